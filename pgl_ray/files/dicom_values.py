"""What the stored pixels of a DICOM slice mean in HU, or why that cannot be known (see dicom_pixels for the bits)."""

import re
from typing import Any, NamedTuple, Protocol

import numpy as np

PADDING = -(2**15)  # HU of what a file declares as padding, below every measured one
HIGHEST_TISSUE = 3071  # HU of 12-bit CT
AIR = -1024
HOUNSFIELD = re.compile(r"(hou?n[ds]*fields?(units?)?)?(hus?)?")  # as people spell it, only its letters
HOUNSFIELD_CODES = ("[hnsf'u]", "hu", "hnsf'u")  # UCUM's, and what is written in its place


class Tagged(Protocol):
    """A header by keyword, or by tag: pydicom's data set, or what an enhanced file says of one of its frames."""

    def __contains__(self, key: Any, /) -> bool:
        """Whether there is such a tag."""

    def get(self, key: Any, default: Any = None, /) -> Any:
        """The value of a tag, or the default where there is none."""


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


def encoding(header: Tagged) -> Encoding:
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
    if slope <= 0:
        what = "makes all voxels alike" if slope == 0 else "turns dense into thin"
        raise Refused(f"RescaleSlope is {slope:g}, which {what}: mend the header, or take the original series")
    scaled = plain._replace(slope=slope, intercept=intercept)
    return scaled._replace(padding=padding_of(header, scaled))


def stored_encoding(header: Tagged) -> Encoding:
    """What a header says of its pixels, whatever they mean: slope 1, intercept 0, no padding.

    Raises:
        Refused: no picture, or bits that do not go together.
    """
    if not header.get("Rows") or not header.get("Columns"):
        raise Refused("has no picture: leave this file out")
    if not (isinstance(header.get("Rows"), int) and isinstance(header.get("Columns"), int)):
        raise Refused("has no valid Rows and Columns: mend the header, or take the original series")
    bits, overlay = _bits(header), 0
    for group in range(0x6000, 0x6020, 2):  # old files keep an overlay in the pixels' upper bits
        position = header.get((group, 0x0102))
        if position is not None and isinstance(position.value, int) and bits[2] < position.value < bits[0]:
            overlay |= 1 << position.value
    return Encoding((header.get("Rows"), header.get("Columns")), *bits, 1.0, 0.0, None, overlay)


def is_unspecified(header: Tagged) -> bool:
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


def _unit(header: Tagged) -> str:
    return "".join(letter for letter in str(header.get("RescaleType") or "").casefold() if letter.isalnum())


def _check_unit(header: Tagged) -> None:
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


def _bits(header: Tagged) -> tuple[int, int, int, bool]:
    """BitsAllocated, BitsStored, HighBit and whether signed."""
    fields = []
    for tag in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        value = header.get(tag)
        if tag == "HighBit" and value is None and fields[1]:
            value = fields[1] - 1
        if not isinstance(value, int):
            raise Refused(f"has no valid {tag}, so its values are unknown: mend the header or take the original series")
        fields.append(value)
    allocated, stored, high, signed = fields
    if allocated not in (8, 16, 32) or not 0 < stored <= high + 1 <= allocated or signed not in (0, 1):
        raise Refused(
            f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high} and PixelRepresentation {signed} do not "
            "go together: mend the header, or take the original series"
        )
    return allocated, stored, high, bool(signed)


def _number(header: Tagged, tag: str, default: float | None) -> float | None:
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


def padding_of(header: Tagged, of: Encoding) -> tuple[int, int] | None:
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
    ignored = np.zeros(bits.shape, bool) if padding is None else padding
    alike = upper == upper.flat[int(np.argmin(ignored))]
    if of.signed:
        if ((upper == bits.dtype.type(mask) * (values < 0)) | ignored).all():
            return
        if (alike | ignored).all():  # no sign in the upper bits: then a large value looks like one below air
            lost = (values < 0) & (values * of.slope + of.intercept < AIR) & ~ignored
            if not lost.any():
                return
            raise Refused(
                f"{of.stored} bits are stored as signed, and {int(lost.sum())} pixels may be below air or above "
                f"{2 ** (of.stored - 1)}: take the original series"
            )
    elif (alike | ignored).all():
        return
    raise Refused(
        f"pixels use bits beyond the {of.stored} that its header says are stored (HighBit {of.high}): mend BitsStored "
        "and HighBit, or take the original series"
    )
