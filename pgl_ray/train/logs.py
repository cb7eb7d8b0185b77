"""What each worker of a run says, as JSON lines in the run's folder: logs/rank_<K>.jsonl, and its stacks on SIGUSR1."""

import faulthandler
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG = logging.getLogger("pgl_ray")


class JsonLines(logging.Handler):
    """Writes each record as one line with time, run, rank, epoch, step, level and message; what `extra={"facts": {}}`
    holds stands in it, too. `place` says where the loop stands."""

    def __init__(self, path: Path, run: str, rank: int):
        super().__init__()
        self.file = path.open("a")
        self.place: dict[str, Any] = {"run": run, "rank": rank, "epoch": None, "step": None}

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler's."""
        row = {"time": round(record.created, 3), **self.place, "level": record.levelname}
        row |= {"message": " ".join(record.getMessage().split()), **getattr(record, "facts", {})}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """As logging.Handler's."""
        self.file.close()
        super().close()


@contextmanager
def written(run: str, rank: int, world: int) -> Iterator[None]:
    """While it lasts, this process' log goes to the run's folder: what the loop says, what libraries warn of, and the
    error that ends it. `kill -USR1 PID` on its host, both named in the first line, adds all its threads' stacks to
    logs/rank_<K>.stack.

    Args:
        run: folder of the run.
        rank, world: of this worker.
    """
    folder = Path(run) / "logs"
    folder.mkdir(exist_ok=True)
    lines = JsonLines(folder / f"rank_{rank}.jsonl", Path(run).name, rank)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(lines)
    LOG.setLevel(logging.INFO)
    with (folder / f"rank_{rank}.stack").open("a") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        say("start", world=world, host=socket.gethostname(), pid=os.getpid())
        began = time.monotonic()
        try:
            yield
            say("end", seconds=round(time.monotonic() - began, 3))
        except BaseException as error:
            LOG.error("%s: %s", type(error).__name__, error)
            raise
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            logging.getLogger().removeHandler(lines)
            lines.close()


def at(epoch: float, step: int) -> None:
    """Where the loop stands from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, JsonLines):
            handler.place |= {"epoch": epoch, "step": step}


def say(message: str, **facts: Any) -> None:
    """One line of level INFO; `facts` are plain values."""
    LOG.info(message, extra={"facts": facts})
