"""The store: one Zarr v3 group per scan and a Parquet index over them, in a folder or in a bucket.

    STORE/store.json           format, HU window, encoding, organ name -> label value, what was prepared and by what
    STORE/index.parquet        one row per scan: the fields of ScanRecord
    STORE/chunks.parquet       where the chunks of every shard lie (data/chunks.py), for readers of a bucket
    STORE/scans/<scan_id>/     OME-Zarr 0.5 group; its attribute "pgl_ray" is the scan's record
    STORE/scans/<scan_id>/0/                 int16 HU or uint8 codes of it, one shard
    STORE/scans/<scan_id>/labels/organs/0/   uint8 or uint16 on the same grid, one shard
    STORE/scans/<scan_id>/source_label/      where scans are resampled: the label map on the scan's own grid, one shard

A scan is written aside and put in place when whole (data/place.py), and the index is assembled from the scans'
attributes: an interrupted run leaves a valid store.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import google_crc32c
import numpy as np
from scipy import ndimage

from pgl_ray.data import chunks, wire
from pgl_ray.data.array_reader import ArrayReader, ChunkIndex
from pgl_ray.data.columns import Changed, Columns, Rows, parquet_table
from pgl_ray.data.hu_codes import code_table
from pgl_ray.data.place import Place, open_place
from pgl_ray.data.shard import ARRAY_PATHS, SHARD, array_metadata, encode_shard

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 3
WRITERS = (
    "pgl_ray",
    "zarr",
    "numcodecs",
    "numpy",
    "pyarrow",
    "scipy",
    "nibabel",
    "SimpleITK",
    "pydicom",
)  # whose versions count
READS_AT_ONCE = 16  # records; an object store answers each after tens of milliseconds
READS_IN_TURN = 8
HISTOGRAM_HU = tuple(range(-1024, 1601, 64))  # inner bounds of the records' bins; the first and last bin are open
BODY_HU = -500  # voxels above it are body (or couch), below it air and lung
ALL_HU = np.arange(2**16, dtype=np.uint16).view(np.int16)  # by its bits as uint16, the order that voxels are counted in
HISTOGRAM_STARTS = [0, *(hu + 2**15 for hu in HISTOGRAM_HU)]  # of the bins, among all HU in ascending order


@dataclass(frozen=True)
class ScanRecord:
    """What the index knows of a scan. Axis order D, H, W; boxes are half-open (d0, d1, h0, h1, w0, w1) in voxels.

    One `of_row` keeps nothing and reads a field when it is asked for it: whoever needs some fields of many scans has no
    others in memory.

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
        content_hash: sha256 of the int16 HU that a reader gives, in C order.
        rounding_error_hu: largest change by rounding to int16; 0 for integer sources.
        encoding_rms_hu: root mean square change by 8-bit codes of the voxels inside the HU window; 0 for int16.
        clipped_share: share of voxels outside the HU window, which 8-bit codes do not tell apart; 0 for int16.
        histogram: number of voxels per bin of HISTOGRAM_HU.
        foreground_share: share of voxels above -500 HU.
        border_share: that of the voxels on the four side faces; high where the field of view cuts the body.
        split: "train", "test", ... or "".
        array_metadata, label_metadata: zarr.json of the two arrays, so that readers need not open it; None = no label.
        labelled: label values that are annotated in this scan; others are unknown here, not absent.
        label_boxes, label_voxels: box and number of voxels of every label value that occurs.
        num_padding: voxels that were below -1024 HU in the source and are -1024 here.
        source_label_metadata, source_affine: of a resampled scan's label map on the scan's own grid, which evaluation
            scores on; None and () where the stored grid is the scan's own, or it has no label.
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
    encoding_rms_hu: float
    clipped_share: float
    histogram: tuple[int, ...]
    foreground_share: float
    border_share: float
    split: str
    array_metadata: str
    label_metadata: str | None
    labelled: tuple[int, ...]
    label_boxes: dict[int, tuple[int, ...]]
    label_voxels: dict[int, int]
    num_padding: int
    source_label_metadata: str | None
    source_affine: tuple[float, ...]

    @classmethod
    def of_row(cls, columns: Columns, row: int) -> "ScanRecord":
        """The record in a row of an index."""
        record = object.__new__(cls)
        record.__dict__["_row"] = columns, row
        return record

    def __getattr__(self, name: str) -> Any:  # called for what __dict__ has not: the fields of one `of_row`
        if name not in ScanRecord.__dataclass_fields__ or "_row" not in self.__dict__:
            raise AttributeError(f"a scan's record has no {name!r}")
        columns, row = self.__dict__["_row"]
        return _parsed(name, columns.value(name, row))

    def __reduce__(self) -> tuple[type, tuple]:
        return ScanRecord, tuple(getattr(self, name) for name in ScanRecord.__dataclass_fields__)


@dataclass(frozen=True)
class Settings:
    """What holds for all scans of a store.

    Attributes:
        labels: organ name -> label value.
        hu_window: of the statistics, of the views and of 8-bit codes.
        encoding: "int16" or "uint8".
        spacing_mm: that all scans were resampled to (D, H, W); none: each has its own.
        preparations: config of every prepare that added to the store, one per source folder.
    """

    labels: dict[str, int]
    hu_window: tuple[float, float]
    encoding: str = "int16"
    spacing_mm: tuple[float, float, float] | None = None
    preparations: tuple[dict[str, Any], ...] = ()


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
        """Scans of a split that have a label map.

        Raises:
            ValueError: a map holds a value without a name: it would pass for background.
        """
        found = [scan for scan in self.scans if scan.split == split and scan.label_metadata is not None]
        known = set(self.label_values)
        for scan in found:
            unknown = sorted(set(scan.label_voxels) - known)
            if unknown:
                raise ValueError(
                    f"scan {scan.scan_id!r} of {self.store} has label values {unknown} that have no name; known: "
                    f"{self.labels}; prepare the store again with all of them in labels.names"
                )
        return found

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


# -- records and index ------------------------------------------------------------------------------------------------


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


def data_sets(settings: Settings) -> tuple[dict[str, str], ...]:
    """What `Index.data_sets` holds."""
    recipes = [said.get("recipe", {}) for said in settings.preparations]
    found = [{key: recipe.get(key, "") for key in ("name", "licence", "origin")} for recipe in recipes]
    return tuple(one for number, one in enumerate(found) if one not in found[:number])


def read_table(content: bytes) -> list[ScanRecord]:
    """Records of an index.parquet; an error of pyarrow's where a checksum in it does not agree."""
    return [_from_row(row) for row in parquet_table(content).to_pylist()]


def read_settings(store: str | Path) -> Settings:
    """What store.json says.

    Raises:
        ValueError: no store there, one of another format, or store.json is damaged.
    """
    place = open_place(store)
    try:
        content = place.read("store.json")
    except FileNotFoundError:
        raise ValueError(
            f"{str(store)!r} is not a store (no store.json): make one with python -m pgl_ray.prepare"
        ) from None
    try:
        said = json.loads(content)
        known = said["format"]
        if known == FORMAT:
            spacing, (low, high) = said["spacing_mm"], said["hu_window"]
            if spacing:
                d, h, w = spacing
                spacing = d, h, w
            return Settings(said["labels"], (low, high), said["encoding"], spacing, tuple(said["preparations"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"store.json of {str(store)!r} is damaged: delete it, then prepare the same folders again; scans that are "
            "there stay"
        ) from None
    raise ValueError(
        f"store {str(store)!r} has format {known}, this version reads {FORMAT}: prepare the same folders into a new one"
    )


def write_settings(store: str | Path, labels: dict[str, int], hu_window: tuple[float, float], **others: Any) -> None:
    """Writes store.json; `others` are the further fields of Settings."""
    low, high = hu_window
    settings = Settings(labels, (low, high), **others)
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    said = {"format": FORMAT, **dataclasses.asdict(settings), "labels": ordered, "versions": _versions()}
    open_place(store).write("store.json", [json.dumps(said, indent=2, ensure_ascii=False).encode()])


def _versions() -> dict[str, str]:
    found = {}
    for name in WRITERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pgl_ray run from a checkout, pydicom not installed
            continue
    return found


def made_here(store: str | Path) -> bool:
    """Whether this environment has the versions that the store was written with."""
    return json.loads(open_place(store).read("store.json"))["versions"] == _versions()


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


def table_of(scans: Sequence[ScanRecord]) -> bytes:
    """index.parquet of some records, with a checksum per page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([_to_row(scan) for scan in scans], schema=index_schema())
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read_records(store: str | Path) -> dict[str, ScanRecord]:
    """Records of all whole scans, from their Zarr attributes."""
    place = open_place(store)

    def read(names: Sequence[str]) -> dict[str, ScanRecord]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # prepare writes it again
                found[name] = parse_record(place.read(f"scans/{name}/zarr.json"))
        return found

    names = scan_names(place)  # in turns of some, for a thread's turn costs as much as reading a file
    turns = [names[start : start + READS_IN_TURN] for start in range(0, len(names), READS_IN_TURN)]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return {name: record for found in pool.map(read, turns) for name, record in found.items()}


def scan_names(place: Place) -> list[str]:
    """Names of the scans' folders, whole or not; what a file browser leaves (.DS_Store) is none."""
    return [name for name in place.names("scans") if not name.startswith(".")]


def parse_record(content: bytes) -> ScanRecord:
    """Record in a scan's zarr.json.

    Raises:
        ValueError: damaged: any bit of it is another.
    """
    try:
        row = json.loads(content)["attributes"]["pgl_ray"]
        record = _from_row(row)
        whole = content == group_text(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"zarr.json is cut off or damaged ({type(error).__name__})") from None
    if not whole:
        raise ValueError("zarr.json is damaged: its checksum does not agree")
    return record


def update_record(store: str | Path, record: ScanRecord) -> None:
    """Replaces the record of a scan; its arrays stay."""
    open_place(store).write(f"scans/{record.scan_id}/zarr.json", [group_text(record)])


def group_text(record: ScanRecord) -> bytes:
    """A scan's zarr.json, with a checksum of the record."""
    row = _to_row(record)
    checksum = google_crc32c.value(json.dumps(row, sort_keys=True).encode())
    return _group_text(_ome(record.spacing_mm) | {"pgl_ray": row, "pgl_ray_crc32c": checksum})


def _to_row(record: ScanRecord) -> dict:
    """Plain values; the dicts as JSON text, because Parquet has no dict of integers."""
    fields = {name: getattr(record, name) for name in ScanRecord.__dataclass_fields__}
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return row | {key: json.dumps(row[key]) for key in ("label_boxes", "label_voxels")}


def _from_row(row: dict) -> ScanRecord:
    return ScanRecord(**{name: _parsed(name, value) for name, value in row.items()})


def _parsed(name: str, value: Any) -> Any:
    """A field of a row as the record has it."""
    if name == "label_boxes":
        return {int(label): tuple(box) for label, box in json.loads(value).items()}
    if name == "label_voxels":
        return {int(label): count for label, count in json.loads(value).items()}
    return tuple(value) if isinstance(value, list) else value


def index_schema() -> "pa.Schema":
    """Arrow types by hand: inference would fail on columns that are empty in all scans."""
    import pyarrow as pa

    integers, floats = pa.list_(pa.int64()), pa.list_(pa.float64())
    lists = {
        "shape": integers,
        "foreground_box": integers,
        "labelled": integers,
        "histogram": integers,
        "spacing_mm": floats,
        "affine": floats,
        "source_affine": floats,
    }
    scalars: dict[object, pa.DataType] = {int: pa.int64(), float: pa.float64()}
    fields = dataclasses.fields(ScanRecord)
    return pa.schema([(field.name, lists.get(field.name, scalars.get(field.type, pa.string()))) for field in fields])


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


# -- writing ----------------------------------------------------------------------------------------------------------


def write_scan(
    store: str | Path,
    scan_id: str,
    volume: np.ndarray,
    affine: np.ndarray,
    *,
    label: np.ndarray | None = None,
    source_label: np.ndarray | None = None,
    source_affine: np.ndarray | None = None,
    labelled: tuple[int, ...] = (),
    split: str = "",
    hu_window: tuple[float, float] = (-1024.0, 325.0),
    encoding: str = "int16",
    chunk: tuple[int, int, int] = (8, 64, 64),
    compression: str = "lz4",
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
        store: folder of the store, or its URL.
        scan_id: name of the scan's folder.
        volume: int16 [D, H, W], HU.
        affine: [4, 4], stored voxel index (d, h, w, 1) -> RAS+ mm.
        label: uint8 or uint16 [D, H, W].
        source_label, source_affine: of a resampled scan, the label map on the scan's own grid.
        labelled: label values that are annotated.
        hu_window: of the statistics, and of 8-bit codes.
        encoding: "int16", lossless, or "uint8": 256 steps over the HU window, what lies outside is clipped.
        chunk: inner chunk of the shard in voxels.
        compression: of the volume, "lz4" or "none"; labels are always compressed.
        split, orientation, rounding_error_hu, num_padding, the other source_*: see ScanRecord.

    Raises:
        ValueError: wrong dtype, or a label of another shape.
        OSError: the disk is full or not writable; nothing of the scan remains.
    """
    if volume.dtype != np.int16 or volume.ndim != 3:
        raise ValueError(f"volume of {scan_id}: {volume.dtype} {volume.shape}, expected int16 [D, H, W]")
    if label is not None and (label.dtype not in (np.uint8, np.uint16) or label.shape != volume.shape):
        raise ValueError(f"label of {scan_id}: {label.dtype} {label.shape}, expected uint8 or uint16 {volume.shape}")
    counts = _counts(volume.view(np.uint16))
    attributes: dict[str, float] = {}
    stored, table, loss = volume, None, (0.0, 0.0)
    if encoding == "uint8":
        codes, attributes = _codes(hu_window)
        table = _hu_of(attributes)
        loss = _loss(counts, codes, attributes, hu_window)
        stored = codes[volume.view(np.uint16)]
        counts = np.bincount(table[codes].view(np.uint16), counts, 2**16).astype(np.int64)
    mean, std = _mean_and_std(counts, hu_window)
    body, border = _shares(volume, counts)
    depth, height, width = volume.shape
    spacing_d, spacing_h, spacing_w = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0).tolist()
    metadata = array_metadata(stored.shape, stored.dtype, chunk, attributes, compression)
    arrays = {"volume": (stored, metadata, compression)}
    if label is not None:
        arrays["label"] = (label, array_metadata(label.shape, label.dtype, chunk), "lz4")
    if source_label is not None:
        arrays["source_label"] = (source_label, array_metadata(source_label.shape, source_label.dtype, chunk), "lz4")
    record = ScanRecord(
        scan_id=scan_id,
        shape=(depth, height, width),
        spacing_mm=(spacing_d, spacing_h, spacing_w),
        orientation=orientation,
        affine=tuple(float(value) for value in np.asarray(affine, dtype=np.float64).ravel()),
        mean_hu=mean,
        std_hu=std,
        foreground_box=foreground_box(volume),
        source=source,
        source_size=source_size,
        source_mtime_ns=source_mtime_ns,
        source_hash=source_hash,
        content_hash=_content_hash(stored, table),
        rounding_error_hu=rounding_error_hu,
        num_padding=num_padding,
        encoding_rms_hu=loss[0],
        clipped_share=loss[1],
        histogram=_histogram(counts),
        foreground_share=body,
        border_share=border,
        split=split,
        array_metadata=arrays["volume"][1],
        label_metadata=arrays["label"][1] if label is not None else None,
        labelled=tuple(sorted(int(value) for value in labelled)),
        label_boxes={} if label is None else _label_boxes(label),
        label_voxels={} if label is None else count_labels(label),
        source_label_metadata=arrays["source_label"][1] if source_label is not None else None,
        source_affine=() if source_label is None else tuple(np.asarray(source_affine, np.float64).ravel().tolist()),
    )
    with open_place(store).replaced(f"scans/{scan_id}") as scan:
        for kind, (array, _, codec) in arrays.items():
            scan.write(f"{ARRAY_PATHS[kind]}/{SHARD}", encode_shard(array, chunk, codec))
        for key, content in group_files(record).items():  # its own zarr.json last: with it a scan is whole
            scan.write(key, [content])
    return record


def _content_hash(stored: np.ndarray, table: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for part in stored:
        digest.update(np.ascontiguousarray(part if table is None else table[part], "<i2").data)
    return digest.hexdigest()


def group_files(record: ScanRecord) -> dict[str, bytes]:
    """Every file of a scan but the shards, by its key below the scan's."""
    files = {f"{ARRAY_PATHS['volume']}/zarr.json": record.array_metadata.encode()}
    if record.label_metadata is not None:
        files[f"{ARRAY_PATHS['label']}/zarr.json"] = record.label_metadata.encode()
        files["labels/zarr.json"] = _group_text({"ome": {"version": "0.5", "labels": ["organs"]}})
        ome = _ome(record.spacing_mm)["ome"] | {"image-label": {"source": {"image": "../../"}}}
        files["labels/organs/zarr.json"] = _group_text({"ome": ome})
    if record.source_label_metadata is not None:
        files[f"{ARRAY_PATHS['source_label']}/zarr.json"] = record.source_label_metadata.encode()
    return files | {"zarr.json": group_text(record)}


def _group_text(attributes: dict) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=2).encode()


def _ome(spacing_mm: tuple[float, float, float]) -> dict:
    """OME-Zarr 0.5 attributes of a one-level image."""
    scale = {"type": "scale", "scale": list(spacing_mm)}
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    level = {"path": "0", "coordinateTransformations": [scale]}
    return {"ome": {"version": "0.5", "multiscales": [{"name": "volume", "axes": axes, "datasets": [level]}]}}


def _counts(array: np.ndarray) -> np.ndarray:
    """Number of voxels per unsigned value, some slices at a time because bincount widens its input to 8 bytes a voxel;
    single ones would cost more in adding up the counts than in counting."""
    size, num = 2 ** (8 * array.itemsize), max(1, 2**20 // max(1, array[0].size))
    counts = np.zeros(size, np.int64)
    for i in range(0, len(array), num):
        counts += np.bincount(array[i : i + num].ravel(), minlength=size)
    return counts


def statistics(volume: np.ndarray, hu_window: tuple[float, float]) -> tuple[float, float]:
    """Mean and standard deviation after clipping, exact and independent of the order of summation."""
    return _mean_and_std(_counts(volume.view(np.uint16)), hu_window)


def _mean_and_std(counts: np.ndarray, hu_window: tuple[float, float]) -> tuple[float, float]:
    values, size = ALL_HU.clip(*hu_window).astype(np.float64), counts.sum()
    mean = np.sum(counts * values) / size
    return float(mean), math.sqrt(np.sum(counts * (values - mean) ** 2) / size)


def _histogram(counts: np.ndarray) -> tuple[int, ...]:
    return tuple(np.add.reduceat(np.roll(counts, 2**15), HISTOGRAM_STARTS).tolist())


def _codes(hu_window: tuple[float, float]) -> tuple[np.ndarray, dict[str, float]]:
    """Table from int16 HU (viewed as uint16) to 8-bit codes, and the array attributes that undo it, by CF's names."""
    low, high = hu_window
    step = (high - low) / 255
    return np.rint((ALL_HU.clip(low, high) - low) / step).astype(np.uint8), {"scale_factor": step, "add_offset": low}


def _hu_of(attributes: dict[str, float]) -> np.ndarray:
    """int16 HU [256] of the codes of an array with these attributes."""
    table = code_table(attributes)
    if table is None:
        raise ValueError(f"attributes {attributes}: those of an array of 8-bit codes have scale_factor and add_offset")
    return table


def _loss(
    counts: np.ndarray, codes: np.ndarray, attributes: dict, hu_window: tuple[float, float]
) -> tuple[float, float]:
    """Root mean square error of 8-bit codes inside the HU window, and the share of voxels outside of it."""
    inside = (hu_window[0] <= ALL_HU) & (hu_window[1] >= ALL_HU)
    errors, num = _hu_of(attributes)[codes] - ALL_HU.astype(np.float64), int(counts[inside].sum())
    rms = math.sqrt(np.sum((counts * errors**2)[inside]) / max(num, 1))
    return rms, float(1 - num / counts.sum())


def _shares(volume: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Share of voxels above BODY_HU in the volume, and on its four side faces."""
    faces = (volume[:, 0], volume[:, -1], volume[:, :, 0], volume[:, :, -1])
    bodies = sum(int(np.count_nonzero(face > BODY_HU)) for face in faces)
    body = counts[: 2**15].sum() + counts[2**16 + BODY_HU + 1 :].sum()  # HU of 0 and above stand first, see ALL_HU
    return float(body / volume.size), bodies / sum(face.size for face in faces)


def foreground_box(volume: np.ndarray) -> tuple[int, ...]:
    """Half-open box (d0, d1, h0, h1, w0, w1) in voxels of what is above -500 HU in [D, H, W]; all where nothing is."""
    body = np.asarray(volume > BODY_HU)
    if not body.any():
        return tuple(bound for size in volume.shape for bound in (0, size))
    box: list[int] = []
    seen = np.asarray(body.any(axis=0))
    for line in (body.any(axis=(1, 2)), seen.any(axis=1), seen.any(axis=0)):
        inside = np.flatnonzero(line)
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


def open_volume(
    store: str | Path, record: ScanRecord, codes: bool = False, index: ChunkIndex | None = None
) -> ArrayReader:
    """Reader of a scan's HU, or of what is stored for them; the others as ArrayReader's."""
    return ArrayReader(store, record.scan_id, "volume", record.array_metadata, codes, index)


def hu_of_codes(hu_window: tuple[float, float]) -> np.ndarray:
    """int16 HU [256] of the 8-bit codes of a store with a HU window."""
    return _hu_of(_codes(hu_window)[1])


def open_label(store: str | Path, record: ScanRecord, index: ChunkIndex | None = None) -> ArrayReader:
    """Reader of a scan's label map.

    Raises:
        ValueError: the scan has none.
    """
    if record.label_metadata is None:
        raise ValueError(f"scan {record.scan_id!r} of {str(store)!r} has no label map")
    return ArrayReader(store, record.scan_id, "label", record.label_metadata, index=index)


def open_source_label(store: str | Path, record: ScanRecord) -> ArrayReader:
    """Reader of the label map on the scan's own grid.

    Raises:
        ValueError: the scan has none: it is no resampled one, or one without labels.
    """
    if record.source_label_metadata is None:
        raise ValueError(
            f"scan {record.scan_id!r} of {str(store)!r} has no label map on another grid than the stored one"
        )
    return ArrayReader(store, record.scan_id, "source_label", record.source_label_metadata)


def check_scan(store: str | Path, scan_id: str) -> None:
    """Reads all that is stored of a scan and compares it with its checksums.

    Raises:
        ValueError, RuntimeError: what is damaged or missing.
    """
    place, key = open_place(store), "zarr.json"
    try:
        record = parse_record(place.read(f"scans/{scan_id}/{key}"))
        for key, content in group_files(record).items():
            if place.read(f"scans/{scan_id}/{key}") != content:
                raise ValueError(f"{key} is damaged: it does not agree with the scan's record")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{key} is missing") from None
    if record.scan_id != scan_id:
        raise ValueError(f"zarr.json is that of scan {record.scan_id!r}")
    if open_volume(store, record).verify() != record.content_hash:
        raise ValueError("voxels do not agree with their sha256")
    if record.label_metadata is not None:
        open_label(store, record).verify()
    if record.source_label_metadata is not None:
        open_source_label(store, record).verify()
