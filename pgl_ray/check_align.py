"""python -m pgl_ray.check_align [file.yaml] [index=STORE] [run=RUN] [a.b=c ...]: does the aligner bring the same
anatomy together, for this encoder, these views and these scans?

Views of coordinate ramps, in place of CT, go through the configured encoder's own layers, reduced to the voxel under
each kernel's centre, and through the aligner. What comes out of either view is the scan coordinate that each compared
feature looks at. The two views' coordinates should be equal; their distance is the residual.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("check_align")

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pgl_ray.config import CheckAlignConfig, FailedRun, build
from pgl_ray.data import scan_files, store
from pgl_ray.data.batch_views import resize_and_flip
from pgl_ray.data.durable import check_writable, put_in_place
from pgl_ray.data.rendering import AIR, normalise, read_padded
from pgl_ray.data.sampling import ablated, sample_pair
from pgl_ray.judge.alignment import centre_taps, look, pair_of_ramps, residuals_of, summary_of
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.pgl import align, feature_geometry
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.pages import pair_pictures, slices
from pgl_ray.paths import is_url
from pgl_ray.phantom.phantom import make_phantom
from pgl_ray.prior import Geometry, Prior, interpolation_matrices, overlap_share
from pgl_ray.train import run_paths
from pgl_ray.train.records import RunRecord
from pgl_ray.train.run_files import RECORD, write_json

AXES = ("D", "H", "W")
CHECKED = ("index", "split", "views", "encoder", "align")  # the settings whose geometry it is
CONVENTIONS = ("receptive_field", "cell")
BATCH = 16  # pairs at a time
FLIP_PAIRS = list(itertools.product(itertools.product((False, True), repeat=3), repeat=2))
BODY_MM = (240.0, 336.0, 336.0)  # what a phantom needs to be whole


class Scan(NamedTuple):
    """A scan as far as crops go."""

    name: str
    reader: Any  # has `shape` and `read_boxes(boxes)`
    spacing_mm: np.ndarray
    foreground_box: tuple[int, ...] | None
    window: tuple[float, float]
    mean_hu: float
    std_hu: float


@dataclass(frozen=True)
class Result:
    """What was measured and where it lies.

    Attributes:
        facts: what check_align.json holds: per convention, axis by axis, the mean and the largest residual in voxels
            and mm over all bins and over those clamped in neither view, and the share of clamped bins.
        folder: of check_align.json and check_align.png.
    """

    facts: dict[str, Any]
    folder: str


def run(config: CheckAlignConfig) -> Result:
    """Checks both conventions; writes table and picture.

    Raises:
        ValueError: an output stride that the encoder or the views do not have, a run or a store that is none.
        FailedRun: the residual is larger than the geometry allows.
    """
    config, folder = _resolve(config)
    check_writable(f"output={folder}", folder.absolute())
    num_scans, scan_of = _scans(config)
    encoder = build_encoder(**{**config.encoder.model_dump(), "width": 1})
    stride, size = config.align.output_stride, config.views.size
    geometries = _geometries(encoder, config)
    encoder.stop_at(geometries["cell"][0])
    centre_taps(encoder)
    rng, drawn = np.random.default_rng(config.seed), []
    for i in range(config.num_pairs):
        drawn.append(_draw(rng, scan_of(rng.integers(num_scans)), config, FLIP_PAIRS[i % len(FLIP_PAIRS)]))
    parts = {name: [] for name in CONVENTIONS}
    for start in range(0, len(drawn), BATCH):
        batch = drawn[start : start + BATCH]
        pair = pair_of_ramps([priors for _, priors in batch], size)
        maps = look(encoder, pair)
        used = pair
        if config.align.wrong_priors:
            used = pair_of_ramps([drawn[i - 1][1] for i in range(start, start + len(batch))], size)
        spacing = torch.from_numpy(np.stack([scan.spacing_mm for scan, _ in batch]))
        for name in CONVENTIONS:
            parts[name].append(residuals_of(maps, used, geometries[name][1], spacing, exact=name == "receptive_field"))

    conventions = {name: summary_of(parts[name]) for name in CONVENTIONS}
    facts = {
        "view_size": list(size),
        "output_stride": list(stride),
        "not_looked_at": [list(other) for other in config.align.more_strides if other != stride],
        "stage_strides": config.encoder.stage_strides,
        "crop_scale": list(ablated(config.views, config.align).crop_scale),
        "num_pairs": config.num_pairs,
        "scans": config.index or "a phantom",
        "configured": config.align.centers,
        "conventions": conventions,
        "passed": all(summary["passed"] for summary in conventions.values()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check_align.json", facts)
    _draw_picture(drawn, encoder, geometries, config, folder / "check_align.png")
    result = Result(facts, str(folder))
    if not facts["passed"]:
        print(_table(facts))
        worst = max(summary["excess_voxels"] for summary in conventions.values())
        if not worst:
            raise FailedRun(
                f"nothing could be checked: no bin of views.size={size} with align.output_stride={stride} lies between "
                f"the feature centres of both views; take larger views or a smaller stride (table in {folder})"
            )
        raise FailedRun(
            f"the residual exceeds what the geometry allows by {worst:.2f} voxels: aligned features do not show the "
            f"same places (align.wrong_priors={config.align.wrong_priors}); table and picture in {folder}"
        )
    return result


def _resolve(config: CheckAlignConfig) -> tuple[CheckAlignConfig, Path]:
    """The config to check, a run's where one is given, and the folder for the results."""
    if not config.run:
        return config, Path(config.output)
    path = run_paths.fetch_for_report(config.run)
    record = RunRecord.read(path) if (path / RECORD).is_file() else None
    if not record or record.door != "pretrain":
        raise ValueError(f"run={config.run} is no pre-training run: give the folder of one, or a config file")
    started = {key: value for key, value in record.config.items() if key in CheckAlignConfig.model_fields}
    values = _merged(started, config.model_dump(mode="json", exclude_unset=True))
    checked, own = build(CheckAlignConfig, values), build(CheckAlignConfig, started)
    another = any(getattr(checked, key) != getattr(own, key) for key in CHECKED)  # no check of the run, then
    folder = config.output if another or "output" in config.model_fields_set or is_url(config.run) else config.run
    return checked, Path(folder)


def _geometries(encoder: Encoder | ResEncoder, config: CheckAlignConfig) -> dict[str, tuple[int, Geometry]]:
    """By convention, of the output stride; the others that pre-training compares maps of are possible, too."""
    size, stride = config.views.size, config.align.output_stride
    for other in config.align.more_strides:
        try:
            feature_geometry(encoder, size, other)
        except ValueError as error:
            raise ValueError(str(error).replace("align.output_stride=", "align.more_strides: ")) from None
    return {name: feature_geometry(encoder, size, stride, name) for name in CONVENTIONS}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Settings typed with run=RUN override those that the run was started with."""
    both = base.keys() & over.keys()
    deeper = {k: _merged(base[k], over[k]) for k in both if isinstance(base[k], dict) and isinstance(over[k], dict)}
    return base | over | deeper


def _scans(config: CheckAlignConfig) -> tuple[int, Callable[[int], Scan]]:
    """How many scans there are, and what opens one: the store's, or a phantom twice as large as the views."""
    if config.index:
        index = store.read_index(config.index)
        records = [record for record in index.scans if config.split in (None, record.split)]
        if not records:
            raise ValueError(f"index={config.index} has no scan in split={config.split!r}")

        def opened(number: int) -> Scan:
            record = records[number]
            reader, spacing = scan_files.open_volume(index.store, record), np.array(record.spacing_mm)
            scaling = index.hu_window, record.mean_hu, record.std_hu
            return Scan(record.scan_id, reader, spacing, record.foreground_box, *scaling)

        return len(records), opened
    shape = tuple(2 * size for size in config.views.size)
    spacing = tuple(length / size for length, size in zip(BODY_MM, shape, strict=True))
    volume = make_phantom(config.seed, shape, spacing).volume
    clipped = np.clip(volume, -1024, 325)
    whole = (0, shape[0], 0, shape[1], 0, shape[2])
    scaling = ((-1024.0, 325.0), float(clipped.mean()), float(clipped.std()))
    phantom = Scan("a phantom", _InMemory(volume), np.array(spacing), whole, *scaling)
    return 1, lambda number: phantom


class _InMemory:
    def __init__(self, volume: np.ndarray):
        self.volume, self.shape = volume, volume.shape

    def read_boxes(self, boxes: list[np.ndarray]) -> list[np.ndarray]:
        return [self.volume[tuple(slice(*axis) for axis in box)] for box in boxes]


def _draw(
    rng: np.random.Generator, scan: Scan, config: CheckAlignConfig, flips: Sequence[Sequence[bool]]
) -> tuple[Scan, tuple[Prior, Prior]]:
    """A pair of priors as pre-training draws them, but with these flips, where flips are on at all."""
    views, shape = ablated(config.views, config.align), scan.reader.shape
    priors = sample_pair(rng, shape, views, scan.foreground_box, shared_box=not config.align.crop)
    flips = flips if views.flip_prob else ((False,) * 3,) * 2
    return scan, tuple(Prior(prior.box, np.array(flip)) for prior, flip in zip(priors, flips, strict=True))


# -- what people look at ----------------------------------------------------------------------------------------------


def _draw_picture(drawn: list, encoder: Encoder, geometries: dict, config: CheckAlignConfig, path: Path) -> None:
    """A pair whose views are flipped differently, overlap well and show a body, with the places that are compared."""

    def interest(one: tuple[Scan, tuple[Prior, Prior]]) -> tuple[int, float]:
        first, second = one[1]
        return int((first.flip != second.flip)[1:].sum()), overlap_share(first.box, second.box, "union")

    def render(scan: Scan, prior: Prior) -> np.ndarray:
        crop = normalise(read_padded(scan.reader, prior.box, AIR), scan.window, scan.mean_hu, scan.std_hu)
        return resize_and_flip(crop, config.views.size, prior.flip).numpy()

    best = sorted(drawn, key=interest)[-8:]
    scan, priors = max(best, key=lambda one: render(one[0], one[1][0]).std())
    pair = pair_of_ramps([priors], config.views.size)
    maps = look(encoder, pair)
    used = pair
    if config.align.wrong_priors:
        other = next((d[1] for d in drawn if d[1] is not priors), priors)
        used = pair_of_ramps([other], config.views.size)
    places = {"before": maps}
    for name in reversed(CONVENTIONS):
        matrices = interpolation_matrices(used.boxes, used.flips, used.regions, geometries[name][1])
        places[name] = align(maps, matrices)
    views = [render(scan, prior) for prior in priors]
    compared = {name: [each.numpy() for each in points] for name, points in places.items()}
    window = tuple((hu - scan.mean_hu) / max(scan.std_hu, 1e-3) for hu in slices.DISPLAY_HU)
    figure = pair_pictures.places(views, priors, compared, window, scan.spacing_mm)
    aside = path.with_name(path.name + ".part")
    figure.savefig(aside, format="png", dpi=130)
    put_in_place(aside, path)


def _table(facts: dict[str, Any]) -> str:
    """Both conventions side by side, axis by axis."""
    size, stride = ("x".join(map(str, facts["view_size"])), "/".join(map(str, facts["output_stride"])))
    summaries = [facts["conventions"][name] for name in CONVENTIONS]
    heads = [f"centers={name}{' *' if name == facts['configured'] else ''}" for name in CONVENTIONS]

    def line(text: str, cells: list[list[str]]) -> str:
        return f"{text:<34}" + " |".join("".join(f"{cell:>10}" for cell in part) for part in cells)

    lines = [
        f"views {size}, output stride {stride}, stage strides {facts['stage_strides']}; "
        f"{facts['num_pairs']} pairs of views of {facts['scans']}",
        f"{'distance of compared places':<34}" + " |".join(f"{head:>30}" for head in heads) + "   * configured",
        line("", [list(AXES)] * 2),
    ]
    for key, text in (
        ("mean", "mean, all bins"),
        ("max", "largest, all bins"),
        ("mean_not_clamped", "mean, bins not clamped"),
        ("max_not_clamped", "largest, bins not clamped"),
    ):
        for unit, spec in (("voxels", ".2f"), ("mm", ".1f")):
            cells = [["-" if a is None else f"{a:{spec}}" for a in part[unit][key]] for part in summaries]
            lines.append(line(f"{text}, {unit}", cells))
    lines.append(line("allowed there, voxels", [[f"{a:.2f}" for a in part["allowed_voxels"]] for part in summaries]))
    lines.append(line("clamped bins", [[f"{share:.0%}" for share in part["clamped_share"]] for part in summaries]))
    free = [["", "", f"{part['bins_clamped_in_no_axis']:.0%}"] for part in summaries]
    lines.append(line("bins clamped on no axis of a pair", free))
    return "\n".join(lines)


def describe(result: Result) -> str:
    """The table and the closing line."""
    others = "".join(
        f"; stride {stride} of align.more_strides was not looked at" for stride in result.facts["not_looked_at"]
    )
    done = f"check_align: the aligner is right for this geometry; picture in {result.folder}{others}"
    return f"{_table(result.facts)}\n{done}"
