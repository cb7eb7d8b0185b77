"""The page of `match`: a click in scan A shows the place and the similarity in scan B, without a network.

It holds what the command computes with, 8-bit features and the lengths of the candidates', so both give one answer.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pgl_ray.data.voxel_statistics import foreground_box
from pgl_ray.files.ct import Scan
from pgl_ray.judge import search
from pgl_ray.judge.features import ScanEncoder
from pgl_ray.model.metrics import reach
from pgl_ray.pages import pages
from pgl_ray.pages.figures import data_uri
from pgl_ray.pages.pages import NO, OPEN, YES, Answer, Line, plural
from pgl_ray.pages.slices import WINDOWS, even_step

MAX_VOXELS = 4_000_000  # of a scan; a larger one is shown at every second, third, ... voxel
GREY_HU = 8.0  # step of the 256 greys, from -1024 HU on
MARGIN = 0.04  # that is shown around the body, as a share of its size
TEXT_BYTES = 60_000  # of page and script
MOST_PICTURES = 12
PICTURE_PX = 220  # height of the tallest slice
CLOSE = 0.05  # of two similarities that the features hardly tell apart


def check_size(encoder: ScanEncoder, scans: Sequence[Scan], names: Sequence[str], page_mb: float) -> None:
    """Finds out before the work is done whether the page gets too large.

    Raises:
        ValueError: it does; says what makes it smaller.
    """
    if not page_mb:
        return
    levels = search.compared_levels(encoder, names)
    num_points = len(search.grid_points(scans[1])[0])
    size = _megabytes(encoder, scans, levels, num_points)
    if size <= page_mb:
        return
    mends = []
    for fewer in (levels[k:] for k in range(1, len(levels))):
        smaller = _megabytes(encoder, scans, fewer, num_points)
        if smaller <= page_mb:
            mends.append(f"maps=[{','.join(encoder.names[level] for level in fewer)}] ({smaller:.1f} MB)")
            break
    known = encoder.spacing_mm
    if known and all(math.prod(known) > 1.5 * math.prod(scan.spacing_mm) for scan in scans):
        mends.append("spacing=weights")
    mends += [f"page_mb={math.ceil(size)}", "page_mb=0 for no page"]
    raise ValueError(f"the page would have {size:.1f} MB, page_mb={page_mb:g}: take {', or '.join(mends)}")


def _megabytes(encoder: ScanEncoder, scans: Sequence[Scan], levels: list[int], num_points: int) -> float:
    """Of a page with these maps."""
    num = 4 * len(levels) * num_points
    for scan in scans:
        shape = np.array(scan.voxels.shape)
        num += math.prod(-(-shape // even_step(scan.voxels.shape, scan.spacing_mm, MAX_VOXELS)))
        for level in levels:
            num += encoder.network.channels[level] * math.prod(-(-shape // np.array(encoder.network.strides[level])))
    return (num * 4 / 3 + TEXT_BYTES) / 1e6


def make_page(
    scans: Sequence[Scan],
    codes: Sequence[search.Codes],
    among: search.Candidates,
    apart_mm: float,
    rows: Sequence[Any],
    voxels: Sequence[np.ndarray],
    hits: Sequence[search.Hit],
    texts: dict[str, str],
) -> str:
    """HTML that needs nothing else.

    Args:
        scans, codes: A and B.
        among: of B.
        apart_mm: of the runner-up.
        rows: of the table, per place.
        voxels: asked, per place.
        hits: per place.
        texts: "title", "a", "b", "how" and "made_by".
    """
    grid = among.size(codes[1].shape)
    mask = np.zeros(grid, np.uint8)
    mask[tuple((among.voxels // np.array(among.step)).T)] = 1
    data = {
        "a": side(scans[0], codes[0]),
        "b": side(scans[1], codes[1]),
        "grid": {"step": among.step, "size": grid, "mask": _text(mask), "lengths": _text(among.lengths)},
        "fine": search.fine_steps(among.step),
        "apart": apart_mm,
        "places": [{"name": row.name, "voxel": voxel.tolist()} for row, voxel in zip(rows, voxels)],
    }
    pictures = [
        {"name": row.name, "image": _picture(scans, voxel, one, among)}
        for row, voxel, one in list(zip(rows, voxels, hits))[:MOST_PICTURES]
    ]
    return pages.render(
        "match.html",
        answers=answers(rows),
        **texts,
        rows=rows,
        num_left_out=max(0, len(rows) - MOST_PICTURES),
        pictures=pictures,
        windows=WINDOWS,
        data=json.dumps(data).replace("<", r"\u003c"),
    )


def answers(rows: Sequence[Any]) -> list[Answer]:
    """Were the places found, which are doubtful, how sure is that: by how far each is ahead of its runner-up."""
    rivalled = [row for row in rows if row.runner_up_similarity is not None]
    margins = [row.similarity - row.runner_up_similarity for row in rivalled]
    named = [(row.name, margin) for row, margin in zip(rivalled, margins)]  # several places may have one name
    doubtful = [one for one in sorted(named, key=lambda one: one[1]) if one[1] < CLOSE]
    clear = len(rows) - len(doubtful)
    have = "has" if clear == 1 else "have"
    text = (
        f"{clear} of {plural(len(rows), 'place')} {have} no other place in B that is nearly as similar (within {CLOSE})"
    )
    half = reach(margins)
    if margins:
        mean = float(np.mean(margins))
        over = (
            "" if half is None else f", 95 % interval {mean - half:.2f} to {mean + half:.2f} over {len(margins)} places"
        )
        text += f"; the lead over the runner-up is {mean:.2f} in the mean{over}"
    verdict = YES if not doubtful else NO if not clear else "In part"
    first = Line("None by its runner-up", "look at all once, for a wrong place can be the only similar one")
    if doubtful:
        names = ", ".join(f"{name} ({margin:.3f})" for name, margin in doubtful)
        first = Line("Doubtful", f"{names}: look there first, at the runner-up, too")
    sure = (
        "nobody has marked these places in B; how many mm such places are off, with an interval, says python -m "
        "pgl_ray.probe with judges=[matching] on labelled scans"
    )
    return [
        Answer("Were the places told from others?", [Line(verdict, text)]),
        Answer("Where to look first?", [first]),
        Answer("How many mm are they off?", [Line(OPEN, sure)]),
    ]


def side(scan: Scan, codes: search.Codes) -> dict[str, Any]:
    """What the page's script knows of a scan."""
    step = even_step(scan.voxels.shape, scan.spacing_mm, MAX_VOXELS)
    voxels = scan.voxels[tuple(slice(by // 2, None, by) for by in step)]
    greys = np.clip((voxels.astype(np.float32) + 1024) / GREY_HU + 0.5, 0, 255).astype(np.uint8)
    maps = [
        {"shape": one.shape, "stride": list(stride), "center": list(center), "codes": _text(one)}
        for one, stride, center in zip(codes.maps, codes.strides, codes.centers)
    ]
    return {
        "shape": codes.shape,
        "spacing": codes.spacing_mm,
        "affine": np.asarray(codes.affine).ravel().tolist(),
        "shown": {"step": step, "shape": greys.shape, "box": _box(scan, step).tolist(), "greys": _text(greys)},
        "maps": maps,
    }


def _box(scan: Scan, step: Sequence[int]) -> np.ndarray:
    """Around the body and a little of what is around it, int [3, 2], in shown voxels."""
    box = np.reshape(foreground_box(scan.voxels), (3, 2)).astype(np.float64)
    box += MARGIN * (box[:, 1] - box[:, 0])[:, None] * [-1, 1]
    first, last = np.floor(box[:, 0] / step), np.ceil(box[:, 1] / step)
    size = [len(range(by // 2, length, by)) for length, by in zip(scan.voxels.shape, step)]
    return np.stack([first.clip(0), np.minimum(last, size)], 1).astype(np.int64)


def _text(array: np.ndarray) -> str:
    """Base64 of an array, little-endian, C order."""
    return base64.b64encode(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)).decode()


# -- pictures, for where there is no JavaScript ------------------------------------------------------------------------


def _picture(scans: Sequence[Scan], voxel: np.ndarray, hit: search.Hit, among: search.Candidates) -> str:
    """Axial and coronal slices through the asked place of A, then through the found one of B, at one scale, as a data
    URI."""
    shape = scans[1].voxels.shape
    heat = search.similarity_map(among, hit.similarities, shape)
    sizes_mm = [np.diff(_box(scan, (1, 1, 1)))[:, 0] * scan.spacing_mm for scan in scans]
    px_per_mm = PICTURE_PX / max(max(size[:2]) for size in sizes_mm)
    panels = []
    for scan, at, hot in ((scans[0], voxel, None), (scans[1], hit.voxel, heat)):
        for through, up in ((0, False), (1, True)):
            panels.append(_panel(scan, at, hot, hit.similarity, through, up, px_per_mm))
    tallest = max(len(panel) for panel in panels)
    padded = [np.pad(panel, ((0, tallest - len(panel)), (0, 0), (0, 0))) for panel in panels]
    padded = [np.pad(panel, ((0, 0), (0, 4), (0, 0)), constant_values=128) for panel in padded]  # between panels
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(padded, 1)[:, :-4]).save(sink, "PNG", compress_level=6)
    return data_uri(sink.getvalue(), "image/png")


def _panel(
    scan: Scan, at: np.ndarray, heat: np.ndarray | None, best: float, through: int, up: bool, px_per_mm: float
) -> np.ndarray:
    """uint8 [height, width, 3] of a slice around the body, W to the right; D upwards where `up`."""
    row, box = 1 if through == 0 else 0, _box(scan, (1, 1, 1))
    part = tuple(slice(*box[axis]) for axis in (row, 2))
    low, high = WINDOWS["soft tissue"]
    grey = np.clip((np.take(scan.voxels, at[through], through)[part].astype(np.float32) - low) / (high - low), 0, 1)
    color = np.repeat(grey[..., None], 3, 2)
    if heat is not None:
        share = (_heat(np.take(heat, at[through], through)[part], best) * 0.6)[..., None]
        color = color * (1 - share) + np.array([1.0, 0.45, 0.0]) * share
    rows, columns = grey.shape
    height, width = (max(8, round(px_per_mm * n * scan.spacing_mm[axis])) for n, axis in ((rows, row), (columns, 2)))
    small = Image.fromarray(np.rint(color * 255).astype(np.uint8))
    panel = np.array(small.resize((width, height), Image.Resampling.BILINEAR))
    y = int((at[row] + 0.5 - box[row, 0]) / rows * height)
    x = int((at[2] + 0.5 - box[2, 0]) / columns * width)
    if 0 <= y < height:
        off_cross = np.abs(np.arange(width) - x) > 4
        panel[y, off_cross] = panel[y, off_cross] // 2 + np.array([0, 120, 60], np.uint8)
    if 0 <= x < width:
        off_cross = np.abs(np.arange(height) - y) > 4
        panel[off_cross, x] = panel[off_cross, x] // 2 + np.array([0, 120, 60], np.uint8)
    return panel[::-1] if up else panel


def _heat(values: np.ndarray, best: float) -> np.ndarray:
    """How strongly a similarity is coloured, 0 to 1; 0.3 below the best there is nothing."""
    return np.clip((values - (best - 0.3)) / 0.3, 0, 1) ** 2
