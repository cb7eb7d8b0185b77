"""prepare under SIGKILL: whenever it is killed, the same command ends with the store of a run that nobody disturbed.

The loop over many random moments takes minutes: PGL_RAY_LONG=1 pytest -s tests/test_resume.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

NUM_KILLS = 20


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
