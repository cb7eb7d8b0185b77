"""A run's metrics to MLflow or Weights & Biases, in addition to its own files, through their own clients; a run that
continues goes on in the same record. Server, project and key come from their own environment variables
(MLFLOW_TRACKING_URI, WANDB_MODE, ...), as for any program. A tracker that fails does not end the training: a line for
the user, and no more of it."""

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgl_ray.config import flattened
from pgl_ray.paths import is_url
from pgl_ray.train.events import Notes
from pgl_ray.train.records import RunRecord, read_json
from pgl_ray.train.run_files import TRACKER, write_json


def known_as(run: Path) -> dict[str, str]:
    """Tracker -> the run's name there; a run may have gone on with another."""
    return read_json(run / TRACKER) if (run / TRACKER).exists() else {}


class Tracker:
    """What train.tracker names, with the run's config, which run.json holds.

    Args:
        kind: none, mlflow or wandb.
        run: folder of the run.

    Raises:
        ValueError: its package is not installed.
    """

    def __init__(self, kind: str, run: str):
        self.record: MLflow | WandB | None = None
        self.notes = Notes(run)
        if kind != "none":
            try:
                self._try(self._open, {"mlflow": MLflow, "wandb": WandB}[kind], Path(run))
            except ImportError:
                raise ValueError(f"train.tracker={kind} needs its package: pip install 'pgl_ray[{kind}]'") from None

    def _open(self, record: type, run: Path) -> None:
        self.record = record(run, RunRecord.read(run))

    def _try(self, action: Callable, *args: Any) -> None:
        try:
            action(*args)
        except ImportError:
            raise
        except Exception as error:  # their classes are many, and a server that is away is no reason to stop
            text = f"the tracker fails and is left out from now on: {' '.join(str(error).split())}"
            logging.getLogger("pgl_ray").warning(text)
            self.notes.add(text)
            self.record = None

    def write(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics."""
        if self.record:
            self._try(self.record.write, step, row)

    def close(self) -> None:
        """The run has ended, well or not."""
        if self.record:
            self._try(self.record.close)


class MLflow:
    """One run of the experiment `pgl_ray` (or MLFLOW_EXPERIMENT_NAME)."""

    def __init__(self, run: Path, record: RunRecord):
        import mlflow
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        self.client = mlflow
        if not MLFLOW_EXPERIMENT_NAME.is_set():
            mlflow.set_experiment("pgl_ray")
        known = known_as(run)
        if "mlflow" in known:
            mlflow.start_run(run_id=known["mlflow"])
            return
        typed = record.config["run"]
        tags = {"door": record.door, "folder": typed if is_url(typed) else str(run)}
        started = mlflow.start_run(run_name=run.name, tags=tags)
        mlflow.log_params(flattened(record.config))
        write_json(run / TRACKER, known | {"mlflow": started.info.run_id})

    def write(self, step: int, row: dict[str, float]) -> None:
        """Sends a row."""
        self.client.log_metrics(row, step=step)

    def close(self) -> None:
        """Ends the record of this start."""
        self.client.end_run()


class WandB:
    """One run of the project `pgl_ray` (or WANDB_PROJECT); its files lie in the run's folder."""

    def __init__(self, run: Path, record: RunRecord):
        import wandb

        known = {"wandb": secrets.token_hex(8)} | known_as(run)
        write_json(run / TRACKER, known)
        options = {"project": os.environ.get("WANDB_PROJECT", "pgl_ray"), "name": run.name, "dir": str(run)}
        options |= {"id": known["wandb"], "resume": "allow", "job_type": record.door}
        self.run = wandb.init(config=record.config, settings=wandb.Settings(silent=True), **options)
        self.run.define_metric("*", step_metric="step")  # steps since the last checkpoint are written again

    def write(self, step: int, row: dict[str, float]) -> None:
        """Sends a row."""
        self.run.log({"step": step, **row})

    def close(self) -> None:
        """Ends the record of this start."""
        self.run.finish()
