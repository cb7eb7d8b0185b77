"""PGL: online and target path, projector, predictor, prior-guided aligner and the local consistency loss (Sec. 3.3)."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgl_ray.model.losses import local_consistency_loss
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import Geometry, feature_coordinates, interpolation_matrices, overlap_box


class Pair(NamedTuple):
    """A batch of view pairs with their priors.

    Attributes:
        view_1, view_2: [N, 1, D, H, W].
        box_1, box_2: [N, 3, 2], scan frame.
        flip_1, flip_2: bool [N, 3].
    """

    view_1: Tensor
    view_2: Tensor
    box_1: Tensor
    box_2: Tensor
    flip_1: Tensor
    flip_2: Tensor

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor]) -> "Pair":
        """The pair in a batch of the stream."""
        return cls(
            *(batch[name].float() for name in ("view_1", "view_2")),
            *(batch[name] for name in ("box_1", "box_2")),
            *(batch[name].bool() for name in ("flip_1", "flip_2")),
        )


class Output(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: scalar, Eq. 9, in [0, 8].
        query: [N, C, d, h, w] predictor output of view 1, aligned.
        key: [N, C, d, h, w] target features of view 2, aligned.
        clamped_share: scalar, share of bins beyond the outermost feature centres, mean of the three axes.
    """

    loss: Tensor
    query: Tensor
    key: Tensor
    clamped_share: Tensor


def mlp(in_channels: int, hidden: int, out: int) -> nn.Sequential:
    """Conv1x1(hidden)-BN-ReLU-Conv1x1(out) (Sec. 3.3)."""
    return nn.Sequential(
        nn.Conv3d(in_channels, hidden, 1, bias=False),
        nn.BatchNorm3d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv3d(hidden, out, 1),
    )


def geometry_of(encoder: Encoder, view_size: tuple[int, int, int], centers: str) -> Geometry:
    """Frame of the encoder's last feature map.

    Args:
        encoder: its own strides and receptive-field centres count.
        view_size: P (D, H, W).
        centers: "receptive_field" or "cell" (the paper's RoIAlign).

    Raises:
        ValueError: the view size is not a multiple of the output stride.
    """
    strides = encoder.strides[-1]
    if any(size % stride for size, stride in zip(view_size, strides, strict=True)):
        raise ValueError(f"views.size={tuple(view_size)} must be a multiple of the output stride {tuple(strides)}")
    center = encoder.centers[-1] if centers == "receptive_field" else tuple(stride / 2 for stride in strides)
    return Geometry(tuple(view_size), tuple(strides), tuple(center))


def align(features: Tensor, matrices: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Reads a feature map at a region's bins, one contraction per axis, in float32.

    Args:
        features: [N, C, d, h, w].
        matrices: from `prior.interpolation_matrices`, [N, bins, cells] per axis.

    Returns:
        [N, C, bins_d, bins_h, bins_w].
    """
    a_d, a_h, a_w = matrices
    with torch.autocast(features.device.type, enabled=False):
        out = torch.einsum("ncdhw,nkw->ncdhk", features.float(), a_w)
        out = torch.einsum("ncdhw,njh->ncdjw", out, a_h)
        return torch.einsum("ncdhw,nid->ncihw", out, a_d)


class Pgl(nn.Module):
    """Online encoder, projector and predictor, and the target encoder and projector.

    BatchNorm sees both views of a path as one batch. The target's BatchNorm runs in training mode on its own batches;
    its parameters follow Eq. 10, its running statistics follow its own batches and are used nowhere in training.
    """

    def __init__(self, encoder: Encoder, hidden: int, out: int, geometry: Geometry):
        super().__init__()
        self.geometry = geometry
        self.online = nn.ModuleDict({"encoder": encoder, "projector": mlp(encoder.channels[-1], hidden, out)})
        self.predictor = mlp(out, hidden, out)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, pair: Pair) -> Output:
        """Both symmetric losses of a batch (Eq. 8 and 9)."""
        views = torch.cat([pair.view_1, pair.view_2])
        boxes, flips = torch.cat([pair.box_1, pair.box_2]), torch.cat([pair.flip_1, pair.flip_2])
        region = overlap_box(pair.box_1, pair.box_2).repeat(2, 1, 1)
        matrices = interpolation_matrices(boxes, flips, region, self.geometry)
        query = self.predictor(align(self._project(self.online, views), matrices))
        with torch.no_grad():
            key = align(self._project(self.target, views), matrices)
            clamped = feature_coordinates(boxes, flips, region, self.geometry)[1]
            clamped_share = torch.stack([c.float().mean() for c in clamped]).mean()
        query_1, query_2 = query.chunk(2)
        key_1, key_2 = key.chunk(2)
        loss = local_consistency_loss(query_1, key_2) + local_consistency_loss(query_2, key_1)
        return Output(loss, query_1.detach(), key_2, clamped_share)

    @staticmethod
    def _project(path: nn.ModuleDict, views: Tensor) -> Tensor:
        return path["projector"](path["encoder"](views)[-1])

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """The target's parameters follow the online path's: mu = decay * mu + (1 - decay) * theta (Eq. 10)."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - decay)
