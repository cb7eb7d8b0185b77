"""A training on many GPUs, predicted from what was measured on few cores: which limit comes first, and by how much.

Pure arithmetic; `scaling.py predict` prints it. Every limit is given in pairs per second of the whole run, and the
smallest one counts. What nobody here could measure is an assumption, with its name in ASSUMED.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "scaling.json"
ASSUMED = {
    "gpu_pairs_per_s": 529.0,  # of an H200 at 128 pairs, not compiled (results/gpu_step.json); taken for 32, too
    "gpus_per_node": 8,
    "cores_per_gpu": 16,
    "nic_bytes_per_s": 100e9 / 8,  # of a node, to other nodes and to the bucket alike
    "link_bytes_per_s": 300e9,  # between GPUs of a node
    "latency_s": 30e-6,  # of one exchange inside a node, or between two; log2(nodes) times that between many
    "object_store_bytes": 200e9,  # of a node
    "hidden_share": 0.6,  # of the step, the backward pass, behind which gradients are exchanged
    "hours_between_faults": 1000.0,  # of one node
}


@dataclass(frozen=True)
class Run:
    """What is trained, and where.

    Attributes:
        gpus: all.
        scans: of the index.
        pairs: per GPU and step.
        regions: pairs that share a region (stream.pairs_per_region): 1 or 8.
        on_gpu: resize and intensity on the GPU (stream.resize_on=gpu).
    """

    gpus: int
    scans: int
    pairs: int = 32
    regions: int = 1
    on_gpu: bool = False


def measured() -> dict:
    """Figures of this repository's benchmarks, each with its date and machine."""
    return {name: said["value"] for name, said in json.loads(RESULTS.read_text()).items()}


def limits(run: Run, cost: dict[str, float], figures: dict, assumed: dict = ASSUMED) -> dict[str, float]:
    """Pairs per second that each part of the system allows.

    Args:
        cost: of the network, from `scaling.costs`.
        figures: from `measured`.
    """
    nodes = max(1, run.gpus // assumed["gpus_per_node"])
    way = f"K={run.regions}" + (", on the GPU" if run.on_gpu else "")
    cores = run.gpus * (assumed["cores_per_gpu"] - 1)  # each worker keeps one busy
    pairs = run.gpus * run.pairs
    return {
        "GPUs": pairs / step_s(run, cost, assumed)["all"],
        "renderers": cores * figures["pairs_per_core_s"][way] * figures["ray_share"],
        "bucket": nodes * assumed["nic_bytes_per_s"] / figures["bytes_per_pair"][f"K={run.regions}"],
        "coordinator": figures["blocks_per_s"] * run.pairs,
    }


def step_s(run: Run, cost: dict[str, float], assumed: dict = ASSUMED) -> dict[str, float]:
    """Seconds of a step's parts: computing, what of the gradients' exchange is not hidden, and SyncBatchNorm's."""
    nodes, computing = run.gpus / assumed["gpus_per_node"], run.pairs / assumed["gpu_pairs_per_s"]
    speed = assumed["nic_bytes_per_s"] if nodes > 1 else assumed["link_bytes_per_s"]
    ring = 2 * (run.gpus - 1) / run.gpus
    gradients = max(0.0, ring * cost["gradient"] / speed - assumed["hidden_share"] * computing)
    # a node's GPUs share its way out, and each gathers every other one's statistics
    gathered = (run.gpus - 1) * cost["norm_forward"] + ring * cost["norm_backward"]
    exchanges = (cost["norms"] + cost["norms_learnt"]) * assumed["latency_s"] * max(1.0, math.log2(max(1.0, nodes)))
    norms = (gathered / speed + exchanges) if run.gpus > 1 else 0.0
    return {"computing": computing, "gradients": gradients, "norms": norms, "all": computing + gradients + norms}


def predict(run: Run, cost: dict[str, float], figures: dict, assumed: dict = ASSUMED) -> dict:
    """Rate, first limit, and what else grows.

    Returns:
        pairs_per_s and limit; needs (what part of each limit the GPUs would use); epoch_s; index_mb of a rendering
        process; store_gb, of blocks in a node's object store; write_share, of a checkpoint's writing in the time
        between two; lost_share, by node faults.
    """
    most = limits(run, cost, figures, assumed)
    limit = min(most, key=most.__getitem__)
    rate, nodes = most[limit], max(1, run.gpus // assumed["gpus_per_node"])
    step = run.gpus * run.pairs / rate
    blocks = assumed["gpus_per_node"] * (assumed["cores_per_gpu"] + figures["blocks_per_worker"])
    between = figures["checkpoint_every"] * step
    fault_s = figures["resume_s"] + between / 2
    return {
        "pairs_per_s": rate,
        "limit": limit,
        "needs": {name: most["GPUs"] / value for name, value in most.items()},
        "epoch_s": run.scans / rate,
        "index_mb": figures["index_mb"] + run.scans * figures["index_bytes_per_scan"] / 1e6,
        "store_gb": blocks * run.pairs * cost["pair"] / 1e9,
        "write_share": cost["checkpoint"] / figures["checkpoint_bytes_per_s"] / between,
        "lost_share": fault_s * nodes / (3600 * assumed["hours_between_faults"]),
    }


def speedup(workers: int, cores: int, step: float, exchange: float) -> float:
    """Pairs per second of several CPU workers over those of one: cores are shared, the gradients' exchange comes on
    top, for gloo uses the cores that compute.

    Args:
        step: CPU seconds of one worker's step.
        exchange: CPU seconds per worker that its part of an exchange takes, alone.
    """
    return workers / (max(1.0, workers / cores) * (step + exchange) / step)
