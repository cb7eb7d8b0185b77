"""NIfTI through nibabel (ITK refuses slightly sheared sforms), and what nibabel leaves out: the unit of length, forms
that contradict each other, damage behind the last voxel.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy
from nibabel.imageglobals import logger as nibabel_logger

from pgl_ray.files import itk
from pgl_ray.files.geometry import shift
from pgl_ray.files.raw import Geometry, Raw

UNITS = {0: ("mm", 1.0), 1: ("m", 1e3), 2: ("mm", 1.0), 3: ("um", 1e-3)}  # code -> unit of length, mm
SPATIAL = 7  # bits of xyzt_units; the others are the unit of time
SAME_SIZE = 0.02  # share by which two statements of a voxel's size may differ unsaid
ELSEWHERE = 0.5  # voxels by which two forms may differ at a corner unsaid
PART = 2**20  # bytes
OF_THE_CT = ("descrip", "aux_file", "db_name", "data_type", "intent_name")  # texts that may name a patient


def is_nifti(path: Path) -> bool:
    """Whether a file name says NIfTI."""
    return path.name.lower().endswith((".nii", ".nii.gz", ".hdr"))


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """nibabel logs what it then raises, and what it mends in a header."""
    level = nibabel_logger.level
    nibabel_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        nibabel_logger.setLevel(level)


def open_image(path: Path) -> nib.Nifti1Pair:
    """An image whose voxels are not read yet.

    Raises:
        ValueError: not NIfTI, not one 3D volume of single numbers, or a shape that the file cannot hold.
    """
    try:
        with _quiet_nibabel():
            image = nib.load(path)
    except Exception as error:  # nibabel has no common base for what a damaged header can cause
        raise itk.unreadable(path, error) from None
    if not isinstance(image, nib.Nifti1Pair):
        raise itk.unreadable(path, f"{type(image).__name__}, not NIfTI")
    dtype = image.get_data_dtype()
    if dtype.kind not in "biuf":
        kind = "colours (RGB)" if dtype.fields else "complex numbers" if dtype.kind == "c" else str(dtype)
        raise ValueError(f"{path}: its voxels are {kind}, expected single numbers: no CT in HU, leave it out")
    if len(image.shape) < 3 or min(image.shape) < 1 or any(size != 1 for size in image.shape[3:]):
        raise ValueError(f"{path}: shape {image.shape}, expected one 3D volume: split or select it first")
    if isinstance(image, nib.Nifti1Image) and image.dataobj.offset < image.header.single_vox_offset:
        raise itk.unreadable(path, f"its voxels begin at byte {image.dataobj.offset}, inside its header")
    held = _voxels_of(image, path).stat().st_size * (itk.DEFLATE_RATIO if path.name.lower().endswith(".gz") else 1)
    itk.check_fits(path, image.shape, dtype.itemsize, held)
    return image


def _voxels_of(image: nib.Nifti1Pair, path: Path) -> Path:
    """The file that holds the voxels: its own, or the one next to a header (.hdr).

    Raises:
        ValueError: it is not there.
    """
    voxels = Path(image.file_map["image"].filename)
    if not voxels.is_file():
        raise itk.unreadable(path, f"{voxels.name}, its voxels, is not there")
    return voxels


def read(path: Path) -> Raw:
    """Raises ValueError: as open_image; damaged; more or fewer voxels than the header says."""
    image = open_image(path)
    try:
        if path.name.lower().endswith(".gz"):
            with igzip.open(path) as stream, _quiet_nibabel():
                raw, surplus = _unzipped(stream, image.dataobj), 0
                while part := stream.read(2**20):  # to the end, where gzip compares its checksum
                    surplus += len(part)
        else:
            raw = image.dataobj.get_unscaled()
            surplus = _voxels_of(image, path).stat().st_size - image.dataobj.offset - raw.nbytes
    except MemoryError:
        raise itk.too_large(path, image.shape) from None
    except Exception as error:  # EOFError, zlib.error, OSError, ValueError, ...
        raise itk.unreadable(path, error) from None
    itk.check_surplus(path, raw.shape, surplus, raw.itemsize)
    voxels = raw.reshape(raw.shape[:3], order="F")
    return Raw(voxels, float(image.dataobj.slope), float(image.dataobj.inter), geometry(image))


def _unzipped(stream: igzip.IGzipFile, voxels: ArrayProxy) -> np.ndarray:
    """What lies in a stream for nibabel's proxy, as stored; read in parts that stay in the processor's cache."""
    stream.seek(voxels.offset)
    raw = np.empty(math.prod(voxels.shape) * voxels.dtype.itemsize, np.uint8)
    view, num = memoryview(raw), 0
    while part := stream.readinto(view[num : num + PART]):
        num += part
    if num < len(raw):
        raise EOFError(f"expected {len(raw)} bytes of voxels, found {num}")
    return np.ndarray(voxels.shape, voxels.dtype, raw, order="F")


def geometry(image: nib.Nifti1Pair) -> Geometry:
    """The affine in mm, by nibabel's rule (sform before qform), and what is doubtful about it."""
    header, notes = image.header, []
    code = int(header["xyzt_units"]) & SPATIAL
    if code not in UNITS:
        notes.append(f"its header's unit of length has the unknown code {code}: taken as mm")
    unit, scale = UNITS.get(code, UNITS[2])
    sform, qform = _form(header, "sform"), _form(header, "qform")
    stated = int(header["sform_code"]) > 0
    if sform is not None:
        affine = sform
        sizes, stated_sizes = np.linalg.norm(sform[:3, :3], axis=0), np.abs(header["pixdim"][1:4].astype(float))
        if qform is None and stated_sizes.all() and not np.allclose(sizes, stated_sizes, rtol=SAME_SIZE):
            texts = (" x ".join(f"{size * scale:.3g}" for size in three) for three in (sizes, stated_sizes))
            notes.append(
                "its sform makes voxels of {} mm, its header states {} mm (pixdim): the sform is taken; if that is "
                "wrong, correct the sform".format(*texts)
            )
        if qform is not None and (apart := shift(sform, qform, image.shape[:3])) > ELSEWHERE * _finest(sform):
            notes.append(
                f"its sform and qform lie up to {apart * scale:.3g} mm apart, other programs may take the qform: the "
                "sform is taken"
            )
    elif stated and (qform := _unstated_qform(header) if qform is None else qform) is not None:
        affine = qform
        notes.append("its sform is empty though its code says otherwise: the qform is taken")
    elif qform is not None:
        affine = qform
    elif stated or int(header["qform_code"]) > 0:
        affine = image.affine  # of no use, as check_grid will say
    else:
        affine = header.get_base_affine()
        towards = ", ".join(nib.aff2axcodes(affine))
        notes.append(
            f"its header states no orientation (qform_code and sform_code are 0): its axes are taken to run towards "
            f"{towards}, with the middle of the volume at 0"
        )
    return Geometry(np.diag([scale, scale, scale, 1.0]) @ affine, unit, tuple(notes))


def _form(header: nib.Nifti1Header, name: str) -> np.ndarray | None:
    """A form that is stated and has an inverse, in the header's unit."""
    if not int(header[f"{name}_code"]):
        return None
    try:
        form = getattr(header, f"get_{name}")()
    except (ValueError, nib.spatialimages.HeaderDataError):  # no rotation in the quaternion
        return None
    return form if np.isfinite(form).all() and np.linalg.matrix_rank(form[:3, :3]) == 3 else None


def _unstated_qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """A qform whose code is 0, where its numbers are not those of a new header."""
    if not any(header[name] for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")):
        return None
    header = header.copy()
    header["qform_code"] = 1
    return _form(header, "qform")


def _finest(affine: np.ndarray) -> float:
    return float(np.linalg.norm(affine[:3, :3], axis=0).min())


def write_label(path: Path, label: np.ndarray, like: Path) -> None:
    """Writes a label map with the geometry of another NIfTI as it stands: forms, codes, units, voxel sizes.

    Args:
        path: .nii or .nii.gz.
        label: [i, j, k] in the other file's axis order.
    """
    image = open_image(like)
    header = image.header.copy()
    header.set_data_dtype(label.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the CT's display range
    header["intent_code"] = header["intent_p1"] = header["intent_p2"] = header["intent_p3"] = 0
    for name in OF_THE_CT:
        if name in header:  # NIfTI-2 has no data_type
            header[name] = b""
    header.extensions.clear()  # may hold the patient's DICOM header
    image_class = nib.Nifti2Image if isinstance(image.header, nib.nifti2.Nifti2Header) else nib.Nifti1Image
    nib.save(image_class(label, None, header), path)
