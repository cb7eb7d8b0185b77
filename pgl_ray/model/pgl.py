"""PGL: online and target path, projector, predictor, prior-guided aligner and the local consistency loss (Sec. 3.3)."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgl_ray.model.encoder import refuse_one_cell
from pgl_ray.model.losses import local_consistency_loss
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import Axes, Geometry, clamped_bins, interpolation_matrices, overlap_box, triple


class Pair(NamedTuple):
    """A batch of view pairs with their priors.

    Attributes:
        view_1, view_2: [N, 1, D, H, W].
        box_1, box_2: [N, 3, 2], scan frame.
        flip_1, flip_2: bool [N, 3].
        deformed_1, deformed_2: like the views, only for Models Genesis.
    """

    view_1: Tensor
    view_2: Tensor
    box_1: Tensor
    box_2: Tensor
    flip_1: Tensor
    flip_2: Tensor
    deformed_1: Tensor | None = None
    deformed_2: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor]) -> "Pair":
        """The pair in a batch of the stream."""
        return cls(
            *(batch[name].float() for name in ("view_1", "view_2")),
            *(batch[name] for name in ("box_1", "box_2")),
            *(batch[name].bool() for name in ("flip_1", "flip_2")),
            *(batch[name].float() if name in batch else None for name in ("deformed_1", "deformed_2")),
        )

    def with_wrong_priors(self) -> "Pair":
        """Every pair with its neighbour's boxes and flips: a control that no alignment survives."""
        names = ("box_1", "box_2", "flip_1", "flip_2")
        return self._replace(**{name: getattr(self, name).roll(1, 0) for name in names})

    @property
    def views(self) -> Tensor:
        """[2N, 1, D, H, W], the first views, then the second ones; so are all of these."""
        return torch.cat([self.view_1, self.view_2])

    @property
    def boxes(self) -> Tensor:
        """[2N, 3, 2], scan frame."""
        return torch.cat([self.box_1, self.box_2])

    @property
    def flips(self) -> Tensor:
        """bool [2N, 3]."""
        return torch.cat([self.flip_1, self.flip_2])

    @property
    def regions(self) -> Tensor:
        """[2N, 3, 2], the overlap of each pair, twice."""
        return overlap_box(self.box_1, self.box_2).repeat(2, 1, 1)


class Output(NamedTuple):
    """What a forward pass gives; all but the loss is detached, for the health panel.

    Attributes:
        loss: scalar.
        maps: [2N, C, d, h, w] the online encoder's maps of both views, not aligned; none for Models Genesis, whose
            encoder sees deformed views.
        query: [N, C, ...] what the loss compares of view 1: the online path's predictions; none for Models Genesis.
        key: [N, C, ...] of view 2: the target path's features.
    """

    loss: Tensor
    maps: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


def mlp(in_channels: int, hidden: int, out: int) -> nn.Sequential:
    """Conv1x1(hidden)-BN-ReLU-Conv1x1(out) (Sec. 3.3); on pooled maps it is BYOL's two-layer perceptron."""
    return nn.Sequential(
        nn.Conv3d(in_channels, hidden, 1, bias=False),
        nn.BatchNorm3d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv3d(hidden, out, 1),
    )


def feature_geometry(
    encoder: Encoder | ResEncoder,
    view_size: tuple[int, int, int],
    output_stride: tuple[int, int, int],
    centers: str = "receptive_field",
) -> tuple[int, Geometry]:
    """Which of the encoder's maps has an output stride, and that map's frame.

    Args:
        encoder: its own strides and receptive-field centres count.
        view_size: P (D, H, W).
        output_stride: s (D, H, W).
        centers: "receptive_field" or "cell" (the paper's RoIAlign).

    Returns:
        The number of the deepest map of that stride, and its geometry; a bin is read at its centre.

    Raises:
        ValueError: no map of that stride, or the view size is no multiple of it, or too small.
    """
    strides = triple(output_stride)
    if strides not in encoder.strides:
        possible = ", ".join(str(list(map_stride)) for map_stride in dict.fromkeys(encoder.strides))
        raise ValueError(
            f"align.output_stride={list(strides)}: a {encoder.settings['kind']} encoder with stage_strides="
            f"{encoder.stage_strides} has maps of output stride {possible}: take one of them"
        )
    if any(size % stride for size, stride in zip(view_size, strides, strict=True)):
        raise ValueError(f"views.size={tuple(view_size)} must be a multiple of the output stride {strides}")
    refuse_one_cell(encoder, "views.size", view_size, strides)
    level = max(i for i, map_stride in enumerate(encoder.strides) if map_stride == strides)
    center = encoder.centers[level] if centers == "receptive_field" else triple(stride / 2 for stride in strides)
    return level, Geometry(triple(view_size), strides, triple(center))


def align(features: Tensor, matrices: Axes) -> Tensor:
    """Reads a feature map at a region's bins, one contraction per axis, in float32 or above.

    Args:
        features: [N, C, d, h, w].
        matrices: from `prior.interpolation_matrices`, [N, bins, cells] per axis.

    Returns:
        [N, C, bins_d, bins_h, bins_w].
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        a_d, a_h, a_w = (matrix.to(features.dtype) for matrix in matrices)
        out = torch.einsum("ncdhw,nkw->ncdhk", features, a_w)
        out = torch.einsum("ncdhw,njh->ncdjw", out, a_h)
        return torch.einsum("ncdhw,nid->ncihw", out, a_d)


def valid_bins(pair: Pair, geometry: Geometry) -> Tensor:
    """Which bins of the overlap are clamped in neither view.

    Returns:
        bool [N, bins_d, bins_h, bins_w].
    """
    axes = clamped_bins(pair.boxes, pair.flips, pair.regions, geometry)
    d, h, w = (~torch.logical_or(*clamped.chunk(2)) for clamped in axes)
    return d[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]


class Pgl(nn.Module):
    """Online encoder, projector and predictor, and the target encoder and projector.

    BatchNorm sees both views of a path as one batch. The target's BatchNorm runs in training mode on its own batches;
    its parameters follow Eq. 10, its running statistics follow its own batches and are used nowhere in training.
    """

    def __init__(
        self,
        encoder: Encoder | ResEncoder,
        hidden: int,
        out: int,
        level: int,
        geometry: Geometry,
        mask_clamped: bool = False,
    ):
        """
        Args:
            encoder: owned from now on; its stages behind the map are switched off.
            hidden, out: channels of projector and predictor.
            level, geometry: the map that is compared, from `feature_geometry`.
            mask_clamped: leave clamped bins out of the loss.
        """
        super().__init__()
        self.geometry, self.mask_clamped = geometry, mask_clamped
        encoder.stop_at(level)
        self.online = nn.ModuleDict({"encoder": encoder, "projector": mlp(encoder.channels[level], hidden, out)})
        self.predictor = mlp(out, hidden, out)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, pair: Pair) -> Output:
        """Both symmetric losses of a batch (Eq. 8 and 9), in [0, 8]."""
        views = pair.views
        matrices = interpolation_matrices(pair.boxes, pair.flips, pair.regions, self.geometry)
        maps = self.online["encoder"](views)[-1]
        query = self.predictor(align(self.online["projector"](maps), matrices))
        with torch.no_grad():
            key = align(self.target["projector"](self.target["encoder"](views)[-1]), matrices)
        (query_1, query_2), (key_1, key_2) = query.chunk(2), key.chunk(2)
        valid = valid_bins(pair, self.geometry) if self.mask_clamped else None
        loss = local_consistency_loss(query_1, key_2, valid) + local_consistency_loss(query_2, key_1, valid)
        return Output(loss, maps.detach(), query_1.detach(), key_2)

    def follow(self, decay: float) -> None:
        """The target follows (Eq. 10)."""
        follow(self.target, self.online, decay)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, decay: float) -> None:
    """Parameters only: mu = decay * mu + (1 - decay) * theta (Eq. 10)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - decay)
