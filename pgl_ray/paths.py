"""What paths and URLs say by themselves. With the standard library only: nodes that lack the rest run this, too."""

import os
from pathlib import Path


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a bucket's, where each read takes as long as a request; on this machine's disk none is."""
    return "://" in os.fspath(path)


def cache_folder() -> Path:
    """The user's, for what can be fetched or made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
