"""Storage that fails for a while: work on it is tried again."""

import time
from collections.abc import Callable
from typing import TypeVar

from pgl_ray.config import FailedRun

T = TypeVar("T")
RETRY_S = 600.0  # that storage may fail before the run ends
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between two tries


def retried(work: Callable[[], T], failure: str) -> T:
    """What `work` returns, tried again for RETRY_S where storage fails."""
    began, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return work()
        except OSError as error:
            refused = isinstance(error, PermissionError) and not error.filename  # by a bucket: waiting will not help
            if refused or time.monotonic() - began > RETRY_S:
                raise FailedRun(f"{failure}: {error}") from error
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
