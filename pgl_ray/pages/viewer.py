"""One scan with its labels as an HTML page that needs nothing else: niivue, and pictures where there is no WebGL."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip
from matplotlib.colors import to_rgb

from pgl_ray.pages import pages
from pgl_ray.pages.figures import to_png
from pgl_ray.pages.label_pictures import montage, organ_color
from pgl_ray.pages.pages import OPEN, Answer, Line, plural
from pgl_ray.pages.slices import DISPLAY_HU, WINDOWS, even_step

MAX_VOXELS = 32_000_000  # that a page holds; a larger scan is shown at every second, third, ... voxel
GREY_HU = 8.0  # step of the 256 greys that a page holds, from -1024 HU on
HERE = Path(__file__).parent


class Organ(NamedTuple):
    """A row of the legend.

    Attributes:
        name: of the organ.
        value: in the label map.
        voxels, volume_ml: how large it is; of nested labels, with what lies inside.
    """

    name: str
    value: int
    voxels: int
    volume_ml: float


def make_page(
    voxels: np.ndarray,
    label: np.ndarray,
    affine: np.ndarray,
    organs: list[Organ],
    texts: dict[str, str],
    notes: Sequence[str] = (),
) -> tuple[str, bytes]:
    """A page with the scan, its labels and a legend, and the pictures in it as a file of their own.

    Args:
        voxels: int16 [D, H, W], HU, along S, P, L.
        label: [D, H, W] label values.
        affine: [4, 4], voxel index (d, h, w, 1) -> RAS+ mm.
        organs: in the order of the legend's numbers.
        texts: "title", "subtitle" and "made_by".
        notes: what the reader should know of the scan, a sentence each.

    Returns:
        HTML and PNG.
    """
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    numbers = _numbers(label, [organ.value for organ in organs])
    picture = to_png(montage(voxels, numbers, spacing_mm, [organ.name for organ in organs]), dpi=110)
    step = even_step(voxels.shape, spacing_mm, MAX_VOXELS)
    rows = [
        {**organ._asdict(), "number": number, "color": organ_color(number)} for number, organ in enumerate(organs, 1)
    ]
    page = pages.render(
        "viewer.html",
        answers=answers(organs, notes, np.count_nonzero(label) * _voxel_ml(affine)),
        **texts,
        notes=notes,
        organs=rows,
        windows=WINDOWS,
        shrunk=f"One voxel of {' x '.join(map(str, step))} (D, H, W) is shown." if max(step) > 1 else "",
        montage=picture,
        display_hu=DISPLAY_HU,
        grey_hu=GREY_HU,
        niivue=(HERE / "niivue.umd.js").read_text().replace("</script", r"<\/script"),
        licence=(HERE / "niivue.license.txt").read_text().replace("--", "- -"),
        data=json.dumps(_niivue_data(voxels, numbers, affine, organs, step)).replace("<", r"\u003c"),
    )
    return page, base64.b64decode(picture.split(",", 1)[1])


def _niivue_data(
    voxels: np.ndarray, numbers: np.ndarray, affine: np.ndarray, organs: list[Organ], step: list[int]
) -> dict[str, Any]:
    """What niivue shows: scan and labels as NIfTI at every `step`-th voxel, and how."""
    cut, small = tuple(slice(None, None, n) for n in step), affine @ np.diag([*step, 1.0])
    colors = [(0.0, 0.0, 0.0), *(to_rgb(organ_color(number)) for number in range(1, len(organs) + 1))]
    channels = np.rint(np.array(colors).T * 255).astype(int).tolist()
    return {
        "scan": _nifti(_greys(voxels[cut]), small, (GREY_HU, -1024.0)),
        "labels": _nifti(numbers[cut], small, (1.0, 0.0)),
        "window": WINDOWS["soft tissue"],
        "range": [-1024, round(255 * GREY_HU - 1024)],
        "centre": _centre_mm(numbers, affine),
        "colormap": {
            **dict(zip("RGB", channels)),
            "A": [0, *[255] * len(organs)],
            "I": list(range(len(colors))),
            "labels": ["", *(organ.name for organ in organs)],
        },
    }


def answers(organs: Sequence[Organ], notes: Sequence[str], total_ml: float) -> list[Answer]:
    """What was found, `total_ml` of it, what to look at first, and how sure it is."""
    present = [organ for organ in organs if organ.voxels]
    missed = [organ.name for organ in organs if not organ.voxels]
    what = f"{len(present)} of {plural(len(organs), 'organ')}"
    where = f"{total_ml:,.1f} mL in all" if present else "no voxel has a label"
    where += f"; not found: {', '.join(missed)}" if missed else ""
    if notes:
        first = Line("The scan", f"{plural(len(notes), 'note')} on it, first: {notes[0].rstrip('.')}")
    elif missed:
        first = Line("What was not found", f"{', '.join(missed)}: outside of the scan, or overlooked")
    elif present:
        least = min(present, key=lambda organ: organ.volume_ml)
        first = Line("The smallest organ", f"{least.name}, {least.volume_ml:.1f} mL, for small ones go wrong first")
    else:
        first = Line("The scan", "nothing was found in it")
    sure = (
        "nobody has drawn this scan's organs; python -m pgl_ray.evaluate says Dice and its interval on labelled scans"
    )
    return [
        Answer("What was found?", [Line(what, where)]),
        Answer("What to look at first?", [first]),
        Answer("How sure is it?", [Line(OPEN, sure)]),
    ]


def _numbers(label: np.ndarray, values: list[int]) -> np.ndarray:
    """Label values as the legend's numbers, uint8 or uint16, 0 outside."""
    lookup = np.zeros(int(max(label.max(), *values)) + 1, np.min_scalar_type(len(values)))
    lookup[values] = np.arange(1, len(values) + 1)
    return lookup[label]


def _greys(voxels: np.ndarray) -> np.ndarray:
    """HU as uint8; the page adds back what `GREY_HU` says."""
    return np.clip((voxels.astype(np.float32) + 1024) / GREY_HU + 0.5, 0, 255).astype(np.uint8)


def _nifti(array: np.ndarray, affine: np.ndarray, scaling: tuple[float, float]) -> str:
    """[D, H, W] as base64 of a .nii.gz, axes W, H, D; scaling = slope and intercept."""
    affine = affine[:, [2, 1, 0, 3]]
    header = nib.Nifti1Header()
    header.set_data_shape(array.shape[::-1])
    header.set_data_dtype(array.dtype)
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = *scaling, 352
    content = header.binaryblock + b"\0" * 4 + np.ascontiguousarray(array).tobytes()
    return base64.b64encode(igzip.compress(content, 2, mtime=0)).decode()


def _centre_mm(numbers: np.ndarray, affine: np.ndarray) -> list[float] | None:
    """The labels' middle, RAS+ mm; none without labels."""
    if not numbers.any():
        return None
    middle = [float(np.average(np.arange(n), weights=_profile(numbers, axis))) for axis, n in enumerate(numbers.shape)]
    return (affine @ [*middle, 1.0])[:3].tolist()


def _profile(numbers: np.ndarray, axis: int) -> np.ndarray:
    """Labelled voxels of each slice along an axis."""
    return np.count_nonzero(numbers, axis=tuple(k for k in range(3) if k != axis))


def _voxel_ml(affine: np.ndarray) -> float:
    return abs(np.linalg.det(affine[:3, :3])) / 1000


def legend(label: np.ndarray, names: dict[str, int], affine: np.ndarray, nested: bool) -> list[Organ]:
    """How large the organs of a label map are.

    Args:
        label: [D, H, W] label values.
        names: organ -> label value.
        affine: [4, 4], of the label map, mm.
        nested: whether a smaller value includes the larger ones, as organ includes tumour (task=binary).
    """
    counts = np.bincount(label.ravel(), minlength=max(names.values()) + 1)
    voxel_ml, organs = _voxel_ml(affine), []
    for name, value in sorted(names.items(), key=lambda item: item[1]):
        voxels = int(counts[value:].sum() if nested else counts[value])
        organs.append(Organ(name, value, voxels, round(voxels * voxel_ml, 3)))
    return organs
