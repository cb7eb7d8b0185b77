"""The candidates of the collapse alarm: a distance by loops, and what the committed trainings say of each."""

import itertools
import json
from pathlib import Path

import health_controls
import numpy as np
import pytest
import torch

from pgl_ray.model.pgl import Output, Pair
from pgl_ray.prior import Geometry

ROWS = json.loads((Path(__file__).parent / "results" / "health_candidates.json").read_text())


def test_the_distance_is_that_of_loops_over_places():
    """Views without flips whose boxes are their overlap: bins are cells, so each place has its own cell's feature."""
    torch.manual_seed(0)
    cells, size, strides = (2, 3, 2), (16, 48, 32), (8, 16, 16)
    boxes = torch.tensor([[[0, 16], [0, 48], [0, 32]], [[4, 36], [8, 56], [0, 32]]])
    flips = torch.zeros(2, 3, dtype=torch.bool)
    views = torch.zeros(2, 1, *size)
    maps, mm = torch.randn(4, 5, *cells), torch.tensor([[3.0, 1.0, 1.0], [5.0, 2.0, 0.5]])
    pair = Pair(views, views, boxes, boxes, flips, flips)
    geometry = Geometry(size, strides, tuple(stride / 2 for stride in strides))
    got = health_controls.error(torch.nn.Identity(), Output(torch.zeros(()), maps), pair, geometry, mm)

    centred = (maps - maps.mean((0, 2, 3, 4), keepdim=True)).double().numpy()
    places, shares = list(itertools.product(*map(range, cells))), []
    for n in range(2):
        length = (boxes[n, :, 1] - boxes[n, :, 0]).numpy() * mm[n].numpy()
        at = [(np.array(place) + 0.5) / cells * length for place in places]
        found = []
        for own, place in enumerate(places):
            query = centred[n][(slice(None), *place)]
            keys = [centred[2 + n][(slice(None), *other)] for other in places]
            cosines = [query @ key / np.linalg.norm(query) / np.linalg.norm(key) for key in keys]
            found.append(np.linalg.norm(at[int(np.argmax(cosines))] - at[own]))
        chance = [np.linalg.norm(a - b) for a in at for b in at]
        # torch's median is the lower one of two in the middle
        shares.append(sorted(found)[(len(found) - 1) // 2] / sorted(chance)[(len(chance) - 1) // 2])
    assert got == pytest.approx(min(shares), rel=1e-4)


def test_only_the_number_of_directions_tells_collapse():
    lines = [line.split("|") for line in health_controls.table(ROWS)][2:]
    apart = {line[1].strip(): line[4].strip() for line in lines}
    assert apart.pop(health_controls.CANDIDATES["directions"]) == "yes" and {*apart.values()} == {"no"}
    assert len(apart) == 4 and ROWS.keys() == {*health_controls.SOUND, *health_controls.COLLAPSED}
