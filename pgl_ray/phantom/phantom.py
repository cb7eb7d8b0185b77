"""Anatomy-like CT phantoms with organ labels, from a seed: what the demo and the tests learn from without real data.

A phantom is painted, not simulated: an upper abdomen between lungs and pelvis (`anatomy`), in smoothly deformed
coordinates (`canvas`), then blurred and made noisy as a scanner does.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from pgl_ray.data.durable import write_aside
from pgl_ray.phantom.anatomy import AIR, ORGANS, Body, draw_body, paint_body, paint_table
from pgl_ray.phantom.canvas import Canvas, Pose, Size, Spacing

NOISE_BLUR, NOISE_STD = (0.3, 0.6, 0.6), 0.4917  # sigma of the blur in voxels, and what it leaves of white noise


@dataclass(frozen=True)
class Phantom:
    """One phantom.

    Attributes:
        volume: int16 HU (D, H, W); D runs to the head, H to the back, W to the left.
        label: uint8 (D, H, W), values of `ORGANS`, 0 elsewhere.
        spacing_mm: (D, H, W).
    """

    volume: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]


def make_phantom(seed: int, shape: Size = (48, 112, 112), spacing_mm: Spacing = (5.0, 3.0, 3.0)) -> Phantom:
    """Draws a torso; the same arguments give the same phantom.

    Args:
        seed: not negative.
        shape: voxels (D, H, W); a grid smaller than the body cuts it off, 240 x 336 x 336 mm holds every organ.
        spacing_mm: (D, H, W).
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: expected a seed of at least 0")
    rng = np.random.default_rng((seed, 1))
    pose = Pose(
        scale=rng.uniform((0.86, 0.95, 0.82), (1.14, 1.18, 1.02)),
        shift_mm=rng.uniform((-30, -26, -20), (30, -4, 20)),  # forward: the table needs room behind the body
        roll=rng.uniform(-9, 9),
        pitch=rng.uniform(-5, 5),
    )
    canvas = Canvas(rng, shape, spacing_mm, AIR, pose)
    body = draw_body(canvas)
    paint_table(canvas, body, back_mm=95 * pose.scale[1] + pose.shift_mm[1])
    paint_body(canvas, body)
    return Phantom(_scan(canvas, body), canvas.label, tuple(map(float, spacing_mm)))


def _scan(c: Canvas, b: Body) -> np.ndarray:
    """Partial volume, then mildly correlated noise that is stronger inside the body; int16 HU."""
    sharp = ndimage.gaussian_filter(c.hu, (0.35, 0.5, 0.5))
    noise = ndimage.gaussian_filter(c.rng.standard_normal(c.hu.shape, dtype=np.float32), NOISE_BLUR)
    sigma = c.rng.uniform(10, 30) * np.where(b.depth > -10, 1.0, 0.5)
    return np.clip(np.rint(sharp + sigma * noise / NOISE_STD), -1024, 3071).astype(np.int16)


def write_phantoms(
    folder: str | Path,
    num_unlabelled: int,
    num_labelled: int,
    num_test: int,
    seed: int,
    shape: Size = (48, 112, 112),
    spacing_mm: Spacing = (5.0, 3.0, 3.0),
) -> None:
    """Writes an nnU-Net raw folder: imagesTr, labelsTr, imagesTs, labelsTs (.nii.gz) and dataset.json.

    The unlabelled phantoms come first in imagesTr and have no file in labelsTr. A phantom depends only on the seed, its
    number, shape and spacing; a file that already holds the same bytes is left as it is.
    """
    folder = Path(folder)
    num_train = num_unlabelled + num_labelled
    for number in range(num_train + num_test):
        own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        phantom = make_phantom(own_seed, shape, spacing_mm)
        part = "Tr" if number < num_train else "Ts"
        _write(folder / f"images{part}" / f"phantom_{number:03d}_0000.nii.gz", _nifti(phantom.volume, spacing_mm))
        if number >= num_unlabelled:
            _write(folder / f"labels{part}" / f"phantom_{number:03d}.nii.gz", _nifti(phantom.label, spacing_mm))
    dataset = {
        "name": "phantoms",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **ORGANS},
        "numTraining": num_train,
        "file_ending": ".nii.gz",
    }
    _write(folder / "dataset.json", json.dumps(dataset, indent=1).encode())


def _nifti(array: np.ndarray, spacing_mm: Spacing) -> bytes:
    """A gzipped NIfTI of a (D, H, W) array whose axes run to the head, the back and the left."""
    d, h, w = spacing_mm
    affine = np.diag([-w, -h, d, 1.0])  # RAS+: left and back are negative
    affine[:3, 3] = -affine[:3, :3] @ (np.array(array.shape[::-1]) - 1) / 2
    image = nibabel.Nifti1Image(np.asfortranarray(array.transpose(2, 1, 0)), affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=3, mtime=0)


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole, or leaves it as it is where it already holds the content."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, content)
