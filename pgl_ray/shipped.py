"""Files that come with pgl_ray beside its code: configs, recipes of data sets, search spaces."""

from pathlib import Path

FOLDERS = ("conf", "data_prep", "tune_spaces")
PACKAGE = Path(__file__).parent


def path_of(name: str) -> Path | None:
    """Where a file such as `data_prep/bcv.yaml` lies; none: no such file comes with pgl_ray.

    An installed package has the folders inside, a checkout beside it.
    """
    if not name.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
        return None
    roots = [PACKAGE, *([PACKAGE.parent] if (PACKAGE.parent / "pyproject.toml").is_file() else [])]
    return next((root / name for root in roots if (root / name).is_file()), None)


def find(arg: str) -> str:
    """An argument of a command line; one that names a file that comes with pgl_ray, and none here, as its path."""
    path = path_of(arg)  # first: what is typed may be longer than a path can be
    return str(path) if path and not Path(arg).exists() else arg
