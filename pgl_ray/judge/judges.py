"""Three judges of a frozen encoder on the same scans, in the same state: what each says, how sure, and where it stands.

A judge is only as good as the room between its ends: the strongest that needs no learning of places (random weights in
whichever reading is best, and wrong priors as a second control), and an encoder of the same size that was trained with
all labels.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pgl_ray.config import ProbeSettings
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index
from pgl_ray.judge import decoder, matching, readings, shortcomings, voxels
from pgl_ray.model import metrics
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder

JUDGES = ("voxels", "decoder", "matching")
HIGHER_IS_BETTER = {"voxels": True, "decoder": True, "matching": False}
UNITS = {"voxels": "balanced accuracy", "decoder": "Dice", "matching": "mm"}
IN_FULL = {
    "voxels": "balanced accuracy of voxels",
    "decoder": "Dice of a decoder on the frozen maps",
    "matching": "median error of point matching in mm",
}
NUM_DRAWS = 1000  # of matching's pairs of scans
LEAST_ROOM = {"voxels": 0.02, "decoder": 0.02, "matching": 2.0}  # between its ends, below which a judge says nothing


@dataclass(frozen=True)
class Score:
    """What one judge says of one reading.

    Attributes:
        value: balanced accuracy, mean Dice, or median error in mm.
        ci95: [low, high] over the test scans (of matching in both of their parts) and, where there are several, over
            decoders; none for a single scan.
        details: plain values: of voxels "recall", "last_map", and "hits" of "counts" voxels per "scans" and "classes";
            of the decoder "organs" with Dice and HD95, "hd95_mm", "seeds", and "rows" per scan and organ; of matching
            "organs", "deformed_mm", and "rows" per pair of scans and organ.
        drawn: the value in bootstrap draws of test scans and decoders, [draws], the same draws for every encoder, so
            that differences are paired; none for a single scan. Not written to files.
        num_scans: that were drawn.
    """

    value: float
    ci95: list[float] | None
    details: dict[str, Any] = field(default_factory=dict)
    drawn: np.ndarray | None = field(default=None, compare=False, repr=False)
    num_scans: int = field(default=0, compare=False)

    @classmethod
    def of_draws(
        cls, value: float, details: dict[str, Any], drawn: np.ndarray | None, num_scans: int, most: float = math.inf
    ) -> "Score":
        """With the interval that the draws of so many scans give a value between 0 and `most`."""
        bounds = None if drawn is None else metrics.bounds_of(drawn, value, num_scans, most)
        return cls(value, bounds, details, drawn, num_scans)

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"value": self.value, "ci95": self.ci95, "details": self.details}


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
        if "voxels" in judges:
            self.probe.check(config)
        train, test = self.probe.scans
        check_number(test, config, judges)
        self.notes = shortcomings.shortcomings(self.probe, config)
        unlabelled = [scan for scan in index.scans if scan.split == config.split]
        tested = {scan.scan_id for scan in test}
        unlabelled = [scan for scan in unlabelled if scan.scan_id not in tested] or unlabelled
        self.size = voxels.window_size(config)
        self.views = readings.unlabelled_views(index, unlabelled, self.size, config.seed)
        both = "decoder" in judges, "matching" in judges
        self.train = [decoder.LabelledScan(index, scan) for scan in train] if both[0] else []
        self.test = [decoder.LabelledScan(index, scan) for scan in test] if any(both) else []
        self.notes += shortcomings.nowhere_to_search(self.test) if both[1] else []
        self.names = [voxels.BACKGROUND, *sorted(index.labels, key=lambda name: index.labels[name])]
        body = {scan.record.scan_id for scan in self.test if matching.has_body(scan)}
        shortcomings.check_organs(index, config, judges, test, body)

    def judge(
        self, encoder: Encoder | ResEncoder, reading: readings.Reading, only: tuple[str, ...] = JUDGES
    ) -> dict[str, Score]:
        """What every judge says of one reading of an encoder, which is left as it is.

        Args:
            encoder: on the device to compute on.
            reading: of `readings.READINGS`.
            only: these of the judges that were asked.

        Raises:
            FailedRun: its features are not finite.
        """
        plain = readings.read_as(encoder, reading, self.views)
        asked = [judge for judge in self.judges if judge in only]
        scores = {"voxels": self._voxels(plain)} if "voxels" in asked else {}
        if len(scores) == len(asked):
            return scores
        maps = readings.StandardisedMaps(plain, self.views)
        if "decoder" in asked:
            scores["decoder"] = self._decoder(maps)
        if "matching" in asked:
            scores["matching"] = self._matching(maps)
        return scores

    def maps(self, encoder: Encoder | ResEncoder, reading: readings.Reading) -> readings.StandardisedMaps:
        """The maps of one reading, those that decoder and matching see."""
        return readings.StandardisedMaps(readings.read_as(encoder, reading, self.views), self.views)

    def _voxels(self, encoder: Encoder | ResEncoder) -> Score:
        features = self.probe.features(encoder)
        score = self.probe.score(features)
        last = self.probe.score(features, slice(-encoder.channels[encoder.last], None))
        draws = metrics.scan_draws(len(score.hits), self.config.seed)
        num_scored = int((score.counts.sum(1) > 0).sum())
        drawn = voxels.drawn_accuracies(score.hits, score.counts, draws) if num_scored > 1 else None
        details = {"recall": score.recall, "last_map": last.balanced_accuracy}
        details |= {"hits": score.hits.tolist(), "counts": score.counts.tolist()}
        details |= {"scans": [scan.scan_id for scan in self.probe.scans[1]], "classes": list(self.probe.names.values())}
        return Score.of_draws(score.balanced_accuracy, details, drawn, num_scored, 1.0)

    def _decoder(self, maps: readings.StandardisedMaps) -> Score:
        seeds, size = range(self.config.seed, self.config.seed + self.num_seeds), self.size
        decoders = [decoder.train_decoder(maps, self.train, size, seed) for seed in seeds]
        rows = decoder.score_decoder(maps, decoders, self.test, self.names, size)
        together = mean_rows(rows)
        own: list[dict[str, Any]] = [metrics.summarise(part) for part in rows]
        drawn = drawn_dice(rows, self.config.seed)
        organs = {
            organ: {key: mean_known([one["organs"][organ][key] for one in own]) for key in ("dice", "hd95_mm")}
            for organ in own[0]["organs"]
        }
        details: dict[str, Any] = {
            "organs": organs,
            "hd95_mm": mean_known([one["hd95_mm"] for one in own]),
            "rows": together,
        }
        details["seeds"] = [one["dice"] for one in own]  # each has one: an organ is there, see `check_organs`
        num_scored = len({row["scan_id"] for row in together if not math.isnan(row["dice"])})
        return Score.of_draws(float(np.mean(details["seeds"])), details, drawn, num_scored, 1.0)

    def _matching(self, maps: readings.StandardisedMaps) -> Score:
        rows = matching.organ_errors(maps, self.test, self.names, self.size)
        moved = matching.deformation_errors(maps, self.test, self.size, self.config.seed)
        deformed_mm = matching.median_error(moved) if moved else None
        scans = sorted({row[key] for row in rows for key in ("scan_id", "source_id")})
        drawn = metrics.drawn_medians(rows, scans, metrics.scan_draws(len(scans), self.config.seed)[:NUM_DRAWS])
        plain = [{key: value for key, value in row.items() if key != "found_mm"} for row in rows]
        details = {"organs": matching.by_organ(rows), "deformed_mm": deformed_mm, "rows": plain}
        return Score.of_draws(matching.median_error(rows), details, drawn, len(scans))

    def body_box_mm(self) -> float:
        """Median matching error of the place in the body's box, which needs no encoder."""
        return matching.median_error(matching.organ_errors(None, self.test, self.names, self.size))


def check_number(test: list[ScanRecord], config: ProbeSettings, judges: tuple[str, ...]) -> None:
    """Refuses too few scans to test on.

    Raises:
        ValueError: fewer than two, for places of one scan are searched in another.
    """
    if "matching" in judges and len(test) < 2:
        raise ValueError(
            f"judges=matching needs two test scans or more: num_test_scans={config.num_test_scans}, and "
            f"test_split={config.test_split!r} has {len(test)} that are not learnt from"
        )


def mean_known(values: list[float | None]) -> float | None:
    """Of those that have a value; none where none has."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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


def drawn_dice(parts: list[list[dict[str, Any]]], seed: int) -> np.ndarray | None:
    """Mean Dice in bootstrap draws of the test scans and of the decoders, [draws]; none for a single scan.

    Args:
        parts: rows of each decoder, for the same scans and organs.
        seed: of the draws.
    """
    of_decoders = [one for rows in parts if (one := metrics.drawn_means(rows, "dice", seed)) is not None]
    if len(of_decoders) < len(parts):
        return None
    drawn = np.stack(of_decoders)  # [decoders, draws]
    chosen = np.random.default_rng((seed, 1)).integers(len(drawn), size=drawn.shape)
    return np.take_along_axis(drawn, chosen, 0).mean(0)


@dataclass(frozen=True)
class Standing:
    """Where a value lies between a judge's ends.

    Attributes:
        low: the strongest of the controls.
        low_is: which that is, e.g. "random, BatchNorm off".
        ahead: by how much the value is better than that, in the judge's unit; below 0 it is worse.
        ahead_ci95: [low, high] of it, paired over bootstrap draws of the test scans, wider where these are few; none
            for a single scan.
        high: of the encoder that was trained with all labels; none: not given.
        closed: share of the room between them that is closed; none without an upper end, or without room.
    """

    low: float
    low_is: str
    ahead: float
    ahead_ci95: list[float] | None
    high: float | None
    closed: float | None

    @classmethod
    def of(cls, judge: str, score: Score, lows: dict[str, Score], high: float | None) -> "Standing":
        """
        Args:
            judge: of JUDGES.
            score: to place.
            lows: name -> score of each control, at least one.
            high: the upper end.
        """
        sign, value = 1 if HIGHER_IS_BETTER[judge] else -1, score.value
        low_is = max(lows, key=lambda name: sign * lows[name].value)
        low, other = lows[low_is].value, lows[low_is].drawn
        ahead, paired, num_scans = sign * (value - low), None, min(score.num_scans, lows[low_is].num_scans)
        if score.drawn is not None and other is not None and num_scans > 1:
            bounds = metrics.percentile_bounds(sign * (score.drawn - other))
            paired = metrics.for_few(bounds, ahead, num_scans)
        has_room = high is not None and sign * (high - low) >= LEAST_ROOM[judge]
        closed = (value - low) / (high - low) if high is not None and has_room else None
        return cls(low, low_is, ahead, paired, high, closed)

    @property
    def is_ahead(self) -> bool | None:
        """Whether the value is better than the strongest control; none: within the noise of the test scans."""
        if self.ahead_ci95 is None:
            return self.ahead > 0
        low, high = self.ahead_ci95
        return None if low <= 0 <= high else low > 0

    def sentence(self, judge: str, value: float) -> str:
        """In words."""
        text = f"{_number(judge, value)} {UNITS[judge]}, {self.against(judge)}"
        if self.high is None:
            return f"{text}; ceiling=RUN of an encoder trained with all labels would say how much room there is"
        text += f"; trained with all labels {_number(judge, self.high)}"
        if self.closed is None:
            return f"{text}: no room between these ends, so this judge says nothing here"
        return f"{text}: {self.closed:.0%} of the room between them"

    def against(self, judge: str) -> str:
        """The difference to the strongest control in words, with its interval."""
        other = f"{self.low_is} {_number(judge, self.low)}"
        if self.ahead_ci95 is None:
            return f"{'ahead of' if self.is_ahead else 'not ahead of'} {other}"
        if self.is_ahead is None:
            return f"not clearly ahead of {other}: {self.by(judge)}"
        return f"{'ahead of' if self.is_ahead else 'behind'} {other} by {self.by(judge)}"

    def by(self, judge: str) -> str:
        """The difference, and its interval if it has one; a deficit is turned round, what may be either is signed."""
        values, sign = [self.ahead, *(self.ahead_ci95 or [])], "+" if self.is_ahead is None else ""
        if self.is_ahead is False:
            values = [-self.ahead, *(-bound for bound in reversed(self.ahead_ci95 or []))]
        ahead, *bounds = (_number(judge, value, sign) for value in values)
        return f"{ahead} (95 % interval {' to '.join(bounds)})" if bounds else ahead


def answer(name: str, standing: dict[str, Standing], values: dict[str, float]) -> str:
    """One sentence: is an encoder better than the strongest random weights, by how much, and how sure is that.

    Args:
        name: of the encoder.
        standing: judge -> where it stands.
        values: judge -> its own value.
    """
    chance = all(one.low_is.startswith("random") for one in standing.values())
    other = "random weights in their strongest reading" if chance else "the strongest control"
    parts = []
    for ahead, word in {True: "ahead of", None: "not clearly ahead of", False: "behind"}.items():
        texts = []
        for judge, one in standing.items():
            if one.is_ahead is ahead:
                text = f"{IN_FULL[judge]} {_number(judge, values[judge])} against {_number(judge, one.low)}"
                texts.append(text + (f", by {one.by(judge)}" if one.ahead_ci95 else ""))
        count = "every judge" if len(texts) == len(standing) else f"{len(texts)} of {len(standing)} judges"
        parts += [f"{word} {other} by {count}: {'; '.join(texts)}"] if texts else []
    return f"{name} is {'. It is '.join(parts)}."


def _number(judge: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.1f}" if judge == "matching" else f"{value:{sign}.3f}"


def to_device(encoder: Encoder | ResEncoder) -> Encoder | ResEncoder:
    """On CUDA where there is one."""
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")
