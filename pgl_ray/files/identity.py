"""How a scan is named: by its own place below the source folder, whatever else lies there.

The id of `p1/ct.nii.gz` is `p1__ct`. A double underscore in a name is written `_=_`, so that no two places have one id.
A DICOM series adds its number and a mark of patient, study, series and frame of reference: `p1__series3-8f3a1c`.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

JOIN = "__"
LONGEST_ID = 180  # bytes; file systems take 255, and other files are named after a scan
MARK = re.compile(r"series[^-]*-([0-9a-f]{6})$")


def plain(name: str) -> str:
    """A name with its accents composed (NFC), as names are compared: macOS writes them decomposed."""
    return unicodedata.normalize("NFC", name)


def scan_id(parts: Sequence[str]) -> str:
    """The id of a scan whose path below its folder has these parts, the last without suffix; different paths have
    different ids."""
    last = len(parts) - 1
    text = JOIN.join(_escaped(plain(part), k > 0, k < last) for k, part in enumerate(parts))
    whole = text.encode()
    if len(whole) <= LONGEST_ID:
        return text
    mark = series_mark(text)
    end = f"=={digest(text)[:10]}{f'{JOIN}series-{mark}' if mark else ''}"
    return whole[: LONGEST_ID - len(end)].decode(errors="ignore") + end


def _escaped(part: str, follows: bool, goes_on: bool) -> str:
    """A part of a path so written that a double underscore, or one at an end that is joined, is only ever a join's."""
    part = re.sub("_(=*)(?=_)", r"_=\1", part)
    if follows:
        part = re.sub("^(=*)_", r"=\1_", part)
    if goes_on:
        part = re.sub("_(=*)$", r"_=\1", part)
    return part


def series_part(number: str, patient: str, study: str, series: str, frame: str) -> str:
    """The last part of a DICOM series' id."""
    number = re.sub(r"[^0-9A-Za-z.]", "", number)
    return f"series{number}-{digest(patient, study, series, frame)[:6]}"


def series_mark(scan_id: str) -> str:
    """What a DICOM series' id says of patient, study, series and frame of reference; "" where it is no such id."""
    match = MARK.search(scan_id)
    return match[1] if match else ""


def digest(*texts: str) -> str:
    """Hex sha256 of some texts."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()
