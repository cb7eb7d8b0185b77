"""What inspect says of a store in figures: totals, one row per scan, and all scans as a CSV where they are too many."""

import csv
import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from pgl_ray.config import IntensityConfig, ViewsConfig
from pgl_ray.data import store, store_settings
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.place import open_place
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.shard import ARRAY_PATHS, SHARD
from pgl_ray.data.store import Index
from pgl_ray.data.system import num_cores

NUM_ROWS = 1000  # scans that a page lists; of so many the files are asked for their sizes
NUM_TIMED_PAIRS = 8
QUANTILES = {"smallest": 0, "5 %": 5, "median": 50, "95 %": 95, "largest": 100}
COLUMNS = (
    "scan_id",
    "split",
    "slices",
    "rows",
    "columns",
    "spacing_d_mm",
    "spacing_h_mm",
    "spacing_w_mm",
    "mean_hu",
    "std_hu",
    "foreground_share",
    "border_share",
    "num_labels",
    "stands_out",
)


def spread(num: int, most: int) -> list[int]:
    """At most so many numbers below `num`, evenly spread."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(int)).tolist()


def sizes(index: Index, records: Sequence[ScanRecord]) -> dict[str, int]:
    """Bytes of the shards of some scans; 0 where one is missing."""
    place = open_place(index.store)

    def size(record: ScanRecord) -> int:
        total = 0
        written = {"volume": True, "label": record.label_metadata, "source_label": record.source_label_metadata}
        for kind in (kind for kind in ARRAY_PATHS if written[kind]):
            try:
                file = place.open(f"scans/{record.scan_id}/{ARRAY_PATHS[kind]}/{SHARD}")
            except OSError:
                continue
            total += file.size
            file.close()
        return total

    with ThreadPoolExecutor(store.READS_AT_ONCE) as pool:
        return dict(zip((record.scan_id for record in records), pool.map(size, records)))


def totals(index: Index, settings: store_settings.Settings, known: Mapping[str, int]) -> list[tuple[str, str]]:
    """Figures of the whole store, each with its name.

    Args:
        known: bytes of some scans; where they are not all, the others are taken to be alike.
    """
    scans, voxels = index.scans, index.column("shape").prod(1)
    splits = Counter(record.split for record in scans)
    labelled = sum(record.label_metadata is not None for record in scans)
    by_split = ", ".join(f"{splits[name]} {name or 'without split'}" for name in sorted(splits))
    per_voxel = sum(known.values()) / int(index.numbers("shape", known).prod(1).sum())
    num_bytes = f"{sum(known.values()):,}"
    if len(known) < len(scans):
        num_bytes = f"about {per_voxel * voxels.sum() / 1e9:,.1f} GB, by {len(known)} of the scans"
    return [
        ("scans", f"{len(scans)} ({by_split}), {labelled} with labels"),
        ("voxels", f"{voxels.sum():,}"),
        ("bytes", f"{num_bytes} ({per_voxel:.2f} per voxel)"),
        ("encoding", settings.encoding + _loss(index, settings)),
        ("HU window", "{:g} to {:g}".format(*index.hu_window)),
        (
            "voxel size",
            "resampled to {:g} x {:g} x {:g} mm".format(*settings.spacing_mm) if settings.spacing_mm else "own",
        ),
    ]


def _loss(index: Index, settings: store_settings.Settings) -> str:
    if settings.encoding == "int16":
        return ", lossless"
    rms = np.sqrt(np.mean(index.column("encoding_rms_hu") ** 2))
    clipped = np.mean(index.column("clipped_share"))
    return f": {rms:.2f} HU rms inside the window, {clipped:.0%} of the voxels outside of it are clipped"


def epoch(index: Index) -> str:
    """Time of an epoch of the paper's view pairs, measured on a few of them."""
    try:
        ids = tuple(record.scan_id for record in index.scans)
        renderer = PairRenderer(index.store, ids, 0, ViewsConfig(), IntensityConfig())
        scans = np.linspace(0, len(index.scans) - 1, NUM_TIMED_PAIRS).astype(np.int64)
        rows = {"step": scans * 0, "epoch": scans * 0, "scan": scans, "draw": np.arange(len(scans))}
        every = IntensityConfig(noise_prob=1, blur_prob=1, gain_prob=1, gamma_prob=1)
        replace(renderer, intensity=every)({key: value[:1] for key, value in rows.items()})  # opens, and compiles, all
        began = time.perf_counter()
        renderer(rows)
        seconds = (time.perf_counter() - began) / len(scans)
    except (ValueError, RuntimeError, OSError) as error:  # a damaged scan
        return f"not measured: {error}"
    cores = num_cores()
    total = len(index.scans) * seconds / cores
    rate = f"{_duration(total)} on this machine's {cores} cores ({seconds * 1e3:.0f} ms per pair and core)"
    pairs = f"{len(index.scans)} view pairs of 16 x 96 x 96, one per scan"
    return f"{pairs}: {rate} where the network keeps pace; python -m pgl_ray.bench measures both"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def quantiles(index: Index) -> list[tuple[str, list[str]]]:
    """What scans are like, for a page that does not list them all: each figure at QUANTILES."""
    shape, spacing = index.column("shape"), index.column("spacing_mm")
    figures = {"slices": shape[:, 0], "rows": shape[:, 1], "columns": shape[:, 2]}
    figures |= {f"voxel along {axis}, mm": spacing[:, k] for k, axis in enumerate("DHW")}
    figures |= {"mean in the window, HU": index.column("mean_hu"), "body": index.column("foreground_share")}
    at = list(QUANTILES.values())
    return [(name, [f"{value:.4g}" for value in np.percentile(values, at)]) for name, values in figures.items()]


def as_csv(index: Index, notes: Mapping[str, list[str]]) -> bytes:
    """All scans, a line each, with what stands out of them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for scan in index.scans:
        figures = (scan.mean_hu, scan.std_hu, scan.foreground_share, scan.border_share)
        num_labels = len(scan.label_voxels) if scan.label_metadata is not None else ""
        cells = [f"{figure:.6g}" for figure in (*scan.spacing_mm, *figures)]
        writer.writerow([scan.scan_id, scan.split, *scan.shape, *cells, num_labels, "; ".join(notes[scan.scan_id])])
    return text.getvalue().encode()


def row(record: ScanRecord, index: Index, num_bytes: int, notes: list[str]) -> dict[str, Any]:
    """A scan as the page lists it."""
    names = {value: name for name, value in index.labels.items()}
    inside = [f"{names.get(value, value)} {count:,}" for value, count in sorted(record.label_voxels.items())]
    unknown = [name for name, value in index.labels.items() if value not in record.labelled]
    labels = f"{len(inside)} of {len(names)}" if record.label_metadata is not None else ""
    return {
        "scan_id": record.scan_id,
        "split": record.split,
        "shape": " x ".join(map(str, record.shape)),
        "spacing": " x ".join(f"{size:.3g}" for size in record.spacing_mm),
        "histogram": bars(np.array(record.histogram), 120, 22),
        "hu": f"{record.mean_hu:.0f} ± {record.std_hu:.0f}",
        "foreground": f"{record.foreground_share:.0%}",
        "border": f"{record.border_share:.0%}",
        "labels": labels,
        "label_title": ", ".join(inside) + (f"; not annotated: {', '.join(unknown)}" if labels and unknown else ""),
        "size": f"{num_bytes / 1e6:.1f}",
        "warn": bool(notes),
    }


def bars(counts: np.ndarray, width: int, height: int) -> dict[str, Any]:
    """Heights of a histogram's bars in an SVG of a size; square roots, so that small shares are seen."""
    tall = np.sqrt(counts / max(counts.max(), 1)) * height
    step = width / len(counts)
    path = "".join(f"M{i * step:.1f} {height}v-{h:.1f}h{step:.1f}v{h:.1f}z" for i, h in enumerate(tall) if h > 0.05)
    return {"width": width, "height": height, "path": path, "step": step}
