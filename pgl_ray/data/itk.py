"""NRRD and MHA/MHD through ITK, and the checks of size and checksum that ITK leaves out."""

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
DEFLATE_RATIO = 1032  # zlib cannot compress better
HEADER_BYTES = 2**20  # more than any text header has


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [i, j, k] in the file's axis order, and affine (i, j, k, 1) -> RAS+ mm.

    Raises:
        ValueError: as open_header; damaged; more or fewer voxels than the header says.
    """
    import SimpleITK as sitk

    reader = open_header(path)
    _check_data(path, reader.GetSize(), sitk.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent())
    try:
        image = reader.Execute()
    except MemoryError:
        raise too_large(path, reader.GetSize()) from None
    except RuntimeError:
        raise unreadable(path) from None
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), affine_of(reader)


def open_header(path: Path):
    """ITK's reader of a file, its header read.

    Raises:
        ValueError: not readable, not one 3D volume of single numbers, no spacing, or a shape that the file cannot hold.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # ITK's reasons mislead ("No such file" for a file that is cut off)
        raise unreadable(path) from None
    if reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{path}: {reader.GetNumberOfComponents()} values per voxel (RGB or vector), expected one (HU)"
        )
    if reader.GetDimension() != 3:
        raise ValueError(f"{path}: shape {reader.GetSize()}, expected one 3D volume: split or select it first")
    if not _fields(path)[0].keys() & {"spacedirections", "spacings", "elementspacing", "elementsize"}:
        raise ValueError(f"{path}: no voxel spacing in its header: add it, or take the original file")
    held = sum(file.stat().st_size for file in files_of(path)) * DEFLATE_RATIO
    check_fits(path, reader.GetSize(), 1, held)
    return reader


def affine_of(reader) -> np.ndarray:
    """Affine (i, j, k, 1) -> RAS+ mm of a header that ITK has read."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    return LPS_TO_RAS @ affine


def files_of(path: Path) -> list[Path]:
    """The files that make up a volume: itself, and what a detached header (.mhd, .nhdr) names."""
    if not path.name.lower().endswith((".mhd", ".nhdr")):
        return [path]
    lines = path.read_text(errors="replace").splitlines()
    named = [path.parent / re.split("[:=]", line)[-1].strip() for line in lines if line.strip()]
    return [path, *(file for file in named if file.is_file() and file != path)]


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


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Fields of a text header (names in lower case, without spaces), and the first byte after it."""
    with path.open("rb") as file:
        content = file.read(HEADER_BYTES)
    fields, place = {}, 0
    for line in content.split(b"\n"):
        place += len(line) + 1
        text = line.decode(errors="replace").strip()
        match = re.match(r"([\w ]+?)\s*[:=]=?\s*(.*)", text)
        if match:
            fields[match[1].lower().replace(" ", "")] = match[2]
        if not text or "elementdatafile" in fields:  # the end of NRRD's header and of MetaImage's
            break
    return fields, place


def _check_data(path: Path, shape: tuple[int, ...], itemsize: int) -> None:
    """Compares the voxels with header and checksum; ITK reads on where they are too few, or decompressed wrongly."""
    fields, start = _fields(path)
    name = fields.get("elementdatafile") or fields.get("datafile") or "LOCAL"
    skips = {fields.get(key, "0") for key in ("headersize", "byteskip", "lineskip")} - {"0"}
    if "%" in name or name.split()[0].upper() == "LIST" or skips:
        return  # slices in files of their own, where ITK notices what is missing
    data, start = (path, start) if name.upper() == "LOCAL" else (path.parent / name, 0)
    try:
        with data.open("rb") as file:
            file.seek(start)
            encoding = fields.get("encoding", "raw").lower()
            if fields.get("compresseddata", "").lower() == "true":
                size = _inflated_size(file)
            elif encoding in ("gzip", "gz"):
                with gzip.GzipFile(fileobj=file) as stream:
                    size = sum(map(len, iter(lambda: stream.read(2**20), b"")))
            elif encoding == "raw":
                size = data.stat().st_size - start
            else:
                return
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None
    check_surplus(path, shape, size - math.prod(shape) * itemsize, itemsize)


def _inflated_size(file) -> int:
    """Size of a zlib stream's content; zlib compares its checksum at the end."""
    inflate, size = zlib.decompressobj(), 0
    while not inflate.eof:
        part = file.read(2**20)
        if not part:
            raise zlib.error("the compressed voxels are cut off")
        size += len(inflate.decompress(part))
    return size
