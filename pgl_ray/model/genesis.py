"""Models Genesis: a network restores views from their deformed copies (Zhou et al. 2019)."""

import torch
from torch import nn

from pgl_ray.model.pgl import Output, Pair
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter


class Genesis(nn.Module):
    """The segmentation network with one output, which is the restored view.

    Attributes:
        online: the `Segmenter`; the name is that of the other methods' encoder path. There is no target.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.online = Segmenter(encoder, 1)

    def forward(self, pair: Pair) -> Output:
        """Mean squared error of the restored views, z-score units, both views together.

        Args:
            pair: with `deformed_1` and `deformed_2`.
        """
        maps, restored = self.online.maps_and_logits(torch.cat([pair.deformed_1, pair.deformed_2]))
        loss = (restored.float() - pair.views).square().mean()
        return Output(loss, maps[-1].detach())

    def follow(self, decay: float) -> None:
        """Nothing follows: Models Genesis has one path."""
