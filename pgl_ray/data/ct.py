"""Reading a CT and its label map, and writing a label map back into the CT's own geometry.

Stored orientation: the array axes (D, H, W) run towards S, P, L, so imshow of an axial slice looks as radiologists see
it. Axes are permuted and flipped to the closest such order, never resampled; the affine keeps what is oblique or
sheared. World coordinates are RAS+ mm, as in NIfTI. NIfTI goes through nibabel, because ITK refuses slightly sheared
sforms; NRRD and MHA/MHD go through SimpleITK; a DICOM series is a folder and the names of its slices (see dicom).
HU below air, which scanners and converters write outside the field of view (-2000, -3024), become -1024.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel import orientations
from nibabel.imageglobals import logger as nibabel_logger

from pgl_ray.data import dicom, dicom_grid, dicom_masks, itk
from pgl_ray.data.dicom import AIR
from pgl_ray.data.dicom_values import PADDING
from pgl_ray.data.geometry import shear_notes

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
STORED = orientations.axcodes2ornt("LPS")  # of the axes W, H, D
LIKE_AIR = -500  # HU that no tissue but lung has
GRID_TOLERANCE = 0.1  # how far a label's corner may lie from its CT's, in voxels


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
    """

    voxels: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    orientation: str
    rounding_error_hu: float
    num_padding: int
    notes: tuple[str, ...] = ()


def is_volume(path: Path) -> bool:
    """Whether a file name is one of a supported format; macOS' "._" shadows and hidden files are not."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def bare_name(path: Path) -> str:
    """File name without the format's suffix."""
    suffix = next(s for s in SUFFIXES if path.name.lower().endswith(s))
    return path.name[: -len(suffix)]


def read_scan(path: str | Path, slices: tuple[str, ...] = ()) -> Scan:
    """Reads a CT volume.

    Args:
        path: a file, or a folder of DICOM.
        slices: of a folder, the paths in it of the series' files; none: the one series that lies below it.

    Raises:
        ValueError: missing, not a readable image, not one 3D volume of single numbers, without geometry, or with
            voxels that are not finite or not HU.
    """
    path, notes = Path(path), ()
    if path.is_dir():
        voxels, rounding_error, affine, notes = _read_series(path, slices)
    else:
        raw, slope, inter, affine = _read(path)
        voxels, rounding_error = _whole_numbers(raw, slope, inter, np.int16, path)
        del raw
    num_padding = int(np.count_nonzero(voxels < AIR)) if voxels.min() < AIR else 0
    if num_padding:
        voxels = np.maximum(voxels, np.int16(AIR))
    stored, stored_affine = _to_stored(voxels, affine)
    return Scan(
        voxels=np.ascontiguousarray(stored),
        affine=stored_affine,
        spacing_mm=tuple(float(size) for size in np.linalg.norm(stored_affine[:3, :3], axis=0)),
        orientation="".join(nib.aff2axcodes(affine)),
        rounding_error_hu=rounding_error,
        num_padding=num_padding,
        notes=(*notes, *shear_notes(affine)),
    )


def read_label(path: str | Path, like: Scan, slices: tuple[str, ...] = ()) -> np.ndarray:
    """Reads a label map onto its CT's stored grid.

    Args:
        path: a file, or a folder of DICOM.
        slices: of a folder, the names of the label map's slices.

    Returns:
        uint8 [D, H, W], or uint16 where a value is above 255.

    Raises:
        ValueError: as read_scan; another grid than the CT's; negative values or fractions.
    """
    if slices:
        (raw, affine), slope, inter = dicom_masks.read(Path(path), slices), 1.0, 0.0
    else:
        raw, slope, inter, affine = _read(Path(path))
    label, rounding_error = _whole_numbers(raw, slope, inter, np.uint16, path)
    if rounding_error:
        raise ValueError(f"{path}: label values must be whole numbers, found fractions: is it a label map?")
    label, label_affine = _to_stored(label, affine)
    if label.shape != like.voxels.shape:
        raise ValueError(
            f"{path}: label shape {label.shape} differs from its CT's {like.voxels.shape} (D, H, W): resample it onto "
            "the CT's grid"
        )
    if _largest_shift(label_affine, like.affine, label.shape) > GRID_TOLERANCE * min(like.spacing_mm):
        raise ValueError(
            f"{path}: label affine {_text(label_affine)} differs from its CT's {_text(like.affine)}: resample it onto "
            "the CT's grid"
        )
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


def num_voxels(path: str | Path, slices: tuple[str, ...] = ()) -> int:
    """Size of a volume by its header alone.

    Raises:
        ValueError: as read_scan.
    """
    path = Path(path)
    if path.is_dir():
        return math.prod(dicom_grid.read_grid(path, slices or dicom.only_series(path)).shape)
    return math.prod(_open_nifti(path).shape if _is_nifti(path) else itk.open_header(path).GetSize())


def write_label(path: str | Path, label: np.ndarray, like: str | Path, slices: tuple[str, ...] = ()) -> None:
    """Writes a label map as NIfTI in exactly the grid, affine and axis order of a CT file.

    Args:
        path: .nii or .nii.gz.
        label: uint8 or uint16 [D, H, W], stored orientation.
        like, slices: the CT, as for read_scan; of a NIfTI the header's geometry is copied as it stands.

    Raises:
        ValueError: the shape is not the CT's, or the CT cannot be read.
    """
    header, image_class = None, nib.Nifti1Image
    if Path(like).is_dir():
        grid = dicom_grid.read_grid(like, slices or dicom.only_series(like))
        shape, affine = grid.shape, grid.affine
    elif _is_nifti(Path(like)):
        image = _open_nifti(Path(like))
        shape, affine, header, image_class = image.shape[:3], image.affine, image.header.copy(), type(image)
        header.set_data_dtype(label.dtype)
        header["cal_min"] = header["cal_max"] = 0  # the CT's display range
        header.extensions.clear()  # may hold the patient's DICOM header
    else:
        reader = itk.open_header(Path(like))
        shape, affine = reader.GetSize(), itk.affine_of(reader)
    own_order = orientations.ornt_transform(STORED, _checked_orientation(affine, like))
    own = orientations.apply_orientation(label.transpose(2, 1, 0), own_order)
    if own.shape != tuple(shape):
        raise ValueError(f"{path}: label shape {label.shape} (D, H, W) does not fit {like}, shape {tuple(shape)}")
    nib.save(image_class(own, affine, header), path)


# -- formats ----------------------------------------------------------------------------------------------------------


def _read_series(folder: Path, slices: tuple[str, ...]) -> tuple[np.ndarray, float, np.ndarray, tuple[str, ...]]:
    """int16 HU [i, j, k] of a DICOM series, the largest change by rounding, affine (i, j, k, 1) -> RAS+ mm, notes."""
    grid = dicom_grid.read_grid(folder, slices or dicom.only_series(folder))
    voxels, rounding_error = np.empty((0, 0, 0), np.int16), 0.0
    for k, hu in enumerate(dicom_grid.read_slices(folder, grid)):
        if not k:  # a header may state any size: the first slice has it
            voxels = np.empty(grid.shape, np.int16, order="F")
        voxels[..., k : k + 1], error = _whole_numbers(hu[..., None], 1, 0, np.int16, folder / grid.files[k])
        rounding_error = max(rounding_error, error)
    if grid.unspecified and not ((voxels > PADDING) & (voxels < LIKE_AIR)).any():
        raise ValueError(
            f"{grid.name}: pixels are in US (no unit is stated), and none lies below {LIKE_AIR} as air does in HU: "
            "take the original series"
        )
    return voxels, rounding_error, grid.affine, grid.notes


def _read(path: Path) -> tuple[np.ndarray, float, float, np.ndarray]:
    """Raw voxels [i, j, k] in the file's axis order, slope, intercept, and affine (i, j, k, 1) -> RAS+ mm."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not is_volume(path):
        raise ValueError(f"{path}: not a supported format ({', '.join(SUFFIXES)}): convert it")
    if _is_nifti(path):
        raw, slope, inter, affine = _read_nifti(path)
    else:
        (raw, affine), slope, inter = itk.read(path), 1.0, 0.0
    _checked_orientation(affine, path)
    return raw, slope, inter, affine


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """nibabel logs what it then raises, and what it mends in a header."""
    level = nibabel_logger.level
    nibabel_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        nibabel_logger.setLevel(level)


def _open_nifti(path: Path):
    try:
        with _quiet_nibabel():
            image = nib.load(path)
    except Exception as error:  # nibabel has no common base for what a damaged header can cause
        raise itk.unreadable(path, error) from None
    if not isinstance(image, nib.Nifti1Pair):
        raise itk.unreadable(path, f"{type(image).__name__}, not NIfTI")
    if image.get_data_dtype().kind not in "biuf":
        raise ValueError(f"{path}: voxels are of type {image.get_data_dtype()}, expected single numbers (a CT in HU)")
    if len(image.shape) < 3 or min(image.shape) < 1 or any(size != 1 for size in image.shape[3:]):
        raise ValueError(f"{path}: shape {image.shape}, expected one 3D volume: split or select it first")
    if image.dataobj.offset < image.header.single_vox_offset:
        raise itk.unreadable(path, f"its voxels begin at byte {image.dataobj.offset}, inside its header")
    held = path.stat().st_size * (itk.DEFLATE_RATIO if path.name.lower().endswith(".gz") else 1)
    itk.check_fits(path, image.shape, image.get_data_dtype().itemsize, held)
    return image


def _read_nifti(path: Path) -> tuple[np.ndarray, float, float, np.ndarray]:
    image = _open_nifti(path)
    try:
        if path.name.lower().endswith(".gz"):
            with igzip.open(path) as stream, _quiet_nibabel():
                image = type(image).from_stream(stream)
                raw, surplus = image.dataobj.get_unscaled(), 0
                while part := stream.read(
                    2**20
                ):  # to the end, where gzip compares its checksum; nibabel stops before it
                    surplus += len(part)
        else:
            raw = image.dataobj.get_unscaled()
            surplus = path.stat().st_size - image.dataobj.offset - raw.nbytes
    except MemoryError:
        raise itk.too_large(path, image.shape) from None
    except Exception as error:  # EOFError, zlib.error, OSError, ValueError, ...
        raise itk.unreadable(path, error) from None
    itk.check_surplus(path, raw.shape, surplus, raw.itemsize)
    return raw.reshape(raw.shape[:3], order="F"), image.dataobj.slope, image.dataobj.inter, image.affine


# -- geometry and values ----------------------------------------------------------------------------------------------


def _checked_orientation(affine: np.ndarray, path: str | Path) -> np.ndarray:
    """nibabel's orientation of the file's axes; refuses an affine that has none."""
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: affine {_text(affine)} is singular: spacing or orientation is missing in the header")
    return orientations.io_orientation(affine)


def _to_stored(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Array [i, j, k] and its affine -> view [D, H, W] along S, P, L and the affine of (d, h, w, 1)."""
    transform = orientations.ornt_transform(orientations.io_orientation(affine), STORED)
    stored = orientations.apply_orientation(array, transform).transpose(2, 1, 0)
    return stored, (affine @ orientations.inv_ornt_aff(transform, array.shape))[:, [2, 1, 0, 3]]


def _largest_shift(affine_1: np.ndarray, affine_2: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart two affines put a corner voxel of the grid, in mm."""
    corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in shape))])
    return float(np.linalg.norm(corners @ (affine_1 - affine_2).T, axis=1).max())


def _whole_numbers(raw: np.ndarray, slope: float, inter: float, dtype: type, path) -> tuple[np.ndarray, float]:
    """Scaled voxels as integers, and the largest change by rounding.

    Works slice by slice: a whole scaled volume would be float64, four times the int16 it ends as.

    Raises:
        ValueError: NaN or infinity, or values beyond the integer type.
    """
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
        raise ValueError(f"{path}: {num_bad} of {raw.size} voxels are NaN or infinite: mend or leave out this file")
    return whole, error


def _check_range(low: float, high: float, dtype: type, path: str | Path) -> None:
    bounds = np.iinfo(dtype)
    if low < bounds.min or high > bounds.max:
        what = "HU" if dtype is np.int16 else "label values"
        raise ValueError(
            f"{path}: values from {low:g} to {high:g}, {what} lie in {bounds.min}..{bounds.max}: is it in other units?"
        )


def _text(affine: np.ndarray) -> str:
    return str(np.round(affine[:3], 3).tolist())
