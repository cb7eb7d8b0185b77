"""The path on this machine of what is asked of a run, which lies in a folder or in a bucket."""

import contextlib
import filecmp
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from pgl_ray.data.durable import put_in_place
from pgl_ray.paths import is_url
from pgl_ray.train.mirror import Mirror, own_events, parts_of, read_versions, url_of, whole
from pgl_ray.train.run_files import EVENTS, MANIFEST, METRICS, NAME, STATE, write_json

WEIGHTS = (".pt", ".pth", ".safetensors")


def mirror(run: str | os.PathLike) -> Mirror | None:
    """This machine's copies of a run in a bucket; none for a folder.

    Raises:
        ValueError: no object store of that kind.
    """
    return Mirror(os.fspath(run)) if is_url(run) else None


def origin(run: str | os.PathLike) -> str:
    """What the user calls a run: of a copy its URL."""
    return url_of(run) or os.fspath(run)


def events_file(run: str | os.PathLike) -> Path:
    """Where this process notes events of a run's folder or working copy."""
    return own_events(Path(run)) if url_of(run) else Path(run, EVENTS)


def network(run: str) -> Path:
    """Path on this machine of a file with weights, or of a run with what its network is read from, wherever it lies."""
    if not is_url(run):
        return Path(run)
    parent, _, name = run.rpartition("/")
    if name.endswith(WEIGHTS):
        return Mirror(parent).fetched({name}.intersection) / name
    return Mirror(run).fetched(_of_network)


def is_checkpoint(run: str) -> bool:
    """Whether a path is that of one checkpoint: a file, or a folder that a later checkpoint removes with all in it."""
    is_named = bool(NAME.fullmatch(os.path.basename(run)))
    if is_url(run):
        return is_named or run.endswith(WEIGHTS)
    return os.path.isfile(run) or (is_named and os.path.isdir(run))


def _of_network(keys: Collection[str]) -> list[str]:
    single = [name for name in ("best.pt", STATE) if name in keys]
    return single[:1] or [f"{name}/{file}" for name in whole(keys)[-1:] for file in (STATE, MANIFEST)]


def followed(run: str | os.PathLike) -> Path:
    """Path on this machine where a run's metrics and events are read, wherever it lies."""
    copy = mirror(run)
    if not copy:
        return Path(run)
    return copy.fetched(lambda keys: [key for key in keys if key in (METRICS, EVENTS) or key.startswith("events/")])


def fetch_for_report(run: str) -> Path:
    """Path on this machine of a run with all that a report shows, wherever it lies: no weights, no logs."""
    copy = mirror(run)
    if not copy:
        return Path(run)
    left_out = ("logs/", ".", "events", "checkpoint_")
    return copy.fetched(lambda keys: [key for key in keys if not key.startswith(left_out) and not key.endswith(".pt")])


@contextlib.contextmanager
def results(run: str, name: str) -> Iterator[Path]:
    """Path of a file or folder of results in a run; of a run in a bucket it is one of this machine, which is brought
    there when the block ends well. A folder goes on from what another machine has brought there since."""
    copy = mirror(run)
    if not copy:
        yield Path(run, name)
        return
    path = copy.home / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    _match(copy, path)
    yield path
    keys = set()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            key = file.relative_to(path.parent).as_posix()
            copy.place.write(key, parts_of(file))
            keys.add(key)
    for key in _below(copy, name).keys() - keys:  # at last: whoever is killed before leaves nothing half
        copy.place.remove(key)
    write_json(_note(path), _below(copy, name))


def _match(copy: Mirror, path: Path) -> None:
    """Makes this machine's copy of a folder of results the bucket's, unless the bucket has what this machine saw or
    brought there last: what was interrupted since goes on."""
    stored, known = _below(copy, path.name), read_versions(_note(path))
    new = [key for key in stored if stored[key] != known.get(key)]
    gone = [key for key in known.keys() - stored.keys() if (path.parent / key).exists()]
    if stored and (new or gone or not path.exists()):
        cache = copy.fetched({*stored}.intersection)
        own = path.exists() and not gone and all(_same(cache / key, path.parent / key) for key in new)
        if not own:
            aside = path.with_name(f".{path.name}.part")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(cache / path.name, aside)
            shutil.rmtree(path, ignore_errors=True)
            put_in_place(aside, path)
    write_json(_note(path), stored)


def _note(path: Path) -> Path:
    """Where the versions stand that the bucket had of a copy's keys when this machine last saw them."""
    return path.with_name(f".{path.name}.json")


def _below(copy: Mirror, name: str) -> dict[str, str]:
    """Keys below a folder in the bucket, with their versions."""
    return {key: version for key, version in copy.place.versions().items() if key.startswith(f"{name}/")}


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
