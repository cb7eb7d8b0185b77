# %% [markdown]
# # What the encoder sees
#
# PGL's features are local: without any label they tell places of the body apart, and find a place of one patient in
# another. `python -m pgl_ray.examples.what_it_sees` needs seconds. Settings are taken from the environment:
#
# - `PGL_RAY_INIT`: a run, a file of `export`, or `pretrained:NAME`
# - `PGL_RAY_A`, `PGL_RAY_B`: two CTs (a file, or a DICOM series' folder); without them two CT phantoms are made. The
#   weights that come along were trained on heads and necks: give two of those, or your own run
# - `PGL_RAY_OUT`: where the pictures are written

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from pgl_ray import api
from pgl_ray.phantom.phantom import write_phantoms

OUT = Path(os.environ.get("PGL_RAY_OUT", "examples/what_it_sees")).absolute()
OUT.mkdir(parents=True, exist_ok=True)
INIT = os.environ.get("PGL_RAY_INIT", "pretrained:openkbp_small")
if not {"PGL_RAY_A", "PGL_RAY_B"} <= os.environ.keys():
    write_phantoms(OUT / "phantoms", 2, 0, 0, seed=0, shape=(48, 80, 80), spacing_mm=(5.0, 4.5, 4.5))
made = [f"{OUT}/phantoms/imagesTr/phantom_00{number}_0000.nii.gz" for number in (0, 1)]
paths = [os.environ.get("PGL_RAY_A", made[0]), os.environ.get("PGL_RAY_B", made[1])]

# %%
encoder = api.load_encoder(INIT)
scans = [api.read_scan(path) for path in paths]
print(f"{INIT}: maps {', '.join(encoder.names)}; trained on voxels of {encoder.spacing_mm} mm")
for path, scan in zip(paths, scans):
    print(f"{path}: {scan.voxels.shape} voxels of {np.round(scan.spacing_mm, 2)} mm, D, H, W")

# %% [markdown]
# ## Maps as colours
#
# The three strongest directions of a map (its principal components over both scans) are shown as red, green and blue:
# the same colour in both patients is the same kind of place. A map is read at places in mm, here at every voxel of a
# coronal slice, the head up; between its cells it is interpolated.


# %%
def slice_places(scan):
    """Places of the middle coronal slice's voxels, [D, W, 3] in mm, the head up."""
    num_d, num_h, num_w = scan.voxels.shape
    d, w = np.mgrid[num_d - 1 : -1 : -1, :num_w]
    return np.stack([d, np.full_like(d, num_h // 2), w, np.ones_like(d)], -1) @ scan.affine[:3].T


names = encoder.names[-3:]
maps = [api.dense_features(encoder, scan, names) for scan in scans]
figure, axes = plt.subplots(2, 1 + len(names), figsize=(2.6 * (1 + len(names)), 4.2), layout="constrained")
for row, scan in zip(axes, scans):
    row[0].imshow(scan.voxels[::-1, scan.voxels.shape[1] // 2], cmap="gray", vmin=-200, vmax=300)
    row[0].set_title("CT", fontsize=9)
for number, name in enumerate(names):
    cells = torch.cat([of_scan[number].values.flatten(1).float() for of_scan in maps], 1)  # [C, cells of both scans]
    directions = torch.linalg.svd(torch.cov(cells))[0][:, :3]
    strength = (directions.T @ cells).std(1)
    for row, scan, of_scan in zip(axes, scans, maps):
        places = slice_places(scan)
        features = of_scan[number].at(places.reshape(-1, 3)) - cells.mean(1)  # [voxels, C]
        colours = 0.5 + (features @ directions) / (4 * strength)
        row[1 + number].imshow(colours.clip(0, 1).reshape(places.shape).cpu())
        row[1 + number].set_title(f"{name}, stride {','.join(map(str, of_scan[number].stride))}", fontsize=9)
for row, scan in zip(axes, scans):
    for ax in row:
        ax.set_aspect(scan.spacing_mm[0] / scan.spacing_mm[2])
        ax.set_axis_off()
figure.savefig(OUT / "colours.png", dpi=130)

# %% [markdown]
# ## Places found again
#
# Places of scan A (left) are searched in scan B (right) by the nearest feature. The similarity is a cosine: 1 is the
# same feature. The runner-up is the best other place that is far away; where it is as similar, the place is ambiguous.

# %%
first, second = scans
body = np.argwhere(first.voxels > -200)
low, high = np.percentile(body, [20, 80], axis=0)
voxels = np.array([[d, body[:, 1].mean(), w] for d in (low[0], high[0]) for w in (low[2], high[2])])
places = np.column_stack([voxels, np.ones(len(voxels))]) @ first.affine.T
matches = api.match(encoder, first, second, places[:, :3])
for one in matches:
    runner_up = "none" if one.runner_up_similarity is None else f"{one.runner_up_similarity:.3f}"
    places_mm = f"{np.round(one.asked_mm)} -> {np.round(one.matched_mm)} mm"
    print(f"{places_mm}, similarity {one.similarity:.3f}, runner-up {runner_up}")

# %%
figure, axes = plt.subplots(len(matches), 2, figsize=(5.5, 2.2 * len(matches)), layout="constrained", squeeze=False)
for row, one in zip(axes, matches):
    for ax, scan, place in zip(row, scans, (one.asked_mm, one.matched_mm)):
        d, h, w = (np.linalg.inv(scan.affine) @ [*place, 1])[:3]
        ax.imshow(scan.voxels[:, round(h)], cmap="gray", vmin=-200, vmax=300, origin="lower")
        ax.set_aspect(scan.spacing_mm[0] / scan.spacing_mm[2])
        ax.plot(w, d, "o", color="#E69F00", markerfacecolor="none", markersize=12, markeredgewidth=2)
        ax.set_axis_off()
    row[1].set_title(f"similarity {one.similarity:.2f}", fontsize=9)
figure.savefig(OUT / "places.png", dpi=130)

# %% [markdown]
# A page to click in, with the similarity everywhere: `python -m pgl_ray.match init=... a=... b=... point=[x,y,z]
# output=matched`. Vectors and neighbours of many scans: `python -m pgl_ray.embed`.
