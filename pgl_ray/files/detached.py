"""Text headers of MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): their fields, and the files that hold the voxels.

The voxels follow the header, or lie in a file that it names, in a list of files, or in files numbered by a pattern
("slice%03d.raw 1 40 1"). Reading, the stamp of a file's content and the check of its size all go by this one parser.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
LONGEST = 2**22  # bytes; no text header is longer
PATTERN = re.compile(r"(\S*%\d*d\S*)((?:\s+-?\d+)*)")  # a name with a number in it; least, largest, step


class TextHeader(NamedTuple):
    """What a text header says.

    Attributes:
        fields: name in lower case, without blanks -> value.
        keys: NRRD's own `key:=value` pairs.
        files: that hold the voxels, in order; empty: they follow the header.
        start: first byte behind the header.
    """

    fields: dict[str, str]
    keys: dict[str, str]
    files: tuple[Path, ...]
    start: int


def read_header(path: Path) -> TextHeader:
    """Reads a text header; of a file that has none, what looks like fields at its beginning."""
    fields, keys, listed = {}, {}, None
    with path.open("rb") as file:
        while file.tell() < LONGEST and (line := file.readline(LONGEST)):
            text = line.decode(errors="replace").strip()
            if listed is not None:  # the lines behind LIST are names, to the end
                listed += [text] if text else []
                continue
            if not text:
                break
            name, value, is_key = _split(text)
            if is_key:
                keys[name] = value
            elif name:
                fields[name] = value
            if name in ("elementdatafile", "datafile") and value.split()[:1] == ["LIST"]:
                listed = []
            elif name == "elementdatafile":
                break
        start = file.tell()
    data = fields.get("elementdatafile") or fields.get("datafile") or "LOCAL"
    names = listed if listed is not None else _names(data, fields)
    return TextHeader(fields, keys, tuple(path.parent / name for name in names), start)


def _split(line: str) -> tuple[str, str, bool]:
    """Name, value, and whether it is one of NRRD's own keys; ("", "", False) of a comment or of the first line."""
    if match := re.match(r"([^:=#][^:=]*):=(.*)", line):
        return match[1].strip(), match[2].strip(), True
    match = re.match(r"([\w ]+?)\s*[:=]\s*(.*)", line)
    return (match[1].lower().replace(" ", ""), match[2], False) if match else ("", "", False)


def _names(data: str, fields: dict[str, str]) -> list[str]:
    """The names that stand for a data file."""
    if data.upper() == "LOCAL":
        return []
    match = PATTERN.fullmatch(data)
    if not match:
        return [data]
    last = (fields.get("dimsize") or fields.get("sizes") or "1").split()[-1]
    numbers = [int(number) for number in match[2].split()]
    low = numbers[0] if numbers else 1
    high = numbers[1] if len(numbers) > 1 else low + int(last) - 1 if last.isdecimal() else low
    step = numbers[2] if len(numbers) > 2 and numbers[2] else 1
    return [match[1] % number for number in range(low, high + (1 if step > 0 else -1), step)]


def files_of(path: Path) -> list[Path]:
    """The files that make up a volume: itself, and those that its text header names and that are there."""
    if not path.name.lower().endswith(SUFFIXES) or not path.is_file():
        return [path]
    return [path, *(file for file in read_header(path).files if file != path and file.is_file())]


def is_segmentation(path: Path) -> bool:
    """Whether it is 3D Slicer's segmentation (.seg.nrrd): an NRRD that tells of its segments."""
    if not path.name.lower().endswith((".nrrd", ".nhdr")) or not path.is_file():
        return False
    return any(key.startswith("Segment0_") for key in read_header(path).keys)


def states_spacing(header: TextHeader) -> bool:
    """Whether a header says how far voxels lie apart, of at least three axes and of every one that has several. NRRD
    writes "none" or nan where that is not known, which ITK takes for 1."""
    stated = header.fields.get("spacedirections") or header.fields.get("spacings")
    if not stated:
        return bool(header.fields.keys() & {"elementspacing", "elementsize"})
    known = [_is_finite(entry) for entry in re.findall(r"\([^)]*\)|[^\s()]+", stated)]
    lengths = header.fields.get("sizes", "").split()
    return sum(known) >= 3 and all(one or length == "1" for one, length in zip(known, lengths))


def _is_finite(entry: str) -> bool:
    """Whether an axis' spacing, or its direction (x,y,z), is made of finite numbers."""
    try:
        return all(math.isfinite(float(part)) for part in entry.strip("()").split(","))
    except ValueError:
        return False


# -- units of length --------------------------------------------------------------------------------------------------

MILLIMETRES = {"mm": 1.0, "um": 1e-3, "m": 1e3, "cm": 10.0, "nm": 1e-6}
NAMED = {"": "mm", "?": "mm", "???": "mm", "millimeter": "mm", "millimetre": "mm", "micron": "um", "micrometer": "um"}
NAMED |= {"micrometre": "um", "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm"}


def millimetres_per_unit(header: TextHeader) -> tuple[float, str]:
    """How many mm the header's unit of length has, and its name.

    Raises:
        ValueError: axes of several units, or a unit that is none of length (to be completed with the file's name).
    """
    stated = header.fields.get("spaceunits") or header.fields.get("units") or header.fields.get("distanceunits") or ""
    quoted = re.findall(r'"([^"]*)"', stated) or stated.split()
    units = {_unit(one) for one in quoted} or {"mm"}
    if len(units) > 1 or not units <= MILLIMETRES.keys():
        known = ", ".join(MILLIMETRES)
        raise ValueError(f"its units of length are {stated}, expected one of {known} for all axes: mend its header")
    return MILLIMETRES[unit := units.pop()], unit


def _unit(text: str) -> str:
    """A unit's short name; the micro sign comes in two characters, or unreadable in Latin 1."""
    name = re.sub("[\u00b5\u03bc\ufffd]", "u", text.strip()).lower()
    return NAMED.get(name) or NAMED.get(name.removesuffix("s")) or name
