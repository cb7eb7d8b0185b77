"""python -m pgl_ray.match init=RUN a=CT b=CT point=[x,y,z] output=DIR [a.b=c ...]: places of one CT found in another.

Nothing is trained: a place of scan A is found in scan B by the nearest feature, as the judge of point matching does it.
The page that is written holds the same 8-bit features, so a click in it gives the same answer as the command.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("match")

import csv
import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pgl_ray
from pgl_ray import api
from pgl_ray.config import MatchConfig
from pgl_ray.data.durable import check_writable, put_in_place, write_aside
from pgl_ray.data.facts import disagreements
from pgl_ray.files import ct
from pgl_ray.files.resample import onto_grid
from pgl_ray.files.scans import ScanFile, one_scan
from pgl_ray.files.source import some
from pgl_ray.judge import search
from pgl_ray.judge.features import ScanEncoder, at_spacing, spacing_of
from pgl_ray.pages import match_page

STORED_AXES = {"S": (0, 1), "I": (0, -1), "P": (1, 1), "A": (1, -1), "L": (2, 1), "R": (2, -1)}
NOT_SAFE = re.compile(r"[^\w.-]+")
READINGS = {
    "reestimated": "BatchNorm re-estimated on the store's scans",
    "trained": "BatchNorm as trained",
    "none": "no BatchNorm",
}


class Asked(NamedTuple):
    """A place of scan A.

    Attributes:
        name: of it.
        place_mm: [3], RAS+.
    """

    name: str
    place_mm: np.ndarray


class Row(NamedTuple):
    """A line of the table; places in RAS+ mm.

    Attributes:
        name: of the place.
        a_mm, b_mm: in either scan.
        similarity: mean cosine over maps.
        runner_up_mm, runner_up_similarity: of the highest other peak far away; none: there is no such.
    """

    name: str
    a_mm: np.ndarray
    b_mm: np.ndarray
    similarity: float
    runner_up_mm: np.ndarray | None
    runner_up_similarity: float | None


class Result(NamedTuple):
    """What was found.

    Attributes:
        rows: per place.
        output: folder.
        reading: state of BatchNorm.
        seconds: wall time.
    """

    rows: list[Row]
    output: str
    reading: str
    seconds: float


def run(config: MatchConfig) -> Result:
    """Writes matches.csv, match.json, similarity maps and the page.

    Raises:
        ValueError: no place is asked for, one lies outside of the scan, scans or weights cannot be used, or the page
            would get too large.
    """
    began = time.monotonic()
    if not (config.point or config.voxel or config.labels or config.landmarks):
        raise ValueError("no place is asked for: give point=[x,y,z], voxel=[i,j,k], labels=FILE or landmarks=FILE.csv")
    output = Path(config.output)
    for key, source in (("a", Path(config.a)), ("b", Path(config.b))):
        if source.is_dir() and source.resolve() == output.resolve():
            raise ValueError(
                f"output={output} is {key}'s folder, whose similarity maps would be CTs next time: give another"
            )
    files = one_scan(Path(config.a), "a", [output]), one_scan(Path(config.b), "b", [output])
    check_writable(f"output={config.output}", output.absolute())
    store = api.open_store(config.index) if config.index else None
    options = {"hu_window": config.hu_window, "size": config.size, "seed": config.seed, "spacing": config.spacing}
    encoder = api.load_encoder(config.init, store, **options)
    encoder.levels(config.maps)
    originals = [one.read() for one in files]
    asked = places(config, originals[0])
    scans = [_prepared(encoder, scan, key, config) for scan, key in zip(originals, ("a", "b"))]
    if files[0].path.resolve() == files[1].path.resolve() and files[0].slices == files[1].slices:
        print("match: note: a and b are the same scan: every place should find itself", flush=True)
    try:
        search.grid_points(scans[1])
    except ValueError as error:
        raise ValueError(f"b={config.b}: {error}") from None
    match_page.check_size(encoder, scans, config.maps, config.page_mb)

    codes = search.encode(encoder, scans, config.maps, config.seed)
    among = search.candidates(scans[1], codes[1])
    voxels = [_voxel(scans[0], one.place_mm) for one in asked]
    if away := [one.name for one, is_away in zip(asked, search.away_from_body(scans[0], np.array(voxels))) if is_away]:
        print(f"match: note: outside of A's body, while B is searched inside of its own: {some(away)}", flush=True)
    hits = [search.search(codes[0], voxel, codes[1], among, config.apart_mm) for voxel in voxels]
    rows = [_row(one.name, scans, voxel, hit) for one, voxel, hit in zip(asked, voxels, hits)]
    names = _similarity_maps(config, asked, hits, among, scans[1], originals[1], files[1])
    facts = _facts(config, encoder, names)
    if config.page_mb:
        texts = {"title": f"{files[0].scan_id} in {files[1].scan_id}", "a": files[0].scan_id, "b": files[1].scan_id}
        texts |= {"how": f"{config.init}, {READINGS[encoder.reading]}", "made_by": facts["made_by"]}
        page = match_page.make_page(scans, codes, among, config.apart_mm, rows, voxels, hits, texts)
        write_aside(output / "match.html", page.encode())
    write_aside(output / "matches.csv", _table(rows).encode())
    _replace_facts(output, facts)
    return Result(rows, str(output), encoder.reading, time.monotonic() - began)


# -- what is asked ----------------------------------------------------------------------------------------------------


def places(config: MatchConfig, scan: ct.Scan) -> list[Asked]:
    """Every place that the config asks for.

    Args:
        config: names point, voxel, labels or landmarks.
        scan: A, on its own grid.

    Raises:
        ValueError: a place outside of the scan, an unreadable file, or no label in it.
    """
    asked = []
    if config.point:
        asked.append(Asked("point", np.array(config.point)))
    if config.voxel:
        voxel = stored_voxel(config.voxel, scan.orientation, scan.voxels.shape)
        asked.append(Asked("voxel", search.place_of(scan, voxel)))
    if config.labels:
        asked += _centroids(config, scan)
    if config.landmarks:
        asked += _landmarks(Path(config.landmarks))
    for one in asked:
        _check_inside(scan, one)
    return asked


def stored_voxel(voxel: tuple[int, int, int], orientation: str, shape: tuple[int, ...]) -> np.ndarray:
    """A voxel's index in the file's own axes -> (d, h, w).

    Args:
        voxel: (i, j, k).
        orientation: the file's axis codes, e.g. "RAS".
        shape: of the stored array (D, H, W).

    Raises:
        ValueError: outside of the scan.
    """
    stored = np.empty(3, np.int64)
    axes = [STORED_AXES[code] for code in orientation]
    sizes = [shape[axis] for axis, _ in axes]
    if not all(0 <= at < size for at, size in zip(voxel, sizes)):
        bounds = ", ".join(f"0 to {size - 1}" for size in sizes)
        raise ValueError(f"voxel={list(voxel)} lies outside of scan A, whose axes i, j, k run from {bounds}")
    for at, size, (axis, sign) in zip(voxel, sizes, axes):
        stored[axis] = at if sign > 0 else size - 1 - at
    return stored


def _centroids(config: MatchConfig, scan: ct.Scan) -> list[Asked]:
    label = ct.read_label(config.labels, scan)
    values = [int(value) for value in np.unique(label) if value]
    if not values:
        raise ValueError(f"labels={config.labels} holds no label: all of it is 0")
    missing = [f"{name}={value}" for name, value in config.names.items() if value not in values]
    if missing:
        raise ValueError(f"names: {', '.join(missing)} is not in {config.labels}, which holds {values}")
    names = {value: name for name, value in config.names.items()}
    wanted = [value for value in values if value in names] or values
    asked = []
    for value in wanted:
        middle = np.argwhere(label == value).mean(0)
        asked.append(Asked(names.get(value, f"label_{value}"), (scan.affine @ [*middle, 1.0])[:3]))
    return asked


def _landmarks(path: Path) -> list[Asked]:
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"landmarks={path} cannot be read: {error}") from None
    if not rows or not {"name", "x", "y", "z"} <= set(rows[0]):
        raise ValueError(f"landmarks={path}: expected a first line name,x,y,z and a line per place in mm (RAS+)")
    asked = []
    for number, row in enumerate(rows, 2):
        try:
            place = np.array([float(row[key]) for key in "xyz"])
        except (TypeError, ValueError):
            place = np.array([np.nan])
        if not np.isfinite(place).all():
            raise ValueError(f"landmarks={path}, line {number}: x, y, z must be three numbers in mm")
        asked.append(Asked(row["name"] or f"line {number}", place))
    return asked


def _check_inside(scan: ct.Scan, asked: Asked) -> None:
    try:
        search.voxel_at(scan, asked.place_mm)
    except ValueError as error:
        raise ValueError(f"{asked.name}: {str(error).replace('of the scan', 'of scan A', 1)}") from None


def _voxel(scan: ct.Scan, place_mm: np.ndarray) -> np.ndarray:
    """The voxel nearest to a place of the scan; a resampled grid may end half a voxel before the scan does."""
    index = (np.linalg.inv(scan.affine) @ [*place_mm, 1.0])[:3]
    return np.floor(index + 0.5).astype(np.int64).clip(0, np.array(scan.voxels.shape) - 1)


def _prepared(encoder: ScanEncoder, scan: ct.Scan, key: str, config: MatchConfig) -> ct.Scan:
    """A scan as the encoder sees it; prints in what it is unlike the training's."""
    if spacing := spacing_of(config.spacing, encoder):
        scan = at_spacing(scan, spacing)
    notes = list(scan.notes)
    notes += disagreements(encoder.facts, encoder.hu_window, scan.voxels, scan.affine) if encoder.facts else []
    for note in notes:
        mend = "; spacing=weights resamples it" if note.startswith("its voxels are") else ""
        print(f"match: note: {key}={getattr(config, key)}: {note}{mend}", flush=True)
    return scan


# -- what is written --------------------------------------------------------------------------------------------------


def _row(name: str, scans: list[ct.Scan], voxel: np.ndarray, hit: search.Hit) -> Row:
    other = None if hit.other_voxel is None else search.place_of(scans[1], hit.other_voxel)
    a_mm, b_mm = search.place_of(scans[0], voxel), search.place_of(scans[1], hit.voxel)
    return Row(name, a_mm, b_mm, hit.similarity, other, hit.other_similarity)


def _similarity_maps(
    config: MatchConfig,
    asked: list[Asked],
    hits: list[search.Hit],
    among: search.Candidates,
    scan: ct.Scan,
    original: ct.Scan,
    file: ScanFile,
) -> list[str]:
    """Writes the first places' maps on B's own grid; returns the files' names."""
    names = []
    for number, (one, hit) in enumerate(zip(asked[: config.similarity_maps], hits), 1):
        values = search.similarity_map(among, hit.similarities, scan.voxels.shape)
        if scan is not original:
            values = onto_grid(values, scan.affine, original.affine, original.voxels.shape)
        names.append(f"similarity_{number:02d}_{NOT_SAFE.sub('_', one.name)}.nii.gz")
        target = Path(config.output, names[-1])
        aside = target.with_name(f".part{os.getpid()}.{target.name}")
        try:
            ct.write_label(aside, values, file.path, file.slices)
            put_in_place(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    return names


def _facts(config: MatchConfig, encoder: ScanEncoder, names: list[str]) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"output"})
    made_by = f"pgl_ray {pgl_ray.__version__}"
    return {
        **settings,
        "reading": encoder.reading,
        "encoder_hash": encoder.hash,
        "similarity_files": names,
        "made_by": made_by,
    }


def _replace_facts(output: Path, facts: dict[str, Any]) -> None:
    """Writes match.json, and removes the similarity maps of an earlier call that this one has not."""
    path = output / "match.json"
    try:
        before = json.loads(path.read_text())["similarity_files"]
    except (OSError, ValueError, KeyError, TypeError):
        before = []
    write_aside(path, json.dumps(facts, indent=2).encode())
    for name in set(before) - set(facts["similarity_files"]):
        (output / Path(name).name).unlink(missing_ok=True)
    if not facts["page_mb"]:
        (output / "match.html").unlink(missing_ok=True)


def _table(rows: list[Row]) -> str:
    """CSV; places to a hundredth of a mm."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    places = [f"{scan}_{axis}_mm" for scan in ("a", "b") for axis in "xyz"]
    others = [f"runner_up_{axis}_mm" for axis in "xyz"]
    writer.writerow(["name", *places, "similarity", *others, "runner_up_similarity"])
    for row in rows:
        other = [""] * 4 if row.runner_up_mm is None else [*_mm(row.runner_up_mm), f"{row.runner_up_similarity:.4f}"]
        writer.writerow([row.name, *_mm(row.a_mm), *_mm(row.b_mm), f"{row.similarity:.4f}", *other])
    return sink.getvalue()


def _mm(place: np.ndarray) -> list[str]:
    return [f"{value + 0.0:.2f}" for value in place]  # + 0.0: no -0.00


def describe(result: Result) -> str:
    """The table and the closing line."""
    lines = [
        f"{'place':<24}{'in A, mm (RAS+)':>26}{'in B, mm (RAS+)':>26}{'similar':>9}{'runner-up':>26}{'similar':>9}"
    ]
    for row in result.rows:
        a, b, other = (_text(place) for place in (row.a_mm, row.b_mm, row.runner_up_mm))
        second = "-" if row.runner_up_similarity is None else f"{row.runner_up_similarity:.3f}"
        lines.append(f"{row.name[:23]:<24}{a:>26}{b:>26}{row.similarity:>9.3f}{other:>26}{second:>9}")
    num = f"{len(result.rows)} place{'s' * (len(result.rows) != 1)}"
    return "\n".join([*lines, f"match: {num} in {result.output}, {READINGS[result.reading]}, {result.seconds:.1f} s"])


def _text(place: np.ndarray | None) -> str:
    return "-" if place is None else ", ".join(f"{value + 0.0:.1f}" for value in place)
