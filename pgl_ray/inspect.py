"""python -m pgl_ray.inspect store=STORE: what lies in a store, as one self-contained HTML page.

Table, histograms and warnings come from the index and what prepare wrote beside it; of the voxels only the pictured
slices are read.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("inspect")

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb
from scipy import ndimage

from pgl_ray.config import InspectConfig
from pgl_ray.data import scan_files, store, store_settings
from pgl_ray.data.durable import check_writable_file, write_aside
from pgl_ray.data.place import open_place
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index
from pgl_ray.data.voxel_statistics import BODY_HU, HISTOGRAM_HU
from pgl_ray.files.geometry import MOST_SHEAR, shear_notes
from pgl_ray.files.notes import read_notes
from pgl_ray.pages import pages, store_answers, store_table
from pgl_ray.pages.figures import data_uri
from pgl_ray.pages.label_pictures import organ_color
from pgl_ray.paths import is_url

DISPLAY_HU = (-1000.0, 600.0)  # wide, for scans that are no soft tissue at all must be seen as such
PICTURE_PX = 192
# What stands out. Shares of voxels; each bound lies well beyond what the real CTs of the tests have.
LEAST_BELOW_FAT = 0.005  # below -128 HU: air, lung, fat
LEAST_SOFT = 0.01  # from -128 to 192 HU
MOST_ABOVE_BONE = 0.05  # above 1600 HU
MOST_IN_ONE_BIN = 0.98
LEAST_BODY = 0.02
MOST_AT_BORDER = 0.1
FEWEST_SLICES = 10
BOUNDS = (
    f"less than {LEAST_BELOW_FAT:.1%} of its voxels are below -128 HU (air, lung, fat)",
    f"less than {LEAST_SOFT:.0%} are soft tissue (-128 to 192 HU)",
    f"more than {MOST_ABOVE_BONE:.0%} are above 1600 HU",
    f"more than {MOST_IN_ONE_BIN:.0%} lie within 64 HU",
    f"less than {LEAST_BODY:.0%} are body (above {BODY_HU} HU)",
    f"the body covers more than {MOST_AT_BORDER:.0%} of the four side faces",
    f"there are fewer than {FEWEST_SLICES} slices",
    f"its axes are more than {MOST_SHEAR:g} degrees off right angles",
    "its label map is empty",
    "another scan has the same voxels",
    "prepare had something to say of it",
)
LEAST_OF_LARGEST = 0.25  # a plane of less than this share of the largest one's area is not pictured
UNUSED = {"failed.jsonl": "failed", "left_out.jsonl": "left out"}  # what prepare wrote -> in a word
NUM_UNUSED = NUM_OUTLIERS = 500  # that the page names


def run(config: InspectConfig) -> str:
    """Writes the page and returns its path.

    Raises:
        ValueError: no store there.
    """
    if config.output:
        check_writable_file(f"output={config.output}", Path(config.output))
    index, settings = store.read_index(config.store), store_settings.read_settings(config.store)
    notes = {record.scan_id: warnings(record) for record in index.scans}
    for line in read_notes(open_place(config.store)):
        if line["shown"] and line["reason"] not in notes.get(line["scan_id"], [line["reason"]]):
            notes[line["scan_id"]].append(line["reason"])
    for record, others in duplicates(index).items():
        notes[record].append(f"the same voxels as {', '.join(others)}")
    unused = [(word, line) for file, word in UNUSED.items() for line in _lines(index, file)]
    epoch = store_table.epoch(index)
    outliers = [record for record in index.scans if notes[record.scan_id]]
    listed = _listed(index, outliers)
    sizes = store_table.sizes(index, listed)
    path = Path(config.output or ("inspect.html" if is_url(index.store) else f"{index.store}/inspect.html")).absolute()
    all_listed = len(listed) == len(index.scans)
    content = {
        "answers": store_answers.of_store(index, notes, [word for word, _ in unused], epoch),
        "store": index.store,
        "num_scans": len(index.scans),
        "totals": [*store_table.totals(index, settings, sizes), ("one epoch", epoch)],
        "quantiles": [] if all_listed else store_table.quantiles(index),
        "quantile_names": list(store_table.QUANTILES),
        "csv": "" if all_listed else path.with_suffix(".csv").name,
        "preparations": [_preparation(preparation) for preparation in settings.preparations],
        "histogram": store_table.bars(index.column("histogram").sum(0), 560, 90),
        "bounds": HISTOGRAM_HU,
        "outliers": [(record.scan_id, notes[record.scan_id]) for record in outliers[:NUM_OUTLIERS]],
        "num_outliers": len(outliers),
        "pictures": [picture_of(index, one, notes[one.scan_id]) for one in _choose(config, index, notes, outliers)],
        "unused": unused[:NUM_UNUSED],
        "num_unused": {word: sum(kind == word for kind, _ in unused) for word in UNUSED.values()},
        "organs": list(index.labels),
        "colors": {name: organ_color(number) for number, name in enumerate(index.labels, 1)},
        "rows": [store_table.row(one, index, sizes[one.scan_id], notes[one.scan_id]) for one in listed],
        "thresholds": BOUNDS,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if not all_listed:
        write_aside(path.with_suffix(".csv"), store_table.as_csv(index, notes))
    write_aside(path, pages.render("inspect.html", **content).encode())
    return str(path)


# -- what stands out --------------------------------------------------------------------------------------------------


def _lines(index: Index, name: str) -> list[dict[str, Any]]:
    """What prepare wrote next to the index; nothing where it didn't, or what is there cannot be read."""
    try:
        return [json.loads(line) for line in open_place(index.store).read(name).splitlines() if line.strip()]
    except (OSError, ValueError):
        return []


def warnings(record: ScanRecord) -> list[str]:
    """What a human should look at in a scan, each with its figure."""
    counts = np.array(record.histogram) / sum(record.histogram)
    low = counts[: _bin(-128)].sum()
    soft = counts[_bin(-128) : _bin(192)].sum()
    texts = []
    if low < LEAST_BELOW_FAT:
        texts.append(f"not like HU: {low:.1%} of the voxels are air, lung or fat (an offset of 1024 missing?)")
    if soft < LEAST_SOFT:
        texts.append(f"not like HU: {soft:.1%} of the voxels are soft tissue (-128 to 192 HU)")
    if counts[-1] > MOST_ABOVE_BONE:
        texts.append(f"not like HU: {counts[-1]:.0%} of the voxels are above {HISTOGRAM_HU[-1]} HU")
    if counts.max() > MOST_IN_ONE_BIN:
        texts.append(f"nearly constant: {counts.max():.1%} of the voxels within 64 HU")
    if record.foreground_share < LEAST_BODY:
        texts.append(f"hardly any body: {record.foreground_share:.1%} of the voxels are above {BODY_HU} HU")
    if record.border_share > MOST_AT_BORDER:
        texts.append(f"field of view cuts the body: it covers {record.border_share:.0%} of the side faces")
    if record.shape[0] < FEWEST_SLICES:
        texts.append(f"{record.shape[0]} slices")
    texts += shear_notes(np.reshape(record.affine, (4, 4)))
    if record.label_metadata is not None and not record.label_voxels:
        texts.append("its label map is empty")
    return texts


def _bin(hu: int) -> int:
    """First bin at or above a bound of the histogram."""
    return HISTOGRAM_HU.index(hu) + 1


def duplicates(index: Index) -> dict[str, list[str]]:
    """scan_id -> other scans with the same voxels."""
    groups: dict[str, list[str]] = {}
    for record in index.scans:
        groups.setdefault(record.content_hash, []).append(record.scan_id)
    return {one: [other for other in group if other != one] for group in groups.values() if group[1:] for one in group}


def _listed(index: Index, outliers: list[ScanRecord]) -> list[ScanRecord]:
    """The scans that the page lists: all, or those that stand out and some between them."""
    if len(index.scans) <= store_table.NUM_ROWS:
        return list(index.scans)
    ids = {record.scan_id for record in outliers[:NUM_OUTLIERS]}
    spread = store_table.spread(len(index.scans), store_table.NUM_ROWS - len(ids))
    return [index.by_id[one] for one in sorted(ids | {index.scans[i].scan_id for i in spread})]


def _preparation(preparation: dict[str, Any]) -> dict[str, str]:
    recipe = preparation.get("recipe", {})
    return {"source": preparation["source"], **{key: recipe.get(key, "") for key in ("name", "licence", "origin")}}


# -- pictures ---------------------------------------------------------------------------------------------------------


def _choose(
    config: InspectConfig, index: Index, notes: dict[str, list[str]], outliers: list[ScanRecord]
) -> list[ScanRecord]:
    """Scans that stand out first, then evenly spread ones, as many as asked for."""
    first = outliers[: config.num_pictures]
    rest = [record for record in index.scans if not notes[record.scan_id]]
    return first + [rest[i] for i in store_table.spread(len(rest), config.num_pictures - len(first))]


PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))  # with the axis that they are cut through


def planes(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> list[tuple[str, int]]:
    """Which planes of a scan are pictured: two, or of a thin stack only the one in which it lies."""
    areas, lines = {}, {}
    for name, axis in PLANES:
        across = [k for k in range(3) if k != axis]
        areas[name] = math.prod(shape[k] * spacing_mm[k] for k in across)
        lines[name] = min(shape[k] for k in across)
    fine = [name for name in areas if lines[name] >= FEWEST_SLICES] or [max(areas, key=areas.get)]
    largest = max(areas[name] for name in fine)
    wanted = [name for name in fine if areas[name] >= LEAST_OF_LARGEST * largest]
    return [plane for plane in PLANES if plane[0] in wanted][:2]


def picture_of(index: Index, record: ScanRecord, notes: list[str]) -> dict[str, Any]:
    """Slices through the middle of the labels or else of the body, upright, at the anatomy's proportions and all at
    one scale, with the labels' outlines."""
    spacing, picture = record.spacing_mm, {"scan_id": record.scan_id, "notes": notes, "slices": [], "error": ""}
    chosen = planes(record.shape, spacing)
    try:
        reader = scan_files.open_volume(index.store, record)
        labels = scan_files.open_label(index.store, record) if record.label_metadata is not None else None
        for name, axis in chosen:
            box = [
                (at, at + 1) if k == axis else (0, n) for k, (at, n) in enumerate(zip(_middle(record), record.shape))
            ]
            image, label = (np.squeeze(part.read(np.array(box)), axis) if part else None for part in (reader, labels))
            row, column = (k for k in range(3) if k != axis)
            wide_mm, tall_mm = image.shape[1] * spacing[column], image.shape[0] * spacing[row]
            if row == 0:  # head up
                image, label = image[::-1], None if label is None else label[::-1]
            png = _png(image, label, list(index.labels.values()))
            size = {"wide": f"{wide_mm:.1f}", "ratio": f"{wide_mm / tall_mm:.3f}"}
            picture["slices"].append({"name": name, "src": png, **size})
    except RuntimeError as error:  # damaged; the others can be shown
        picture["error"] = str(error)
    return picture


def _middle(record: ScanRecord) -> list[int]:
    """The middle of the largest organ's box, else of the body's."""
    box = record.foreground_box
    if record.label_voxels:
        box = record.label_boxes[max(record.label_voxels, key=record.label_voxels.get)]
    return [(low + high) // 2 for low, high in np.reshape(box, (3, 2)).tolist()]


def _png(image: np.ndarray, label: np.ndarray | None, values: list[int]) -> str:
    """HU [rows, columns] as a small grey PNG; the k-th label value is outlined in the colour of organ k + 1."""
    cut = tuple(slice(None, None, max(1, round(size / PICTURE_PX))) for size in image.shape)
    low, high = DISPLAY_HU
    grey = ((image[cut].astype(np.float32) - low) / (high - low)).clip(0, 1)
    colors = np.repeat(grey[..., None], 3, axis=2)
    if label is not None:
        label = label[cut]
        edge = label != ndimage.minimum_filter(label, 3)
        edge |= label != ndimage.maximum_filter(label, 3)
        for number, value in enumerate(values, 1):
            colors[edge & (label == value)] = to_rgb(organ_color(number))
    sink = io.BytesIO()
    matplotlib.image.imsave(sink, colors, format="png")
    return data_uri(sink.getvalue(), "image/png")


def describe(path: str) -> str:
    """The closing line."""
    return f"inspect: {os.path.getsize(path) / 1e6:.1f} MB in {path}"
