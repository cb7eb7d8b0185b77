"""What Python users call: encoders, stores, scans, features with their place in mm, matching, priors and alignment.

Places are RAS+ mm, arrays (D, H, W) along S, P, L. The doors embed and match are made of these functions; every other
door is `run(config)` of its module.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgl_ray.data.sampling import sample_prior
from pgl_ray.data.store import Index
from pgl_ray.data.store import read_index as open_store
from pgl_ray.files import ct
from pgl_ray.files.scans import StoredScan
from pgl_ray.judge import search
from pgl_ray.judge.features import FeatureMap, ScanEncoder, pooled, spacing_of
from pgl_ray.judge.readings import unlabelled_views
from pgl_ray.model import pgl
from pgl_ray.model.inference import pick_device
from pgl_ray.prior import Geometry, Prior, interpolation_matrices, overlap_box
from pgl_ray.train import weights

__all__ = (
    "FeatureMap",
    "Match",
    "Prior",
    "ScanEncoder",
    "align",
    "dense_features",
    "load_encoder",
    "match",
    "open_store",
    "pooled",
    "read_scan",
    "sample_prior",
)


class Match(NamedTuple):
    """A place of one scan and where it was matched in another, RAS+ mm.

    Attributes:
        asked_mm: [3], the middle of the voxel that was asked for.
        matched_mm: [3].
        similarity: mean cosine over maps, -1 to 1.
        runner_up_mm, runner_up_similarity: the highest other peak that is far away; none: there is no such.
    """

    asked_mm: np.ndarray
    matched_mm: np.ndarray
    similarity: float
    runner_up_mm: np.ndarray | None
    runner_up_similarity: float | None


def load_encoder(
    init: str,
    store: Index | None = None,
    *,
    hu_window: tuple[float, float] | None = None,
    size: tuple[int, int, int] | None = None,
    seed: int = 0,
    reestimate: bool = True,
    spacing: Literal["own", "weights"] = "own",
) -> ScanEncoder:
    """A frozen encoder, on CUDA where there is one, its maps up to the last that was trained.

    Args:
        init: a run's folder, `pretrained:NAME`, a .safetensors file of `export`, or other weights as fine-tuning takes
            them.
        store: whose unlabelled scans BatchNorm's statistics are estimated on, as the judges do it; none: as trained.
        hu_window: that HU are clipped to; none: what the weights say, or else the store.
        size: of the training views (D, H, W); none: what the weights say, or else 16, 96, 96.
        seed: of the views that are drawn from the store.
        reestimate: false: BatchNorm stays as trained, whatever the store.
        spacing: of the scans that it will be shown, and so of these views: their own, or as in its training.

    Raises:
        ValueError: no such weights, they do not say what they expect of a scan, or the store has another window.
    """
    if init == "random":
        raise ValueError("init=random has learnt nothing: give a run, pretrained:NAME or a .safetensors file")
    network, source = weights.read(init, None, store.hu_window if store else None)
    known = source.meta and source.meta.hu_window
    if known and hu_window and tuple(known) != tuple(hu_window):
        raise ValueError(f"hu_window={list(hu_window)}: init={init} was trained with {list(known)}: leave it out")
    window = known or hu_window or (store and store.hu_window)
    if not window:
        raise ValueError(
            f"init={init} has no metadata, so it is not known what HU it expects: give hu_window=[low,high] of its "
            "training, or a file that export wrote"
        )
    if store and tuple(window) != tuple(store.hu_window):
        mend = "give it no store, or one that was prepared with the window of the weights"
        raise ValueError(f"hu_window={list(window)}, and the index {store.store} has {list(store.hu_window)}: {mend}")
    try:
        loaded = weights.fill(network, source)
    except ValueError as error:
        text = str(error).partition("; allow_partial")[0]
        raise ValueError(f"{text}: give a run, or a file that export wrote") from None
    network.stop_at(source.level)
    encoder = ScanEncoder(init, network.to(pick_device("auto")), window, loaded.trained_on, size or source.view_size)
    if store is None or not reestimate:
        return encoder
    spacing_mm = spacing_of(spacing, encoder)
    return encoder.reestimated(unlabelled_views(store, list(store.scans), encoder.size, seed, spacing_mm))


def read_scan(source: str | Index, scan_id: str | None = None) -> ct.Scan:
    """A CT in HU, its axes towards S, P, L, with its affine to RAS+ mm.

    Args:
        source: a file, a folder with one DICOM series, or a store from `open_store`.
        scan_id: which scan of a store.

    Raises:
        ValueError: not readable, or no such scan.
    """
    if not isinstance(source, Index):
        return ct.read_scan(source)
    if scan_id not in source.by_id:
        known = ", ".join(scan.scan_id for scan in source.scans[:5]) + ", ..." * (len(source.scans) > 5)
        raise ValueError(f"scan_id={scan_id!r} is not in {source.store}, which has {known}")
    return StoredScan(source.store, source.by_id[scan_id]).read()


def dense_features(encoder: ScanEncoder, scan: ct.Scan, maps: Sequence[str] = ()) -> list[FeatureMap]:
    """Maps of a whole scan, float16 [C, d, h, w] each, with stride, receptive-field centres and affine.

    Args:
        encoder: from `load_encoder`.
        scan: from `read_scan`, of about the voxel size of the encoder's training (`encoder.spacing_mm`).
        maps: of `encoder.names`; none: the last.
    """
    return encoder.dense(scan, maps)


def match(
    encoder: ScanEncoder,
    scan: ct.Scan,
    other: ct.Scan,
    places_mm: np.ndarray,
    maps: Sequence[str] = (),
    apart_mm: float = 40.0,
) -> list[Match]:
    """Finds places of one scan in another by the nearest feature.

    Args:
        encoder: from `load_encoder`.
        scan: with the places.
        other: that is searched.
        places_mm: [places, 3], RAS+; each is read at the voxel that it lies in.
        maps: that are compared; none: all but the finest.
        apart_mm: how far from the matched place the runner-up must lie.

    Raises:
        ValueError: a place outside of the scan.
    """
    query, target = search.encode(encoder, [scan, other], maps)
    among = search.candidates(other, target)
    matches = []
    for place in np.reshape(places_mm, (-1, 3)):
        voxel = search.voxel_at(scan, place)
        hit = search.search(query, voxel, target, among, apart_mm)
        runner_up = None if hit.other_voxel is None else search.place_of(other, hit.other_voxel)
        asked, at = search.place_of(scan, voxel), search.place_of(other, hit.voxel)
        matches.append(Match(asked, at, hit.similarity, runner_up, hit.other_similarity))
    return matches


def align(
    maps: tuple[Tensor, Tensor],
    priors: tuple[Prior, Prior],
    view_size: tuple[int, int, int],
    stride: tuple[int, int, int],
    center: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """Features of two views of a scan at the same places: flips undone, the overlap resampled (paper, Eq. 4 to 7).

    Args:
        maps: [C, d, h, w] of either view.
        priors: crop and flips of either.
        view_size: (D, H, W) after the resize; a multiple of the stride.
        stride, center: of the map, as the encoder's `strides` and `centers` say.

    Returns:
        Two tensors [C, d, h, w], bin for bin the same places of the overlap.

    Raises:
        ValueError: the crops do not overlap.
    """
    boxes = [torch.from_numpy(np.asarray(prior.box))[None] for prior in priors]
    region = overlap_box(*boxes)
    if (region[..., 1] <= region[..., 0]).any():
        raise ValueError(f"the crops {priors[0].box.tolist()} and {priors[1].box.tolist()} do not overlap")
    geometry, aligned = Geometry(tuple(view_size), tuple(stride), tuple(center)), []
    for one, box, prior in zip(maps, boxes, priors):
        flip = torch.from_numpy(np.asarray(prior.flip))[None]
        matrices = interpolation_matrices(box, flip, region, geometry)
        aligned.append(pgl.align(one[None], tuple(matrix.to(one.device) for matrix in matrices))[0])
    return aligned[0], aligned[1]
