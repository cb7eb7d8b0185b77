"""Plots of a sweep: settings against scores, the trials' curves, arms over a setting."""

from typing import NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pgl_ray.pages.figures import style

WORSE_TO_BETTER = LinearSegmentedColormap.from_list("worse to better", ["#a6a6a6", "#E69F00", "#0072B2"])


class Axis(NamedTuple):
    """A setting of a sweep: its name, and its values on a scale, or as categories in their order."""

    name: str
    values: list[float]
    labels: list[str] | None
    log: bool = False

    @property
    def places(self) -> np.ndarray:
        """Each trial's place from 0 to 1."""
        values = np.log10(self.values) if self.log else np.asarray(self.values, float)
        low, high = values.min(), values.max()
        return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


def _score_colors(scores: list[float]) -> np.ndarray:
    low, high = min(scores), max(scores)
    return WORSE_TO_BETTER((np.array(scores) - low) / (high - low) if high > low else np.ones(len(scores)))


@style
def parallel_coordinates(
    axes: list[Axis], scores: list[float], ended: list[bool], judge: str, merits: list[float]
) -> Figure:
    """A line per trial through its settings to its score, grey to blue as it is better by its merit; dashed where it
    was stopped early."""
    last = Axis(judge, scores, None)
    all_axes, colors = [*axes, last], _score_colors(merits)
    figure = Figure(figsize=(max(4.0, 1.7 * len(all_axes)), 3.0))
    ax = figure.add_subplot(xlim=(-0.15, len(all_axes) - 0.75), ylim=(-0.06, 1.06))
    places = np.stack([axis.places for axis in all_axes], 1)
    for k in np.argsort(merits):
        ax.plot(places[k], color=colors[k], lw=1.4, ls="-" if ended[k] else "--", marker=".", ms=4)
    for k, axis in enumerate(all_axes):
        ax.axvline(k, color="#999999", lw=0.8, zorder=0)
        ticks = dict(zip(axis.places, axis.labels or [f"{value:.3g}" for value in axis.values]))
        labelled = ticks if axis.labels else {place: ticks[place] for place in (min(ticks), max(ticks))}
        for place, text in labelled.items():
            ax.text(
                k + 0.03,
                place,
                text,
                fontsize=7,
                va="center",
                bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
            )
    ax.set_xticks(range(len(all_axes)), [axis.name for axis in all_axes])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    return figure


@style
def setting_scores(
    axis: Axis,
    scores: list[float],
    ended: list[bool],
    means: list[tuple[float, float, float | None]],
    judge: str,
    limits: tuple[float, float],
) -> Figure:
    """Scores over one setting.

    Args:
        axis: the setting.
        scores: of the trials.
        ended: whether each ran to its end; the others are hollow.
        means: (value, mean score of the trials that ended, half its 95 % interval or none).
        judge: name of the score, and what is good.
        limits: of the scores that are shown, those of all settings.
    """
    figure = Figure(figsize=(3.6, 2.4))
    ax = figure.add_subplot(title=axis.name, ylabel=judge, ylim=limits)
    if axis.log:
        ax.set_xscale("log")
    for done, face in ((True, "#0072B2"), (False, "none")):
        points = [(x, y) for x, y, end in zip(axis.values, scores, ended) if end == done]
        if points:
            ax.scatter(*zip(*points), s=16, facecolors=face, edgecolors="#0072B2", linewidths=0.8, zorder=3)
    for value, mean, reach in means:
        ax.errorbar(value, mean, yerr=reach, color="#D55E00", marker="_", ms=12, capsize=3, lw=1.2, zorder=4)
    if axis.labels:
        ticks = dict(zip(axis.values, axis.labels))
        ax.set_xticks(list(ticks), list(ticks.values()), rotation=20 if len(ticks) > 3 else 0)
        ax.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
    return figure


@style
def trial_curves(lines: list[tuple[list[float], list[float], bool]], merits: list[float], judge: str) -> Figure:
    """The judged figure of every trial over its training in percent, grey to blue as it is better by its merit; dashed
    where it was stopped early."""
    figure, colors = Figure(figsize=(5.4, 2.8)), _score_colors(merits)
    ax = figure.add_subplot(xlabel="percent of the judged training", ylabel=f"best {judge}")
    for k in np.argsort(merits):
        x, y, ended = lines[k]
        ax.plot(x, y, color=colors[k], lw=1.2, ls="-" if ended else "--", marker="." if len(x) < 30 else None, ms=4)
    return figure


@style
def arms_over_labels(lines: list[tuple[str, str, list[float], list[float], list[float]]]) -> Figure:
    """Mean Dice per arm over the number of labelled scans, with error bars.

    Args:
        lines: (arm, colour, labelled scans, means, errors).
    """
    figure = Figure(figsize=(4.4, 2.8))
    names = {"title": "mean over organs", "xlabel": "labelled scans, validation included"}
    ax = figure.add_subplot(**names, ylabel="Dice in %, higher is better")
    values = sorted({x for line in lines for x in line[2]})
    place = {x: k for k, x in enumerate(values)}
    for k, (arm, color, x, mean, error) in enumerate(lines):
        shift = 0.06 * (k - (len(lines) - 1) / 2)
        at = [place[value] + shift for value in x]
        ax.errorbar(at, mean, yerr=error, color=color, marker="o", ms=3, lw=1.2, capsize=2, label=arm)
    ax.set_xticks(
        range(len(values)), [f"{value:g}" if isinstance(value, int | float) else str(value) for value in values]
    )
    ax.legend(fontsize=7, frameon=False)
    return figure
