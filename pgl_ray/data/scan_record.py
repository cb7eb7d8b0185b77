"""What a store knows of a scan: as an object, as text in the scan's zarr.json, and as a row of index.parquet."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c

from pgl_ray.data.columns import Columns, parquet_table
from pgl_ray.data.shard import ARRAY_PATHS

if TYPE_CHECKING:
    import pyarrow as pa


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
            the bytes); size and hash cover the label's files too, and for several files the time is a hash, see
            Source.stamp.
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


def read_table(content: bytes) -> list[ScanRecord]:
    """Records of an index.parquet; an error of pyarrow's where a checksum in it does not agree."""
    return [_from_row(row) for row in parquet_table(content).to_pylist()]


def table_of(scans: Sequence[ScanRecord]) -> bytes:
    """index.parquet of some records, with a checksum per page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([_to_row(scan) for scan in scans], schema=index_schema())
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


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
