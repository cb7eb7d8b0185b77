"""How far a stage has come: one bar in a terminal, elsewhere a plain line every ten seconds. Imports nothing heavy."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

EVERY_S = 10.0  # between two plain lines; a stage that is done sooner says nothing
REFRESH_S = 0.1  # between two looks of the bar


class Stage:
    """One stage of a door: how much is done, how fast it goes, how long it will take.

    What is printed while it lasts stands above the bar.

    Args:
        name: what its lines begin with.
        unit: what is counted, in the singular; "": steps, whose text says how fast they go.
        total: of them.
        done: before this stage.
        starts: whether processes start before the first is done, which then says nothing about the speed.
    """

    def __init__(self, name: str, unit: str, total: int, done: int = 0, starts: bool = False):
        self.name, self.unit, self.total, self.done, self.text = name, unit, total, done, ""
        self.began = self.printed = time.monotonic()
        self.mark = None if starts else (done, self.began)  # from where the speed is measured
        self.pending, self.bar, self.redirected = False, None, contextlib.ExitStack()
        if total and sys.stdout.isatty():
            from tqdm import tqdm  # here, for Ray's workers import this file, too

            rate, units = ("{rate_fmt}, ", f" {unit}s") if unit else ("", "")
            look = f"{{desc}} {{n_fmt}}/{{total_fmt}}{units} |{{bar:10}}| {rate}{{remaining}} left{{postfix}}"
            own = {"desc": name, "unit": unit, "total": total, "initial": done, "bar_format": look}
            # tqdm shows nothing in a terminal that does not know its size, as many in containers
            self.bar = tqdm(**own, file=sys.stdout, leave=False, ncols=_columns(), nrows=24, smoothing=0)

    def __enter__(self) -> "Stage":
        if self.bar is not None:
            from tqdm.contrib import DummyTqdmFile

            above = DummyTqdmFile(sys.stdout)
            self.redirected.enter_context(contextlib.redirect_stdout(above))
            if sys.stderr.isatty():  # the same terminal
                self.redirected.enter_context(contextlib.redirect_stderr(above))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.redirected.close()
        if self.bar is not None:
            self.bar.clear()
            self.bar.close()
        elif kind is None and self.pending and time.monotonic() - self.began >= EVERY_S:
            print(self.line(), flush=True)

    def each(self, outcomes: Iterable[Any], text: Callable[[], str] = str) -> Iterator[Any]:
        """What there is to work on; each is done when the next is asked for. `text`: as that of `show`."""
        for outcome in outcomes:
            yield outcome
            self.advance(text())

    def advance(self, text: str = "") -> None:
        """One more is done."""
        self.show(self.done + 1, text)

    def show(self, done: int, text: str = "") -> None:
        """So many are done; fewer than before where the newest are done again.

        Args:
            text: what else there is to say of it.
        """
        now = time.monotonic()
        if self.mark is None or done < self.done:
            self.mark = done, now
        self.done, self.text, self.pending = done, text, True
        if now - self.printed < (EVERY_S if self.bar is None else REFRESH_S):
            return
        self.printed, self.pending = now, False
        if self.bar is None:
            print(self.line(), flush=True)
            return
        # what tqdm computes speed and time from; its clock is another
        self.bar.n, (self.bar.initial, since) = done, self.mark
        self.bar.start_t = self.bar._time() - (now - since)
        self.bar.ncols = _columns()  # it may have been resized
        self.bar.set_postfix_str(text)

    def line(self) -> str:
        """The plain line."""
        parts = [f"{self.name} {self.done}/{self.total}{f' {self.unit}s' * bool(self.unit)}"]
        begun, since = self.mark or (self.done, self.began)
        num, seconds = self.done - begun, time.monotonic() - since
        if num > 0 and seconds > 0:
            parts += [speed(num / seconds, self.unit)] * bool(self.unit)
            parts += [f"{clock((self.total - self.done) * seconds / num)} left"] * (self.done < self.total)
        return ", ".join([*parts, self.text] if self.text else parts)


def _columns() -> int:
    return shutil.get_terminal_size().columns - 1


def speed(per_s: float, unit: str) -> str:
    """Units per second, or seconds per unit where it takes longer."""
    return f"{per_s:.2g} {unit}s/s" if per_s >= 1 else f"{1 / per_s:.2g} s per {unit}"


def num_of(things: Sized, state: str) -> str:
    """How many there are of what; "" where there are none."""
    return f"{len(things)} {state}" if things else ""


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
