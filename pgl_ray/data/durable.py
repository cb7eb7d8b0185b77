"""Files and folders on a disk that appear under their name whole or not at all, also after a loss of power."""

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems know no fsync of a folder


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file in one step: readers see the old one or the new one, also after a loss of power."""
    write_parts_aside(path, [content], path.with_name(f"{path.name}.part{os.getpid()}"))


def put_in_place(aside: Path, path: Path) -> None:
    """Gives a file or folder that was written aside its name, once it is on the disk with all below it: whatever
    happens, under that name lies nothing half. A folder takes the place of none, or of an empty one.

    Raises:
        OSError: storage fails; what lay there is as it was.
    """
    for part in [*aside.rglob("*"), aside] if aside.is_dir() else [aside]:
        _to_disk(part)
    aside.replace(path)
    _to_disk(path.parent)


def check_writable(given: str, folder: Path) -> None:
    """Finds out before the work is done whether its result can be kept; makes the folder.

    Args:
        given: what the user wrote, for the message.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{given} cannot be written: {error.strerror or error}") from None


def check_writable_file(given: str, path: Path) -> None:
    """The same for a file.

    Raises:
        ValueError: a folder of that name is there, or its own folder cannot be made or written to.
    """
    if path.is_dir():
        raise ValueError(f"{given} is a folder: name a file")
    check_writable(given, path.absolute().parent)


def write_parts_aside(path: Path, parts: Iterable[bytes], aside: Path) -> None:
    """`write_aside` of content in parts; `aside` is the name until it is whole."""
    try:
        fill(aside, parts)
        put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def fill(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file in place."""
    with path.open("wb") as file:
        file.writelines(parts)


def _to_disk(path: Path) -> None:
    """Brings a file's bytes, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)
