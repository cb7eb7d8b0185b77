"""Segments of a DICOM segmentation object (SEG) on a CT's grid.

Every frame is put where its own position says, onto the CT's voxels; nothing is resampled. Only binary segmentations
are labels: fractional ones hold probabilities or shares of a voxel.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from pgl_ray.files import dicom_pixels
from pgl_ray.files.contours import TOLERANCE, Placed, gaps
from pgl_ray.files.dicom_values import Refused, Tagged
from pgl_ray.files.structure_header import segment_names, whole

if TYPE_CHECKING:  # comes with pgl_ray[dicom]
    from pydicom import Dataset


class Segment:
    """A segment: its name, how messages call it, and its frames with their places."""

    def __init__(self, name: str, number: int | None, frames: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.name, self.title, self._frames = name, f"segment {name!r} (number {number})", frames

    def place(self, to_index: np.ndarray, shape: tuple[int, int, int]) -> Placed:
        """Puts the frames on a grid.

        Args:
            to_index: [4, 4], LPS mm -> voxel index of the grid (three axes in any order).
            shape: of the grid.
        """
        placed, outside, filled, slices = Placed(), 0, np.zeros((0, 3), np.int64), set()
        for mask, to_mm in self._frames:
            if not mask.any():
                continue
            to_voxel = to_index @ to_mm  # (column, row, 1) -> voxel index
            steps = to_voxel[:3, :2]
            corners = np.array([(c, r, 1) for c in (0, mask.shape[1] - 1) for r in (0, mask.shape[0] - 1)]).T
            places = (to_voxel @ corners)[:3]
            drift = np.abs(steps - np.rint(steps)) * (mask.shape[1] - 1, mask.shape[0] - 1)
            unit = np.abs(np.rint(steps)).sum(0).tolist() == [1, 1] and drift.max() <= TOLERANCE
            if not unit or np.abs(places - np.rint(places)).max() > TOLERANCE:
                placed.refused = "its voxels are not the CT's, it has another grid: resample it onto the CT's first"
                return placed
            rows, columns = np.nonzero(mask)
            voxels = np.rint(to_voxel @ np.stack([columns, rows, np.ones_like(rows)]))[:3].astype(np.int64).T
            inside = ((voxels >= 0) & (voxels < shape)).all(1)
            outside += int((~inside).sum())
            filled = np.r_[filled, voxels[inside]]
            across = ~np.rint(steps).any(1)  # of the axes, that of which the frame is a slice
            slices |= set(voxels[inside][:, across].ravel().tolist())
        if not self._frames or not (len(filled) or outside):
            placed.notes.append("is empty")
        elif not len(filled):
            placed.refused = "it lies outside its CT: is it another's?"
        elif reason := gaps(slices, "frames"):
            placed.refused = reason
        else:
            if outside:
                placed.notes.append(f"{outside} voxels lie outside the CT and are not used")
            for place in np.unique(filled[:, 0]):
                in_slice, mask = filled[filled[:, 0] == place], np.zeros(shape[1:], bool)
                mask[in_slice[:, 1], in_slice[:, 2]] = True
                placed.pieces.append((0, int(place), mask))
        return placed


def segments(dataset: "Dataset") -> list[Segment]:
    """The segments of a segmentation object, by number.

    Args:
        dataset: pydicom's, with its pixels.

    Raises:
        Refused: it is not binary, or its frames have no place.
        ValueError: it has fewer pixels than it says.
    """
    kind = str(dataset.get("SegmentationType") or "of no type")
    if kind != "BINARY":
        raise Refused(f"a segmentation that is {kind}, expected BINARY: threshold it first")
    names, frames = segment_names(dataset), defaultdict(list)
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    masks = _masks(dataset, len(groups))
    for mask, group in zip(masks, groups):
        number = _item(group, shared, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
        frames[whole(number)].append((mask, _to_mm(group, shared)))
    if unknown := set(frames) - set(names):
        raise Refused(f"frames of segment {sorted(map(str, unknown))[0]}, which it does not name")
    return [Segment(name, number, frames[number]) for number, name in names.items()]


def _masks(dataset: "Dataset", count: int) -> np.ndarray:
    """bool [frame, row, column]."""
    size = int(dataset.Rows) * int(dataset.Columns)
    if int(dataset.get("NumberOfFrames") or 1) != count:
        raise Refused(f"{dataset.get('NumberOfFrames')} frames, {count} of them with a place")
    syntax = dicom_pixels.syntax_of(dataset)
    if syntax not in dicom_pixels.UNCOMPRESSED:
        raise Refused(f"a segmentation in transfer syntax {getattr(syntax, 'name', syntax)}: rewrite it uncompressed")
    content = np.frombuffer(dataset.PixelData, np.uint8)
    if int(dataset.BitsAllocated) == 1:
        content = np.unpackbits(content, bitorder="little")  # frames follow one another without filling (PS3.5, 8.1.1)
    if len(content) < size * count:
        raise ValueError(f"{len(content)} pixels, {size * count} expected")
    return content[: size * count].reshape(count, int(dataset.Rows), int(dataset.Columns)) > 0


def _item(group: Tagged, shared: Tagged, sequence: str, tag: str) -> Any:
    """The value of the first of the two that has it."""
    for one in (group, shared):
        for item in one.get(sequence) or []:
            if item.get(tag) is not None:
                return item.get(tag)
    raise Refused(f"a frame without {tag}: its place is unknown")


def _to_mm(group: Tagged, shared: Tagged) -> np.ndarray:
    """[4, 3]: (column, row, 1) -> (LPS mm, 1) of a frame."""
    spacing = np.array(_item(group, shared, "PixelMeasuresSequence", "PixelSpacing"), float)
    directions = np.array(_item(group, shared, "PlaneOrientationSequence", "ImageOrientationPatient"), float).reshape(
        2, 3
    )
    position = np.array(_item(group, shared, "PlanePositionSequence", "ImagePositionPatient"), float)
    matrix = np.zeros((4, 3))
    matrix[:3] = np.c_[directions[0] * spacing[1], directions[1] * spacing[0], position]
    matrix[3, 2] = 1
    return matrix
