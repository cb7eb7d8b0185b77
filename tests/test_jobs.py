"""`ray job submit` against a head of our own on loopback: a job brings its code, is followed to its end, and fails in
one line."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import hosts
import numpy as np
import pytest

from pgl_ray import config as c
from pgl_ray.data.store import write_index, write_scan
from pgl_ray.train import checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = ["max_steps=4", "views.size=[16,32,32]", "global_batch_size=4", "encoder.width=8", "heads.hidden=16"]


def inside_a_job(monkeypatch, tmp_path) -> None:
    folder = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("model", "args", "name"),
    [
        (c.PretrainConfig, ["index=/s", "run=runs/x"], "run='runs/x'"),
        (c.PretrainConfig, ["index=stores/s", "run=/r"], "index='stores/s'"),
        (c.FinetuneConfig, ["index=/s", "run=/r", "init=runs/pgl"], "init='runs/pgl'"),
        (c.DemoConfig, [], "out='demo'"),
    ],
)
def test_relative_paths_are_refused_inside_a_job(monkeypatch, tmp_path, model, args, name):
    inside_a_job(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="give an absolute path") as error:
        c.load(model, args)
    assert name in str(error.value)
    fine = c.load(c.FinetuneConfig, ["index=s3://bucket/store", "run=/r", "init=random"])
    assert (fine.index, fine.run) == ("s3://bucket/store", "/r")


def test_a_run_in_a_bucket_is_refused():
    with pytest.raises(ValueError, match=r"run='s3://b/r': only a store may lie in a bucket"):
        c.load(c.PretrainConfig, ["index=s3://b/s", "run=s3://b/r"])


@pytest.mark.cluster
def test_a_job_is_followed_to_its_end(tmp_path):
    """The code is the working directory's, not the installed one; a wrong use is one line; both from the outside."""
    code = tmp_path / "code"
    shutil.copytree(ROOT / "pgl_ray", code / "pgl_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", code / "conf")
    (code / "pgl_ray" / "__init__.py").write_text('__version__ = "of the job"\n')
    for name in ("a", "b"):
        volume = np.random.default_rng(0).integers(-900, 300, (24, 64, 64)).astype(np.int16)
        write_scan(tmp_path / "store", name, volume, np.eye(4), split="train")
    write_index(tmp_path / "store", {}, (-1024.0, 325.0))

    env = hosts.environment()
    with hosts.head(env) as url:

        def ray(*args: str) -> tuple[int, str]:
            done = subprocess.run(
                [str(hosts.BIN / "ray"), *args],
                env=env | {"RAY_API_SERVER_ADDRESS": url},
                cwd=code,
                capture_output=True,
                text=True,
                timeout=150,
            )
            return done.returncode, done.stdout + done.stderr

        def submit(name: str, *command: str) -> tuple[int, str]:
            job = ("job", "submit", "--submission-id", name, "--working-dir", ".", "--", "python", "-m")
            return ray(*job, *command)[0], ray("job", "logs", name)[1]

        # nobody without the token gets in
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/api/jobs/")

        index, run = f"index={tmp_path}/store", tmp_path / "run"
        door = ("pgl_ray.pretrain", "conf/pretrain_small.yaml")
        code_of, log = submit("wrong", *door, index, "run=runs/x")
        lines = [line for line in log.splitlines() if line.startswith("pgl_ray.")]
        assert code_of == 1 and len(lines) == 1 and "run='runs/x'" in lines[0] and "Traceback" not in log

        code_of, log = submit("right", *door, index, f"run={run}", *TINY, "train.device=cpu")
        assert code_of == 0 and re.search(rf"^pretrain: done after 4 steps, .*{run}$", log, re.M), log
        assert "Job 'right' succeeded" in ray("job", "status", "right")[1]

    assert checkpoint.committed_step(run) == 4
    assert json.loads((run / "run.json").read_text())["versions"]["pgl_ray"] == "of the job"
