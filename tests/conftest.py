"""Shared fixtures: the real CTs where they lie, and one Ray cluster for the whole session."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads spin where the cores are busy, for minutes
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers fill the cores already

import pickle
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# The same examples in every run of the normal tests; PGL_RAY_LONG=1 draws new ones.
settings.register_profile("fixed", derandomize=True)
if not os.environ.get("PGL_RAY_LONG"):
    settings.load_profile("fixed")

# A shell has its background jobs ignore SIGINT; tests that interrupt a run need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not os.environ.get("PGL_RAY_SOAK"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="takes minutes to hours: PGL_RAY_SOAK=minutes"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT volumes; skips where it is not there."""
    folder = Path(os.environ.get("PGL_RAY_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "openkbp").is_dir():
        pytest.skip(f"no real CT volumes at {folder} (PGL_RAY_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster with 4 logical CPUs for all `cluster` tests."""
    import warnings

    from pgl_ray.config import RayConfig
    from pgl_ray.train.launch import connect

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        connect(RayConfig(num_cpus=4, object_store_mb=500))
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """URL of an empty bucket of moto's S3 on loopback; the environment names it, for obstore and all its children."""
    pytest.importorskip("moto", reason="no moto: pip install 'pgl_ray[test]'")
    pytest.importorskip("obstore", reason="no obstore: pip install 'pgl_ray[cloud]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/stores", method="PUT")).close()
                break
            except OSError:
                time.sleep(0.1)
        names = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in names.items():
                patch.setenv(name, value)
            yield "s3://stores"
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.fixture
def serial(monkeypatch):
    """prepare converts in this process, without Ray, in the given or the reverse order."""
    from pgl_ray.convert import parallel

    backwards = []

    def in_parallel(work, items, config, peak=None):
        for i in sorted(range(len(items)), reverse=bool(backwards)):
            yield work({"task": i, "item": pickle.dumps(items[i])})

    monkeypatch.setattr(parallel, "in_parallel", in_parallel)
    return backwards
