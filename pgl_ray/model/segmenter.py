"""The segmentation network: encoder, ASPP and a light decoder (paper, Fig. 6 and Appendix B.1), or a lighter one."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import triple

# ASPP width and decoder widths for an encoder of width 64: what reproduces the paper's 48.54 M and 2.38 M parameters
WIDTHS = {"early": (160, (128, 96, 32)), "late": (128, (192, 128, 32))}
LIGHT_STRIDES = ((2, 4, 4), (4, 8, 8))  # of the maps that the light decoder takes beside the last one
NEVER = -1e4  # a logit that no other loses to


def build_segmenter(
    encoder: Encoder | ResEncoder, num_outputs: int, decoder: Literal["paper", "light"] = "paper"
) -> "Segmenter | LightSegmenter":
    """The network of a `FinetuneConfig`'s `decoder`, or of `CheckpointMeta.decoder`.

    Args:
        encoder: owned by the network from now on.
        num_outputs: logits per voxel: classes with background (multiclass), or label values (binary).
        decoder: paper, the paper's; light, a feature pyramid.
    """
    match decoder:
        case "paper":
            return Segmenter(encoder, num_outputs)
        case "light":
            return LightSegmenter(encoder, num_outputs)


class Segmenter(nn.Module):
    """Encoder + ASPP + decoder with three skips; logits on the input's grid.

    48,536,930 parameters with the default encoder and two outputs, 2,381,858 of them outside the encoder. For
    another encoder width, ASPP and decoder are scaled alike.

    Attributes:
        encoder: the `Encoder`; a pre-trained state dict loads into it directly.
        skips: numbers of the encoder's maps that the decoder takes, coarse to fine; the last one's are the logits.
    """

    def __init__(self, encoder: Encoder | ResEncoder, num_outputs: int):
        """
        Args:
            encoder: owned by the segmenter from now on.
            num_outputs: logits per voxel: classes with background (multiclass), or label values (binary).
        """
        super().__init__()
        self.encoder = encoder
        first, others = WIDTHS[encoder.stage_strides]
        aspp, *decoder = (max(8, round(width * encoder.channels[0] / 64)) for width in (first, *others))
        self.aspp = ASPP(encoder.channels[-1], aspp)
        # the skip of each step is the first map at half the stride of the step before
        self.skips = [encoder.strides.index(triple(s // 2**i for s in encoder.strides[-1])) for i in (1, 2, 3)]
        self.ups = nn.ModuleList(
            Up(channels, width, encoder.channels[skip])
            for channels, width, skip in zip((aspp, *decoder), decoder, self.skips)
        )
        self.head = nn.Conv3d(decoder[-1], num_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits.

        Args:
            x: [N, 1, D, H, W] z-scored voxels, of any size.

        Returns:
            [N, num_outputs, D, H, W].
        """
        maps = self.encoder(x)
        y = self.aspp(maps[-1])
        for up, skip in zip(self.ups, self.skips):
            y = up(y, maps[skip])
        scale = tuple(float(s) for s in self.encoder.strides[self.skips[-1]])
        y = F.interpolate(self.head(y), scale_factor=scale, mode="trilinear", align_corners=False)
        return _crop(y, x)


class LightSegmenter(nn.Module):
    """Encoder + `LightDecoder`; logits on the input's grid.

    0.13 M parameters outside an encoder of width 16. It learns in a few hundred steps where the paper's decoder, many
    layers deep from the last map on, does not.

    Attributes:
        encoder: as the `Segmenter`'s.
        levels: numbers of the encoder's maps that the decoder takes, finest first: the stem, layer1, layer2 and layer4
            of the paper's encoder. Without the finest one logits of stride 2,4,4 would be enlarged, where voxels of
            4 mm leave a spinal cord no room.
    """

    def __init__(self, encoder: Encoder | ResEncoder, num_outputs: int, width: int = 32):
        """
        Args:
            encoder: owned by the network from now on.
            num_outputs: logits per voxel.
            width: channels of the decoder.
        """
        super().__init__()
        self.encoder, self.levels = encoder, sorted({0, *light_levels(encoder.strides)})
        channels, strides = [encoder.channels[i] for i in self.levels], [encoder.strides[i] for i in self.levels]
        self.decoder = LightDecoder(channels, strides, num_outputs, width)

    @property
    def head(self) -> nn.Conv3d:
        """What gives the logits."""
        return self.decoder.head

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, D, H, W] z-scored voxels, of any size -> logits [N, num_outputs, D, H, W]."""
        maps = self.encoder(x)
        return self.decoder([maps[i] for i in self.levels], x.shape[2:])


def light_levels(strides: Sequence[tuple[int, int, int]]) -> list[int]:
    """Which of an encoder's coarser maps a light decoder takes, finest first: the deepest of LIGHT_STRIDES, the last.

    Args:
        strides: of the encoder's maps.
    """
    deepest = {stride: level for level, stride in enumerate(strides)}
    return sorted({deepest[stride] for stride in LIGHT_STRIDES if stride in deepest} | {len(strides) - 1})


def silence(head: nn.Conv3d, annotated: Sequence[bool], optimizer: torch.optim.Optimizer) -> None:
    """Keeps a head from naming organs that no scan to learn from annotates: no loss knows of their logits.

    Args:
        head: on its device.
        annotated: one per organ, the last of the head's outputs; a first output more is background.
        optimizer: of the head; after each of its steps weight decay is undone.
    """
    assert head.bias is not None
    bias, unknown = head.bias.detach()[-len(annotated) :], ~torch.tensor(annotated, device=head.bias.device)

    def quiet(*_: object) -> None:
        bias.masked_fill_(unknown, NEVER)

    quiet()
    if not all(annotated):
        optimizer.register_step_post_hook(quiet)


class LightDecoder(nn.Module):
    """A feature pyramid (Lin et al. 2017) on maps of whatever encoder, frozen or not, which it does not own.

    From the coarsest map to the finest: a 1x1x1 convolution and BatchNorm of the map, plus what comes from above,
    upsampled, then a 3x3x3 convolution; a 1x1x1 head on the finest map, its logits upsampled to the input's grid.

    Attributes:
        strides: of the maps.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[tuple[int, int, int]], num_outputs: int, width: int = 32
    ):
        """
        Args:
            channels: of the maps, finest first.
            strides: of the maps, in voxels of the input per cell (D, H, W); each a multiple of the one before.
            num_outputs: logits per voxel.
            width: channels from the first convolutions on.
        """
        super().__init__()
        self.strides = [triple(stride) for stride in strides]
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv3d(num, width, 1, bias=False), nn.BatchNorm3d(width)) for num in channels
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width, width, 3, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU(True))
            for _ in channels
        )
        self.head = nn.Conv3d(width, num_outputs, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits on the input's grid.

        Args:
            maps: one per stride, [N, channels[i], ceil(D / stride_d), ceil(H / stride_h), ceil(W / stride_w)].
            size: (D, H, W) of the input.

        Returns:
            [N, num_outputs, D, H, W].
        """
        return _enlarge(self.finest(maps), self.strides[0], (1, 1, 1), size)

    def at(self, maps: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Logits at some planes of the input's grid alone, which is many times as fast on a CPU as all of them.

        Args:
            maps: as of `forward`.
            places: numbers of the planes of each axis, int64, three.

        Returns:
            [N, num_outputs, places of D, of H, of W], as `forward` has them there, but for rounding.
        """
        y = self.finest(maps)
        d, h, w = (_between(n, by, at).to(y) for n, by, at in zip(y.shape[2:], self.strides[0], places))
        y = h @ (y @ w.T)
        return (d @ y.flatten(3)).unflatten(3, y.shape[3:])

    def finest(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits on the finest map's grid."""
        (lateral, block, above, one), *finer = list(zip(self.laterals, self.blocks, self.strides, maps))[::-1]
        y = block(F.relu(lateral(one)))
        for lateral, block, stride, one in finer:
            z = lateral(one)
            z = z + _enlarge(y, above, stride, z.shape[2:])
            y, above = block(F.relu(z)), stride
        return self.head(y)


def _between(num_cells: int, stride: int, at: Tensor) -> Tensor:
    """Weights of linear interpolation along an axis, [len(at), num_cells], clamped to the outermost cells."""
    position = ((at + 0.5) / stride - 0.5).clamp(0, num_cells - 1)
    return (1 - (position[:, None] - torch.arange(num_cells, device=at.device)).abs()).clamp_min(0)


def _enlarge(x: Tensor, stride: tuple[int, ...], to: tuple[int, ...], size: Sequence[int]) -> Tensor:
    """A map of one stride on the grid of a smaller one, trilinear; by their ratio, so that nothing is stretched where a
    size is no multiple of it."""
    scale = [float(coarse) / fine for coarse, fine in zip(stride, to)]
    y = F.interpolate(x, scale_factor=scale, mode="trilinear", align_corners=False)
    return y[:, :, : size[0], : size[1], : size[2]]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 branch, image pooling and three SepConvs, joined by a 1x1 convolution."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.point = nn.Sequential(nn.Conv3d(channels, width, 1, bias=False), nn.BatchNorm3d(width), nn.ReLU(True))
        # no norm after the pooling: BatchNorm fails on one value per channel, that is at batch size 1
        self.pool = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Conv3d(channels, width, 1), nn.ReLU(True))
        self.dilated = nn.ModuleList(
            nn.Sequential(*_sep_conv(channels, width, dilation=rate), nn.ReLU(True)) for rate in (2, 4, 8)
        )
        self.project = nn.Sequential(nn.Conv3d(5 * width, width, 1, bias=False), nn.BatchNorm3d(width), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, D, H, W] -> [N, width, D, H, W]."""
        branches = [self.point(x), *(branch(x) for branch in self.dilated)]
        return self.project(torch.cat([*branches, self.pool(x).expand_as(branches[0])], 1))


class Up(nn.Module):
    """TransConv, summation with the encoder's map, and a residual block of two SepConvs."""

    def __init__(self, channels: int, width: int, skip_channels: int):
        super().__init__()
        self.up = nn.ConvTranspose3d(channels, width, 2, stride=2)
        self.skip = nn.Sequential(nn.Conv3d(skip_channels, width, 1, bias=False), nn.BatchNorm3d(width))
        self.block = nn.Sequential(*_sep_conv(width, width), nn.ReLU(True), *_sep_conv(width, width))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[N, channels, d, h, w] and [N, skip_channels, D, H, W] -> [N, width, D, H, W]; d = ceil(D / 2)."""
        y = F.relu(_crop(self.up(x), skip) + self.skip(skip))
        return F.relu(y + self.block(y))


def _sep_conv(channels: int, width: int, dilation: int = 1) -> list[nn.Module]:
    """Depthwise 3x3x3 and pointwise convolution, then BatchNorm."""
    return [
        nn.Conv3d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False),
        nn.Conv3d(channels, width, 1, bias=False),
        nn.BatchNorm3d(width),
    ]


def _crop(x: Tensor, like: Tensor) -> Tensor:
    """Cuts the far end: a strided map of an odd size has ceil(n / 2) cells, so that its double is one too long."""
    d, h, w = like.shape[2:]
    return x[:, :, :d, :h, :w]
