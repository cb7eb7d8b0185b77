"""The encoder: a 3D ResNet-50 with an output stride of 8, 16, 16 (paper, Sec. 3.3 and Fig. 3)."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn

from pgl_ray.prior import triple

STAGE_STRIDES = {"early": (2, 2, 2, 1), "late": (1, 2, 2, 2)}

Geometry = tuple[tuple[int, int, int], tuple[float, float, float]]  # stride and centre of cell 0 of a map


class Encoder(ResNet):
    """MONAI's bottleneck ResNet, its maps after the stem and each stage as output.

    46,155,072 parameters at the default size, the paper's 46.16 M. The keys are those of monai's `resnet50` whatever
    the strides, so other weights load. The stem strides only H and W: the paper's views have few, thick slices.

    Attributes:
        settings: keyword arguments of `build_encoder` that build the same network again.
        stage_strides: as given.
        last: number of the last map that `forward` computes; 4 unless `stop_at` says otherwise.
        channels: of the five maps: stem, layer1, ..., layer4.
        strides: output stride (D, H, W) of each map, in view voxels per cell.
        centers: view edge coordinate (D, H, W) of cell 0's centre in each map; cell j sits at stride * j + center.
            Kernels of odd size with symmetric padding put it at 0.5, not in the middle of the cell.
    """

    settings: dict[str, Any]
    stage_strides: Literal["early", "late"]
    conv1: nn.Conv3d
    last: int
    channels: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]
    centers: tuple[tuple[float, float, float], ...]

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        stage_strides: Literal["early", "late"] = "early",
    ):
        """
        Args:
            depths: bottleneck blocks of each of the four stages.
            width: channels of the stem; stage i puts out width * 4 * 2**i channels.
            stage_strides: early = 2,2,2,1 (15.3 GFLOP per 16x96x96 view), late = 1,2,2,2 (79.9).
        """
        super().__init__(
            block="bottleneck",
            layers=list(depths),
            block_inplanes=[width * 2**i for i in range(4)],
            n_input_channels=1,
            conv1_t_size=7,
            conv1_t_stride=cast(tuple[int], (1, 2, 2)),  # MONAI's annotation means a tuple of any length
            no_max_pool=True,
            shortcut_type="B",
            feed_forward=False,
            bias_downsample=False,
        )
        for stage, stride in zip(self._bottlenecks(), STAGE_STRIDES[stage_strides]):
            # MONAI fixes 1,2,2,2; the stride of a bottleneck sits in its 3x3x3 convolution and in its shortcut
            shortcut = cast(nn.Sequential, stage[0].downsample)  # MONAI's annotation knows other networks' as well
            for conv in (stage[0].conv2, shortcut[0]):
                conv.stride = (stride,) * 3
        self.settings = {"kind": "resnet", "depths": list(depths), "width": width, "stage_strides": stage_strides}
        self.stage_strides, self.last = stage_strides, 4
        self.channels = (width, *(stage[-1].conv3.out_channels for stage in self._bottlenecks()))
        start: Geometry = ((1, 1, 1), (0.5, 0.5, 0.5))
        geometry = list(accumulate(self._convolutions(), _through, initial=start))
        maps = list(accumulate((3 * depth for depth in depths), initial=1))  # convolutions up to each map
        self.strides = tuple(geometry[i][0] for i in maps)
        self.centers = tuple(geometry[i][1] for i in maps)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override] # MONAI's gives what its classifier says
        """Feature maps, finest first.

        Args:
            x: [N, 1, D, H, W] z-scored voxels.

        Returns:
            Five tensors [N, channels[i], ceil(D / stride_d), ceil(H / stride_h), ceil(W / stride_w)], or fewer after
            `stop_at`.
        """
        maps = [self.act(self.bn1(self.conv1(x)))]
        for stage in self.running_stages():
            maps.append(stage(maps[-1]))
        return maps

    def stop_at(self, level: int) -> None:
        """Makes map `level` (0 = stem, 4 = layer4) the last: the stages behind it are neither run nor trained."""
        self.last = level
        for stage in self._stages()[level:]:
            stage.requires_grad_(False)

    def running_stages(self) -> list[nn.Sequential]:
        """The stages that `forward` runs, in order."""
        return self._stages()[: self.last]

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def _bottlenecks(self) -> list[list[ResNetBottleneck]]:
        """The blocks of each stage."""
        return [[block for block in stage if isinstance(block, ResNetBottleneck)] for stage in self._stages()]

    def _convolutions(self) -> list[nn.Conv3d]:
        blocks = [block for stage in self._bottlenecks() for block in stage]
        return [self.conv1] + [conv for block in blocks for conv in (block.conv1, block.conv2, block.conv3)]


def _through(geometry: Geometry, conv: nn.Conv3d) -> Geometry:
    """Stride and centre of cell 0, in the input's edge coordinates, after one more convolution."""
    stride, center = geometry
    paddings = cast(tuple[int, int, int], conv.padding)  # "same" and "valid" are other networks'
    shift = [(kernel - 1) / 2 - pad for kernel, pad in zip(conv.kernel_size, paddings)]
    return (
        triple(s * step for s, step in zip(stride, conv.stride)),
        triple(c + s * by for c, s, by in zip(center, stride, shift)),
    )


@torch.no_grad()
def init_kaiming_uniform(module: nn.Module, seed: int) -> None:
    """Initialises in place: convolutions Kaiming uniform, biases 0, norms 1 and 0 (paper, Sec. 5.2; He et al. 2015).

    The weights depend only on the seed and the architecture: they are drawn on the CPU, wherever the module lies.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d)):
            weight = torch.empty(part.weight.shape)
            part.weight.copy_(nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator))
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, (nn.BatchNorm3d, nn.InstanceNorm3d)):
            part.reset_parameters()
