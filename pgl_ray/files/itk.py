"""NRRD and MHA/MHD through ITK, and what ITK leaves out: the unit of length, and the checks of size and checksum."""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from pgl_ray.files import detached
from pgl_ray.files.detached import TextHeader, files_of
from pgl_ray.files.geometry import LPS_TO_RAS
from pgl_ray.files.raw import Geometry, Raw

if TYPE_CHECKING:
    from SimpleITK import ImageFileReader

DEFLATE_RATIO = 1032  # zlib cannot compress better
KNOWN_SPACES = ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps")
READ_ENCODINGS = ("raw", "gzip", "gz", "ascii", "text", "txt")  # of NRRD


def read(path: Path) -> Raw:
    """Reads a volume.

    Raises:
        ValueError: as open_header; damaged; more or fewer voxels than the header says.
    """
    import SimpleITK as sitk

    reader = open_header(path)
    _check_data(path, shape_of(reader), sitk.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent())
    reader.SetExtractSize([*shape_of(reader), *[0] * (reader.GetDimension() - 3)])  # axes of one voxel go
    try:
        image = reader.Execute()
    except MemoryError:
        raise too_large(path, reader.GetSize()) from None
    except RuntimeError:
        raise _unread(path) from None
    return Raw(sitk.GetArrayFromImage(image).transpose(2, 1, 0), *_intensity(path), geometry(path, reader))


def _intensity(path: Path) -> tuple[float, float]:
    """Slope and offset that a MetaImage gives its values; ITK leaves them out."""
    header = detached.read_header(path)
    slope = _number(path, header, "elementtointensityfunctionslope", 1)
    return slope, _number(path, header, "elementtointensityfunctionoffset", 0)


def _number(path: Path, header: TextHeader, name: str, default: float) -> float:
    """A field's number.

    Raises:
        ValueError: it is none.
    """
    try:
        return float(header.fields.get(name, default))
    except ValueError:
        raise unreadable(path, f"its header's {name} is {header.fields[name]!r}, no number") from None


def open_header(path: Path) -> "ImageFileReader":
    """ITK's reader of a file, its header read.

    Raises:
        ValueError: not readable, not one 3D volume of single numbers, no spacing, files that are not there, or a shape
            that the files cannot hold.
    """
    import SimpleITK as sitk

    reader, header = sitk.ImageFileReader(), detached.read_header(path)
    reader.SetFileName(str(path))
    missing = [file for file in header.files if not file.is_file()]
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # ITK's reasons mislead ("No such file" for a file that is cut off)
        raise _unread(path) from None
    if detached.is_segmentation(path) and (reader.GetNumberOfComponents() != 1 or reader.GetDimension() != 3):
        raise ValueError(
            f"{path}: a segmentation with overlapping segments, in layers: in 3D Slicer export it as a label map "
            "(Segmentations, Export to files)"
        )
    if reader.GetNumberOfComponents() != 1:
        number = reader.GetNumberOfComponents()
        raise ValueError(f"{path}: {number} values per voxel (colours or a vector), expected one: no CT in HU")
    if reader.GetDimension() < 3 or any(size != 1 for size in reader.GetSize()[3:]):
        raise ValueError(f"{path}: shape {reader.GetSize()}, expected one 3D volume: split or select it first")
    if not detached.states_spacing(header):
        raise ValueError(f"{path}: no voxel spacing in its header: add it, or take the original file")
    if missing:
        raise unreadable(path, f"its voxels should lie in {missing[0]}, which is not there")
    held = sum(file.stat().st_size for file in files_of(path)) * DEFLATE_RATIO
    check_fits(path, reader.GetSize(), 1, held)
    return reader


def shape_of(reader: "ImageFileReader") -> tuple[int, int, int]:
    """Shape (i, j, k) of a header that ITK has read, without further axes of one voxel."""
    return reader.GetSize()[:3]


def geometry(path: Path, reader: "ImageFileReader") -> Geometry:
    """Geometry of a header that ITK has read. ITK takes lengths as mm whatever their unit, and unknown axes as LPS.

    Raises:
        ValueError: a unit that is none.
    """
    affine, dimension = np.eye(4), reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3]
    affine[:3, :3] = direction * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    header = detached.read_header(path)
    try:
        scale, unit = detached.millimetres_per_unit(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    space = header.fields.get("space", "").lower()
    known = space.removesuffix("-time") in KNOWN_SPACES and "spacedirections" in header.fields
    notes = ()
    if not known and "elementtype" not in header.fields:  # MetaImage's axes are LPS where nothing is said
        where = f"the space {space!r}" if space else "no orientation"
        notes = (f"its header states {where}: its axes are taken to run towards L, P, S",)
    return Geometry(np.diag([scale, scale, scale, 1.0]) @ LPS_TO_RAS @ affine, unit, notes)


def check_fits(path: Path, shape: tuple[int, ...], itemsize: int, held: int) -> None:
    """Refuses a header that promises more bytes than its file can hold, before memory is asked for them."""
    if math.prod(shape) * itemsize > held:
        raise unreadable(path, f"its header says shape {tuple(shape)}, more than the file holds")


def check_surplus(path: Path, shape: tuple[int, ...], surplus: int, itemsize: int) -> None:
    """Refuses a file that holds fewer voxels than its header says, or a whole slice more of them."""
    if not 0 <= surplus < shape[0] * shape[1] * itemsize:
        more = "more" if surplus > 0 else "fewer"
        raise unreadable(path, f"it holds {more} voxels than the shape {tuple(shape)} in its header")


def unreadable(path: Path, reason: Any = "") -> ValueError:
    """The error of a damaged file."""
    detail = f" ({' '.join(str(reason).split())})" if str(reason) else ""
    return ValueError(f"{path}: not a readable image{detail}: it is cut off, damaged or of another format")


def too_large(path: Path, shape: tuple[int, ...]) -> ValueError:
    """The error of a volume that does not fit into memory."""
    return ValueError(
        f"{path}: shape {tuple(shape)} needs more memory than there is: crop it, or take a machine with more; if it is "
        "no such volume, its header is damaged"
    )


def _unread(path: Path) -> ValueError:
    """The error of a file that ITK does not read: its encoding, a file of voxels that is missing, or damage."""
    header = detached.read_header(path)
    encoding = header.fields.get("encoding", "raw").lower()
    if encoding not in READ_ENCODINGS:
        return ValueError(f"{path}: its voxels are encoded as {encoding}, which is not read: save it with gzip instead")
    missing = [file for file in header.files if not file.is_file()]
    if not missing and any("%" in file.name for file in header.files):
        return unreadable(path, f"MetaImage takes the % in {header.files[0].name} for a number: rename it, and in here")
    return unreadable(path, f"its voxels should lie in {missing[0]}, which is not there" if missing else "")


def _check_data(path: Path, shape: tuple[int, ...], itemsize: int) -> None:
    """Compares the voxels with header and checksum; ITK reads on where they are too few, or decompressed wrongly."""
    header = detached.read_header(path)
    skip = int(_number(path, header, "headersize", 0) or _number(path, header, "byteskip", 0))
    encoding = header.fields.get("encoding", "raw").lower()
    if skip < 0 or header.fields.get("lineskip", "0") != "0" or encoding not in ("raw", "gzip", "gz"):
        return
    places = [(file, skip) for file in header.files] or [(path, header.start + skip)]
    try:
        size = sum(_voxel_bytes(file, start, header) for file, start in places)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None
    check_surplus(path, shape, size - math.prod(shape) * itemsize, itemsize)


def _voxel_bytes(path: Path, start: int, header: TextHeader) -> int:
    """Size of what a file holds from a byte on, decompressed."""
    with path.open("rb") as file:
        file.seek(start)
        if header.fields.get("compresseddata", "").lower() == "true":
            size, deflated = _inflated_size(file)
            _check_deflated(header, deflated, path.stat().st_size - start)
            return size
        if header.fields.get("encoding", "raw").lower() == "raw":
            return path.stat().st_size - start
        with gzip.GzipFile(fileobj=file) as stream:
            return sum(map(len, _parts(stream)))


def _parts(stream: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    return iter(lambda: stream.read(2**20), b"")


def _inflated_size(file: IO[bytes]) -> tuple[int, int]:
    """Size of a zlib stream's content, and its own; zlib compares its checksum at the end."""
    inflate, size, deflated = zlib.decompressobj(), 0, 0
    while not inflate.eof:
        part = file.read(2**20)
        if not part:
            raise zlib.error("the compressed voxels are cut off")
        size, deflated = size + len(inflate.decompress(part)), deflated + len(part)
    return size, deflated - len(inflate.unused_data)


def _check_deflated(header: TextHeader, deflated: int, held: int) -> None:
    """Refuses a MetaImage whose compressed size is stated wrongly: ITK would read zeros."""
    stated = header.fields.get("compresseddatasize", "")
    right = deflated <= int(stated) <= held if stated.isdecimal() else not stated and bool(header.files)
    if not right:
        statement = f"says CompressedDataSize = {stated}" if stated else "has no CompressedDataSize"
        raise zlib.error(f"its header {statement}, it should be {deflated}")
