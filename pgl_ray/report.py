"""python -m pgl_ray.report run=RUN [a.b=c ...], run=[A,B,C] to compare, or run=SWEEP: one self-contained HTML page with
answers at its top (answers.py), then tables, curves and pictures. What a run lacks is left out, and a line says so."""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("report")

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pgl_ray.config import ReportConfig
from pgl_ray.data.array_reader import ArrayReader
from pgl_ray.data.batch_views import resize_and_flip
from pgl_ray.data.durable import check_writable_file, write_aside
from pgl_ray.data.rendering import AIR, normalise, read_padded
from pgl_ray.data.scan_files import open_label, open_source_label, open_volume
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index, read_index
from pgl_ray.data.voxel_statistics import foreground_box
from pgl_ray.files.resample import onto_grid
from pgl_ray.pages import (
    answers,
    curves,
    figures,
    label_pictures,
    next_steps,
    pages,
    pair_pictures,
    probe_tables,
    run_folders,
    slices,
    sweep_report,
    tables,
)
from pgl_ray.pages.run_folders import Run
from pgl_ray.paths import is_url
from pgl_ray.prior import overlap_box
from pgl_ray.train import run_paths
from pgl_ray.train.health import COLLAPSED
from pgl_ray.train.records import read_json

NUM_PAIRS, NUM_OVERLAYS = 2, 3


def run(config: ReportConfig) -> str:
    """Writes the page and returns its path.

    Raises:
        ValueError: a folder that is no run, or an output that cannot be written.
    """
    if config.output:
        check_writable_file(f"output={config.output}", Path(config.output))
    if sweep_report.is_sweep(config.run):
        of_sweep = sweep_report.content(Path(config.run[0]).absolute(), overlays)
        return _write(config, {"title": config.title, "notes": config.notes, **of_sweep}, "sweep.html")
    runs = run_folders.read_runs(config.run)
    pretrained, tuned = ([r for r in runs if r.door == door] for door in ("pretrain", "finetune"))
    evaluated = [r for r in tuned if r.summary]
    missing = [f"{r.name} {_unevaluated(r)}: {next_steps.evaluation(r)}" for r in tuned if not r.summary]
    missing += [f"{r.name} has no metrics yet" for r in runs if not r.rows]
    probes, old = probe_tables.read(runs)
    missing += old
    num_pairs = NUM_PAIRS if len(pretrained) == 1 else 1
    content = {
        "title": config.title,
        "notes": config.notes,
        "runs": runs,
        "color": curves.color,
        "answers": answers.of_runs(runs, probes),
        "overviews": [run_folders.overview(r) for r in runs],
        "differences": [
            (group, run_folders.differing_settings(group)) for group in (pretrained, tuned) if len(group) > 1
        ],
        "comparison": tables.comparison(evaluated) if evaluated else None,
        "probes": probe_tables.table(probes),
        "probe_pictures": [
            picture
            for name, (path, result) in zip(probe_tables.names_of(probes), probes)
            for picture in probe_pictures(name, path, result)
        ],
        "pretrained": pretrained,
        "verdicts": [tables.verdict(r) for r in pretrained],
        "health": tables.health(pretrained),
        "alignments": [table for r in pretrained if (table := alignment(r))],
        "pretrain_curves": curves.pretrain_curves(pretrained),
        "loss_words": curves.loss_words(pretrained),
        "rises": tables.rises(pretrained),
        "least_directions": COLLAPSED,
        "pairs": [
            pair for r in pretrained for pair in _or_missing(missing, r.name, lambda r=r: view_pairs(r, num_pairs))
        ],
        "tuned": tuned,
        "finetune_curves": curves.finetune_curves(tuned),
        "bars": curves.organ_bars(evaluated) if evaluated else None,
        "overlays": _or_missing(missing, "overlays", lambda: overlays(evaluated)) if evaluated else None,
        "settings": [(r.name, run_folders.settings(r)) for r in runs],
        "missing": missing,
    }
    return _write(config, content)


def _unevaluated(run: Run) -> str:
    return "has been trained on since it was evaluated" if run.outdated else "is not evaluated"


def _or_missing(missing: list[str], what: str, draw: Callable[[], Any]) -> Any:
    """What `draw` gives; where its files are gone an empty list, and a line in `missing`."""
    try:
        return draw()
    except Exception as error:  # store moved, scan gone, file damaged: each library has its own; the numbers stand
        missing.append(f"{what}: pictures left out, {type(error).__name__}: {' '.join(str(error).split())}")
        return []


def _write(config: ReportConfig, content: dict[str, Any], template: str = "report.html") -> str:
    page = pages.render(template, **content)
    into = nullcontext(Path(config.output)) if config.output else run_paths.results(config.run[0], "report.html")
    with into as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, page.encode())
    return f"{config.run[0]}/report.html" if is_url(config.run[0]) and not config.output else str(path.absolute())


# -- pictures ---------------------------------------------------------------------------------------------------------


def _open(store: str) -> tuple[Index, Mapping[str, ScanRecord]]:
    index = read_index(store)
    return index, index.by_id


def _whole(array: ScanRecord | ArrayReader) -> np.ndarray:
    """Box [3, 2] of all of a scan."""
    return np.array([(0, size) for size in array.shape])


def alignment(one: Run) -> dict[str, Any] | None:
    """What check_align left in a run's folder: its table and its picture as a data URI."""
    table, picture = one.path / "check_align.json", one.path / "check_align.png"
    if not (table.is_file() and picture.is_file()):
        return None
    content = tables.alignment(read_json(table))
    return {"name": one.name, **content, "src": figures.data_uri(picture.read_bytes(), "image/png")}


PROBE_CAPTIONS = {
    "matching": "Organ centroids of one test scan (filled), where the nearest feature of another scan finds them "
    "(crosses) and where they are (rings), drawn onto one coronal and one axial slice; the errors are those in space.",
    "features": "The same slice as CT and with the first three principal components of the features as red, green and "
    "blue, fitted over several test scans: where features name places, the same anatomy has the same colour in both "
    "scans. Each encoder has colours of its own.",
}


def probe_pictures(encoder: str, path: Path, result: dict[str, Any]) -> list[dict[str, str]]:
    """What probe drew with its result, as data URIs with captions."""
    drawn = []
    for name in result["pictures"]:
        kind = Path(name).stem.rpartition(".")[2]
        if kind in PROBE_CAPTIONS and (path.parent / name).is_file():
            src = figures.data_uri((path.parent / name).read_bytes(), "image/png")
            drawn.append({"src": src, "caption": f"{encoder}. {PROBE_CAPTIONS[kind]}"})
    return drawn


def view_pairs(one: Run, num_pairs: int) -> list[dict[str, Any]]:
    """Pictures and voxel correlations of the run's first pairs.

    Raises:
        ValueError, OSError, KeyError, ...: views.npz, the store or a scan cannot be read.
    """
    index, records = _open(one.record.index)
    with np.load(one.path / "views.npz") as file:
        views = {key: file[key] for key in file.files}
    pairs = []
    for i, scan_id in enumerate(views["scan_id"][:num_pairs].tolist()):
        pair = view_pair(views, i, index, records[scan_id])
        first, second = (
            pair_pictures.cut_region(*each, pair.overlap) for each in zip(pair.views, pair.boxes, pair.flips)
        )
        pairs.append(
            {
                "title": f"{one.name}, scan {scan_id}",
                "scan": figures.to_png(pair_pictures.pair_in_scan(pair)),
                "seen": figures.to_png(pair_pictures.pair_as_seen(pair)),
                "axial": figures.to_png(pair_pictures.pair_aligned(pair, slices.AXIAL)),
                "coronal": figures.to_png(pair_pictures.pair_aligned(pair, slices.CORONAL)),
                "aligned_r": pair_pictures.correlation(first, second),
                "raw_r": pair_pictures.correlation(*pair.views),
                "scan_r": [pair_pictures.correlation(pair.region, part) for part in (first, second)],
            }
        )
    return pairs


def view_pair(views: dict[str, np.ndarray], i: int, index: Index, record: ScanRecord) -> pair_pictures.ViewPair:
    """Pair i of views.npz with its scan."""
    reader, scaling = open_volume(index.store, record), (index.hu_window, record.mean_hu, record.std_hu)
    both = tuple(views[name][i][0].astype(np.float32) for name in ("view_1", "view_2"))
    boxes = tuple(views[name][i].astype(np.int64) for name in ("box_1", "box_2"))
    crop = normalise(read_padded(reader, overlap_box(*boxes), AIR), *scaling)
    return pair_pictures.ViewPair(
        views=both,
        boxes=boxes,
        flips=tuple(views[name][i].astype(bool) for name in ("flip_1", "flip_2")),
        volume=reader.read(_whole(record)),
        spacing_mm=np.array(record.spacing_mm),
        mean_hu=record.mean_hu,
        std_hu=max(record.std_hu, 1e-3),
        region=resize_and_flip(crop, both[0].shape, np.zeros(3, bool)).numpy(),
    )


def overlays(runs: list[Run]) -> dict[str, Any]:
    """Predicted against true labels of scans that all runs were evaluated on, side by side; what lies there of others,
    of an evaluation on another split, is in none of the figures.

    Raises:
        ValueError, OSError, KeyError, ...: no such scan, or the store or a prediction cannot be read.
    """
    if len({r.summary["index"] for r in runs}) > 1:
        raise ValueError("the runs were evaluated on different stores")
    index, records = _open(runs[0].summary["index"])
    common = set(records)
    for r in runs:
        common &= {row["scan_id"] for row in r.scores}
        common &= {path.name.removesuffix(".nii.gz") for path in _predictions(r).glob("*.nii.gz")}
    if not common:
        raise ValueError("no scan has predictions of all runs (evaluate with save_predictions=true)")
    spread = np.unique(np.linspace(0, len(common) - 1, NUM_OVERLAYS).round().astype(int))
    scans = []
    for record in (records[sorted(common)[i]] for i in spread):
        overlay, place = overlay_of(index, record, runs)
        picture = figures.to_png(label_pictures.overlay(overlay, index.label_values))
        scans.append((picture, f"Scan {record.scan_id}, {place}."))
    organs = {value: organ.replace("_", " ") for organ, value in index.labels.items()}
    legend = [(k, organs[value], label_pictures.organ_color(k)) for k, value in enumerate(index.label_values, 1)]
    return {"scans": scans, "legend": legend}


def _predictions(one: Run) -> Path:
    return one.path / "evaluation" / "predictions"


def overlay_of(index: Index, record: ScanRecord, runs: list[Run]) -> tuple[label_pictures.Overlay, str]:
    """The axial slice with the most organs, then the most organ voxels, cut to the body, on the grid that the scan was
    scored on; and which it is."""
    volume, reader = open_volume(index.store, record).read(_whole(record)), open_label(index.store, record)
    spacing_mm, box = np.array(record.spacing_mm), record.foreground_box
    if record.source_label_metadata is not None:
        stored, source = (np.array(affine).reshape(4, 4) for affine in (record.affine, record.source_affine))
        reader = open_source_label(index.store, record)
        volume = onto_grid(volume, stored, source, reader.shape)
        spacing_mm, box = np.linalg.norm(source[:3, :3], axis=0), foreground_box(volume)
    true = reader.read(_whole(reader))
    position = max(range(len(true)), key=lambda d: (len(np.unique(true[d])), np.count_nonzero(true[d])))
    h0, h1, w0, w1 = box[2:]
    body = np.s_[position, h0:h1, w0:w1]
    predictions = []
    for r in runs:
        path = _predictions(r) / f"{record.scan_id}.nii.gz"
        predicted = np.asarray(nib.load(path).dataobj)
        if predicted.shape != true.shape:
            raise ValueError(f"{path} has shape {predicted.shape}, the scan {true.shape}")
        predicted = predicted[body]
        unknown = (true[body] == 0) & ~np.isin(
            predicted, (0, *record.labelled)
        )  # not annotated: neither right nor wrong
        title = f"{r.name}: Dice {tables.number(tables.scan_means(r.scores, 'dice').get(record.scan_id), '.3f')}"
        predictions.append((title, predicted, (predicted != true[body]) & ~unknown))
    place = f"axial slice {position} of {len(true)}"
    return label_pictures.Overlay(volume[body], true[body], predictions, spacing_mm), place


def describe(path: str) -> str:
    """The closing line."""
    size = "" if is_url(path) else f"{os.path.getsize(path) / 1e6:.1f} MB in "
    return f"report: {size}{path}"
