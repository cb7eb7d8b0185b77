"""Which worker stands still: each tells the others how far it is, and who waits too long for another says for whom.

A collective that does not end names nobody, and under NCCL it ends the process. So a thread in every worker publishes
the worker's place in the loop, in the store of the process group, and looks at the places of the others.
"""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch

from pgl_ray.config import FailedRun
from pgl_ray.train import logs
from pgl_ray.train.events import Notes

T = TypeVar("T")
PLACES = ("waiting for its batch", "in the training step", "in the metrics", "judging")  # of a step, in this order
BATCH, STEP, METRICS, JUDGE = range(4)
ENDED = -1  # instead of a sign of life: nobody waits for this worker any more
SHARE = 0.7  # of the timeout after which a wait is looked at: before the collective ends and takes the process along


class Watch:
    """Of one worker.

    Args:
        run: folder of the run; who stands still is noted there.
        rank, world: of the worker.
        timeout_s: that workers wait for one that stands still; collectives have the same.
    """

    def __init__(self, run: str, rank: int, world: int, timeout_s: float):
        self.notes, self.rank, self.world, self.timeout_s = Notes(run), rank, world, timeout_s
        self.period_s = min(5.0, timeout_s / 20)
        self.progress, self.beats, self.alive, self.moved = 0, 0, 0, time.monotonic()
        self.finding: str | None = None
        self.store = None
        if world > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            patience = timedelta(seconds=max(1.0, 2 * self.period_s))
            self.store = torch.distributed.TCPStore(address, port, is_master=False, timeout=patience)
        self.seen: dict[int, tuple[list, float, float]] = {}  # rank -> what it said last, when its place and it changed
        if self.store:
            self._tell(self.store, self.alive)  # from the first moment on there is somebody to name
        self.opened = contextlib.ExitStack()
        self.stacks = self.opened.enter_context(logs.stacks_file(run, rank))
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True, name="watch")
        self.thread.start()

    def at(self, step: int, place: int) -> None:
        """The worker has reached a place of a step; costs nothing."""
        self.progress, self.moved = step * len(PLACES) + place, time.monotonic()

    def beat(self) -> None:
        """The worker gets on where it is."""
        self.beats, self.moved = self.beats + 1, time.monotonic()

    @contextlib.contextmanager
    def beating(self, module: torch.nn.Module) -> Iterator[None]:
        """While it lasts, every forward pass of a module says that the worker gets on."""
        hook = module.register_forward_hook(lambda *_: self.beat())
        try:
            yield
        finally:
            hook.remove()

    def meet(self) -> None:
        """Waits for all workers for as long as the slowest one gets on: before a collective that some reach much later.

        Raises:
            FailedRun: one has stood still for `timeout_s`.
        """
        if not self.store:
            return
        name = f"pgl_ray/met/{self.progress}"
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.world:
            self.beat()
            late = [rank for rank, (_, moved, _) in self.seen.items() if time.monotonic() - moved > self.timeout_s]
            if late:
                raise FailedRun(self._name(late))
            time.sleep(min(0.2, self.period_s))

    def close(self) -> None:
        """Ends the thread; the others wait for this worker no more."""
        self._end()
        if self.store:
            with contextlib.suppress(RuntimeError):
                self._tell(self.store, ENDED)
        faulthandler.cancel_dump_traceback_later()
        self.opened.close()

    def last_look(self) -> str | None:
        """Who was waited for in a collective that has just failed: its timeout may end before the thread's turn."""
        self._end()
        self._look()
        return self.finding

    def _end(self) -> None:
        self.done.set()
        self.thread.join()

    def _follow(self) -> None:
        armed = 0.0
        while not self.done.wait(self.period_s):
            if self.moved > armed:  # else the timer runs out, and dumps all stacks, whatever hangs
                armed = time.monotonic()
                faulthandler.dump_traceback_later(SHARE * self.timeout_s + self.period_s, file=self.stacks)
            self._look()

    def _look(self) -> None:
        still_s = time.monotonic() - self.moved
        finding = None
        try:
            self._exchange()
        except RuntimeError:  # the store lies with rank 0
            finding = "rank 0 does not answer" if self.rank else None
        if still_s < SHARE * self.timeout_s:
            self.finding = None
        elif self.finding is None:
            finding = finding or self._finding()
            if finding:
                self.finding = f"{finding}; rank {self.rank} has waited {still_s:.0f} s for it (train.timeout_s)"
                self.notes.add(self.finding)

    def _exchange(self) -> None:
        """Tells the others this worker's place, and hears theirs."""
        if not self.store:
            return
        self.alive += 1
        self._tell(self.store, self.alive)
        now = time.monotonic()
        for rank in range(self.world):
            key = f"pgl_ray/at/{rank}"
            if rank == self.rank or not self.store.check([key]):
                continue
            state = json.loads(self.store.get(key))
            if state[2] == ENDED:
                self.seen.pop(rank, None)
                continue
            before, moved, heard = self.seen.get(rank, ([None] * 5, now, now))
            self.seen[rank] = state, now if state[:2] != before[:2] else moved, now if state[2] != before[2] else heard

    def _tell(self, store: torch.distributed.TCPStore, alive: int) -> None:
        state = [self.progress, self.beats, alive, os.getpid(), socket.gethostname()]
        store.set(f"pgl_ray/at/{self.rank}", json.dumps(state))

    def _finding(self) -> str | None:
        """Who is waited for, or none where nobody is behind."""
        now = time.monotonic()
        silent = [rank for rank, (_, _, heard) in self.seen.items() if now - heard > SHARE * self.timeout_s / 2]
        places = {rank: state[0] for rank, (state, _, _) in self.seen.items()} | {self.rank: self.progress}
        behind = [rank for rank, place in places.items() if place < max(places.values()) and rank != self.rank]
        return self._name(silent or behind) if silent or behind else None

    def _name(self, ranks: list[int]) -> str:
        now, texts = time.monotonic(), []
        for rank in ranks:
            (progress, _, _, pid, host), _, heard = self.seen[rank]
            step, place = divmod(progress, len(PLACES))
            silent = now - heard > SHARE * self.timeout_s / 2
            gone = "does not answer, last heard of" if silent else "stands still"
            texts.append(f"rank {rank} (process {pid} on {host}) {gone} at step {step}, {PLACES[place]}")
        return ", ".join(texts)


def watched(work: Callable[[Watch], T], run: str, rank: int, world: int, timeout_s: float) -> T:
    """Calls a worker under a watch, see `Watch`.

    Raises:
        FailedRun: a collective failed because another worker stands still; it is named.
    """
    watch = Watch(run, rank, world, timeout_s)
    try:
        return work(watch)
    except RuntimeError as error:
        finding = watch.last_look()
        if finding:
            raise FailedRun(finding) from error
        raise
    finally:
        watch.close()
