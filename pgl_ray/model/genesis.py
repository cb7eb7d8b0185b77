"""Models Genesis: a network restores views from their deformed copies (Zhou et al. 2019)."""

import torch
from torch import Tensor, nn

from pgl_ray.model.pgl import Output, Pair
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import Segmenter


class Genesis(nn.Module):
    """The segmentation network with one output, which is the restored view.

    Attributes:
        online: the `Segmenter`; the name is that of the other methods' encoder path. There is no target.
    """

    def __init__(self, encoder: Encoder | ResEncoder):
        super().__init__()
        self.online = Segmenter(encoder, 1)

    def forward(self, pair: Pair) -> Output:
        """Mean squared error of the restored views, z-score units, both views together.

        Args:
            pair: with `deformed_1` and `deformed_2`.

        Raises:
            ValueError: it has none.
        """
        if pair.deformed_1 is None or pair.deformed_2 is None:
            raise ValueError("Models Genesis restores deformed views: the batch has no deformed_1 and deformed_2")
        restored = self.online(torch.cat([pair.deformed_1, pair.deformed_2]))
        return Output((restored.float() - pair.views).square().mean())

    @torch.no_grad()
    def plain_maps(self, views: Tensor) -> Tensor:
        """The encoder's last map of views that are not deformed, which training never sees, for the health panel.

        BatchNorm normalises by this batch, as in training, and keeps its running statistics as they are.
        """
        norms = [part for part in self.online.encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        for part in norms:
            part.track_running_stats = False
        try:
            return self.online.encoder(views)[-1]
        finally:
            for part in norms:
                part.track_running_stats = True

    def follow(self, decay: float) -> None:
        """Nothing follows: Models Genesis has one path."""
