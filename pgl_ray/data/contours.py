"""Contours of a DICOM structure set (RTSTRUCT) as a label map on a CT's grid.

Own code, because no kept library fits: rt-utils needs OpenCV and rounds the points to pixels, platipy holds pydicom
below 3, dcmrtstruct2nii takes one series in one folder.
"""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from pgl_ray.data import dicom

TOLERANCE = 0.2  # how far a contour may lie from its slice, in slice distances


def fill_contours(
    path: str | Path, values: dict[str, int], affine: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Fills the closed contours of a structure set.

    A voxel belongs to a structure where its centre lies inside an odd number of the structure's contours on its slice,
    so that inner contours and keyholes are holes (DICOM PS3.3, C.8.8.6). Where structures overlap, the larger value
    stands, as tumour in organ.

    Args:
        values: structure name -> label value; other structures are left out. Capitals do not matter.
        affine: [4, 4], voxel index (three axes in any order, 1) -> RAS+ mm.
        shape: of the grid.

    Returns:
        uint16 label map.

    Raises:
        ValueError: contours that do not lie on the grid's slices, or only on every second or later slice.
    """
    try:
        structures = dicom.read(path)
        numbers = {int(roi.ROINumber): str(roi.ROIName).strip() for roi in structures.StructureSetROISequence}
        points = {
            numbers[int(roi.ReferencedROINumber)]: [_points(one) for one in roi.get("ContourSequence") or []]
            for roi in structures.ROIContourSequence
        }
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # see find
        raise ValueError(dicom.unreadable(path, error)) from None
    by_name = {name.casefold(): value for name, value in values.items()}
    chosen = [(by_name[name.casefold()], name) for name in points if name.casefold() in by_name]
    to_index = np.linalg.inv(affine) @ dicom.LPS_TO_RAS
    label = np.zeros(shape, np.uint16)
    for value, name in sorted(chosen):
        contours = [np.c_[one, np.ones(len(one))] @ to_index.T[:, :3] for one in points[name] if one is not None]
        if contours:
            try:
                _fill(label, value, contours)
            except dicom.Refused as error:
                raise ValueError(f"{path}: structure {name!r}: {error}") from None
    return label


def _points(contour) -> np.ndarray | None:
    """Points [N, 3] of a closed contour, LPS mm; none of points and open lines."""
    if contour.get("ContourGeometricType") not in dicom.CLOSED:
        return None
    points = np.array([float(number) for number in contour.ContourData]).reshape(-1, 3)
    return points if len(points) > 2 else None


def _fill(label: np.ndarray, value: int, contours: list[np.ndarray]) -> None:
    """Fills contours [N, 3] in voxel indices into the label map."""
    axis = int(np.argmin([max(np.ptp(points[:, axis]) for points in contours) for axis in range(3)]))
    across = [other for other in range(3) if other != axis]
    slices = defaultdict(list)
    for points in contours:
        place = round(float(points[:, axis].mean()))
        if np.abs(points[:, axis] - place).max() > TOLERANCE:
            raise dicom.Refused(
                f"a contour lies at slice {points[:, axis].mean():.2f}, between its CT's slices: draw it on this CT"
            )
        if not 0 <= place < label.shape[axis]:
            raise dicom.Refused(
                f"a contour lies at slice {place} of {label.shape[axis]}, outside its CT: is it another's?"
            )
        slices[place].append(points[:, across])
    steps = Counter(np.diff(sorted(slices)).tolist())
    if len(slices) > 2 and 1 not in steps:
        raise dicom.Refused(
            f"only one slice in {steps.most_common(1)[0][0]} has contours: interpolate them to all slices first"
        )
    view = np.moveaxis(label, axis, 0)
    for place, polygons in slices.items():
        view[place][_inside(polygons, view.shape[1:])] = value


def _inside(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Cells whose centres lie inside an odd number of the polygons (scan-line filling, even-odd rule).

    Args:
        polygons: [N, 2] each, (row, column) in cell indices, where cell centres are whole numbers.
        shape: rows, columns.
    """
    toggles = np.zeros((shape[0], shape[1] + 1), np.int32)
    rows = np.arange(shape[0])[:, None]
    for polygon in polygons:
        (row_a, col_a), (row_b, col_b) = polygon.T, np.roll(polygon, -1, axis=0).T
        line, edge = np.nonzero((row_a <= rows) != (row_b <= rows))
        share = (line - row_a[edge]) / (row_b[edge] - row_a[edge])
        column = np.ceil(col_a[edge] + share * (col_b[edge] - col_a[edge]))
        np.add.at(toggles, (line, column.clip(0, shape[1]).astype(int)), 1)
    return np.cumsum(toggles, axis=1)[:, :-1] % 2 == 1
