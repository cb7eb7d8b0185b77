"""The networks that trainings begin with, at their initial weights."""

from typing import Protocol

import torch

from pgl_ray.config import FinetuneConfig, PretrainConfig
from pgl_ray.model.byol import Byol
from pgl_ray.model.encoder import build_encoder, refuse_one_cell
from pgl_ray.model.genesis import Genesis
from pgl_ray.model.pgl import Pgl, feature_geometry
from pgl_ray.model.places import Objective, PlacesPgl
from pgl_ray.model.resnet import init_kaiming_uniform
from pgl_ray.model.segmenter import LightSegmenter, Segmenter, build_segmenter
from pgl_ray.prior import Geometry
from pgl_ray.train import weights
from pgl_ray.train.records import CheckpointMeta

Net = Pgl | PlacesPgl | Byol | Genesis


class Labelled(Protocol):
    """What of a store's index decides what a segmentation network computes."""

    @property
    def labels(self) -> dict[str, int]:
        """Organ name -> label value."""
        ...

    @property
    def hu_window(self) -> tuple[float, float]:
        """That voxels are clipped to."""
        ...

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Of a resampled store, (D, H, W)."""
        ...


def build_pretraining(config: PretrainConfig) -> tuple[Net, Geometry]:
    """The method's network at its initial weights, the same on every rank, and the geometry of its last map.

    Raises:
        ValueError: the encoder has no map of the output stride, or the view size is no multiple of it.
    """
    align, heads = config.align, (config.heads.hidden, config.heads.out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(**config.encoder.model_dump())
        stride = align.output_stride if config.method == "pgl" else encoder.strides[-1]
        level, geometry = feature_geometry(encoder, config.views.size, stride, align.centers)
        if config.method == "pgl" and config.beyond_paper:
            levels = [
                feature_geometry(encoder, config.views.size, other, align.centers) for other in align.more_strides
            ]
            model: Net = PlacesPgl(encoder, *heads, [*levels, (level, geometry)], Objective(**config.loss.model_dump()))
        elif config.method == "pgl":
            model = Pgl(encoder, *heads, level, geometry, align.mask_clamped)
        elif config.method == "byol":
            model = Byol(encoder, *heads)
        else:
            model = Genesis(encoder)
    init_kaiming_uniform(model.online, config.seed)
    if not isinstance(model, Genesis):
        init_kaiming_uniform(model.predictor, config.seed + 1)
        if isinstance(model, PlacesPgl):
            init_kaiming_uniform(model.place, config.seed + 2)
        model.target.load_state_dict(model.online.state_dict())
    return model, geometry


def build_finetuning(
    config: FinetuneConfig, index: Labelled, begun: CheckpointMeta | None = None
) -> tuple[Segmenter | LightSegmenter, CheckpointMeta, weights.Report | None]:
    """The network at its initial weights, what its checkpoints say of it, and what was loaded, if anything.

    Args:
        config: of the run.
        index: of its scans.
        begun: what a checkpoint of this run says: the network is that one's, `config.init` is not read and need
            not be there any more, and the weights are to be filled in.

    Raises:
        ValueError: `config.init` is missing, or of another architecture or HU window; patches are too small.
    """
    settings, source = config.encoder.model_dump() if config.encoder else None, None
    if begun or config.init == "random":
        encoder = build_encoder(**(begun.encoder if begun else settings or {}))
    else:
        encoder, source = weights.read(config.init, settings, index.hu_window, config.allow_partial)
    refuse_one_cell(encoder, "patch.size", config.patch.size, encoder.strides[-1])
    num_outputs = len(index.labels) + (config.task == "multiclass")
    model = build_segmenter(encoder, num_outputs, config.decoder)
    init_kaiming_uniform(model, config.seed)
    loaded = weights.fill(model, weights.for_segmenter(source, model), config.allow_partial) if source else None
    level = source.level if source else encoder.last
    if begun and begun.init_level is not None:
        level = begun.init_level
    if config.freeze:
        if level < len(encoder.channels) - 1:
            raise ValueError(
                f"freeze=true: {config.init} was trained up to stage {level} of the encoder (align.output_stride) and "
                f"the network reads stage {len(encoder.channels) - 1}, too, which would stay random: take freeze=false"
            )
        if loaded and (random := loaded.random_encoder()):
            raise ValueError(
                f"freeze=true: {config.init} has nothing that fits {random}, which would stay random: take freeze=false"
            )
        encoder.requires_grad_(False)
    meta = CheckpointMeta(
        door="finetune",
        encoder=encoder.settings,
        decoder=config.decoder,
        hu_window=index.hu_window,
        spacing_mm=index.spacing_mm,
        labels=index.labels,
        task=config.task,
        num_outputs=num_outputs,
        patch_size=config.patch.size,
        init_level=level,
        config=config.model_dump_json(),
    )
    return model, meta, loaded
