"""Plots of runs: curves over steps, Dice per organ."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from pgl_ray.pages.figures import style

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")  # Okabe-Ito
MARK_COLOR = "#808080"  # of levels; seen on white and on black


class Series(NamedTuple):
    """One line of a plot."""

    x: list[float]
    y: list[float]
    color: str
    dashed: bool = False


class Mark(NamedTuple):
    """A level that a plot's lines are to be held against, such as chance."""

    y: float
    text: str


@style
def curves(
    lines: list[Series],
    title: str,
    bounds: tuple[float | None, float | None] = (None, None),
    log: bool = False,
    marks: Sequence[Mark] = (),
) -> Figure:
    """Lines over steps; on a log scale zeros leave gaps; where all are zero it is linear. Marks are dotted
    lines with a word; one that lies beyond the bounds is left out."""
    figure = Figure(figsize=(3.6, 2.2))
    ax = figure.add_subplot(title=title, xlabel="step")
    for line in lines:
        marker = "." if len(line.x) < 30 else None
        ax.plot(line.x, line.y, color=line.color, ls="--" if line.dashed else "-", lw=1.2, marker=marker, ms=4)
    log = log and any(y > 0 for line in lines for y in line.y)
    for mark in (mark for mark in marks if mark.y > 0 or not log):
        ax.axhline(mark.y, color=MARK_COLOR, lw=1, ls=":", zorder=1)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": True}
        ax.annotate(mark.text, (1, mark.y), (-2, 2), ha="right", fontsize=6.5, color=MARK_COLOR, **at)
    if log:
        ax.set_yscale("log", nonpositive="mask")
    else:
        ax.ticklabel_format(axis="y", useOffset=False)
    ax.set_ylim(*bounds)
    return figure


@style
def organ_bars(organs: list[str], runs: list[tuple[str, list[float], list[float]]]) -> Figure:
    """Bars with error bars, an organ below the other, as wide as a telephone's screen.

    Args:
        organs: names.
        runs: (colour, Dice per organ, its standard error per organ); NaN draws nothing.
    """
    width = 0.8 / len(runs)
    figure = Figure(figsize=(4.8, 0.7 + len(organs) * (0.1 + 0.1 * max(2, len(runs)))))
    ax = figure.add_subplot(xlabel="Dice, higher is better", xlim=(0, 1))
    for k, (color, dice, error) in enumerate(runs):
        y = np.arange(len(organs)) + (k - (len(runs) - 1) / 2) * width
        ax.barh(y, dice, width * 0.92, color=color, xerr=error, ecolor="#333333", error_kw={"lw": 0.8, "capsize": 1.5})
    ax.set_yticks(range(len(organs)), [organ.replace("_", " ") for organ in organs])
    ax.set_ylim(len(organs) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_axisbelow(True)
    return figure
