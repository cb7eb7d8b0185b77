"""Whether a store is whole: every byte of every scan, and its index."""

import pickle
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from pgl_ray.config import StoreConfig
from pgl_ray.convert import parallel
from pgl_ray.data import chunks, scan_files, scan_record, store, store_settings
from pgl_ray.train.progress import Stage, num_of


@dataclass(frozen=True)
class Verified:
    """What reading every byte of a store brought to light.

    Attributes:
        store: its folder.
        num_scans: scans that were read.
        damaged: scan_id -> what is wrong with it.
        index: what is wrong with index.parquet; "" = nothing.
        seconds: wall time.
    """

    store: str
    num_scans: int
    damaged: dict[str, str]
    index: str
    seconds: float


def look_through(config: StoreConfig) -> Verified:
    """Reads every byte of a store while no prepare writes into it.

    Raises:
        ValueError: no store there.
    """
    began = time.monotonic()
    store.read_settings(config.store)
    place, damaged = store.open_place(config.store), {}
    index, fault = read_index(place)
    names = sorted({*store.scan_names(place), *index})
    looks = [(name, name in index) for name in names]
    checked = parallel.in_parallel(partial(_check, folder=place.url), looks, config.ray)
    with closing(checked) as outcomes, Stage("prepare verify:", "scan", len(names), starts=True) as stage:
        for row in stage.each(outcomes, lambda: num_of(damaged, "damaged")):
            if row["reason"]:
                damaged[names[row["task"]]] = row["reason"]
    records = {name: record for name, record in store.read_records(place.url).items() if name not in damaged}
    if not fault and {name: record for name, record in index.items() if name not in damaged} != records:
        fault = "does not agree with the scans' own records: prepare did not come to its end"
    if not fault and (why := chunks.damage(place)):
        fault = f"is whole, {chunks.FILE} beside it is damaged ({why})"
    return Verified(place.url, len(names), damaged, fault, time.monotonic() - began)


def read_index(place: store.Place) -> tuple[dict[str, store.ScanRecord], str]:
    """The index' records, and what is wrong with it."""
    try:
        content = place.read("index.parquet")
        scans = scan_record.read_table(content)
        # some bytes (page statistics) have no checksum and are never read; the same pyarrow writes them the same
        fault = "" if content == store.table_of(scans) or not store_settings.made_here(place.url) else "is damaged"
        return {record.scan_id: record for record in scans}, fault
    except FileNotFoundError:
        return {}, "is missing: prepare did not come to its end"
    except Exception as error:  # pyarrow's own, of several kinds
        return {}, f"is damaged ({' '.join(str(error).split())})"


def _check(row: dict, folder: str) -> dict:
    """Checks one scan, (scan_id, whether the index has it); runs in a Ray task. Returns task, and what is damaged."""
    (name, listed), reason = pickle.loads(row["item"]), ""
    try:
        if listed or "zarr.json" in store.open_place(folder).names(f"scans/{name}"):
            scan_files.check_scan(folder, name)  # else what a killed run left in a bucket: no scan yet
    except Exception as error:  # damage may show as anything
        reason = str(error) or type(error).__name__
    return {"task": row["task"], "reason": reason}


def is_whole(folder: str, scan_id: str) -> bool:
    """Whether every byte of a scan is as it was written."""
    try:
        scan_files.check_scan(folder, scan_id)
    except (ValueError, RuntimeError):
        return False
    return True
