"""Which encoder a config asks for."""

from collections.abc import Sequence
from typing import Literal

from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder


def build_encoder(
    kind: Literal["resnet", "resenc"] = "resnet",
    depths: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
    stage_strides: Literal["early", "late"] = "early",
) -> Encoder | ResEncoder:
    """The network of an `EncoderConfig`'s fields, or of `CheckpointMeta.encoder`.

    Args:
        kind: resnet, the paper's; resenc, nnU-Net's, which knows one way of strides.
        depths, width, stage_strides: as the networks say.
    """
    match kind:
        case "resnet":
            return Encoder(depths, width, stage_strides)
        case "resenc":
            return ResEncoder(depths, width)


def refuse_one_cell(encoder: Encoder | ResEncoder, key: str, size: Sequence[int], stride: Sequence[int]) -> None:
    """Refuses what leaves a ResEnc one cell on a map: InstanceNorm needs more to train.

    Args:
        encoder: of either kind.
        key: that gives `size`.
        size, stride: of the input and the map's output stride (D, H, W).

    Raises:
        ValueError: there is one cell.
    """
    if isinstance(encoder, ResEncoder) and all(length <= step for length, step in zip(size, stride, strict=True)):
        raise ValueError(
            f"{key}={list(size)}: encoder.kind=resenc has one cell on its map of stride {list(stride)} and normalises "
            f"over several: take larger {key}"
        )
