"""The controls that the collapse alarm was set by, as one picture.

python tests/benchmarks/health_controls.py OUT.png

tests/golden/health_controls.json holds the health figures of trainings on OpenKBP, phantoms and blank scans (encoder of
width 8, views of 32x64x64 and 16x48x48, 28 November 2026): sound ones, wrong priors and 3,000 steps among them, and
ones that were made to collapse: no predictor, no stop-gradient, blank scans, the rate times 10 and 30.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pgl_ray.train import health

GOLDEN = Path(__file__).parents[1] / "golden" / "health_controls.json"


def controls(collapsed: bool) -> dict[str, list[dict[str, float]]]:
    """Name -> rows of health figures of the sound or the collapsed trainings."""
    golden = json.loads(GOLDEN.read_text())
    return {
        name: [{key: value for key, value in zip(golden["columns"], row) if value is not None} for row in one["rows"]]
        for name, one in golden["controls"].items()
        if one["collapsed"] == collapsed
    }


def main() -> None:
    """Draws `health.directions` of every control over the share of its training."""
    figure, axes = plt.subplots(figsize=(9, 5))
    for kind, color in (("sound", "tab:green"), ("collapsed", "tab:red")):
        for number, rows in enumerate(controls(kind == "collapsed").values()):
            values = [max(health.directions(row), 1e-3) for row in rows]
            share = [i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(share, values, color=color, alpha=0.6, label=kind if number == 0 else None)
    axes.axhline(health.COLLAPSED, color="black", linestyle="--", label=f"alarm below {health.COLLAPSED}")
    axes.set(yscale="log", xlabel="share of the recorded training", ylabel="directions that features spread over")
    axes.legend()
    figure.savefig(sys.argv[1], dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
