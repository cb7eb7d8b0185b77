"""prepare under SIGKILL: whenever it is killed, the same command ends with the store of a run that nobody disturbed.

The loop over many random moments takes minutes: PGL_RAY_LONG=1 pytest -s tests/test_resume.py
"""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pgl_ray import prepare
from pgl_ray.config import PrepareConfig
from pgl_ray.convert import parallel

NUM_KILLS = 20  # of the long loop


def one_by_one(work, items, config, sources=()):
    """Instead of Ray."""
    return (work({"task": i, "item": pickle.dumps(item)}) for i, item in enumerate(items))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_kills_of_a_run_without_ray(tmp_path, monkeypatch):
    """The same in a forked child that converts one scan after the other: many kills in little time."""
    rng = random.Random(0)
    for place in range(10):
        volume = np.random.default_rng(place).integers(-1000, 1000, (120, 100, 30)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.diag([-1.5, -1.5, 3, 1])), tmp_path / f"{place:02}.nii.gz")
    monkeypatch.setattr(parallel, "in_parallel", one_by_one)

    def config(store: str) -> PrepareConfig:
        return PrepareConfig(source=str(tmp_path), store=str(tmp_path / "stores" / store))

    def start(store: str) -> multiprocessing.Process:
        child = multiprocessing.get_context("fork").Process(target=prepare.run, args=(config(store),))
        child.start()
        return child

    prepare.run(config("undisturbed"))  # here, so that the children need not import anything
    expected = files_of(tmp_path / "stores/undisturbed")
    assert len(expected) > 3 * 10
    kills, rounds = 0, 0
    while kills < 8:
        rounds += 1
        store = tmp_path / f"stores/{rounds}"
        while True:
            shards = {p: p.stat().st_ino for p in store.glob("scans/*/0/c/0/0/0")}
            child, last = start(store.name), rng.randint(0, 11)
            while child.is_alive() and len(list(store.glob("scans/*"))) < last:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            if child.is_alive():
                child.kill()
                kills += 1
            child.join()
            assert {p: p.stat().st_ino for p in shards} == shards  # what was whole is left alone
            if child.exitcode == 0:
                break
            assert child.exitcode == -signal.SIGKILL
        assert files_of(store) == expected


@pytest.mark.cluster
@pytest.mark.skipif("PGL_RAY_LONG" not in os.environ, reason="20 kills take ten minutes: PGL_RAY_LONG=1")
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(tmp_path, real_data):
    command = [sys.executable, "-m", "pgl_ray.prepare", f"source={real_data}/openkbp"]

    def start(store: Path) -> subprocess.Popen:
        return subprocess.Popen([*command, f"store={store}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    began, first = time.monotonic(), start(tmp_path / "undisturbed")
    assert first.wait() == 0, first.stderr.read()
    latest_s = time.monotonic() - began
    expected, num_scans = files_of(tmp_path / "undisturbed"), len(list((real_data / "openkbp/images").iterdir()))
    rng, kills, rounds, redone = random.Random(0), 0, 0, []
    while kills < NUM_KILLS:
        rounds += 1
        store = tmp_path / f"round_{rounds}"
        while True:
            before = {p.parent.name: p.stat().st_ino for p in store.glob("scans/*/zarr.json")}
            shards = {name: (store / f"scans/{name}/0/c/0/0/0").stat().st_ino for name in before}
            running = start(store)
            try:
                code = running.wait(rng.uniform(0, latest_s) if kills < NUM_KILLS else None)
            except subprocess.TimeoutExpired:
                os.kill(running.pid, signal.SIGKILL)
                running.wait()
                kills += 1
            else:
                assert code == 0, running.stderr.read()
            # what was whole before was left alone
            redone += [n for n, inode in shards.items() if (store / f"scans/{n}/0/c/0/0/0").stat().st_ino != inode]
            print(f"kill {kills}, round {rounds}: {len(before)} of {num_scans} scans at its start", flush=True)
            if running.returncode == 0:
                break
            time.sleep(rng.choice([0, 0, 1, 5]))  # the dead run's workers may still be there
        assert files_of(store) == expected
    assert not redone
