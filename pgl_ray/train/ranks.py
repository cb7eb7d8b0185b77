"""What the workers of a training exchange; with a single worker each function answers at once."""

from typing import TypeVar, cast

import torch

T = TypeVar("T")


def of_all_workers(value: T) -> list[T]:
    """What each worker has, by rank; all workers call this."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return cast(list[T], values)  # torch fills the list in place


def share_buffers(module: torch.nn.Module) -> None:
    """Gives all workers rank 0's buffers of a module, in place; all of them call this."""
    if torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


def mean_over_workers(figures: dict[str, float]) -> dict[str, float]:
    """Mean of each figure over all workers, which all call this; every worker gets the same answer."""
    rows = of_all_workers(figures)
    return {key: sum(row[key] for row in rows) / len(rows) for key in figures}
