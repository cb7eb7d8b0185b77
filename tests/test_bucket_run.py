"""Runs in a bucket: what is there counts, whatever happens to the machines that work on it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import train_loop as loop

from pgl_ray import finetune
from pgl_ray import config as c
from pgl_ray.config import FailedRun
from pgl_ray.data.place import Bucket
from pgl_ray.train import bucket, checkpoint, launch

ROOT = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return loop.scans(tmp_path_factory.mktemp("scans") / "store")


@pytest.fixture
def run(s3, tmp_path, monkeypatch) -> str:
    """URL of a run, and a machine without any copy of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine_1"))
    return f"{s3}/{tmp_path.name}/run"


def lose_the_machine() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])


def keys(run: str, start: str = "checkpoint_") -> list[str]:
    return sorted(key for key in Bucket(run).versions() if key.startswith(start))


def check_the_same(one: dict, other: dict) -> None:
    for state in (one, other):
        state["meta"].pop("config")  # names the run
    assert loop.equal(one, other)


def state_in(run: str) -> dict:
    """State of the newest checkpoint that lies in the bucket, read without the code under test."""
    place, name = Bucket(run), max(key.split("/")[0] for key in keys(run) if key.endswith(".json"))
    path = Path(os.environ["XDG_CACHE_HOME"], "state_in.pt")
    path.write_bytes(place.read(f"{name}/state.pt"))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("make", [loop.pretraining, loop.finetuning], ids=["pretrain", "finetune"])
def test_a_run_whose_machine_is_lost_is_bit_for_bit_the_undisturbed_one(scans, run, tmp_path, make):
    whole, killed = (make(scans, place) for place in (tmp_path / "whole", run))
    loop.train(whole)
    with pytest.raises(loop.Killed):
        loop.train(killed, until=3)
    lose_the_machine()
    assert checkpoint.committed_step(run) == 2
    loop.train(killed)
    check_the_same(loop.state_of(whole.run), state_in(run))
    assert loop.rows_of(whole.run) == loop.rows_of(run)
    kept = [f"checkpoint_0000000{step}/{name}" for step in (4, 6) for name in ("checkpoint.json", "state.pt")]
    assert keys(run) == kept and {"run.json", "config.yaml", "metrics.jsonl"} <= set(keys(run, ""))
    assert keys(run, "events.out.tfevents") and not keys(run, ".")
    if make is loop.finetuning:
        best = [checkpoint.state_of(place) for place in (whole.run, run)]
        assert best[0]["val_dice"] == best[1]["val_dice"] and loop.equal(best[0]["model"], best[1]["model"])
        assert finetune.run(killed).val_dice == best[0]["val_dice"]  # finished: at once
