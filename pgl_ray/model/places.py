"""PGL beyond the paper: several maps, told apart by place (a contrastive loss), and where they are (a regression).

The prior-guided aligner is the paper's. What is asked of the aligned features differs: the paper's consistency alone is
also met by features that name the scan and not the place, and on one coarse map it says little about fine structure.
"""

import copy
from itertools import product
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl_ray.model.losses import local_consistency_loss, place_contrast_loss
from pgl_ray.model.pgl import Output, Pair, follow, mlp, valid_bins
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import Geometry, feature_coordinates, view_to_scan
from pgl_ray.splitmix import STEP, mix


class Objective(NamedTuple):
    """What is asked of the aligned features; the fields are those of `config.LossConfig`.

    Attributes:
        kind: "consistency" (Eq. 8) or "contrast".
        temperature: of the contrastive loss.
        negatives: "pair" (other bins of the same pair) or "batch" (bins of other scans, too).
        num_bins: bins per pair and map that are compared, and cells whose displacement is predicted.
        displacement: weight of the displacement regression; 0: none.
    """

    kind: Literal["consistency", "contrast"] = "contrast"
    temperature: float = 0.1
    negatives: Literal["pair", "batch"] = "pair"
    num_bins: int = 64
    displacement: float = 0.0


class PlacesPgl(nn.Module):
    """Online and target path of PGL on several maps of the encoder, with drawn bins instead of whole maps.

    Bins are drawn before the projector, so that a fine map costs no more than a coarse one. They depend on the priors
    alone: a run that is continued, or split over other workers, draws the same. Bins that are clamped in either view
    are drawn only where there are too few others.

    Attributes:
        online: encoder and, per map, a projector.
        predictor: per map.
        place: per map a head that gives coordinates (D, H, W) of a cell, up to a shift; empty without displacement.
        target: the encoder and projectors that follow the online ones (Eq. 10).
    """

    def __init__(
        self,
        encoder: Encoder | ResEncoder,
        hidden: int,
        out: int,
        maps: list[tuple[int, Geometry]],
        objective: Objective,
    ):
        """
        Args:
            encoder: owned from now on; its stages behind the deepest map are switched off.
            hidden, out: channels of projectors and predictors.
            maps: number and geometry of each map, from `feature_geometry`; the last is `align.output_stride`'s.
            objective: of every map.
        """
        super().__init__()
        self.maps, self.objective = maps, objective
        levels = [level for level, _ in maps]
        encoder.stop_at(max(levels))
        projectors = nn.ModuleList(mlp(encoder.channels[level], hidden, out) for level in levels)
        self.online = nn.ModuleDict({"encoder": encoder, "projector": projectors})
        self.predictor = nn.ModuleList(mlp(out, hidden, out) for _ in levels)
        places = levels if objective.displacement else []
        self.place = nn.ModuleList(mlp(encoder.channels[level], hidden, 3) for level in places)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, pair: Pair) -> Output:
        """The mean over maps of both directions' losses, plus the weighted displacement loss.

        Query and key of the output are those of the last map, [N, C, bins].
        """
        views = pair.views
        maps = self.online["encoder"](views)
        with torch.no_grad():
            target_maps = self.target["encoder"](views)
        losses = []
        heads = zip(self.online["projector"].children(), self.predictor, self.target["projector"].children())
        for number, ((level, geometry), (projector, predictor, target)) in enumerate(zip(self.maps, heads)):
            at = bin_coordinates(pair, geometry, drawn_bins(pair, geometry, self.objective.num_bins))
            query = predictor(projector(read_at(maps[level], at)))
            with torch.no_grad():
                key = target(read_at(target_maps[level], at))
            (query_1, query_2), (key_1, key_2) = query.flatten(2).chunk(2), key.flatten(2).chunk(2)
            loss = (self._compare(query_1, key_2) + self._compare(query_2, key_1)) / 2
            if self.objective.displacement:
                loss = loss + self.objective.displacement * self.displacement_loss(number, maps[level], pair)
            losses.append(loss)
        return Output(torch.stack(losses).mean(), maps[self.maps[-1][0]].detach(), query_1.detach(), key_2)

    def _compare(self, query: Tensor, key: Tensor) -> Tensor:
        """The loss of one direction; query, key [N, C, bins]."""
        if self.objective.kind == "consistency":
            return local_consistency_loss(query, key)
        return place_contrast_loss(query, key, self.objective.temperature, self.objective.negatives)

    def displacement_loss(self, number: int, features: Tensor, pair: Pair) -> Tensor:
        """How far the place heads are from telling the way from cells of view 1 to cells of view 2.

        The answer comes from the priors: the difference of the cells' centres in the scan, in half view sizes per axis.
        """
        _, geometry = self.maps[number]
        size = torch.tensor(geometry.view_size, device=features.device)
        num_cells = features.shape[2:].numel()
        cells = _drawn(pair.boxes, num_cells, min(self.objective.num_bins, num_cells))  # [2N, cells]
        index = torch.stack(torch.unravel_index(cells, features.shape[2:]), -1)
        stride, center = (
            torch.tensor(part, device=features.device) for part in (geometry.output_stride, geometry.center)
        )
        at = view_to_scan(index * stride + center, pair.boxes[:, None], pair.flips[:, None], size) / (size / 2)
        guess = self.place[number](_gather(features.flatten(2), cells)).flatten(2).transpose(1, 2)  # [2N, cells, 3]
        guess_1, guess_2 = guess.float().chunk(2)
        at_1, at_2 = at.float().chunk(2)
        return F.smooth_l1_loss(guess_1[:, :, None] - guess_2[:, None], at_1[:, :, None] - at_2[:, None])

    def follow(self, decay: float) -> None:
        """The target follows (Eq. 10)."""
        follow(self.target, self.online, decay)


def bin_coordinates(pair: Pair, geometry: Geometry, bins: Tensor) -> Tensor:
    """Where both views' maps are read for bins of their overlap: the aligner's interpolation, bin by bin.

    Args:
        pair: N pairs.
        geometry: of the map.
        bins: int64 [N, K], from `drawn_bins`.

    Returns:
        float32 [2N, K, 3], continuous indices of cells, clamped to the outermost; views 1, then views 2.
    """
    axes = feature_coordinates(pair.boxes, pair.flips, pair.regions, geometry)
    cells = [axis.shape[1] for axis in axes]
    index = torch.unravel_index(bins.repeat(2, 1), cells)
    coordinates = [axis.gather(1, at).clamp(0, num - 1) for axis, at, num in zip(axes, index, cells)]
    return torch.stack(coordinates, -1)


def read_at(features: Tensor, at: Tensor) -> Tensor:
    """Trilinear interpolation of a map only at drawn places, in float32 or above: eight cells each, however fine.

    Args:
        features: [N, C, d, h, w].
        at: [N, K, 3], continuous indices inside the map.

    Returns:
        [N, C, K, 1, 1], of the features' type.
    """
    sizes = torch.tensor(features.shape[2:], device=at.device)
    low = at.long()
    high, share = torch.minimum(low + 1, sizes - 1), at - low
    flat, values = features.flatten(2), torch.zeros((), device=features.device)
    for corner in product((0, 1), repeat=3):
        upper = torch.tensor(corner, device=at.device, dtype=torch.bool)
        d, h, w = torch.where(upper, high, low).unbind(-1)
        weight = torch.where(upper, share, 1 - share).prod(-1)[:, None, :, None, None]
        part = _gather(flat, (d * sizes[1] + h) * sizes[2] + w)
        values = values + part.to(torch.promote_types(part.dtype, torch.float32)) * weight
    return values.to(features.dtype)


def _gather(features: Tensor, places: Tensor) -> Tensor:
    """[N, C, places] and int64 [N, K] -> [N, C, K, 1, 1]."""
    return features.gather(2, places[:, None].expand(-1, features.shape[1], -1))[..., None, None]


@torch.no_grad()
def drawn_bins(pair: Pair, geometry: Geometry, num: int) -> Tensor:
    """Bins of each pair's overlap, drawn without replacement, those that are clamped in neither view first.

    Returns:
        int64 [N, min(num, number of bins)], as the flattened index of an aligned map.
    """
    valid = valid_bins(pair, geometry).flatten(1)
    return _drawn(pair.boxes.view(2, -1, 3, 2).transpose(0, 1).flatten(1, 2), valid.shape[1], num, valid)


def _drawn(boxes: Tensor, num_places: int, num: int, first: Tensor | None = None) -> Tensor:
    """A draw without replacement that depends only on whole numbers, here on boxes: the same wherever it is made.

    Args:
        boxes: int [N, ...].
        num_places: to draw from.
        num: to draw; all where there are fewer.
        first: bool [N, num_places] of those that are drawn before the others.

    Returns:
        int64 [N, num].
    """
    state = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for part in boxes.long().flatten(1).unbind(1):
        state = mix(state + STEP) ^ part
    places = torch.arange(1, num_places + 1, device=boxes.device)
    key = (mix(mix(state)[:, None] + places * STEP) >> 40).float()  # [N, places], in +-2**23
    if first is not None:
        key = key + first * 2.0**25
    return key.topk(min(num, num_places), 1).indices
