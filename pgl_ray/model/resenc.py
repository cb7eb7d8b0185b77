"""nnU-Net's residual encoder (ResEnc, Isensee et al. 2024), with the keys of dynamic_network_architectures."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from pgl_ray.prior import triple


class ResEncoder(nn.Module):
    """The encoder of nnU-Net's ResidualEncoderUNet: basic ResNet-D blocks, InstanceNorm, LeakyReLU.

    90,296,576 parameters at its default size, that of nnU-Net's ResEncL. Keys and outputs are those of
    dynamic_network_architectures' `ResidualEncoder`, which registers every layer twice (by its name and in
    `all_modules`), so nnU-Net loads the weights. Stages halve H and W first, because the paper's views have few, thick
    slices; strides are not part of the weights, so they fit nnU-Net's cubic strides as well.

    Attributes:
        settings: keyword arguments of `build_encoder` that build the same network again.
        last: number of the last map that `forward` computes, that of the last stage unless `stop_at` says otherwise.
        channels: of the maps, one per stage.
        strides: output stride (D, H, W) of each map, in view voxels per cell.
        centers: view edge coordinate (D, H, W) of cell 0's centre in each map. A strided block adds a convolution,
            whose cell 0 looks at 0.5, and a pooled shortcut, whose cell 0 looks at the middle of the two cells under
            it; the centre is the mean of both, as if they weighed alike.
    """

    settings: dict[str, Any]
    stage_strides: Literal["early"]
    last: int
    channels: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]
    centers: tuple[tuple[float, float, float], ...]

    def __init__(self, depths: Sequence[int] = (1, 3, 4, 6, 6, 6), width: int = 32):
        """
        Args:
            depths: blocks per stage.
            width: channels of the first stage; they double from stage to stage, up to ten times as many.
        """
        super().__init__()
        self.channels = tuple(min(width * 2**i, width * 10) for i in range(len(depths)))
        self.steps = tuple([(1, 1, 1), (1, 2, 2), *[(2, 2, 2)] * (len(depths) - 2)][: len(depths)])
        self.settings = {"kind": "resenc", "depths": list(depths), "width": width, "stage_strides": "early"}
        self.stage_strides, self.last = "early", len(depths) - 1
        self.stem = Stem(width)
        stages = []
        for i, (depth, step) in enumerate(zip(depths, self.steps)):
            before = self.channels[max(0, i - 1)]
            blocks = [Block(before, self.channels[i], step)]
            blocks += [Block(self.channels[i], self.channels[i], (1, 1, 1)) for _ in range(depth - 1)]
            stages.append(Stage(blocks))
        self.stages = nn.ModuleList(stages)
        stride, center, strides, centers = (1, 1, 1), (0.5, 0.5, 0.5), [], []
        for step in self.steps:
            center = triple(c + s * (n - 1) / 4 for c, s, n in zip(center, stride, step))
            stride = triple(s * n for s, n in zip(stride, step))
            strides.append(stride)
            centers.append(center)
        self.strides, self.centers = tuple(strides), tuple(centers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps, finest first.

        Args:
            x: [N, 1, D, H, W] z-scored voxels.

        Returns:
            A tensor [N, channels[i], ceil(D / stride_d), ceil(H / stride_h), ceil(W / stride_w)] per stage, or fewer
            after `stop_at`.
        """
        x, maps = self.stem.convs(x), []
        for stage in self.running_stages():
            x = stage(x)
            maps.append(x)
        return maps

    def running_stages(self) -> list[nn.Sequential]:
        """The stages that `forward` runs, in order."""
        return [stage.blocks for stage in self.stages[: self.last + 1] if isinstance(stage, Stage)]

    def stop_at(self, level: int) -> None:
        """Makes map `level` the last: the stages behind it are neither run nor trained."""
        self.last = level
        for stage in self.stages[level + 1 :]:
            stage.requires_grad_(False)

    def nnunet_arch(self) -> dict[str, Any]:
        """Arguments of dynamic_network_architectures' ResidualEncoderUNet for this encoder, as plans hold them."""
        num = len(self.channels)
        return {
            "n_stages": num,
            "features_per_stage": list(self.channels),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * num,
            "strides": [list(step) for step in self.steps],
            "n_blocks_per_stage": self.settings["depths"],
            "n_conv_per_stage_decoder": [1] * (num - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }


class Stem(nn.Module):
    """Holds the stem's convolution under the name that its weights have."""

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(1, width, 3))


class Stage(nn.Module):
    """Holds a stage's blocks under the name that their weights have."""

    def __init__(self, blocks: "list[Block]"):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)


class ConvNorm(nn.Module):
    """Convolution, InstanceNorm and, unless it ends a branch, LeakyReLU."""

    def __init__(
        self, channels: int, width: int, kernel: int, stride: tuple[int, int, int] = (1, 1, 1), ends: bool = False
    ):
        super().__init__()
        # a projection has no bias
        self.conv = nn.Conv3d(channels, width, kernel, stride, padding=kernel // 2, bias=kernel > 1)
        self.norm = nn.InstanceNorm3d(width, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, *([] if ends else [nn.LeakyReLU(inplace=True)]))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, D, H, W] -> [N, width, ceil(D / stride_d), ceil(H / stride_h), ceil(W / stride_w)]."""
        return self.all_modules(x)


class Block(nn.Module):
    """Two convolutions and a shortcut, which is pooled and projected where the block changes size or channels."""

    def __init__(self, channels: int, width: int, stride: tuple[int, int, int]):
        super().__init__()
        self.conv1 = ConvNorm(channels, width, 3, stride)
        self.conv2 = ConvNorm(width, width, 3, ends=True)
        self.nonlin2 = nn.LeakyReLU(inplace=True)
        # ceil_mode: as many cells as the convolution has, where a size is odd
        skip: list[nn.Module] = [nn.AvgPool3d(stride, stride, ceil_mode=True)] if max(stride) > 1 else []
        skip += [ConvNorm(channels, width, 1, ends=True)] if channels != width else []
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, D, H, W] -> [N, width, ceil(D / stride_d), ceil(H / stride_h), ceil(W / stride_w)]."""
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))
