"""Why a training ends before its plan does, and what to do about it."""

import math

import numpy as np

from pgl_ray.config import FailedRun, FinetuneConfig
from pgl_ray.model.inference import out_of_memory
from pgl_ray.train import health
from pgl_ray.train.run_files import BEST
from pgl_ray.train.session import Session


def not_finite(row: dict[str, float], step: int, mend: str) -> str | None:
    """Why the loss or its gradient ends a pre-training, if it does."""
    if all(map(math.isfinite, row.values())):
        return None
    return f"train/loss is {row['train/loss']} and train/grad_norm {row['train/grad_norm']} at step {step}: {mend}"


def collapsed(row: dict[str, float], step: int, mend: str) -> str:
    """That the features collapsed, or that the views show nothing, and what to do."""
    mend += " or a larger batch"
    if health.is_blank(row):
        mend = "look at the scans (pgl_ray.inspect), and whether the store's hu_window suits them"
    text = f"stopped at step {step}: {health.verdict({'step': step} | row)}: {mend}; "
    return text + "health.stop_on_collapse=false goes on with this one"


def memory_fault(error: RuntimeError, session: Session, config: FinetuneConfig) -> str | None:
    """Why a step that failed for want of memory ends the run; none where it failed for something else."""
    if not out_of_memory(error):
        return None
    reason = f"out of memory on {session.device} at step {session.step + 1} {smaller_batch(config)}"
    if session.world > 1:
        raise FailedRun(reason) from error  # the other ranks wait for this one's gradient
    return reason


def smaller_batch(config: FinetuneConfig) -> str:
    """The batch to try where memory is too short."""
    whole = config.global_batch_size // config.train.num_workers
    now, size = whole // config.accumulate, "x".join(map(str, config.patch.size))
    text = f"with {now} patches of {size} at a time; "
    if now == 1:
        return text + "one alone is too large: lower patch.size, or take train.precision=bfloat16"
    fewer = max(n for n in range(1, now // 2 + 1) if whole % n == 0)
    return (
        f"{text}try accumulate={whole // fewer}, the same batch {fewer} at a time, "
        f"or a new run=... with global_batch_size={fewer * config.train.num_workers}"
    )


def fault_of_losses(config: FinetuneConfig, values: np.ndarray, step: int, best: float, run: str) -> str | None:
    """Why losses and gradients [steps, 2], the last of them of `step`, end the run, if they do."""
    if np.isfinite(values).all():
        return None
    first = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
    figures = f"train/loss is {values[first, 0]} and train/grad_norm {values[first, 1]}"
    return f"{figures} at step {step - len(values) + 1 + first}: {lower(config, best, run)}"


def lower(config: FinetuneConfig, best: float, run: str) -> str:
    """What to do against a loss or weights that are not finite."""
    fallback = f"{run}/{BEST} keeps the best network so far (val/dice {best:.4f})" if best >= 0 else "nothing was kept"
    return f"start a new run=... with a lower optim.lr than {config.optim.lr}; {fallback}"
