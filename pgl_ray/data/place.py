"""Where a store lies: a folder (folder.py), or a prefix in a bucket (bucket.py), with one interface.

Keys are paths below the place with "/" between the parts.
"""

import os
from pathlib import Path

from pgl_ray.data.bucket import Bucket
from pgl_ray.data.folder import Folder
from pgl_ray.paths import is_url

Place = Folder | Bucket


def open_place(url: str | os.PathLike, synced: bool = True) -> Place:
    """The place at a path or URL; nothing is made or asked for yet.

    Args:
        synced: see Folder; what a bucket took it keeps.
    """
    text = os.fspath(url)
    return Bucket(text) if is_url(text) else Folder(Path(os.path.abspath(text)), synced)
