"""What to do next with runs: the first step that is open, by their own figures."""

import math
from typing import Any

import yaml
from scipy import stats

from pgl_ray import shipped
from pgl_ray.config import EncoderConfig
from pgl_ray.judge.judges import Standing
from pgl_ray.outlook import MAX_CLAMPED, MIN_TURNOVER
from pgl_ray.pages import arms, run_folders, speeds, tables
from pgl_ray.pages.arms import Gain
from pgl_ray.pages.pages import Line, command, percent, plural
from pgl_ray.pages.run_folders import Run
from pgl_ray.train import health, run_paths

TEST = "test"  # the split that doors test on where no other is named
TUNING = "conf/finetune_small.yaml"
USE = "Use it"
MOST_SCANS = 2000  # that anybody would label to tell two runs apart


def first(runs: list[Run], judged: dict[str, dict[str, Any] | None]) -> Line:
    """The first of the steps that is open, in the order in which they are worth doing."""
    pretrained, tuned = ([run for run in runs if run.door == door] for door in ("pretrain", "finetune"))
    if line := _unfinished(runs) or _mends(pretrained):
        return line
    for run in runs:
        if not run.rows:
            return Line("Wait", f"{run.name} has no metrics yet; make this page again when it has")
    for run in pretrained:
        result = judged[run.name]
        if not result or not result["standing"]:
            return Line("Judge it", f"{run.name} was not set beside random weights by all judges: {_judging(run)}")
        if not any(Standing(**one).is_ahead for one in result["standing"].values()):
            return _no_better(run, result)
    return _after(pretrained, tuned)


def _unfinished(runs: list[Run]) -> Line | None:
    for at in filter(None, map(tables.unfinished, runs)):
        return Line("Let it end", f"{at}; where it runs no more, the same command goes on from there")
    return None


def _mends(pretrained: list[Run]) -> Line | None:
    """What is wrong with a training, by its own figures."""
    for run in pretrained:
        if collapsed := tables.collapsed(run):
            if health.is_blank(collapsed):
                text = command("inspect", f"store={run.record.index}")
                return Line("Look at the scans", f"{run.name}: {health.collapse(collapsed)}; {text} shows the scans")
            rate = run.record.learning_rate
            return Line(
                "Train again",
                f"{run.name} collapsed: a new run=... with a lower optim.lr than {rate:g}, or a larger batch",
            )
        if (wait := speeds.wait_of(run)) and wait.verdict == speeds.DATA:
            text = command(
                "bench", str(run.path / "config.yaml"), f"index={run.record.index}"
            )  # here, of a bucket's too
            return Line("Feed it", f"{text} says which part of the data's way is dear, and what helps")
    return None


def _no_better(run: Run, judged: dict[str, Any]) -> Line:
    """An encoder that no judge sets above random weights: the likeliest reason that its record gives."""
    facts, what = run.record.outlook, f"{run.name} is not above random weights"
    if facts.get("target_turnover", math.inf) < MIN_TURNOVER:
        turned = f"its target turned over {facts['target_turnover']:.1f} times, fewer than {MIN_TURNOVER:g}"
        return Line("Train on", f"{what}, and {turned}: more steps (max_steps) or a lower ema_decay")
    if max(facts.get("clamped_share", [0])) > MAX_CLAMPED:
        share = percent(max(facts["clamped_share"]))
        return Line(
            "Enlarge the views",
            f"{what}, and {share} of the bins of an axis were clamped: larger views.size, or finer align.output_stride",
        )
    num = judged["num_test_scans"]
    steps = f"{run.rows[-1]['step']:,.0f} steps"
    return Line(
        "Train on",
        f"{what} after {steps}, on {plural(num, 'test scan')}: more steps, then more test scans (num_test_scans)",
    )


def _judging(run: Run) -> str:
    """The command that sets a pre-training beside random weights."""
    args = f"init={run_paths.origin(run.path)}", "judges=[voxels,decoder,matching]"
    if not run.record.store.labels:
        text = command("probe", *args, "index=STORE")
        return f"{text}, STORE one of a few labelled scans, for this run's has no labels"
    split, text = _tested(run, "train")
    args += (f"index={run.record.index}",) + ((f"test_split={split}",) if split != TEST else ())
    if "train" not in (run.record.store.splits or ["train"]):
        args += (f"split={split}",)  # the judges keep the scans apart
    return command("probe", *args) + text


def evaluation(run: Run) -> str:
    """The command that evaluates a fine-tuning."""
    split, text = _tested(run, run.config.get("split", "train"))
    args = [f"split={split}"] if split != TEST else []
    return command("evaluate", f"run={run_paths.origin(run.path)}", f"index={run.record.index}", *args) + text


def _tested(run: Run, trained: str) -> tuple[str, str]:
    """The split of a run's store to test on, and what is to be said behind the command where it has none.

    Args:
        run: whose store the scans are of.
        trained: the split that labelled scans to train on are taken from.
    """
    splits = run.record.store.splits
    if splits is None or TEST in splits:  # earlier versions did not note them
        return TEST, ""
    others = [split for split in splits if split != trained]
    if others:
        return others[-1], ""  # one without a name is the first
    mend = f"prepare some as split {TEST} (imagesTs and labelsTs, or labels.table with a column split)"
    return TEST, f", once its store has labelled scans beside those of split {trained}: {mend}"


def _after(pretrained: list[Run], tuned: list[Run]) -> Line:
    """Once the encoder is above random weights, or where there are only fine-tunings."""
    waiting = [run for run in tuned if not run.summary]
    if waiting:
        return Line("Evaluate", evaluation(waiting[0]))
    starts = [run for run in tuned if run.record.init != "random"]
    starts = [run for run in starts if run.record.init == starts[0].record.init]
    random = [run for run in tuned if run.record.init == "random"]
    if pretrained and not starts:
        run = pretrained[0]
        args = [TUNING, "index=STORE", "run=RUN", f"init={run_paths.origin(run.path)}", *_encoder(run)]
        return Line("Fine-tune", f"{command('finetune', *args)}, and once from random weights (without init)")
    if not starts:
        return Line(
            "Pre-train",
            "all runs began from random weights: init=RUN of a pre-training, or init=pretrained:openkbp_small",
        )
    if not random:
        return Line(
            "Fine-tune from random weights",
            f"the settings of {starts[0].name} without init, so that there is something to compare with",
        )
    groups = run_folders.by_settings(arms.same_seed(starts, random)).items()
    steps = [(settings, _against_random(pairs)) for settings, pairs in groups]
    settings, step = next((one for one in steps if one[1].verdict != USE), steps[0])  # what is open first
    return step._replace(text=f"{settings}: {step.text}") if settings else step


def _against_random(pairs: list[tuple[Run, Run]]) -> Line:
    """Of runs in pairs with those from random weights, each pair of a seed."""
    pairs = arms.scored_alike(pairs)
    gain = arms.dice_gain(pairs) if pairs else None
    if gain is None and pairs and not arms.unlike(arms.scored_by_both(pairs)[0]):
        return Line(
            "Score on more scans", "fewer than two scans were scored with both: evaluate both on the same two or more"
        )
    if gain is None:
        return Line(
            "Compare alike",
            "fine-tune from random weights with the same seed, scans and settings, and evaluate on the same scans",
        )
    return _more(gain)


def _encoder(run: Run) -> list[str]:
    """What of a run's encoder differs from that of TUNING, as a command's arguments."""
    own = yaml.safe_load(shipped.path_of(TUNING).read_text())["encoder"]
    theirs, named = (EncoderConfig(**one).model_dump(mode="json") for one in (run.config["encoder"], own))
    return [f"encoder.{key}={value}".replace(" ", "") for key, value in theirs.items() if value != named[key]]


def _more(gain: Gain) -> Line:
    """Whether more scans or more seeds would say more about a difference in Dice."""
    seeds = "fine-tune both with three or more seeds" if len(gain.by_seed) < 3 else "fine-tune with more seeds"
    if not gain.low <= 0 <= gain.high:
        if len(gain.by_seed) < 3:
            return Line("Repeat", f"{seeds}: so far the interval is that of the scans alone")
        if gain.is_better is None:
            return Line("Repeat", f"{seeds}: they differ by more than the gain")
        if gain.is_better:
            return Line(USE, "nothing that these figures could tell is open")
        return Line(
            "Begin from random weights", "the pre-training costs Dice here: train longer, or on scans like these"
        )
    half = (gain.high - gain.low) / 2
    spread = half * math.sqrt(gain.num_scans) / stats.t.ppf(0.975, gain.num_scans - 1)
    needed = math.ceil((1.96 * spread / gain.mean) ** 2) if gain.mean else MOST_SCANS + 1
    if needed > MOST_SCANS:
        return Line(
            "Train on",
            f"a difference of {gain.mean:+.2f} points of Dice is too small for any number of test scans: longer "
            "pre-training, fewer labels, or another task",
        )
    return Line(
        "Score on more scans",
        f"if the difference stays as it is, about {max(needed, gain.num_scans + 1):,} test scans would tell it from 0 "
        f"({gain.num_scans} now); then {seeds}",
    )
