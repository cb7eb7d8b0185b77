"""The store: one Zarr v3 group per scan and a Parquet index over them, in a folder or in a bucket.

    STORE/store.json           format, HU window, encoding, organ name -> label value, what was prepared and by what
    STORE/index.parquet        one row per scan: the fields of ScanRecord
    STORE/chunks.parquet       where the chunks of every shard lie (data/chunks.py), for readers of a bucket
    STORE/scans/<scan_id>/     OME-Zarr 0.5 group; its attribute "pgl_ray" is the scan's record
    STORE/scans/<scan_id>/0/                 int16 HU or uint8 codes of it, one shard
    STORE/scans/<scan_id>/labels/organs/0/   uint8 or uint16 on the same grid, one shard
    STORE/scans/<scan_id>/source_label/      where scans are resampled: the label map on the scan's own grid, one shard

A scan is written aside and put in place when whole (folder.py, bucket.py), and the index is assembled from the scans'
attributes: an interrupted run leaves a valid store.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from pgl_ray.data import chunks, wire
from pgl_ray.data.columns import Changed, Columns, Rows
from pgl_ray.data.place import Place, open_place
from pgl_ray.data.scan_record import ScanRecord, group_text, parse_record, table_of
from pgl_ray.data.store_settings import data_sets, read_settings, write_settings

READS_AT_ONCE = 16  # records; an object store answers each after tens of milliseconds
READS_IN_TURN = 8


@dataclass(frozen=True)
class Index:
    """All scans of a store.

    Attributes:
        store: absolute path of its folder, or its URL.
        scans: sorted by scan_id; those of a store that is read are made when they are asked for.
        labels: organ name -> label value.
        hu_window: of the statistics, and of the views.
        spacing_mm: that all scans were resampled to; none: each has its own.
        data_sets: name, licence and origin of each that was prepared into it, as their recipes say; "" for not said.
    """

    store: str
    scans: Sequence[ScanRecord]
    labels: dict[str, int]
    hu_window: tuple[float, float]
    spacing_mm: tuple[float, float, float] | None = None
    data_sets: tuple[dict[str, str], ...] = ()

    def labelled(self, split: str) -> list[ScanRecord]:
        """Scans of a split that have a label map, and an organ that is annotated in it.

        Raises:
            ValueError: a map holds a value without a name: it would pass for background.
        """
        scans = [scan for scan in self.scans if scan.split == split and _is_labelled(scan)]
        known = set(self.label_values)
        for scan in scans:
            unknown = sorted(set(scan.label_voxels) - known)
            if unknown:
                raise ValueError(
                    f"scan {scan.scan_id!r} of {self.store} has label values {unknown} that have no name; known: "
                    f"{self.labels}; prepare the store again with all of them in labels.names"
                )
        return scans

    def annotated(self, scan_ids: Iterable[str]) -> list[bool]:
        """Of each organ, by ascending label value, whether it is annotated in one of these scans."""
        values = {value for scan_id in set(scan_ids) for value in self.by_id[scan_id].labelled}
        return [value in values for value in self.label_values]

    @property
    def labelled_splits(self) -> list[str]:
        """Splits that have `labelled` scans."""
        return sorted({scan.split for scan in self.scans if _is_labelled(scan)}) if self.labels else []

    @property
    def by_id(self) -> Mapping[str, ScanRecord]:
        """scan_id -> scan."""
        return self.scans.by_name if isinstance(self.scans, Rows) else {scan.scan_id: scan for scan in self.scans}

    def column(self, name: str) -> np.ndarray:
        """A field of all scans: [N], or [N, length] where a scan has several numbers; to be left as it is."""
        if isinstance(self.scans, Rows):
            return cast(np.ndarray, self.scans.columns.column(name))  # of numbers
        return np.array([getattr(scan, name) for scan in self.scans])

    def numbers(self, name: str, scan_ids: Iterable[str]) -> np.ndarray:
        """A field of some scans: [N], or [N, length] where a scan has several numbers."""
        if not isinstance(self.scans, Rows):
            by_id = self.by_id
            return np.array([getattr(by_id[scan_id], name) for scan_id in scan_ids])
        numbers = cast(np.ndarray, self.scans.columns.column(name))
        return numbers[[self.scans.names.place(scan_id) for scan_id in scan_ids]]

    @property
    def label_values(self) -> tuple[int, ...]:
        """Label values in ascending order; class k of a network is the k-th of them, class 0 is background."""
        return tuple(sorted(self.labels.values()))


def _is_labelled(scan: ScanRecord) -> bool:
    return scan.label_metadata is not None and bool(scan.labelled)


def check_labelled(index: Index, given: str | None) -> None:
    """Refuses a store without labels, by what the user gave it as.

    Raises:
        ValueError: it has none.
    """
    if not index.labels:
        raise ValueError(f"index={given} holds no labels: prepare it from a source with label maps")


def read_index(store: str | Path) -> Index:
    """Reads a store's index.

    Raises:
        ValueError: not a store, prepare did not finish, or no scan in it.
    """
    settings, place = read_settings(store), open_place(store)
    try:
        file = place.open("index.parquet")
        # of a far one each column would take three requests, one after the other
        columns = Columns(
            wire.held(file) if isinstance(file, wire.FarFile) else file, partial(_index_fault, str(store))
        )
    except FileNotFoundError:
        raise ValueError(f"store {str(store)!r} has no index.parquet: run prepare to its end") from None
    if not columns.num_rows:
        raise ValueError(f"store {str(store)!r} holds no scan: its failed.jsonl says why")
    scans = Rows(columns, ScanRecord.of_row, columns.names("scan_id"))
    return Index(place.url, scans, settings.labels, settings.hu_window, settings.spacing_mm, data_sets(settings))


def _index_fault(store: str, error: Exception) -> ValueError:
    if isinstance(error, Changed):
        return ValueError(f"index.parquet of {store!r} was written anew while it was read: start again")
    reason = " ".join(str(error).split())
    return ValueError(
        f"index.parquet of {store!r} is damaged ({reason}): python -m pgl_ray.prepare repair store={store}"
    )


def write_index(
    store: str | Path,
    labels: dict[str, int],
    hu_window: tuple[float, float],
    records: dict[str, ScanRecord] | None = None,
    **others: Any,
) -> Index:
    """Assembles store.json and index.parquet from the records of all scans; the order of writing leaves no trace.

    Args:
        records: of all scans; none: they are read.
        others: further fields of Settings.
    """
    records = read_records(store) if records is None else records
    scans = tuple(records[scan_id] for scan_id in sorted(records))
    write_settings(store, labels, hu_window, **others)
    place = open_place(store)
    chunks.write(place, scans)
    place.write("index.parquet", [table_of(scans)])
    low, high = hu_window
    return Index(place.url, scans, labels, (low, high), others.get("spacing_mm"))


def read_records(store: str | Path) -> dict[str, ScanRecord]:
    """Records of all whole scans, from their Zarr attributes."""
    place = open_place(store)

    def read(names: Sequence[str]) -> dict[str, ScanRecord]:
        records = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # prepare writes it again
                records[name] = parse_record(place.read(f"scans/{name}/zarr.json"))
        return records

    names = scan_names(place)  # in turns of some, for a thread's turn costs as much as reading a file
    turns = [names[start : start + READS_IN_TURN] for start in range(0, len(names), READS_IN_TURN)]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return {name: record for records in pool.map(read, turns) for name, record in records.items()}


def scan_names(place: Place) -> list[str]:
    """Names of the scans' folders, whole or not; what a file browser leaves (.DS_Store) is none."""
    return [name for name in place.names("scans") if not name.startswith(".")]


def update_record(store: str | Path, record: ScanRecord) -> None:
    """Replaces the record of a scan; its arrays stay."""
    open_place(store).write(f"scans/{record.scan_id}/zarr.json", [group_text(record)])


def class_lookup(label_values: tuple[int, ...]) -> np.ndarray:
    """Table from label value to class index (uint8): 0 = background, k = the k-th label value; others are 0.

    Raises:
        ValueError: more organs than that holds.
    """
    if len(label_values) > 255:
        raise ValueError(f"{len(label_values)} organs: label maps of networks have room for 255")
    table = np.zeros(2**16, np.uint8)
    table[list(label_values)] = np.arange(1, len(label_values) + 1)
    return table
