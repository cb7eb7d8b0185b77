"""What each worker of a run says, as JSON lines in the run's folder: logs/rank_<K>.jsonl; its stacks beside them."""

import faulthandler
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LOG = logging.getLogger("pgl_ray")
WAITING_BYTES = 2**20  # of lines that storage does not take


class JsonLines(logging.Handler):
    """Writes each record as one line with time, run, rank, epoch, step, level and message; what `extra={"facts": {}}`
    holds stands in it, too. `place` says where the loop stands.

    Lines that storage does not take wait for the next one. Those beyond WAITING_BYTES are lost, and the line after them
    says how many in `lost_lines`: nothing is raised, for no training shall end because of its log."""

    def __init__(self, path: Path, run: str, rank: int):
        super().__init__()
        self.path, self.lost = path, 0
        self.file: IO[bytes] | None = None
        self.place: dict[str, Any] = {"run": run, "rank": rank, "epoch": None, "step": None}

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler's."""
        row = {"time": round(record.created, 3), **self.place, "level": record.levelname}
        row |= {"message": " ".join(record.getMessage().split()), **getattr(record, "facts", {})}
        row |= {"lost_lines": self.lost} if self.lost else {}
        try:
            self._opened().write(json.dumps(row).encode() + b"\n")
            self.lost = 0
        except OSError:
            self.lost += 1
            return
        with suppress(OSError):
            self._opened().flush()

    def _opened(self) -> IO[bytes]:
        if not self.file:
            self.path.parent.mkdir(exist_ok=True)
            self.file = self.path.open("ab", WAITING_BYTES)
        return self.file

    def close(self) -> None:
        """As logging.Handler's."""
        if self.file:
            with suppress(OSError):
                self.file.close()
        super().close()


@contextmanager
def stacks_file(run: str, rank: int) -> Iterator[IO[str] | int]:
    """Where a worker's stacks go: logs/rank_<K>.stack of the run, which no other process writes to; standard error
    where that cannot be opened, for a signal that nobody takes would end the worker."""
    path = Path(run) / "logs" / f"rank_{rank}.stack"
    with ExitStack() as opened:
        stacks: IO[str] | int = 2
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            stacks = opened.enter_context(path.open("a"))
        yield stacks


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
    lines = JsonLines(folder / f"rank_{rank}.jsonl", Path(run).name, rank)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(lines)
    LOG.setLevel(logging.INFO)
    with stacks_file(run, rank) as stacks:
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
