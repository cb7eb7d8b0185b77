"""PGL beyond the paper: several maps, told apart by place (a contrastive loss), and where they are (a regression).

The prior-guided aligner is the paper's. What is asked of the aligned features differs: the paper's consistency alone is
also met by features that name the scan and not the place, and on one coarse map it says little about fine structure.
"""

import copy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl_ray.model.losses import local_consistency_loss, place_contrast_loss
from pgl_ray.model.pgl import Output, Pair, follow, mlp, valid_bins
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.prior import Geometry, feature_coordinates, view_to_scan
from pgl_ray.splitmix import STEP, counter, mix


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
        grid_0, grid_1, ...: float32 [3, 3], stride, centre of cell 0 and view size of each map; in no checkpoint.
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
        for number, (_, geometry) in enumerate(maps):  # on the device: a step that brought them there would wait for it
            grid = torch.tensor([geometry.output_stride, geometry.center, geometry.view_size])
            self.register_buffer(f"grid_{number}", grid, persistent=False)

    def forward(self, pair: Pair) -> Output:
        """The mean over maps of both directions' losses, plus the weighted displacement loss.

        Query and key of the output are those of the last map, [N, C, bins].
        """
        views = pair.views
        maps = self.online["encoder"](views)
        with torch.no_grad():
            target_maps = self.target["encoder"](views)
        losses, view_hashes = [], _hashed(pair.boxes)
        pair_hashes = _hashed(pair.box_2, view_hashes[: len(pair.box_1)])
        heads = zip(self.online["projector"].children(), self.predictor, self.target["projector"].children())
        for number, ((level, geometry), (projector, predictor, target)) in enumerate(zip(self.maps, heads)):
            at = bin_coordinates(pair, geometry, drawn_bins(pair, geometry, self.objective.num_bins, pair_hashes))
            query = predictor(projector(read_at(maps[level], at)))
            with torch.no_grad():
                key = target(read_at(target_maps[level], at))
            (query_1, query_2), (key_1, key_2) = query.flatten(2).chunk(2), key.flatten(2).chunk(2)
            loss = (self.direction_loss(query_1, key_2) + self.direction_loss(query_2, key_1)) / 2
            if self.objective.displacement:
                regression = self.displacement_loss(number, maps[level], pair, view_hashes)
                loss = loss + self.objective.displacement * regression
            losses.append(loss)
        return Output(torch.stack(losses).mean(), maps[self.maps[-1][0]].detach(), query_1.detach(), key_2)

    def direction_loss(self, query: Tensor, key: Tensor) -> Tensor:
        """The loss of one direction; query, key [N, C, bins]."""
        if self.objective.kind == "consistency":
            return local_consistency_loss(query, key)
        return place_contrast_loss(query, key, self.objective.temperature, self.objective.negatives)

    def displacement_loss(self, number: int, features: Tensor, pair: Pair, view_hashes: Tensor | None = None) -> Tensor:
        """How far the place heads are from telling the way from cells of view 1 to cells of view 2.

        The answer comes from the priors: the difference of the cells' centres in the scan, in half view sizes per axis.

        Args:
            number: of the map.
            features: the map of both views, [2N, C, d, h, w].
            pair: N pairs.
            view_hashes: int64 [2N], numbers by which the views' cells are drawn; none: those of their boxes.
        """
        stride, center, size = self.get_buffer(f"grid_{number}").unbind()
        hashed = _hashed(pair.boxes) if view_hashes is None else view_hashes
        cells = _drawn(hashed, features.shape[2:].numel(), self.objective.num_bins)  # [2N, cells]
        index = torch.stack(torch.unravel_index(cells, features.shape[2:]), -1)
        at = view_to_scan(index * stride + center, pair.boxes[:, None], pair.flips[:, None], size) / (size / 2)
        guess = self.place[number](_gather(features.flatten(2), cells)[..., None, None])
        guess_1, guess_2 = guess.flatten(2).transpose(1, 2).float().chunk(2)  # [N, cells, 3]
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
    low = at.long()
    share, places, weights = at - low, torch.zeros_like(low[..., :1]), torch.ones_like(at[..., :1])
    for axis, num in enumerate(features.shape[2:]):  # 2, then 4, then 8 cells around each place
        cells = torch.stack([low[..., axis], (low[..., axis] + 1).clamp_max(num - 1)], -1)
        parts = torch.stack([1 - share[..., axis], share[..., axis]], -1)
        places = (places[..., None] * num + cells[..., None, :]).flatten(2)
        weights = (weights[..., None] * parts[..., None, :]).flatten(2)
    values = _gather(features.flatten(2), places.flatten(1)).unflatten(2, places.shape[1:])  # [N, C, K, 8]
    values = values.to(torch.promote_types(values.dtype, torch.float32)) * weights[:, None]
    return values.sum(-1)[..., None, None].to(features.dtype)


def _gather(features: Tensor, places: Tensor) -> Tensor:
    """[N, C, places] and int64 [N, K] -> [N, C, K]."""
    return features.gather(2, places[:, None].expand(-1, features.shape[1], -1))


@torch.no_grad()
def drawn_bins(pair: Pair, geometry: Geometry, num: int, pair_hashes: Tensor | None = None) -> Tensor:
    """Bins of each pair's overlap, drawn without replacement, those that are clamped in neither view first.

    Args:
        pair: N pairs.
        geometry: of the map.
        num: to draw.
        pair_hashes: `hash_pairs(pair)`, where it is known.

    Returns:
        int64 [N, min(num, number of bins)], as the flattened index of an aligned map.
    """
    valid = valid_bins(pair, geometry).flatten(1)
    return _drawn(hash_pairs(pair) if pair_hashes is None else pair_hashes, valid.shape[1], num, valid)


def hash_pairs(pair: Pair) -> Tensor:
    """A number per pair by which its bins are drawn, from its boxes alone, int64 [N]."""
    return _hashed(pair.box_2, _hashed(pair.box_1))


def _hashed(boxes: Tensor, state: Tensor | None = None) -> Tensor:
    """int [N, ...] -> int64 [N], the same wherever it is computed; `state`: of what stands before them, int64 [N]."""
    state = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device) if state is None else state
    for part in boxes.long().flatten(1).unbind(1):
        state = mix(state + STEP) ^ part
    return state


def _drawn(hashed: Tensor, num_places: int, num: int, first: Tensor | None = None) -> Tensor:
    """A draw without replacement that depends only on whole numbers: the same wherever it is made.

    Args:
        hashed: int64 [N].
        num_places: to draw from.
        num: to draw; all where there are fewer.
        first: bool [N, num_places] of those that are drawn before the others.

    Returns:
        int64 [N, num].
    """
    key = (mix(mix(hashed)[:, None] + counter(num_places, hashed.device)) >> 40).float()  # [N, places], in +-2**23
    if first is not None:
        key = key + first * 2.0**25
    return key.topk(min(num, num_places), 1).indices
