"""Shared fixtures: the real CTs where they lie, and one Ray cluster for the whole session."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
