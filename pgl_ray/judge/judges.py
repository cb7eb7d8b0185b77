"""Three judges of a frozen encoder on the same scans, in the same state: what each says, how sure, and where it stands.

A judge is only as good as the room between its ends: the strongest that needs no learning of places (random weights in
whichever reading is best, and wrong priors as a second control), and an encoder of the same size that was trained with
all labels.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from pgl_ray.config import ProbeSettings
from pgl_ray.data.store import Index, ScanRecord
from pgl_ray.judge import decoder, matching, readings, voxels
from pgl_ray.model import metrics
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder

JUDGES = ("voxels", "decoder", "matching")
HIGHER_IS_BETTER = {"voxels": True, "decoder": True, "matching": False}
UNITS = {"voxels": "balanced accuracy", "decoder": "Dice", "matching": "mm"}
LEAST_ROOM = {"voxels": 0.02, "decoder": 0.02, "matching": 2.0}  # between its ends, below which a judge says nothing


@dataclass(frozen=True)
class Score:
    """What one judge says of one reading.

    Attributes:
        value: balanced accuracy, mean Dice, or median error in mm.
        ci95: [low, high] over the test scans (for matching: the scans that are searched); none for a single scan.
        details: plain values: of voxels "recall", "last_map", and "hits" of "counts" voxels per "scans" and "classes";
            of the decoder "organs" with Dice and HD95, "hd95_mm", "seeds", and "rows" per scan and organ; of matching
            "organs", "deformed_mm", and "rows".
    """

    value: float
    ci95: list[float] | None
    details: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


class Judges:
    """Labelled scans that are read once and judge any number of encoders.

    Attributes:
        notes: what of the scans is not as asked, a sentence each.
    """

    def __init__(self, index: Index, config: ProbeSettings, judges: tuple[str, ...] = ("voxels",), num_seeds: int = 1):
        """
        Args:
            index: a store with labels.
            config: scans, window and seed.
            judges: of JUDGES.
            num_seeds: decoders that are trained per encoder.

        Raises:
            ValueError: a store without labels or scans for what is asked.
        """
        self.config, self.judges, self.num_seeds = config, judges, num_seeds
        self.probe = voxels.VoxelProbe(index, config)
        train, test = self.probe.scans
        check_number(test, config, judges)
        self.notes = voxels.shortcomings(self.probe, index, config)
        unlabelled = [scan for scan in index.scans if scan.split == config.split]
        self.views = readings.unlabelled_views(index, unlabelled, config.size, config.seed)
        both = "decoder" in judges, "matching" in judges
        self.train = [decoder.LabelledScan(index, scan) for scan in train] if both[0] else []
        self.test = [decoder.LabelledScan(index, scan) for scan in test] if any(both) else []
        self.names = [voxels.BACKGROUND, *sorted(index.labels, key=index.labels.get)]
        if any(both) and not any(scan.voxels for scan in self.test):
            raise ValueError(
                f"judges={','.join(judges)}: no organ occurs in the {len(test)} scans to test on: raise num_test_scans="
                f"{config.num_test_scans}, or choose another test_split than {config.test_split!r}"
            )

    def judge(self, encoder: Encoder | ResEncoder, reading: str, only: tuple[str, ...] = JUDGES) -> dict[str, Score]:
        """What every judge says of one reading of an encoder, which is left as it is.

        Args:
            encoder: on the device to compute on.
            reading: of `readings.READINGS`.
            only: of the judges that were asked, these alone.

        Raises:
            FailedRun: its features are not finite.
        """
        plain = readings.read_as(encoder, reading, self.views)
        asked = [judge for judge in self.judges if judge in only]
        found = {"voxels": self._voxels(plain)} if "voxels" in asked else {}
        if len(found) == len(asked):
            return found
        maps = readings.StandardisedMaps(plain, self.views)
        if "decoder" in asked:
            found["decoder"] = self._decoder(maps)
        if "matching" in asked:
            found["matching"] = self._matching(maps)
        return found

    def _voxels(self, encoder: Encoder | ResEncoder) -> Score:
        features = self.probe.features(encoder)
        score = self.probe.score(features)
        last = self.probe.score(features, slice(-encoder.channels[encoder.last], None))
        draws = metrics.scan_draws(len(score.hits), self.config.seed)
        bounds = metrics.percentile_bounds(voxels.drawn_accuracies(score, draws)) if len(score.hits) > 1 else None
        details = {"recall": score.recall, "last_map": last.balanced_accuracy}
        details |= {"hits": score.hits.tolist(), "counts": score.counts.tolist()}
        details |= {"scans": [scan.scan_id for scan in self.probe.scans[1]], "classes": list(self.probe.names.values())}
        return Score(score.balanced_accuracy, bounds, details)

    def _decoder(self, maps: readings.StandardisedMaps) -> Score:
        seeds, size = range(self.config.seed, self.config.seed + self.num_seeds), self.config.size
        decoders = [decoder.train_decoder(maps, self.train, size, seed) for seed in seeds]
        rows = decoder.score_decoder(maps, decoders, self.test, self.names, size)
        together = mean_rows(rows)
        summary, bounds = metrics.summarise(together), metrics.intervals(together, self.config.seed)["dice"]
        organs = {organ: {key: one[key] for key in ("dice", "hd95_mm")} for organ, one in summary["organs"].items()}
        details = {"organs": organs, "hd95_mm": summary["hd95_mm"], "rows": together}
        details["seeds"] = [metrics.summarise(part)["dice"] for part in rows]
        return Score(summary["dice"], bounds, details)

    def _matching(self, maps: readings.StandardisedMaps) -> Score:
        rows = matching.organ_errors(maps, self.test, self.names, self.config.size)
        if not rows:
            raise ValueError("judges=matching: no organ occurs in two of the test scans: raise num_test_scans")
        moved = matching.deformation_errors(maps, self.test, self.config.size, self.config.seed)
        details = {"organs": matching.by_organ(rows), "deformed_mm": matching.median_error(moved) if moved else None}
        details["rows"] = by_target(rows)
        return Score(matching.median_error(rows), median_bounds(rows, self.config.seed), details)

    def body_box_mm(self) -> float:
        """Median matching error of the place in the body's box, which needs no encoder."""
        return matching.median_error(matching.organ_errors(None, self.test, self.names, self.config.size))


def check_number(test: list[ScanRecord], config: ProbeSettings, judges: tuple[str, ...]) -> None:
    """Refuses too few scans to test on.

    Raises:
        ValueError: one alone, in which nothing of another can be found.
    """
    if "matching" in judges and len(test) < 2:
        raise ValueError(
            f"judges=matching needs two test scans or more: num_test_scans={config.num_test_scans}, and "
            f"test_split={config.test_split!r} has {len(test)} that are not learnt from"
        )


def mean_rows(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several decoders for the same scans and organs as one: scores are their means where they have one."""
    together = []
    for same in zip(*parts):
        row = dict(same[0])
        for key in metrics.SCORES:
            known = [one[key] for one in same if not np.isnan(one[key])]
            row[key] = float(np.mean(known)) if known else float("nan")
        together.append(row)
    return together


def by_target(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median error per searched scan and organ, for paired comparisons."""
    keys = sorted({(row["target"], row["organ"]) for row in rows})
    errors = {key: [row["error_mm"] for row in rows if (row["target"], row["organ"]) == key] for key in keys}
    return [
        {"scan_id": scan, "organ": organ, "error_mm": float(np.median(errors[scan, organ]))} for scan, organ in keys
    ]


def median_bounds(rows: list[dict[str, Any]], seed: int, num_draws: int = 1000) -> list[float] | None:
    """95 % interval of the median error, the searched scans drawn with all their rows; none for a single scan."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["target"], []).append(row["error_mm"])
    if len(errors) < 2:
        return None
    parts, rng = list(errors.values()), np.random.default_rng(seed)
    drawn = [
        np.median(np.concatenate([parts[i] for i in rng.integers(len(parts), size=len(parts))]))
        for _ in range(num_draws)
    ]
    return metrics.percentile_bounds(np.array(drawn))


def better(judge: str, one: float, other: float) -> bool:
    """Whether a value of a judge is better than another."""
    return one > other if HIGHER_IS_BETTER[judge] else one < other


@dataclass(frozen=True)
class Standing:
    """Where a value lies between a judge's ends.

    Attributes:
        low: the strongest of the controls.
        low_is: which that is, e.g. "random, BatchNorm off".
        high: of the encoder that was trained with all labels; none: not given.
        closed: share of the room between them that is closed; none without an upper end, or without room.
    """

    low: float
    low_is: str
    high: float | None
    closed: float | None

    @classmethod
    def of(cls, judge: str, value: float, lows: dict[str, float], high: float | None) -> "Standing":
        """
        Args:
            judge: of JUDGES.
            value: to place.
            lows: name -> value of each control, at least one.
            high: the upper end.
        """
        low_is = (max if HIGHER_IS_BETTER[judge] else min)(lows, key=lows.get)
        low = lows[low_is]
        room = None if high is None else (high - low) * (1 if HIGHER_IS_BETTER[judge] else -1)
        closed = (value - low) / (high - low) if room is not None and room >= LEAST_ROOM[judge] else None
        return cls(low, low_is, high, closed)

    def sentence(self, judge: str, value: float) -> str:
        """In words."""
        unit = UNITS[judge]
        ends = f"{self.low_is} {_number(judge, self.low)}"
        word = "ahead of" if better(judge, value, self.low) else "not ahead of"
        text = f"{_number(judge, value)} {unit}, {word} {ends}"
        if self.high is None:
            return f"{text}; ceiling=RUN of an encoder trained with all labels would say how much room there is"
        text += f"; trained with all labels {_number(judge, self.high)}"
        if self.closed is None:
            return f"{text}: no room between these ends, so this judge says nothing here"
        return f"{text}: {self.closed:.0%} of the room between them"


def _number(judge: str, value: float) -> str:
    return f"{value:.1f}" if judge == "matching" else f"{value:.3f}"


def to_device(encoder: Encoder | ResEncoder) -> Encoder | ResEncoder:
    """On CUDA where there is one."""
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")
