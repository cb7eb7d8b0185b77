"""Which scans of a store a training draws, and what renders them."""

import numpy as np

from pgl_ray.config import FinetuneConfig, PretrainConfig
from pgl_ray.data import pair_renderer, store, stream
from pgl_ray.data.sampling import ablated
from pgl_ray.data.store import check_labelled


def make_renderer(
    config: PretrainConfig, index: store.Index, plan: stream.Plan, has_gpu: bool = False
) -> pair_renderer.PairRenderer:
    """What turns rows of the plan into pairs of views, the ablations included; `has_gpu`: the workers have one."""
    on_gpu = config.stream.on_gpu
    if on_gpu == "auto":
        on_gpu = "intensity" if has_gpu and config.method != "genesis" else "nothing"
    return pair_renderer.PairRenderer(
        index.store,
        plan.scan_ids,
        config.seed,
        ablated(config.views, config.align),
        config.intensity,
        shared_box=not config.align.crop,
        deform=config.method == "genesis",
        augment=on_gpu == "nothing",
        resize=on_gpu != "all",
        skip=config.stream.on_error == "skip",
        pairs_per_region=config.stream.pairs_per_region,
    )


def make_plan(config: PretrainConfig, index: store.Index) -> stream.Plan:
    """Which scan is drawn when.

    Raises:
        ValueError: no scan in the split, or not one whole batch.
    """
    ids = [scan.scan_id for scan in index.scans if config.split in (None, scan.split)]
    if not ids:
        has = sorted({scan.split for scan in index.scans})
        raise ValueError(f"index={config.index} has no scan in split={config.split!r}; it has: {has}")
    batch = config.global_batch_size
    lasts, regions = (config.epochs, config.max_steps), config.stream.pairs_per_region
    return stream.Plan.make(ids, config.pairs_per_scan, batch, *lasts, config.seed, regions)


def split_scans(config: FinetuneConfig, index: store.Index) -> tuple[list[str], list[str]]:
    """Scan ids to train on and to validate on, drawn with the seed.

    Raises:
        ValueError: no labels, or too few labelled scans.
    """
    check_labelled(index, config.index)
    ids = [scan.scan_id for scan in index.labelled(config.split)]
    num = config.num_scans if isinstance(config.num_scans, int) else round(config.num_scans * len(ids))
    if num > len(ids) or num < 2:
        raise ValueError(
            f"num_scans={config.num_scans}: split={config.split!r} of {config.index} has {len(ids)} labelled scans, "
            f"and at least 2 are needed (one to train on, one to validate)"
        )
    chosen = [ids[i] for i in np.random.default_rng((config.seed, 1)).permutation(len(ids))[:num]]
    num_val = min(max(1, round(config.val_share * num)), num - 1)
    return sorted(chosen[num_val:]), sorted(chosen[:num_val])
