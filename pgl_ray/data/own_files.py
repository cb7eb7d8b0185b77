"""What of a store's place pgl_ray has written: all else is another's, and is neither removed nor replaced."""

import json
import re
from typing import Protocol

from pgl_ray.data.shard import ARRAY_PATHS, SHARD

FILES = frozenset(
    {"zarr.json", "zarr.json.part", "labels/zarr.json", "labels/organs/zarr.json"}
    | {f"{path}/{file}" for path in ARRAY_PATHS.values() for file in ("zarr.json", SHARD)}
)  # every file of a scan, by its key below the scan's
FOLDERS = frozenset(file.rsplit("/", num)[0] for file in FILES for num in range(1, file.count("/") + 1))
SYSTEM = (".DS_Store", "._", ".nfs", "Thumbs.db", "desktop.ini")  # of file browsers and network file systems
MARK = b'"pgl_ray"'  # in the zarr.json of a scan
NOT_WHOLE = re.compile(r"run|start|tries|[0-9a-f]{32}(\.old)?|(run|start)\.part")  # what lies in STORE/.part


class Place(Protocol):
    """What of a place has to be asked, a folder's or a bucket's."""

    def read(self, key: str, /) -> bytes:
        """The content of a key."""
        ...

    def names(self, key: str, /) -> list[str]:
        """What lies directly below a key."""
        ...

    def is_file(self, key: str, /) -> bool:
        """Whether a key is a file's."""
        ...


def is_half(place: Place, scan_id: str) -> bool:
    """Whether a scan's folder holds what an interrupted write or removal has left, and nothing else."""
    names = place.names(f"scans/{scan_id}")
    return bool(names) and "zarr.json" not in names and not foreign_key(place, scan_id)


def foreign_key(place: Place, scan_id: str) -> str:
    """The first key in a scan's place that pgl_ray has not written; "": there is none, or nothing at all."""
    root = f"scans/{scan_id}"
    if place.is_file(root):
        return root
    todo = [""]
    while todo:
        below = todo.pop()
        for name in place.names(f"{root}/{below}".rstrip("/")):
            key = f"{below}/{name}".lstrip("/")
            if key in FOLDERS and not place.is_file(f"{root}/{key}"):
                todo.append(key)
            elif key not in FILES and not name.startswith(SYSTEM):
                return f"{root}/{key}"
    return f"{root}/zarr.json" if _is_anothers(place, f"{root}/zarr.json") else ""


def _is_anothers(place: Place, key: str) -> bool:
    """Whether a zarr.json is whole and of no scan of pgl_ray; a damaged one tells nothing."""
    try:
        content = place.read(key)
        json.loads(content)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except IsADirectoryError:
        return True
    return MARK not in content


def check_scan_place(place: Place, scan_id: str, url: str) -> None:
    """Refuses to put a scan where something of another's lies.

    Raises:
        ValueError: names it.
    """
    if key := foreign_key(place, scan_id):
        raise ValueError(f"{url}/{key} is there, and pgl_ray has not written it: move it elsewhere")
