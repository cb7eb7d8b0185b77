"""Label maps that are DICOM images: a series of slices whose pixels are label values, as some data sets have them in
labels/. Its modality may be anything, for exporters write CT, OT or SEG."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgl_ray.files import dicom, dicom_grid, structure_header
from pgl_ray.files.walk import Tree


class MaskSeries(NamedTuple):
    """A series of label slices: the folder that they lie in, and their names there."""

    folder: Path
    slices: tuple[str, ...]


def find(folder: Path, tree: Tree) -> tuple[dict[tuple[str, ...], MaskSeries], list[tuple[str, str]]]:
    """The DICOM label maps below a folder of labels.

    Args:
        tree: what lies there.

    Returns:
        Path of their folder in `folder` -> label map; and (folder, reason) of those that cannot be one.
    """
    masks, faults, by_folder = {}, [], defaultdict(lambda: defaultdict(list))
    for path, header in _images(tree.below(folder)):
        by_folder[path.parent][str(header.get("SeriesInstanceUID", ""))].append(path.name)
    for below, series in sorted(by_folder.items()):
        if len(series) > 1:
            reason = f"{len(series)} DICOM series in one folder of labels: keep one label map per folder"
            faults.append((str(below), reason))
            continue
        (names,) = series.values()
        masks[below.relative_to(folder).parts] = MaskSeries(below, tuple(sorted(names)))
    return masks, faults


def _images(paths: list[str]) -> Iterator[tuple[Path, object]]:
    """The DICOM images of some files with their headers; what is damaged is named by dicom.find."""
    for path in map(Path, paths):
        if not dicom.is_dicom(path):
            continue
        try:
            header = dicom.read(
                path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SeriesInstanceUID", "Rows"]
            )
        except Exception:  # see dicom.find
            continue
        if header.get("Rows") and str(header.get("SOPClassUID", "")) not in structure_header.KINDS:
            yield path, header


def read(folder: Path, slices: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Label values [i, j, k] as they are stored, and affine (i, j, k, 1) -> RAS+ mm.

    Some exporters give a mask its CT's intercept; background, which is 0, tells whether it counts.

    Raises:
        ValueError: not an even stack, or neither way has background.
    """
    grid = dicom_grid.read_grid(folder, slices, as_hu=False)
    values = np.stack(list(dicom_grid.read_slices(folder, grid, as_hu=False)), axis=-1).astype(np.int64)
    if values.min() != 0:
        header = dicom.read(os.path.join(folder, grid.files[0]), stop_before_pixels=True)
        values = values + int(float(header.get("RescaleIntercept") or 0))
    if values.min() != 0:
        raise ValueError(f"{grid.name}: lowest value {values.min()}, a label map has background 0: is it a label map?")
    return values, grid.affine
