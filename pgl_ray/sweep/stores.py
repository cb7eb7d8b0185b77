"""The stores of a sweep's trials: whether they have the scans that each trial names, and what is to be said of them."""

import functools
from collections.abc import Callable
from pathlib import Path

from pgl_ray import finetune, pretrain
from pgl_ray.config import PRETRAINED, EvaluateConfig, FinetuneConfig, Section, TuneConfig
from pgl_ray.data import stream
from pgl_ray.data.store import Index, ScanRecord, read_index
from pgl_ray.judge import voxels
from pgl_ray.judge.judges import check_number
from pgl_ray.judge.shortcomings import check_organs
from pgl_ray.sweep.points import Point, named, title_of
from pgl_ray.sweep.stages import stage_configs
from pgl_ray.train import checkpoint, weights


def check_stores(config: TuneConfig, trials: list[Point]) -> None:
    """Refuses trials whose store has not the scans that they name, and an encoder that is not there.

    Raises:
        ValueError: of the first such trial.
    """
    read, notes = functools.cache(read_index), []
    read(config.index)
    for values in [trial.values for trial in trials] or [{}]:
        with named(title_of(values) or "base"):
            configs, tested = stage_configs(config, values, Path(config.run)), []
            _check_weights(configs, read)
            if "probe" in configs:
                _, tested = voxels.choose_scans(read(configs["probe"].index), configs["probe"])
                check_number(tested, configs["probe"], configs["probe"].judges)
                check_organs(read(configs["probe"].index), configs["probe"], configs["probe"].judges, tested)
            if "finetune" in configs:
                train_ids, val_ids = finetune.split_scans(configs["finetune"], read(configs["finetune"].index))
                _check_organ(config.judge, configs["finetune"].task, read(configs["finetune"].index), val_ids)
                if config.scheduler.kind == "pbt":
                    _check_checkpoints(config.scheduler.grace, configs["finetune"], train_ids)
            if "evaluate" in configs:
                evaluated = _evaluated(configs["evaluate"], read(configs["evaluate"].index))
                notes += _chosen_by(config, tested, evaluated)
                tested = tested + evaluated
            if "pretrain" in configs:
                pool = read(configs["pretrain"].index)
                plan = pretrain.make_plan(configs["pretrain"], pool)
                if "finetune" in configs or "probe" in configs:
                    _check_windows(pool, read((configs.get("finetune") or configs["probe"]).index))
                curve = configs["pretrain"].probe
                if curve.every:
                    curve = curve.model_copy(update={"index": curve.index or configs["pretrain"].index})
                    tested = tested + voxels.choose_scans(read(curve.index), curve)[1]
                notes += _overlap(pool, plan, tested)
    for note in dict.fromkeys(notes):
        print(f"tune: note: {note}", flush=True)


def _check_organ(judge: str, task: str, index: Index, val_ids: list[str]) -> None:
    """The judged organ is one that fine-tuning's validation gives a figure of: some scan shows it."""
    if judge != "val/dice":
        values: set[int] = set()
        for scan in (index.by_id[scan_id] for scan_id in val_ids):
            inner = max(scan.label_voxels, default=0) if task == "binary" else 0  # an organ includes its tumour
            values |= {value for value in scan.labelled if value in scan.label_voxels or value < inner}
        organs = [organ for organ, value in index.labels.items() if value in values]
        if judge.removeprefix("val/dice_") not in organs:
            raise ValueError(
                f"judge={judge}: the scans that fine-tuning validates on in index={index.store} show "
                f"{', '.join(organs) or 'no organ'}; take val/dice, or val/dice_ and one of them"
            )


def _evaluated(config: EvaluateConfig, index: Index) -> list[ScanRecord]:
    """The scans to evaluate on.

    Raises:
        ValueError: none.
    """
    records = index.labelled(config.split)[: config.num_scans]
    if not records:
        raise ValueError(f"index={config.index} has no labelled scan in split={config.split!r}")
    return records


def _chosen_by(config: TuneConfig, probed: list[ScanRecord], evaluated: list[ScanRecord]) -> list[str]:
    """What to say of scans whose labels choose among the trials and then judge the best of these.

    Args:
        config: of the sweep.
        probed: scans that each trial's probe tests on.
        evaluated: scans that each trial's network is evaluated on.
    """
    key = "first_judge" if config.first_judge else "judge"
    by_probe = (getattr(config, key) or "").startswith("probe/")
    hashes = {scan.content_hash for scan in evaluated}
    both = {scan.content_hash for scan in probed} & hashes if by_probe else set()
    line = f"{len(both)} of the {len(hashes)} scans to evaluate on also choose among the trials ({key}=probe/...)"
    return [f"{line}: give base_probe.test_split another split than base_evaluate.split"] if both else []


def _overlap(pool: Index, plan: stream.Plan, tested: list[ScanRecord]) -> list[str]:
    """What to say of scans that are tested on and pre-trained on, and what would leave them out."""
    hashes, wanted = {scan.content_hash for scan in tested}, set(plan.scan_ids)
    seen = {scan.content_hash for scan in pool.scans if scan.scan_id in wanted} & hashes
    apart = {scan.split for scan in pool.scans} - {scan.split for scan in pool.scans if scan.content_hash in hashes}
    mend = f": base_pretrain.split={' or '.join(sorted(filter(None, apart)))} leaves them out" if any(apart) else ""
    return (
        [f"{len(seen)} of the {len(hashes)} scans to test on are pre-trained on (without labels){mend}"] if seen else []
    )


def _check_windows(pool: Index, labelled: Index) -> None:
    """An encoder sees scans as it saw those that it was trained on."""
    if pool.hu_window != labelled.hu_window:
        raise ValueError(
            f"base_pretrain.index={pool.store} has hu_window={list(pool.hu_window)}, index={labelled.store} "
            f"{list(labelled.hu_window)}: prepare the scans of one into another store=... with the other's hu_window"
        )


def _check_weights(configs: dict[str, Section], read: Callable[[str], Index]) -> None:
    """Weights that come with pgl_ray are there, and fit encoder and store; a probe's control and ceiling are there;
    those of other runs may come into being yet."""
    for key in ("control", "ceiling"):
        if end := "probe" in configs and getattr(configs["probe"], key):
            with named(f"probe.{key}"):
                checkpoint.file_of(end)
    for config in (configs[stage] for stage in ("probe", "finetune") if stage in configs):
        if config.init.startswith(PRETRAINED):
            encoder, partial = config.encoder and config.encoder.model_dump(), getattr(config, "allow_partial", False)
            weights.read(config.init, encoder, read(config.index).hu_window, partial)


def _check_checkpoints(grace: int, config: FinetuneConfig, train_ids: list[str]) -> None:
    """Population based training copies checkpoints: there must be one by each change."""
    counts = (config.patches_per_scan, config.global_batch_size, config.epochs, config.max_steps)
    num_steps = stream.Plan.make(train_ids, *counts, config.seed).num_steps
    most = max(1, num_steps * grace // 100)
    if config.train.checkpoint_every > most:
        raise ValueError(
            f"scheduler.kind=pbt copies checkpoints: base_finetune.train.checkpoint_every="
            f"{config.train.checkpoint_every} must be at most {most}, scheduler.grace={grace} % of {num_steps} steps"
        )
