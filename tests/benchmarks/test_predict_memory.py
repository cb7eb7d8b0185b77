"""Memory of `predict` on a long scan, page and pictures included, within 8 GiB of address space: `make bench`."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train.checkpoint import write_state

pytestmark = pytest.mark.skipif("PGL_RAY_BENCH" not in os.environ, reason="takes minutes: make bench")

SHAPE, NUM_CLASSES, LIMIT_GIB = (512, 512, 600), 14, 8  # i, j, k

PREDICT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)), -1))
from pgl_ray import cli
cli.main("predict")
"""


def test_a_long_scan_fits_into_8_gib(tmp_path):
    rng = np.random.default_rng(0)
    slices = rng.integers(-1000, 1000, (8, 8, 60), np.int16).repeat(64, 0).repeat(64, 1).repeat(10, 2)
    nib.save(nib.Nifti1Image(slices + rng.integers(-50, 50, SHAPE, np.int16), np.eye(4)), tmp_path / "ct.nii.gz")
    settings = {"kind": "resnet", "depths": [1, 1, 1, 1], "width": 4, "stage_strides": "early"}
    model = Segmenter(Encoder(**{key: settings[key] for key in ("depths", "width", "stage_strides")}), NUM_CLASSES)
    meta = {"door": "finetune", "hu_window": [-1024.0, 325.0], "task": "multiclass", "num_outputs": NUM_CLASSES}
    meta |= {"labels": {f"organ_{k}": k for k in range(1, NUM_CLASSES)}, "patch_size": [64, 192, 192]}
    write_state(tmp_path / "best.pt", {"model": model.state_dict(), "meta": meta | {"encoder": settings}})
    door = [f"run={tmp_path}/best.pt", f"input={tmp_path}/ct.nii.gz", f"output={tmp_path}/label.nii.gz"]
    command = [sys.executable, "-c", PREDICT, str(LIMIT_GIB * 2**30), *door, "inference.overlap=0.25"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{SHAPE} voxels, {NUM_CLASSES} classes, a small network: {peak:.1f} GiB at most")
    assert nib.load(tmp_path / "label.nii.gz").shape == SHAPE and peak < LIMIT_GIB
    assert all((tmp_path / f"label.{end}").stat().st_size > 1000 for end in ("html", "png"))
