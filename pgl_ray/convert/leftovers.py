"""What lies in a store's scans/ besides whole scans: what a killed run has left, damaged scans, and other people's."""

from collections.abc import Iterator

from pgl_ray.convert.todo import Todo
from pgl_ray.data import store
from pgl_ray.data.own_files import foreign_key, is_half
from pgl_ray.files.source import Fault


def cleared_records(place: store.Place) -> dict[str, store.ScanRecord]:
    """Of the store's scans; what a killed run had of a scan is removed, which a bucket keeps."""
    records = store.read_records(place.url)
    for name in set(store.scan_names(place)) - set(records):
        if is_half(place, name):
            place.remove(f"scans/{name}")
    return records


def unreadable(place: store.Place, records: dict[str, store.ScanRecord]) -> Iterator[Fault]:
    """What has no record: damaged scans, and what pgl_ray has not written."""
    for name in set(store.scan_names(place)) - set(records):
        if place.names(f"scans/{name}"):  # else a stray file
            if foreign := foreign_key(place, name):
                yield Fault(f"{place.url}/scans/{name}", _not_ours(place, foreign))
                continue
            mend = f"its zarr.json is damaged: python -m pgl_ray.prepare repair store={place.url}"
            yield Fault(f"{place.url}/scans/{name}", mend)


def remove_renamed(place: store.Place, todo: Todo, records: dict[str, store.ScanRecord]) -> list[Fault]:
    """Removes what lies in the store under another name by now; what cannot be removed."""
    faults = []
    stored = {source.scan_id for source in todo.stored}
    for new, olds in todo.renamed.items():
        for old in olds if new in stored else ():
            print(f"prepare: renamed: {old} -> {new}", flush=True)
            if old in stored:
                continue
            if foreign := foreign_key(place, old):
                faults.append(Fault(f"{place.url}/scans/{old}", _not_ours(place, foreign)))
                continue
            place.remove(f"scans/{old}")
            del records[old]
    return faults


def _not_ours(place: store.Place, key: str) -> str:
    """What is to be done about another's file or folder in a scan's place."""
    return f"pgl_ray has not written {place.url}/{key}, so it stays: move it elsewhere"
