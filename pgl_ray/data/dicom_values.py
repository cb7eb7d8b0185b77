"""Stored pixels of DICOM and what they mean in HU.

Uncompressed pixels are taken as they stand in the file. Compressed ones are decoded by SimpleITK's GDCM, whose header
is a copy that says nothing of rescaling, sign or MONOCHROME1, so that it gives the stored bits alone: ITK would invert
MONOCHROME1 and cut values to the bits stored. The meaning of the bits is read here, in one way for all encodings.
"""

import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

PADDING = -(2**15)  # HU of what a file declares as padding, below every measured one
HIGHEST_TISSUE = 3071  # HU of 12-bit CT
AIR = -1024
HOUNSFIELD = re.compile(r"hou?n[ds]*s?fields?(units?)?|hus?")  # as people spell it, without blanks
HOUNSFIELD_CODES = ("[hnsf'u]", "hu", "hnsf'u")  # UCUM's, and what is written in its place
GE_PRIVATE = "1.2.840.113619.5.2"  # implicit VR little endian, but the pixels are big endian
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", GE_PRIVATE)
JPEG = "1.2.840.10008.1.2.4."
JPEG_2000 = (f"{JPEG}90", f"{JPEG}91")
COMPRESSED = (*(f"{JPEG}{one}" for one in (50, 51, 53, 55, 57, 70, 80, 81)), *JPEG_2000, "1.2.840.10008.1.2.5")
PIXELS_BEGIN, PIXELS_END = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff", b"\xfe\xff\xdd\xe0\0\0\0\0"  # of no stated length
LOSSY = tuple(f"{JPEG}{one}" for one in (50, 51, 53, 55, 81))


class Refused(ValueError):
    """A reason without the file's name."""


class Encoding(NamedTuple):
    """How the pixels of a slice are stored, and how their values become HU.

    Attributes:
        shape: rows, columns.
        allocated, stored, high: bits per pixel, bits that hold the value, and the highest of these.
        signed: whether the value is a two's complement.
        slope, intercept: HU = slope * value + intercept.
        padding: first and last stored value that mean "no measurement"; none where none is declared.
        overlay: bits above the value that hold an overlay's pixels.
    """

    shape: tuple[int, int]
    allocated: int
    stored: int
    high: int
    signed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    overlay: int


def encoding(header) -> Encoding:
    """What a header says of its pixels.

    Args:
        header: `get` by keyword, of one frame.

    Raises:
        Refused: no picture, or values that are not HU or cannot be known.
    """
    plain = stored_encoding(header)
    if "ModalityLUTSequence" in header:
        raise Refused("its values pass through a table (ModalityLUTSequence): take the original series")
    if plain.stored <= 8:
        raise Refused(f"{plain.stored} bits per pixel are too few for HU: take the original series")
    _check_unit(header)
    slope, intercept = _number(header, "RescaleSlope", 1.0), _number(header, "RescaleIntercept", None)
    if intercept is None:
        raise Refused("has no RescaleIntercept, so its values are not HU: take the original series")
    if slope == 0:
        raise Refused("RescaleSlope is 0, which makes all voxels alike: mend the header, or take the original series")
    found = plain._replace(slope=slope, intercept=intercept)
    return found._replace(padding=_padding(header, found))


def stored_encoding(header) -> Encoding:
    """What a header says of its pixels, whatever they mean: slope 1, intercept 0, no padding.

    Raises:
        Refused: no picture, or bits that do not go together.
    """
    if not header.get("Rows") or not header.get("Columns"):
        raise Refused("has no picture: leave this file out")
    bits, overlay = _bits(header), 0
    for group in range(0x6000, 0x6020, 2):  # old files keep an overlay in the pixels' upper bits
        position = header.get((group, 0x0102))
        if position is not None and isinstance(position.value, int) and bits[2] < position.value < bits[0]:
            overlay |= 1 << position.value
    return Encoding((int(header.get("Rows")), int(header.get("Columns"))), *bits, 1.0, 0.0, None, overlay)


def is_unspecified(header) -> bool:
    """Whether a file says that its unit is unspecified ("US"), as ITK does of every CT that it writes: its values have
    to show that they are HU.

    Raises:
        Refused: its kind of image is none in HU.
    """
    if _unit(header) != "us":
        return False
    kind = "\\".join(str(part) for part in _several(header.get("ImageType")))
    if "TOMO" in kind.upper():
        raise Refused(f"pixels are in US of a tomosynthesis ({kind}), so its values are not HU: leave this series out")
    return True


def is_lossy(header, syntax: str) -> bool:
    """Whether compression has changed the values."""
    return syntax in LOSSY or str(header.get("LossyImageCompression") or "") == "01"


def _unit(header) -> str:
    return "".join(str(header.get("RescaleType") or "").casefold().split())


def _check_unit(header) -> None:
    mapped = [
        (str(unit.get("CodeValue") or ""), str(one.get("LUTExplanation") or one.get("LUTLabel") or ""))
        for one in header.get("RealWorldValueMappingSequence") or []
        for unit in one.get("MeasurementUnitsCodeSequence") or []
    ]
    if mapped and not any(code.casefold() in HOUNSFIELD_CODES for code, _ in mapped):
        code, what = mapped[0]
        raise Refused(f"pixels are in {code} ({what or 'real world values'}), not HU: leave this series out")
    unit = _unit(header)
    if not unit or HOUNSFIELD.fullmatch(unit) or is_unspecified(header):
        return
    raise Refused(f"pixels are in {header.get('RescaleType')}, so its values are not HU: take the original series")


def _bits(header) -> tuple[int, int, int, bool]:
    """BitsAllocated, BitsStored, HighBit and whether signed."""
    found = []
    for tag in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        value = header.get(tag)
        if tag == "HighBit" and value is None and found[1]:
            value = found[1] - 1
        if not isinstance(value, int):
            raise Refused(f"has no valid {tag}, so its values are unknown: mend the header or take the original series")
        found.append(value)
    allocated, stored, high, signed = found
    if allocated not in (8, 16, 32) or not 0 < stored <= high + 1 <= allocated or signed not in (0, 1):
        raise Refused(
            f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high} and PixelRepresentation {signed} do not "
            "go together: mend the header, or take the original series"
        )
    return allocated, stored, high, bool(signed)


def _number(header, tag: str, default: float | None) -> float | None:
    try:
        value = header.get(tag)
        if value is None or value == "":
            return default
        number = float(value)
    except (TypeError, ValueError):  # pydicom's conversion may fail, too
        number = np.nan
    if not np.isfinite(number):
        raise Refused(f"{tag} is not a number: mend the header, or take the original series")
    return number


def _several(value: Any) -> list:
    return [] if value is None else [value] if isinstance(value, (str, bytes, int, float)) else list(value)


def _padding(header, of: Encoding) -> tuple[int, int] | None:
    """Stored values that the file declares as padding; none where it could be tissue, as in files with 0. Files state
    them signed or unsigned, whatever their pixels are."""
    ends = []
    for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        for value in _several(header.get(tag))[:1]:
            if isinstance(value, bytes):  # a VR that does not say how to read it
                value = int.from_bytes(value[: of.allocated // 8], "little")
            if not isinstance(value, (int, float)):
                continue
            value = int(value) % 2**of.allocated
            ends.append(value - 2**of.allocated * (of.signed and value >= 2 ** (of.allocated - 1)))
    if not ends or header.get("PixelPaddingValue") is None:
        return None
    low, high = (bound(end * of.slope + of.intercept for end in ends) for bound in (min, max))
    return (min(ends), max(ends)) if high <= AIR or low > HIGHEST_TISSUE else None


# -- pixels -----------------------------------------------------------------------------------------------------------


def to_hu(bits: np.ndarray, of: Encoding) -> np.ndarray:
    """HU of stored bits, what the file declares as padding as PADDING.

    Args:
        bits: unsigned integers [rows, columns], as they stand in the file.

    Returns:
        Integers, or float64 where slope or intercept are none; lossless.

    Raises:
        Refused: bits beyond the stored ones that leave the values in doubt.
    """
    values, padding = stored_values(bits, of)
    if of.slope.is_integer() and of.intercept.is_integer():
        wide = np.int32 if of.allocated < 32 and max(abs(of.slope), abs(of.intercept)) < 2**14 else np.int64
        hu = values.astype(wide) * wide(of.slope) + wide(of.intercept)
    else:
        hu = values * of.slope + of.intercept
    if padding is not None and padding.any():
        hu[padding] = PADDING
    return hu


def stored_values(bits: np.ndarray, of: Encoding) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored values, and where they are padding (none: nowhere is asked).

    Raises:
        Refused: as to_hu.
    """
    whole = bits.view(f"i{bits.itemsize}") if of.signed else bits
    padding = None if of.padding is None else (whole >= of.padding[0]) & (whole <= of.padding[1])
    if of.stored == of.allocated:
        return whole, padding
    spare, above = of.high + 1 - of.stored, of.allocated - 1 - of.high
    values = (
        (bits << above).view(f"i{bits.itemsize}") >> (above + spare)
        if of.signed
        else (bits << above) >> (above + spare)
    )
    if of.padding is not None:
        padding |= (values >= of.padding[0]) & (values <= of.padding[1])
    if above:
        _check_upper_bits(bits, values, padding, of)
    return values, padding


def _check_upper_bits(bits: np.ndarray, values: np.ndarray, padding: np.ndarray | None, of: Encoding) -> None:
    """Refuses values that may not fit into the bits stored: what lies above these must be alike in all pixels, the sign
    of the value, or a declared overlay."""
    mask = (2**of.allocated - 1) & ~(2 ** (of.high + 1) - 1) & ~of.overlay
    upper = bits & bits.dtype.type(mask)
    told = np.zeros(bits.shape, bool) if padding is None else padding
    alike = upper == upper.flat[int(np.argmin(told))]
    if of.signed:
        if ((upper == bits.dtype.type(mask) * (values < 0)) | told).all():
            return
        if (alike | told).all():  # no sign in the upper bits: then a large value looks like one below air
            lost = (values < 0) & (values * of.slope + of.intercept < AIR) & ~told
            if not lost.any():
                return
            raise Refused(
                f"{of.stored} bits are stored as signed, and {int(lost.sum())} pixels may be below air or above "
                f"{2 ** (of.stored - 1)}: take the original series"
            )
    elif (alike | told).all():
        return
    raise Refused(
        f"pixels use bits beyond the {of.stored} that its header says are stored (HighBit {of.high}): mend BitsStored "
        "and HighBit, or take the original series"
    )


def frames_bits(dataset, of: Encoding, count: int = 1) -> Iterator[np.ndarray]:
    """The stored bits of a file's frames.

    Args:
        dataset: pydicom's, with its pixels.
        count: of frames.

    Yields:
        Unsigned integers [rows, columns].

    Raises:
        Refused: a transfer syntax that cannot be decoded.
        ValueError: fewer or more pixels than the header says, or damaged ones.
    """
    if "PixelData" not in dataset:
        others = [one for one in ("FloatPixelData", "DoubleFloatPixelData") if one in dataset]
        raise Refused(f"{others[0]}, not HU: take the original series") if others else ValueError("no pixels in it")
    syntax = syntax_of(dataset)
    if syntax in UNCOMPRESSED or not syntax:
        yield from _raw_bits(dataset, of, count, syntax)
    elif syntax in COMPRESSED:
        parts = [dataset.PixelData]
        if count > 1:
            from pydicom.encaps import encapsulate, generate_frames

            parts = (encapsulate([one]) for one in generate_frames(dataset.PixelData, number_of_frames=count))
        for part in parts:
            yield _decoded_bits(of, syntax, part)
    else:
        raise Refused(
            f"transfer syntax {getattr(syntax, 'name', syntax)} cannot be decoded here: rewrite it uncompressed first, "
            "for instance with gdcmconv --raw"
        )


def syntax_of(dataset) -> str:
    """UID of a file's transfer syntax, "" where it says none."""
    return dataset.file_meta.get("TransferSyntaxUID") or ""


def _raw_bits(dataset, of: Encoding, count: int, syntax: str) -> Iterator[np.ndarray]:
    content, need = dataset.PixelData, of.shape[0] * of.shape[1] * (of.allocated // 8)
    if len(content) < need * count:
        raise ValueError(f"{len(content)} bytes of pixels, {need * count} expected")
    if len(content) - need * count > of.shape[1] * (of.allocated // 8):  # else padding at the end
        raise Refused(
            f"{len(content)} bytes of pixels, {need * count} expected: Rows, Columns, BitsAllocated or NumberOfFrames "
            "are wrong, mend the header"
        )
    little = dataset.original_encoding[1] is not False and syntax != GE_PRIVATE
    stored, own = f"{'<' if little else '>'}u{of.allocated // 8}", f"u{of.allocated // 8}"
    for k in range(count):
        bits = np.frombuffer(content, stored, of.shape[0] * of.shape[1], k * need)
        yield bits.astype(own, copy=False).reshape(of.shape)


@lru_cache(maxsize=8)
def _plain_header(shape: tuple[int, int], allocated: int, syntax: str) -> bytes:
    """A DICOM file up to its pixels that says nothing of rescaling, sign or MONOCHROME1."""
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    plain = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    plain.SOPClassUID, plain.SOPInstanceUID, plain.Modality = meta.MediaStorageSOPClassUID, "1.2.3", "CT"
    plain.Rows, plain.Columns = shape
    plain.SamplesPerPixel, plain.PhotometricInterpretation, plain.PixelRepresentation = 1, "MONOCHROME2", 0
    plain.BitsAllocated = plain.BitsStored = allocated
    plain.HighBit = allocated - 1
    content = io.BytesIO()
    plain.save_as(content, enforce_file_format=True)
    return content.getvalue()


def _decoded_bits(of: Encoding, syntax: str, items: bytes) -> np.ndarray:
    """The stored bits of one compressed frame, given as the items of a PixelData element."""
    import SimpleITK as sitk

    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(_plain_header(of.shape, of.allocated, str(syntax)) + PIXELS_BEGIN + items + PIXELS_END)
        file.flush()
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(file.name)
        with _decoders_words() as words:
            try:
                values = sitk.GetArrayFromImage(reader.Execute())[0]
            except RuntimeError:
                raise ValueError("its pixels cannot be decoded") from None
            if b"Corrupt" in words():
                raise ValueError("its JPEG stream is corrupt")
    if values.shape != of.shape:
        raise ValueError(f"picture of {values.shape[::-1]}, its header says {of.shape[::-1]}")
    if values.dtype.kind not in "iu" or values.itemsize > of.allocated // 8:
        raise ValueError(f"its decoded pixels are of type {values.dtype}")
    return values.astype(f"u{of.allocated // 8}")


def with_own_sign(dataset, header, of: Encoding) -> Encoding:
    """The encoding with the sign that a JPEG 2000 stream states of itself, which is what its decoder goes by; headers
    often contradict it."""
    if syntax_of(dataset) not in JPEG_2000 or "PixelData" not in dataset:
        return of
    place = dataset.PixelData.find(b"\xff\x4f\xff\x51")  # start of codestream, then its size marker
    if place < 0 or len(dataset.PixelData) < place + 43:
        return of
    signed = dataset.PixelData[place + 42] >= 128
    if signed == of.signed:
        return of
    of = of._replace(signed=signed)
    return of._replace(padding=of.padding and _padding(header, of))


@contextmanager
def _decoders_words() -> Iterator[Callable[[], bytes]]:
    """Catches what GDCM's JPEG decoders write to the process's stderr: chatter at every 12-bit slice, and that a stream
    is corrupt, where they nevertheless give a picture."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def words() -> bytes:
            file.seek(0)
            return file.read()

        try:
            os.dup2(file.fileno(), 2)
            yield words
        finally:
            os.dup2(kept, 2)
            os.close(kept)
