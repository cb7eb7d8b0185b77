"""Population based training: a fine-tuning becomes a copy of a better trial's, with a learning rate of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

from pgl_ray import finetune
from pgl_ray.config import FinetuneConfig, to_yaml
from pgl_ray.data.durable import put_in_place, write_aside
from pgl_ray.sweep import sweeps
from pgl_ray.train import checkpoint
from pgl_ray.train.metrics import metrics_path, read_metrics
from pgl_ray.train.records import RunRecord
from pgl_ray.train.run_files import RECORD, STATE, write_json


def take_over(folder: Path, values: dict[str, Any], config: FinetuneConfig) -> FinetuneConfig:
    """Where pbt changed this trial, its fine-tuning becomes a copy of another one's, with its own learning rate.

    Returns:
        How to fine-tune: with the rate that it had, where there was nothing to copy yet.
    """
    from ray import tune

    handed = tune.get_checkpoint()
    if not handed:
        return config
    with handed.as_directory() as place:
        source = {**json.loads(Path(place, "source.json").read_text()), "lr": config.optim.lr}
    noted = folder / "taken_over.json"
    if source["name"] == folder.name or (noted.exists() and json.loads(noted.read_text()) == source):
        return config
    if fork(folder.parent / source["name"] / "finetune", Path(config.run), config):
        sweeps.note(folder, values=values)
        write_json(noted, source)
        return config
    if not Path(config.run, RECORD).exists():
        return config
    rate = RunRecord.read(config.run).learning_rate
    return config.model_copy(update={"optim": config.optim.model_copy(update={"lr": rate})})


def fork(source: Path, target: Path, config: FinetuneConfig) -> bool:
    """Puts a copy of a run, as of its newest checkpoint, in the target's place, with another learning rate.

    Returns:
        False where the source has no checkpoint yet; the target stays as it is.
    """
    newest = checkpoint.committed(source)
    if not newest:
        return False
    try:
        state = checkpoint.read_state(newest[0] / STATE)
    except ValueError:  # a newer one took its place just now
        newest = checkpoint.committed(source)
        state = checkpoint.read_state(newest[0] / STATE)
    place, step = newest
    aside = target.with_name(target.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rows = [json.dumps(row) + "\n" for row in read_metrics(source) if row["step"] <= step]
    metrics_path(aside).write_text("".join(rows))
    shutil.copy(source / finetune.BEST, aside / finetune.BEST)
    record = RunRecord.read(source)
    record.model_copy(update={"config": json.loads(config.model_dump_json())}).write(aside)
    write_aside(aside / "config.yaml", to_yaml(config).encode())
    factor = config.optim.lr / record.learning_rate
    for key in ("base_lrs", "_last_lr"):
        state["schedule"][key] = [lr * factor for lr in state["schedule"][key]]
    for group in state["optimizer"]["param_groups"]:
        group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    checkpoint.write_checkpoint(aside, step, state, {"taken_from": str(place)})
    shutil.rmtree(target, ignore_errors=True)
    put_in_place(aside, target)
    return True
