"""Reading a CT and its label map, and writing a label map back into the CT's own geometry.

Stored orientation: the array axes (D, H, W) run towards S, P, L, so imshow of an axial slice looks as radiologists see
it. Axes are permuted and flipped to the closest such order, never resampled; the affine keeps what is oblique or
sheared. World coordinates are RAS+ mm, as in NIfTI. Files are read by nifti and itk; a DICOM series is a folder and the
names of its slices (see dicom).
HU below air, which scanners and converters write outside the field of view (-2000, -3024), become -1024.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

from pgl_ray.files import detached, dicom, dicom_grid, dicom_masks, grids, itk, nifti, plausible
from pgl_ray.files.dicom import AIR
from pgl_ray.files.dicom_values import PADDING
from pgl_ray.files.geometry import shear_notes, shift
from pgl_ray.files.nifti import is_nifti
from pgl_ray.files.raw import Geometry, Raw

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr")
STORED = orientations.axcodes2ornt("LPS")  # of the axes W, H, D
LIKE_AIR = -500  # HU that no tissue but lung has
FINEST_SCALE = 0.02  # factor up to which a file's whole numbers stand for others, scaled
FRACTION = 1e-3  # how far label values may lie from whole numbers; scale factors of float32 make such errors


@dataclass(frozen=True)
class Scan:
    """A CT in the stored orientation.

    Attributes:
        voxels: int16 [D, H, W], HU, -1024 and above.
        affine: float64 [4, 4], stored voxel index (d, h, w, 1) -> RAS+ mm.
        spacing_mm: voxel size (D, H, W).
        orientation: the source's axis codes in its own axis order, e.g. "RAS".
        rounding_error_hu: largest change by rounding to int16; 0 for integer sources.
        num_padding: voxels that were below -1024 HU.
        notes: what is worth saying of it; a sentence each.
        path: of its file or folder; "" of a store's.
    """

    voxels: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    orientation: str
    rounding_error_hu: float
    num_padding: int
    notes: tuple[str, ...] = ()
    path: str = ""


def is_volume(path: Path) -> bool:
    """Whether a file name is one of a supported format; macOS' "._" shadows and hidden files are not."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def bare_name(path: Path) -> str:
    """File name without the format's suffix, if it has one."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def read_scan(path: str | Path, slices: tuple[str, ...] = ()) -> Scan:
    """Reads a CT volume.

    Args:
        path: a file, or a folder of DICOM.
        slices: of a folder, the paths in it of the series' files; none: the one series that lies below it.

    Raises:
        ValueError: missing, not a readable image, not one 3D volume of single numbers, without geometry, or with
            voxels that are not finite or not HU.
    """
    path = Path(path)
    if path.is_dir():
        voxels, rounding_error, geometry = _read_series(path, slices)
    else:
        if detached.is_segmentation(path):
            raise plausible.LabelMap(f"{path}: a segmentation of 3D Slicer, no CT")
        raw = _read(path)
        voxels, rounding_error = _whole_numbers(raw, np.int16, path)
        geometry = raw.geometry
        if rounding_error:
            plausible.check_fractions(path, raw, rounding_error)
        del raw
    num_padding = int(np.count_nonzero(voxels < AIR)) if voxels.min() < AIR else 0
    if num_padding:
        voxels = np.maximum(voxels, np.int16(AIR))
    axes = orientations.io_orientation(geometry.affine)
    stored, stored_affine = _to_stored(voxels, geometry.affine, axes)
    voxels = np.ascontiguousarray(stored)
    doubts = plausible.check_values(path, voxels, of_a_ct=path.is_dir())
    return Scan(
        voxels=voxels,
        affine=stored_affine,
        spacing_mm=tuple(float(size) for size in np.linalg.norm(stored_affine[:3, :3], axis=0)),
        orientation="".join(orientations.ornt2axcodes(axes)),
        rounding_error_hu=rounding_error,
        num_padding=num_padding,
        notes=(*geometry.notes, *shear_notes(geometry.affine), *doubts),
        path=str(path),
    )


def read_label(path: str | Path, like: Scan, slices: tuple[str, ...] = ()) -> np.ndarray:
    """Reads a label map onto its CT's stored grid. A segmentation of 3D Slicer may cover a part of the grid.

    Args:
        path: a file, or a folder of DICOM.
        slices: of a folder, the names of the label map's slices.

    Returns:
        uint8 [D, H, W], or uint16 where a value is above 255.

    Raises:
        ValueError: as read_scan; another grid than the CT's; negative values or fractions.
    """
    path = Path(path)
    if slices:
        voxels, affine = dicom_masks.read(path, slices)
        raw = Raw(voxels, 1.0, 0.0, Geometry(affine))
    else:
        raw = _read(path)
    label, rounding_error = _whole_numbers(raw, np.uint16, path)
    scaled = 0.51 * abs(raw.slope) if abs(raw.slope) < FINEST_SCALE else 0.0  # nibabel's rounding of whole numbers
    if rounding_error > max(FRACTION, scaled):
        raise ValueError(
            f"{path}: label values must be whole numbers, found some that are {rounding_error:.3g} away from one: was "
            "it resampled with interpolation? Take the nearest voxel's value instead"
        )
    label, label_affine = _to_stored(label, raw.geometry.affine, orientations.io_orientation(raw.geometry.affine))
    if label.shape != like.voxels.shape and detached.is_segmentation(path):
        label, label_affine = _pasted(label, label_affine, like)
    reason = grids.difference(label.shape, label_affine, like.voxels.shape, like.affine)
    if reason:
        mend = grids.mend(path, label.shape, label_affine, like.voxels.shape, like.affine, like.path)
        raise ValueError(f"{path}: {reason}: {mend}")
    return smallest(label)


def read_masks(folder: str | Path, masks: dict[str, int], like: Scan) -> np.ndarray:
    """Joins masks of single organs into one label map; where they overlap, the larger value stands.

    Args:
        folder: of the masks, each 0 outside and one other value inside.
        masks: file name -> label value.

    Returns:
        As read_label.

    Raises:
        ValueError: as read_label; a mask with several values.
    """
    label = np.zeros(like.voxels.shape, np.uint16)
    for name, value in sorted(masks.items(), key=lambda item: item[1]):
        mask = read_label(Path(folder, name), like)
        inside = mask > 0
        if inside.any() and mask[inside].min() != mask.max():
            raise ValueError(f"{Path(folder, name)}: values up to {mask.max()}, expected a mask of one organ (0 and 1)")
        label[inside] = value
    return smallest(label)


def smallest(label: np.ndarray) -> np.ndarray:
    """A label map as uint8, or uint16 where a value is above 255."""
    return np.ascontiguousarray(label, dtype=np.uint8 if label.max() <= 255 else np.uint16)


def extent(path: str | Path, slices: tuple[str, ...] = ()) -> tuple[int, float]:
    """Number of voxels of a volume, and the size of one in mm^3, from its header only.

    Raises:
        ValueError: as read_scan.
    """
    path = Path(path)
    if path.is_dir():
        grid = dicom_grid.read_grid(path, slices or dicom.only_series(path))
        shape, affine = grid.shape, grid.affine
    elif is_nifti(path):
        image = nifti.open_image(path)
        shape, affine = image.shape, nifti.geometry(image).affine
    else:
        reader = itk.open_header(path)
        shape, affine = itk.shape_of(reader), itk.geometry(path, reader).affine
    return math.prod(shape), float(abs(np.linalg.det(affine[:3, :3])))


def write_label(path: str | Path, label: np.ndarray, like: str | Path, slices: tuple[str, ...] = ()) -> None:
    """Writes a label map as NIfTI in exactly the grid, affine and axis order of a CT file.

    Args:
        path: .nii or .nii.gz.
        label: uint8 or uint16 [D, H, W], stored orientation.
        like, slices: the CT, as for read_scan; of a NIfTI the header's geometry is copied as it stands.

    Raises:
        ValueError: the shape is not the CT's, or the CT cannot be read.
    """
    path, like = Path(path), Path(like)
    if like.is_dir():
        grid = dicom_grid.read_grid(like, slices or dicom.only_series(like))
        shape, affine = grid.shape, grid.affine
    elif is_nifti(like):
        image = nifti.open_image(like)
        shape, affine = image.shape[:3], nifti.geometry(image).affine
    else:
        reader = itk.open_header(like)
        shape, affine = itk.shape_of(reader), itk.geometry(like, reader).affine
    file_order = orientations.ornt_transform(STORED, orientations.io_orientation(affine))
    turned = orientations.apply_orientation(label.transpose(2, 1, 0), file_order)
    if turned.shape != tuple(shape):
        raise ValueError(f"{path}: label shape {label.shape} (D, H, W) does not fit {like}, shape {tuple(shape)}")
    if is_nifti(like):
        nifti.write_label(path, turned, like)
        return
    written = nib.Nifti1Image(turned, affine)
    written.header.set_xyzt_units("mm")
    nib.save(written, path)


# -- formats ----------------------------------------------------------------------------------------------------------


def _read_series(folder: Path, slices: tuple[str, ...]) -> tuple[np.ndarray, float, Geometry]:
    """int16 HU [i, j, k] of a DICOM series, the largest change by rounding, and where they lie."""
    grid = dicom_grid.read_grid(folder, slices or dicom.only_series(folder))
    voxels, rounding_error = np.empty((0, 0, 0), np.int16), 0.0
    for k, hu in enumerate(dicom_grid.read_slices(folder, grid)):
        if not k:  # a header may state any size: the first slice has it
            voxels = np.empty(grid.shape, np.int16, order="F")
        values = Raw(hu[..., None], 1.0, 0.0, Geometry(grid.affine))
        voxels[..., k : k + 1], error = _whole_numbers(values, np.int16, folder / grid.files[k])
        rounding_error = max(rounding_error, error)
    plausible.check_grid(folder, grid.affine, grid.shape)
    if grid.unspecified and not ((voxels > PADDING) & (voxels < LIKE_AIR)).any():
        raise ValueError(
            f"{grid.name}: pixels are in US (no unit is stated), and none lies below {LIKE_AIR} as air does in HU: "
            "take the original series"
        )
    return voxels, rounding_error, Geometry(grid.affine, notes=grid.notes)


def _read(path: Path) -> Raw:
    """Raises ValueError: no such file, another format, as nifti.read and itk.read, or an impossible grid."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not is_volume(path):
        raise ValueError(f"{path}: not a supported format ({', '.join(SUFFIXES)}): convert it")
    raw = nifti.read(path) if is_nifti(path) else itk.read(path)
    plausible.check_grid(path, raw.geometry.affine, raw.voxels.shape, raw.geometry.unit)
    return raw


# -- geometry and values ----------------------------------------------------------------------------------------------


def _to_stored(array: np.ndarray, affine: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Array [i, j, k], its affine and nibabel's io_orientation of it -> view [D, H, W] along S, P, L and the affine of
    (d, h, w, 1)."""
    transform = orientations.ornt_transform(axes, STORED)
    stored = orientations.apply_orientation(array, transform).transpose(2, 1, 0)
    return stored, (affine @ orientations.inv_ornt_aff(transform, array.shape))[:, [2, 1, 0, 3]]


def _pasted(label: np.ndarray, affine: np.ndarray, like: Scan) -> tuple[np.ndarray, np.ndarray]:
    """A segmentation that was saved only for its segments' extent, on its CT's whole grid; any other as it is."""
    step = np.linalg.inv(like.affine) @ affine
    first = np.rint(step[:3, 3]).astype(int)
    step[:3, 3] -= first
    fits = (first >= 0).all() and (first + label.shape <= like.voxels.shape).all()
    if not fits or shift(step, np.eye(4), label.shape) > grids.TOLERANCE:
        return label, affine
    whole = np.zeros(like.voxels.shape, label.dtype)
    whole[tuple(slice(start, start + size) for start, size in zip(first, label.shape))] = label
    return whole, like.affine


def _whole_numbers(volume: Raw, dtype: type, path: str | Path) -> tuple[np.ndarray, float]:
    """Scaled voxels as integers, and the largest change by rounding.

    Works slice by slice: a whole scaled volume would be float64, four times the int16 it ends as.

    Raises:
        ValueError: NaN or infinity, or values beyond the integer type.
    """
    raw, slope, inter, _ = volume
    if raw.dtype.kind in "biu" and (slope, inter) == (1, 0):
        _check_range(int(raw.min()), int(raw.max()), dtype, path)
        return raw.astype(dtype, copy=False), 0.0
    whole, error, num_bad = np.empty(raw.shape, dtype, order="F"), 0.0, 0
    for k in range(raw.shape[2]):
        values = raw[..., k].astype(np.float64) * slope + inter
        num_bad += int(np.count_nonzero(~np.isfinite(values)))
        if not num_bad:
            rounded = np.rint(values)
            _check_range(rounded.min(), rounded.max(), dtype, path)
            error = max(error, float(np.abs(values - rounded).max()))
            whole[..., k] = rounded
    if num_bad:
        mend = "mend or leave out this file" if dtype is np.int16 else "set them to 0, or to the label that they have"
        raise ValueError(f"{path}: {num_bad} of {raw.size} voxels are NaN or infinite: {mend}")
    return whole, error


def _check_range(low: float, high: float, dtype: type, path: str | Path) -> None:
    bounds = np.iinfo(dtype)
    if low < bounds.min or high > bounds.max:
        if dtype is np.int16:
            what, mend = "HU", "it is in other units, leave it out"
        else:
            what, mend = "label values", "give the background 0 and the organs small numbers"
        raise ValueError(f"{path}: values from {low:g} to {high:g}, {what} lie in {bounds.min}..{bounds.max}: {mend}")
