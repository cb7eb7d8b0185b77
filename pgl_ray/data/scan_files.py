"""The files of one scan in a store: written, opened and checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgl_ray.data.array_reader import ArrayReader, ChunkIndex
from pgl_ray.data.hu_codes import StoredVoxels, coded
from pgl_ray.data.own_files import check_scan_place
from pgl_ray.data.place import Place, open_place
from pgl_ray.data.scan_record import ScanRecord, group_files, parse_record
from pgl_ray.data.shard import ARRAY_PATHS, SHARD, array_metadata, encode_shard
from pgl_ray.data.voxel_statistics import (
    body_shares,
    count_labels,
    count_values,
    foreground_box,
    histogram,
    label_boxes,
    mean_and_std,
)


@dataclass(frozen=True)
class Known:
    """Fields of ScanRecord that whoever writes a scan knows, and its voxels do not say."""

    split: str = ""
    orientation: str = ""
    rounding_error_hu: float = 0.0
    num_padding: int = 0
    source: str = ""
    source_size: int = 0
    source_mtime_ns: int = 0
    source_hash: str = ""


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
    hu_window: tuple[float, float] = (-1024.0, 325.0),
    encoding: str = "int16",
    chunk: tuple[int, int, int] = (8, 64, 64),
    compression: str = "lz4",
    **known: Any,
) -> ScanRecord:
    """Writes one scan. Where it replaces one of that name the store has no index from then on, for that speaks of the
    voxels before.

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
        known: fields of Known.

    Raises:
        ValueError: wrong dtype, a label of another shape, or what pgl_ray has not written lies there.
        OSError: the disk is full or not writable; nothing of the scan remains.
    """
    _check(scan_id, volume, label)
    counts = count_values(volume.view(np.uint16))
    stored = coded(volume, counts, hu_window) if encoding == "uint8" else StoredVoxels(volume, None, {}, counts)
    arrays = {"volume": (stored.array, stored.attributes, compression)}
    if label is not None:
        arrays["label"] = label, {}, "lz4"
    if source_label is not None:
        arrays["source_label"] = source_label, {}, "lz4"
    record = ScanRecord(
        scan_id=scan_id,
        **_geometry(volume.shape, affine),
        **_of_voxels(volume, counts, stored, hu_window),
        **_of_labels(label, labelled),
        source_affine=() if source_label is None else _flat(source_affine),
        **_metadata(arrays, chunk),
        **vars(Known(**known)),
    )
    with _own_place(store, scan_id).replaced(f"scans/{scan_id}", stale="index.parquet") as scan:
        for kind, (array, _, codec) in arrays.items():
            scan.write(f"{ARRAY_PATHS[kind]}/{SHARD}", encode_shard(array, chunk, codec))
        for key, content in group_files(record).items():  # its own zarr.json last: with it a scan is whole
            scan.write(key, [content])
    return record


def _own_place(store: str | Path, scan_id: str) -> Place:
    place = open_place(store)
    check_scan_place(place, scan_id, place.url)
    return place


def _check(scan_id: str, volume: np.ndarray, label: np.ndarray | None) -> None:
    if volume.dtype != np.int16 or volume.ndim != 3:
        raise ValueError(f"volume of {scan_id}: {volume.dtype} {volume.shape}, expected int16 [D, H, W]")
    if label is not None and (label.dtype not in (np.uint8, np.uint16) or label.shape != volume.shape):
        raise ValueError(f"label of {scan_id}: {label.dtype} {label.shape}, expected uint8 or uint16 {volume.shape}")


def _geometry(shape: tuple[int, ...], affine: np.ndarray) -> dict[str, Any]:
    spacing_mm = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0).tolist()
    return {"shape": shape, "spacing_mm": tuple(spacing_mm), "affine": _flat(affine)}


def _flat(affine: np.ndarray | None) -> tuple[float, ...]:
    return tuple(np.asarray(affine, np.float64).ravel().tolist())


def _of_voxels(
    volume: np.ndarray, counts: np.ndarray, stored: StoredVoxels, hu_window: tuple[float, float]
) -> dict[str, Any]:
    """What training reads (mean, deviation, hash) is of what is stored; what a human looks at, of the scan itself."""
    mean, std = mean_and_std(stored.counts, hu_window)
    body, border = body_shares(volume, counts)
    return {
        "mean_hu": mean,
        "std_hu": std,
        "foreground_box": foreground_box(volume),
        "content_hash": _content_hash(stored.array, stored.table),
        "encoding_rms_hu": stored.rms_hu,
        "clipped_share": stored.clipped_share,
        "histogram": histogram(counts),
        "foreground_share": body,
        "border_share": border,
    }


def _of_labels(label: np.ndarray | None, labelled: tuple[int, ...]) -> dict[str, Any]:
    return {
        "labelled": tuple(sorted(int(value) for value in labelled)),
        "label_boxes": {} if label is None else label_boxes(label),
        "label_voxels": {} if label is None else count_labels(label),
    }


def _metadata(arrays: dict[str, tuple[np.ndarray, dict, str]], chunk: tuple[int, int, int]) -> dict[str, Any]:
    texts = {
        kind: array_metadata(array.shape, array.dtype, chunk, attributes, codec)
        for kind, (array, attributes, codec) in arrays.items()
    }
    return {
        "array_metadata": texts["volume"],
        "label_metadata": texts.get("label"),
        "source_label_metadata": texts.get("source_label"),
    }


def _content_hash(stored: np.ndarray, table: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for part in stored:
        digest.update(np.ascontiguousarray(part if table is None else table[part], "<i2").data)
    return digest.hexdigest()


def open_volume(
    store: str | Path, record: ScanRecord, codes: bool = False, index: ChunkIndex | None = None
) -> ArrayReader:
    """Reader of a scan's HU, or of what is stored for them; the others as ArrayReader's."""
    return ArrayReader(store, record.scan_id, "volume", record.array_metadata, codes, index)


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
