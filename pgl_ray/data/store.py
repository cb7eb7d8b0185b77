"""The store: one Zarr v3 group per scan and a Parquet index over them.

    STORE/store.json           format, HU window, organ name -> label value
    STORE/index.parquet        one row per scan: the fields of ScanRecord
    STORE/scans/<scan_id>/     OME-Zarr 0.5 group; its attribute "pgl_ray" is the scan's record
    STORE/scans/<scan_id>/0/                 int16 HU, one shard
    STORE/scans/<scan_id>/labels/organs/0/   uint8 or uint16 on the same grid, one shard

A scan is written to STORE/.part and renamed when whole, and the index is assembled from the scans' attributes: an
interrupted run leaves a valid store.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from scipy import ndimage

from pgl_ray.data.shard import ARRAY_PATHS, ArrayReader, write_array

FORMAT = 1
BODY_HU = -500  # voxels above it are body (or couch), below it air and lung


@dataclass(frozen=True)
class ScanRecord:
    """What the index knows of a scan. Axis order D, H, W; boxes are half-open (d0, d1, h0, h1, w0, w1) in voxels.

    Attributes:
        scan_id: unique in the store.
        shape: of the stored array.
        spacing_mm: voxel size.
        orientation: the source's axis codes in its own axis order, e.g. "RAS" for a NIfTI's i, j, k.
        affine: 4 x 4, row-major; maps the stored voxel index (d, h, w, 1) to RAS+ mm.
        mean_hu, std_hu: of all voxels after clipping to the store's HU window.
        foreground_box: the voxels above -500 HU; the whole volume where there is none.
        source, source_size, source_mtime_ns, source_hash: the file it was made from (path, bytes, time, sha256 over
            the bytes); size, time and hash cover the label file too.
        content_hash: sha256 of the stored int16 array in C order.
        rounding_error_hu: largest change by rounding to int16; 0 for integer sources.
        split: "train", "test", ... or "".
        array_metadata, label_metadata: zarr.json of the two arrays, so that readers need not open it; None = no label.
        labelled: label values that are annotated in this scan; others are unknown here, not absent.
        label_boxes, label_voxels: box and number of voxels of every label value that occurs.
        num_padding: voxels that were below -1024 HU in the source and are -1024 here.
    """

    scan_id: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    affine: tuple[float, ...]
    mean_hu: float
    std_hu: float
    foreground_box: tuple[int, ...]
    source: str
    source_size: int
    source_mtime_ns: int
    source_hash: str
    content_hash: str
    rounding_error_hu: float
    split: str
    array_metadata: str
    label_metadata: str | None
    labelled: tuple[int, ...]
    label_boxes: dict[int, tuple[int, ...]]
    label_voxels: dict[int, int]
    num_padding: int = 0


@dataclass(frozen=True)
class Index:
    """All scans of a store.

    Attributes:
        store: absolute path of its folder.
        scans: sorted by scan_id.
        labels: organ name -> label value.
        hu_window: of the statistics, and of the views.
    """

    store: str
    scans: tuple[ScanRecord, ...]
    labels: dict[str, int]
    hu_window: tuple[float, float]

    def labelled(self, split: str) -> list[ScanRecord]:
        """Scans of a split that have a label map."""
        return [scan for scan in self.scans if scan.split == split and scan.label_metadata is not None]

    @property
    def label_values(self) -> tuple[int, ...]:
        """Label values in ascending order; class k of a network is the k-th of them, class 0 is background."""
        return tuple(sorted(self.labels.values()))


# -- records and index ------------------------------------------------------------------------------------------------


def read_index(store: str | Path) -> Index:
    """Reads a store's index.

    Raises:
        ValueError: not a store, prepare did not finish, or no scan in it.
    """
    import pyarrow.parquet as pq

    labels, hu_window = read_settings(store)
    path = Path(store, "index.parquet")
    if not path.is_file():
        raise ValueError(f"store {str(store)!r} has no index.parquet: run prepare to its end")
    rows = pq.read_table(path).to_pylist()
    if not rows:
        raise ValueError(f"store {str(store)!r} holds no scan: its failed.jsonl says why")
    return Index(os.path.abspath(store), tuple(_from_row(row) for row in rows), labels, hu_window)


def read_settings(store: str | Path) -> tuple[dict[str, int], tuple[float, float]]:
    """Label names and HU window of a store.

    Raises:
        ValueError: no store there, or one of another format.
    """
    path = Path(store, "store.json")
    if not path.is_file():
        raise ValueError(f"{str(store)!r} is not a store (no store.json): make one with python -m pgl_ray.prepare")
    settings = json.loads(path.read_text())
    if settings["format"] != FORMAT:
        raise ValueError(f"store {str(store)!r} has format {settings['format']}, this version reads {FORMAT}")
    return settings["labels"], tuple(settings["hu_window"])


def write_settings(store: str | Path, labels: dict[str, int], hu_window: tuple[float, float]) -> None:
    """Writes store.json."""
    try:
        made_by = version("pgl_ray")
    except PackageNotFoundError:  # run from a checkout
        made_by = "checkout"
    Path(store).mkdir(parents=True, exist_ok=True)
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    settings = {"format": FORMAT, "hu_window": list(hu_window), "labels": ordered, "pgl_ray": made_by}
    write_aside(Path(store, "store.json"), json.dumps(settings, indent=2).encode())


def write_index(store: str | Path, labels: dict[str, int], hu_window: tuple[float, float]) -> Index:
    """Assembles store.json and index.parquet from the records of all scans; the order of writing leaves no trace."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = read_records(store)
    scans = tuple(records[scan_id] for scan_id in sorted(records))
    write_settings(store, labels, hu_window)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([_to_row(scan) for scan in scans], schema=_schema()), sink)
    write_aside(Path(store, "index.parquet"), sink.getvalue())
    return Index(os.path.abspath(store), scans, labels, hu_window)


def read_records(store: str | Path) -> dict[str, ScanRecord]:
    """Records of all whole scans, from their Zarr attributes."""
    records = {}
    for path in Path(store, "scans").glob("*/zarr.json"):
        try:
            records[path.parent.name] = _from_row(json.loads(path.read_text())["attributes"]["pgl_ray"])
        except (ValueError, KeyError, TypeError):  # cut off by a power failure: not whole, so prepare writes it again
            continue
    return records


def update_record(store: str | Path, record: ScanRecord) -> None:
    """Replaces the record of a scan; its arrays stay."""
    _write_group(Path(store, "scans", record.scan_id), _ome(record.spacing_mm) | {"pgl_ray": _to_row(record)})


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file in one step: readers see the old one or the new one."""
    aside = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _to_row(record: ScanRecord) -> dict:
    """Plain values; the dicts as JSON text, because Parquet has no dict of integers."""
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(record).items()}
    return row | {key: json.dumps(row[key]) for key in ("label_boxes", "label_voxels")}


def _from_row(row: dict) -> ScanRecord:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    boxes, voxels = json.loads(row["label_boxes"]), json.loads(row["label_voxels"])
    values["label_boxes"] = {int(value): tuple(box) for value, box in boxes.items()}
    values["label_voxels"] = {int(value): count for value, count in voxels.items()}
    return ScanRecord(**values)


def _schema():
    """Arrow types by hand: inference would fail on columns that are empty in all scans."""
    import pyarrow as pa

    integers, floats = pa.list_(pa.int64()), pa.list_(pa.float64())
    lists = {
        "shape": integers,
        "foreground_box": integers,
        "labelled": integers,
        "spacing_mm": floats,
        "affine": floats,
    }
    scalars = {int: pa.int64(), float: pa.float64()}
    fields = dataclasses.fields(ScanRecord)
    return pa.schema([(field.name, lists.get(field.name, scalars.get(field.type, pa.string()))) for field in fields])


def class_lookup(label_values: tuple[int, ...]) -> np.ndarray:
    """Table from label value to class index (uint8): 0 = background, k = the k-th label value; others are 0."""
    table = np.zeros(2**16, np.uint8)
    table[list(label_values)] = np.arange(1, len(label_values) + 1)
    return table


# -- writing ----------------------------------------------------------------------------------------------------------


def write_scan(
    store: str | Path,
    scan_id: str,
    volume: np.ndarray,
    affine: np.ndarray,
    *,
    label: np.ndarray | None = None,
    labelled: tuple[int, ...] = (),
    split: str = "",
    hu_window: tuple[float, float] = (-1024.0, 325.0),
    chunk: tuple[int, int, int] = (8, 64, 64),
    orientation: str = "",
    rounding_error_hu: float = 0.0,
    num_padding: int = 0,
    source: str = "",
    source_size: int = 0,
    source_mtime_ns: int = 0,
    source_hash: str = "",
) -> ScanRecord:
    """Writes one scan, replacing a scan of that name; the index is not touched.

    Args:
        store: folder of the store.
        scan_id: name of the scan's folder.
        volume: int16 [D, H, W], HU.
        affine: [4, 4], stored voxel index (d, h, w, 1) -> RAS+ mm.
        label: uint8 or uint16 [D, H, W].
        labelled: label values that are annotated.
        hu_window: of the statistics.
        chunk: inner chunk of the shard in voxels.
        split, orientation, rounding_error_hu, num_padding, source*: see ScanRecord.

    Raises:
        ValueError: wrong dtype, or a label of another shape.
        OSError: the disk is full or not writable; nothing of the scan remains.
    """
    if volume.dtype != np.int16 or volume.ndim != 3:
        raise ValueError(f"volume of {scan_id}: {volume.dtype} {volume.shape}, expected int16 [D, H, W]")
    if label is not None and (label.dtype not in (np.uint8, np.uint16) or label.shape != volume.shape):
        raise ValueError(f"label of {scan_id}: {label.dtype} {label.shape}, expected uint8 or uint16 {volume.shape}")
    part, target = Path(store, ".part", uuid.uuid4().hex), Path(store, "scans", scan_id)
    mean, std = statistics(volume, hu_window)
    try:
        part.mkdir(parents=True)
        record = ScanRecord(
            scan_id=scan_id,
            shape=tuple(int(size) for size in volume.shape),
            spacing_mm=tuple(float(size) for size in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)),
            orientation=orientation,
            affine=tuple(float(value) for value in np.asarray(affine, dtype=np.float64).ravel()),
            mean_hu=mean,
            std_hu=std,
            foreground_box=_foreground_box(volume),
            source=source,
            source_size=source_size,
            source_mtime_ns=source_mtime_ns,
            source_hash=source_hash,
            content_hash=hashlib.sha256(np.ascontiguousarray(volume, dtype="<i2")).hexdigest(),
            rounding_error_hu=rounding_error_hu,
            num_padding=num_padding,
            split=split,
            array_metadata=write_array(part / ARRAY_PATHS["volume"], volume, chunk),
            label_metadata=None if label is None else write_array(part / ARRAY_PATHS["label"], label, chunk),
            labelled=tuple(sorted(int(value) for value in labelled)),
            label_boxes={} if label is None else _label_boxes(label),
            label_voxels={} if label is None else count_labels(label),
        )
        if label is not None:
            _write_group(part / "labels", {"ome": {"version": "0.5", "labels": ["organs"]}})
            ome = _ome(record.spacing_mm)["ome"] | {"image-label": {"source": {"image": "../../"}}}
            _write_group(part / "labels/organs", {"ome": ome})
        _write_group(part, _ome(record.spacing_mm) | {"pgl_ray": _to_row(record)})
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            target.rename(part.with_name(f"{part.name}.old"))
        part.rename(target)
    finally:
        for left in (part, part.with_name(f"{part.name}.old")):
            shutil.rmtree(left, ignore_errors=True)
    return record


def _write_group(folder: Path, attributes: dict) -> None:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    write_aside(folder / "zarr.json", json.dumps(group, indent=2).encode())


def _ome(spacing_mm: tuple[float, float, float]) -> dict:
    """OME-Zarr 0.5 attributes of a one-level image."""
    scale = {"type": "scale", "scale": list(spacing_mm)}
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    level = {"path": "0", "coordinateTransformations": [scale]}
    return {"ome": {"version": "0.5", "multiscales": [{"name": "volume", "axes": axes, "datasets": [level]}]}}


def _counts(array: np.ndarray) -> np.ndarray:
    """Number of voxels per unsigned value, slice by slice because bincount widens its input to 8 bytes a voxel."""
    size = 2 ** (8 * array.itemsize)
    return sum(np.bincount(part.ravel(), minlength=size) for part in array)


def statistics(volume: np.ndarray, hu_window: tuple[float, float]) -> tuple[float, float]:
    """Mean and standard deviation after clipping, exact and independent of the order of summation."""
    counts = _counts(volume.view(np.uint16))
    values = np.arange(2**16, dtype=np.uint16).view(np.int16).clip(*hu_window).astype(np.float64)
    mean = np.sum(counts * values) / volume.size
    return float(mean), math.sqrt(np.sum(counts * (values - mean) ** 2) / volume.size)


def _foreground_box(volume: np.ndarray) -> tuple[int, ...]:
    body = volume > BODY_HU
    if not body.any():
        return tuple(bound for size in volume.shape for bound in (0, size))
    box = []
    for others in ((1, 2), (0, 2), (0, 1)):
        inside = np.flatnonzero(body.any(axis=others))
        box += [int(inside[0]), int(inside[-1]) + 1]
    return tuple(box)


def _label_boxes(label: np.ndarray) -> dict[int, tuple[int, ...]]:
    found = ndimage.find_objects(label)
    return {value: tuple(b for s in box for b in (s.start, s.stop)) for value, box in enumerate(found, 1) if box}


def count_labels(label: np.ndarray) -> dict[int, int]:
    """Voxels of every label value that occurs, background left out."""
    counts = _counts(label)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}


# -- reading -----------------------------------------------------------------------------------------------------------


def open_volume(store: str | Path, record: ScanRecord) -> ArrayReader:
    """Reader of a scan's HU."""
    return ArrayReader(store, record.scan_id, "volume", record.array_metadata)


def open_label(store: str | Path, record: ScanRecord) -> ArrayReader:
    """Reader of a scan's label map; the scan must have one."""
    return ArrayReader(store, record.scan_id, "label", record.label_metadata)
