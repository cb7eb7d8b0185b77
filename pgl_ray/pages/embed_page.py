"""The page of `embed`: scans on a map, the nearest neighbours of each as pictures, and dense features as colours."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgl_ray.data.voxel_statistics import foreground_box
from pgl_ray.files.scans import ScanFile, StoredScan
from pgl_ray.judge.components import axial_colors, slice_step
from pgl_ray.judge.features import ScanEncoder, at_spacing, views_of
from pgl_ray.judge.readings import StandardisedMaps
from pgl_ray.pages import feature_pictures, pages
from pgl_ray.pages.figures import to_png
from pgl_ray.pages.pages import OPEN, YES, Answer, Line, percent, plural

NUM_NEIGHBOURS = 4
NUM_COLORED = 3  # scans whose features are shown as colours
MAP_PX = (720, 440)
MARGIN_PX = 30
MOST_COMPARED = 2000  # scans, for the answers
SAME = 0.99  # cosine of scans that may be one


class _PlainScan(NamedTuple):
    """A scan as `axial_colors` reads it; the record has its voxel size only."""

    record: Any
    volume: np.ndarray
    scaling: tuple


class _Size(NamedTuple):
    spacing_mm: tuple[float, float, float]


def make_page(
    rows: Sequence[dict[str, Any]],
    scans: Mapping[str, StoredScan | ScanFile],
    encoder: ScanEncoder,
    spacing_mm: tuple[float, float, float] | None,
    most: int,
    facts: dict[str, Any],
) -> str:
    """HTML that needs nothing else.

    Args:
        rows: of the table.
        scans: by scan_id, to read a few again.
        encoder: frozen.
        spacing_mm: that scans were resampled to; none: not.
        most: scans whose neighbours are shown.
        facts: what the table says of its vectors.
    """
    vectors = standardised(np.stack([row["vector"] for row in rows]))
    chosen = spread(len(rows), most)
    near = neighbours(vectors, chosen) if len(rows) > 2 else [(k, []) for k in chosen]
    pictured = sorted({*chosen, *(other for _, others in near for other, _ in others)})
    uris = {k: base64.b64encode(rows[k]["picture"]).decode() for k in pictured}
    places, shares = components(vectors)
    try:
        colors, why = _colors(rows, scans, encoder, spacing_mm), ""
    except (ValueError, OSError, RuntimeError, IndexError) as error:  # a file is gone by now, a scan has no body
        colors, why = "", f"There is no picture of features as colours: {' '.join(str(error).split())}"
    return pages.render(
        "embed.html",
        answers=answers(rows, vectors, shares, bool(encoder.facts)),
        facts=facts,
        num=len(rows),
        num_features=vectors.shape[1],
        ids=[row["scan_id"] for row in rows],
        map=_map(places, [row["scan_id"] for row in rows], set(chosen)),
        shares=shares,
        near=near,
        uris=uris,
        colors=colors,
        why=why,
        num_hidden=len(rows) - len(chosen),
    )


def answers(
    rows: Sequence[dict[str, Any]], vectors: np.ndarray, shares: tuple[float, float], trained_known: bool
) -> list[Answer]:
    """Which scans are alike, how much the map shows, whether all scans are as the weights know them, what next.

    Args:
        rows: of the table.
        vectors: standardised, [scans, features].
        shares: of the variance, of the map's axes.
        trained_known: whether the weights say what scans they were trained on.
    """
    names, noted = [row["scan_id"] for row in rows], [row for row in rows if row["notes"]]
    alike, following = (
        [Line(OPEN, "one scan has nobody to be like")],
        Line("Embed more scans", "a map begins with three"),
    )
    if len(rows) == 2:
        alike = [Line(OPEN, "two scans are each other's opposites once they are standardised, whatever they show")]
    if len(rows) > 1 and not vectors.any():
        alike = [Line("All alike", f"{plural(len(rows), 'scan')} with the very same features")]
        following = Line("Look for doubles", f"{names[0]} and {names[1]} may be one scan")
    elif len(rows) > 2:
        near = [(k, *others[0]) for k, others in neighbours(vectors, spread(len(rows), MOST_COMPARED))]
        (a, b, most), (c, d, least) = max(near, key=lambda one: one[2]), min(near, key=lambda one: one[2])
        alike = [
            Line("Most alike", f"{names[a]} and {names[b]}, cosine {most:.2f}"),
            Line("Most apart", f"{names[c]}, whose nearest is {names[d]} with cosine {least:.2f}"),
        ]
        following = Line("Look at the outlier", f"{names[c]} first, by its pictures below")
        if most > SAME:
            following = Line("Look for doubles", f"{names[a]} and {names[b]} may be one scan")
    known = Line(YES, f"of {plural(len(rows), 'scan')} none has a note")
    if noted:
        text = f"{len(noted)} of {plural(len(rows), 'scan')} with a note, the first {noted[0]['scan_id']}"
        known = Line("Not all", f"{text}: {noted[0]['notes'][0].rstrip('.')}")
    if not trained_known:  # notes are of the files alone
        unknown = "the weights do not say what scans they were trained on"
        known = Line(OPEN, f"{unknown}; {known.text}" if noted else unknown)
    axes = Line(percent(sum(shares)), "of the variance between scans lies along its axes, the rest is not seen there")
    if len(rows) < 3:
        axes = Line(OPEN, "fewer than three scans lie on a line anyway")
    return [
        Answer("Which scans are alike?", alike),
        Answer("How much does the map show?", [axes]),
        Answer("Are they as the weights know scans?", [known]),
        Answer("What to do next?", [following]),
    ]


def standardised(vectors: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 per feature over the scans, float64; a constant feature is 0.

    Args:
        vectors: [scans, features].
    """
    vectors = vectors.astype(np.float64)
    mean, std = vectors.mean(0), vectors.std(0)
    return (vectors - mean) * np.divide(1, std, out=np.zeros_like(std), where=std > 1e-6 * np.abs(mean))


def components(vectors: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The first two principal components of centred vectors, and their share of the variance.

    Returns:
        float64 [scans, 2], of each component the largest absolute value positive; zeros where there are fewer.
    """
    num, width = vectors.shape
    gram = vectors @ vectors.T if num <= width else vectors.T @ vectors
    values, axes = np.linalg.eigh(gram)
    values, axes = np.clip(values[::-1][:2], 0, None), axes[:, ::-1][:, :2]
    places = axes * np.sqrt(values) if num <= width else vectors @ axes
    places *= np.sign(places[np.abs(places).argmax(0), np.arange(places.shape[1])])
    total = max(float(np.trace(gram)), 1e-300)
    short = 2 - places.shape[1]
    shares = [*(float(value / total) for value in values), *[0.0] * short]
    return np.pad(places, ((0, 0), (0, short))), (shares[0], shares[1])


def spread(num: int, most: int) -> list[int]:
    """At most so many of `num` numbers, evenly chosen."""
    return list(range(num)) if num <= most else np.linspace(0, num - 1, most).round().astype(int).tolist()


def neighbours(vectors: np.ndarray, chosen: Sequence[int]) -> list[tuple[int, list[tuple[int, float]]]]:
    """The most similar other scans by the cosine of standardised vectors, the nearest first.

    Args:
        vectors: [scans, features].
        chosen: scans that are asked for.

    Returns:
        Per chosen scan its number and (number, cosine) of up to NUM_NEIGHBOURS others.
    """
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    nearest = []
    for k in chosen:
        cosine = unit @ unit[k]
        order = [int(other) for other in np.argsort(-cosine, kind="stable") if other != k][:NUM_NEIGHBOURS]
        nearest.append((int(k), [(other, float(cosine[other])) for other in order]))
    return nearest


def _map(places: np.ndarray, names: list[str], linked: set[int]) -> str:
    """An SVG with a dot per scan; those with a row of neighbours lead there."""
    low, high = places.min(0), places.max(0)
    room = np.where(high > low, high - low, 1)
    at = (places - low) / room
    width, height = MAP_PX
    dots = []
    for k, (x, y) in enumerate(at):
        x, y = MARGIN_PX + x * (width - 2 * MARGIN_PX), height - MARGIN_PX - y * (height - 2 * MARGIN_PX)
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{html.escape(names[k])}</title></circle>'
        dots.append(f'<a href="#scan{k}">{dot}</a>' if k in linked else dot)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="scans on a map">{"".join(dots)}</svg>'


def _colors(
    rows: Sequence[dict[str, Any]],
    scans: Mapping[str, StoredScan | ScanFile],
    encoder: ScanEncoder,
    spacing_mm: tuple[float, float, float] | None,
) -> str:
    """A picture of a few scans beside their features as colours."""
    read = [(rows[k]["scan_id"], scans[rows[k]["scan_id"]].read()) for k in spread(len(rows), NUM_COLORED)]
    read = [(name, at_spacing(scan, spacing_mm) if spacing_mm else scan) for name, scan in read]
    maps = StandardisedMaps(encoder.network, views_of(encoder, [scan for _, scan in read], 0))
    plain = [_PlainScan(_Size(scan.spacing_mm), scan.voxels, encoder.scaling(scan.voxels)) for _, scan in read]
    slices = [int(np.reshape(foreground_box(scan.voxels), (3, 2))[0].mean()) for _, scan in read]
    colors = axial_colors(maps, plain, slices, encoder.size)
    panels = []
    for (name, scan), at, one in zip(read, slices, colors):
        title, unit_mm = f"{name}, D = {at} of {len(scan.voxels)}", np.array(scan.spacing_mm)
        body = feature_pictures.in_body(scan.voxels, unit_mm)[at]
        image = scan.voxels[at]
        step = slice_step(scan.voxels.shape)
        panels.append(feature_pictures.Colored(title, image, np.zeros(image.shape, int), body, unit_mm, [one], step))
    return to_png(feature_pictures.features(panels, ["features as colours"]), dpi=110)
