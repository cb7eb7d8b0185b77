"""Run folders, checkpoints, and what is read back from them.

A run folder holds run.json (door, config, versions), config.yaml, metrics.jsonl, TensorBoard events, Ray Train's
checkpoint_<step> folders with its snapshot of which of them are committed, and for fine-tuning best.pt.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pgl_ray
from pgl_ray.config import Section, build, dump
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train.track import Tracker

SNAPSHOT = "checkpoint_manager_snapshot.json"
STATE = "state.pt"
PREFIX = {"pretrain": "online.encoder.", "finetune": "encoder."}  # of the encoder's keys, by door
# what a continued run may change
MAY_DIFFER = {
    "ray",
    "train",
    "health",
    "stream.on_error",
    "stream.max_skipped_share",
    "stream.augment_on",
    "stream.resize_on",
    "accumulate",
    "probe",
}


# -- run folders ------------------------------------------------------------------------------------------------------


def open_run(config: Section, door: str, facts: dict[str, Any]) -> str:
    """Creates the run's folder, or checks that an existing one belongs to the same config.

    Args:
        config: a door's config with a field `run`.
        door: its name.
        facts: what else run.json records; "plan", the identity of the run's plan, must stay the same.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: the folder holds another run or other files.
    """
    folder = Path(config.run).absolute()
    wanted = json.loads(config.model_dump_json())
    if (folder / "run.json").exists():
        found = json.loads((folder / "run.json").read_text())
        if found["door"] != door:
            raise ValueError(f"run={config.run} is a {found['door']} run: choose another run=...")
        skip = MAY_DIFFER | {"run", "index"}
        try:  # with the defaults of settings that came after the run
            stored = json.loads(build(type(config), found["config"]).model_dump_json())
        except ValueError:  # a setting is gone
            stored = found["config"]
        names = _differences({k: v for k, v in wanted.items() if k not in skip}, stored)
        changed = sorted(name for name in names if name.split(" ")[0] not in MAY_DIFFER)
        if changed:
            raise ValueError(f"run={config.run} was started with another {', '.join(changed)}: choose another run=...")
        if found["plan"] != facts["plan"]:
            raise ValueError(
                f"run={config.run} was started on other scans than index={config.index} has now: choose another run=..."
            )
        return str(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(f"run={config.run} exists and is not a run of pgl_ray: choose another run=...")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"pgl_ray": pgl_ray.__version__, "torch": str(torch.__version__)}
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"door": door, "config": wanted, "versions": versions, "started": started, **facts}
    write_json(folder / "run.json", record)
    dump(config, folder / "config.yaml")
    return str(folder)


def _differences(wanted: Any, found: Any, path: str = "") -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        names = [_differences(wanted[k], found.get(k), f"{path}.{k}" if path else k) for k in wanted]
        return [name for part in names for name in part]
    return [] if wanted == found else [f"{path} ({found} there, {wanted} here)"]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside, then renames."""
    aside = path.with_name(f"{path.name}.part{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1))
    aside.replace(path)


def committed(run: str | Path) -> tuple[Path, int] | None:
    """The newest checkpoint that Ray Train's controller has committed, and its step.

    A checkpoint folder may exist that the controller never heard of: only its snapshot counts (ray.md, 1).
    """
    try:
        latest = json.loads((Path(run) / SNAPSHOT).read_text())["latest_checkpoint_result"]
    except FileNotFoundError:
        return None
    return (Path(run) / latest["checkpoint_dir_name"], int(latest["metrics"]["step"])) if latest else None


def committed_step(run: str | Path) -> int:
    """Step at which the run continues; 0 for a new one."""
    found = committed(run)
    return found[1] if found else 0


def metrics_path(run: str | Path) -> Path:
    return Path(run) / "metrics.jsonl"


class Metrics:
    """Rank 0's scalars: one JSON object a line in metrics.jsonl, TensorBoard events, and the tracker's record.

    Rows after `start` are dropped: a run that restarts from a checkpoint writes them again.
    """

    def __init__(self, run: str, start: int, tracker: str = "none"):
        from tensorboardX import SummaryWriter

        path = metrics_path(run)
        kept = [line for line in whole_lines(path) if json.loads(line)["step"] <= start]
        aside = path.with_name(path.name + ".part")
        aside.write_text("".join(line + "\n" for line in kept))
        aside.replace(path)
        self.file = path.open("a")
        self.events = SummaryWriter(logdir=run, purge_step=start + 1)
        self.tracker = Tracker(tracker, run)
        self.began = time.monotonic()

    def write(self, step: int, **values: float) -> None:
        """Writes one row; keys are `group/name_unit`."""
        row = {"step": step, "time_s": round(time.monotonic() - self.began, 3)}
        row |= {key: float(value) for key, value in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in values.items():
            self.events.add_scalar(key, value, step)
        self.tracker.write(step, row)

    def close(self) -> None:
        self.file.close()
        self.events.close()
        self.tracker.close()


def whole_lines(path: Path) -> list[str]:
    """Whole lines of a file that may still be written to."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl; none if it is not there yet."""
    return [json.loads(line) for line in whole_lines(metrics_path(run))]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def report(state: dict[str, Any], step: int, metrics: dict[str, float]) -> None:
    """Hands a checkpoint to Ray Train; a barrier, so every rank calls it. Rank 0's state is kept.

    Args:
        state: tensors and plain values only: it is read back with weights_only=True.
        step: steps done.
        metrics: plain floats.
    """
    import ray.train

    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({"step": step})
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, os.path.join(folder, STATE))
        ray.train.report(
            {"step": step, **{key: float(value) for key, value in metrics.items()}},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint_{step:08d}",
        )


def resumed(device: torch.device) -> dict[str, Any] | None:
    """Inside a worker: the state of the checkpoint this worker group starts from, or none."""
    import ray.train

    found = ray.train.get_checkpoint()
    return read_state(Path(found.path) / STATE, device) if found else None


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a file written by torch.save; never unpickles code.

    Raises:
        ValueError: missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged zip file
        raise ValueError(f"checkpoint {path} is damaged or no pgl_ray checkpoint: {str(error)[:120]}") from error


def save_best(path: Path, state: dict[str, Any]) -> None:
    """torch.save written aside, then renamed."""
    aside = path.with_name(path.name + ".part")
    torch.save(state, aside)
    aside.replace(path)


def state_of(run: str) -> dict[str, Any]:
    """State of a run folder (its best or newest checkpoint), of a checkpoint folder, or of a .pt file."""
    state = read_state(file_of(run))
    meta = state.get("meta") if isinstance(state, dict) else None
    if not isinstance(meta, dict) or meta.get("door") not in PREFIX or "model" not in state:
        raise ValueError(f"{run} is no checkpoint of pgl_ray: give the folder of a pretrain or finetune run")
    return state


def file_of(run: str) -> Path:
    """The file that a run's network is read from: best.pt, or of a pre-training the newest committed checkpoint.

    Raises:
        ValueError: no run, or no checkpoint in it.
    """
    path = Path(run)
    if not path.exists():
        raise ValueError(f"run {run} does not exist")
    for file in (path, path / "best.pt", path / STATE):
        if file.is_file():
            return file
    found = committed(path)
    if not found:
        raise ValueError(f"{run} holds no checkpoint: is it a run folder, and did the run get as far as its first one?")
    return found[0] / STATE


def _fill(module: torch.nn.Module, weights: dict[str, torch.Tensor], run: str) -> None:
    """Loads weights whose keys and shapes must all fit."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{run} holds weights of another architecture: {' '.join(str(error).split())[:160]}") from None


def load_encoder(run: str) -> tuple[Encoder | ResEncoder, dict[str, Any]]:
    """The online encoder of a pre-training run, or the encoder of a fine-tuned one.

    Args:
        run: run folder, checkpoint folder or .pt file.

    Returns:
        The encoder on the CPU and the checkpoint's meta dict (its key "encoder" holds the settings).

    Raises:
        ValueError: no checkpoint, or one of another architecture.
    """
    state = state_of(run)
    meta = state["meta"]
    meta["encoder"] = {"kind": "resnet", **meta["encoder"]}  # before there were others it was not named
    encoder = build_encoder(**meta["encoder"])
    _fill(encoder, below(PREFIX[meta["door"]], state["model"]), run)
    return encoder, meta


def below(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries whose keys start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_segmenter(run: str, device: torch.device | str = "cpu") -> tuple[Segmenter, dict[str, Any]]:
    """The best segmentation network of a fine-tuning run, in eval mode.

    Returns:
        The network on `device` and the meta dict: "hu_window", "labels" {name: value}, "task", "patch_size", "encoder".

    Raises:
        ValueError: not a fine-tuning run.
    """
    state = state_of(run)
    meta = state["meta"]
    if meta["door"] != "finetune":
        raise ValueError(f"{run} is a {meta['door']} run: give a fine-tuning run")
    model = Segmenter(build_encoder(**meta["encoder"]), meta["num_outputs"])
    _fill(model, state["model"], run)
    return model.to(device).eval(), meta
