"""Pairs that a run leaves out because their scan cannot be read."""

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from pgl_ray.config import StreamConfig
from pgl_ray.train import checkpoint, ranks


class Skipped:
    """Counts the pairs of a run that were left out because their scan could not be read.

    Args:
        plan, config: of the run; the plan is a `stream.Plan`.
        before: number of a scan -> its pairs that were left out before this start of the workers.
    """

    def __init__(self, plan: Any, config: StreamConfig, before: dict[int, int]):
        self.plan, self.config = plan, config
        self.waiting: list[int] = []
        self.rows: Counter[int] = Counter(before)

    def add(self, missed: Tensor) -> None:
        """Takes a batch's column, and keeps nothing of the batch: its memory is the object store's."""
        self.waiting += [scan for scan in missed.tolist() if scan >= 0]

    def share(self, step: int, run: str | None) -> tuple[float, str | None]:
        """Share of all workers' pairs, and why the run must stop, or none; all workers call this and get the same.

        Args:
            step: steps done.
            run: where skipped.json is written; none: nowhere.
        """
        missed, self.waiting = self.waiting, []
        for rows in ranks.of_all_workers(missed):
            self.rows.update(rows)
        named = {self.plan.scan_ids[scan]: num for scan, num in self.rows.most_common()}
        if run and named:
            with contextlib.suppress(OSError):  # it is written again with the next row
                checkpoint.write_json(Path(run) / "skipped.json", named)
        pairs = step * self.plan.global_batch_size
        share = self.rows.total() / pairs
        # one bad scan among the first pairs says nothing of the share of bad scans: an epoch's pairs, at least
        if self.rows.total() <= self.config.max_skipped_share * max(pairs, self.plan.rows_per_epoch):
            return share, None
        listed = ", ".join(list(named)[:5]) + ("" if len(named) <= 5 else f" and {len(named) - 5} more")
        return share, (
            f"{share:.1%} of the pairs up to step {step} were skipped, more than stream.max_skipped_share="
            f"{self.config.max_skipped_share}, because these scans cannot be read: {listed}; python -m pgl_ray.prepare "
            "verify store=... says what is wrong with them"
        )
