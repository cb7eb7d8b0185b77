"""BYOL on the same views: the global consistency that PGL is compared with (Grill et al. 2020)."""

import copy

import torch
from torch import Tensor, nn

from pgl_ray.model.losses import local_consistency_loss
from pgl_ray.model.pgl import Output, Pair, follow, mlp
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder


class Byol(nn.Module):
    """PGL with global average pooling after the encoder, so that heads, loss and target see one vector per view.

    Where the views come from plays no part: priors are not read. BatchNorm and target behave as PGL's.
    """

    def __init__(self, encoder: Encoder | ResEncoder, hidden: int, out: int):
        """
        Args:
            encoder: owned from now on.
            hidden, out: widths of projector and predictor.
        """
        super().__init__()
        self.online = nn.ModuleDict({"encoder": encoder, "projector": mlp(encoder.channels[-1], hidden, out)})
        self.predictor = mlp(out, hidden, out)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, pair: Pair) -> Output:
        """|| n(q_1) - n(z_2) ||^2 + || n(q_2) - n(z_1) ||^2, the mean over the batch, in [0, 8]."""
        views = pair.views
        maps = self.online["encoder"](views)[-1]
        query = self.predictor(self.online["projector"](pool(maps)))
        with torch.no_grad():
            key = self.target["projector"](pool(self.target["encoder"](views)[-1]))
        (query_1, query_2), (key_1, key_2) = query.chunk(2), key.chunk(2)
        loss = local_consistency_loss(query_1, key_2) + local_consistency_loss(query_2, key_1)
        return Output(loss, maps.detach(), query_1.detach(), key_2)

    def follow(self, decay: float) -> None:
        """The target follows (Eq. 10)."""
        follow(self.target, self.online, decay)


def pool(maps: Tensor) -> Tensor:
    """Global average: [N, C, d, h, w] -> [N, C, 1, 1, 1]."""
    return maps.mean((2, 3, 4), keepdim=True)
