# %% [markdown]
# # Into nnU-Net
#
# nnU-Net trains from a `.pth` that `python -m pgl_ray.export` writes of a run with `encoder.kind=resenc`. It reads CTs
# in another way than pre-training did: it neither turns their axes nor clips HU before it standardises them, so the
# encoder would see other values than those it was trained on. This writes a data set for nnU-Net whose scans come out
# alike, and prints the commands that train on it. Settings are taken from the environment:
#
# - `PGL_RAY_FILE`: the `.pth`
# - `PGL_RAY_CTS`: CTs and label maps in nnU-Net's folders (imagesTr, labelsTr, dataset.json); without it CT phantoms
#   with nine organs are made
# - `PGL_RAY_OUT`: nnU-Net's raw folder (its nnUNet_raw); `PGL_RAY_TINY=1`: fewer phantoms

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from pgl_ray.phantom.phantom import write_phantoms

TINY = "PGL_RAY_TINY" in os.environ
OUT = Path(os.environ.get("PGL_RAY_OUT", "examples/nnunet_dataset")).absolute()
CTS = Path(os.environ.get("PGL_RAY_CTS", OUT / "phantoms"))
if "PGL_RAY_FILE" not in os.environ:
    raise SystemExit("PGL_RAY_FILE=encoder.pth is needed: python -m pgl_ray.export run=RUN output=encoder.pth")
FILE = Path(os.environ["PGL_RAY_FILE"]).absolute()
if "PGL_RAY_CTS" not in os.environ:
    write_phantoms(CTS, 0, 2 if TINY else 8, 0, seed=0, shape=(40, 96, 96), spacing_mm=(6.0, 3.5, 3.5))

# %% [markdown]
# ## What the weights expect
#
# Under `metadata` the file says what goes in; `nnssl_adaptation_plan` is what nnU-Net reads of it.

# %%
saved = torch.load(FILE, weights_only=True)
low, high = json.loads(saved["metadata"]["hu_window"])
for key in ("orientation", "normalisation", "hu_window", "median_spacing_mm"):
    print(f"{key}: {saved['metadata'][key]}")

# %% [markdown]
# ## Scans and label maps, turned and clipped
#
# SimpleITK, by which nnU-Net reads, gives a file's axes in reverse: a file whose axes run to the left, the back and the
# head ("LPS") becomes an array along head, back, left, as in pre-training. New CTs that the trained network is to
# segment must be turned and clipped in the same way.

# %%
target = OUT / "Dataset007_PGL"
LPS = axcodes2ornt("LPS")


def turned(path):
    image = nibabel.load(path)
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), LPS))


paths = [path for kind in ("images", "labels") for path in sorted(CTS.glob(f"{kind}T[rs]/*.nii.gz"))]
others = {path.relative_to(target) for path in target.glob("*T[rs]/*")} - {path.relative_to(CTS) for path in paths}
if others:
    raise SystemExit(
        f"PGL_RAY_OUT={OUT}: Dataset007_PGL holds {len(others)} files of other scans ({min(others)}, ...) than "
        f"PGL_RAY_CTS={CTS}, and nnU-Net would train on both: choose another PGL_RAY_OUT, or delete {target}"
    )
before, after = [], []
for path in paths:
    image = turned(path)
    values = np.rint(np.asanyarray(image.dataobj)).astype(np.int16)
    if path.parent.name.startswith("images"):
        before.append(values[::4, ::4, ::4].ravel())
        values = values.clip(round(low), round(high))
        after.append(values[::4, ::4, ::4].ravel())
    file = target / path.relative_to(CTS)
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, image.affine), file)
dataset = json.loads((CTS / "dataset.json").read_text())
cases = len(list((target / "labelsTr").iterdir()))
(target / "dataset.json").write_text(json.dumps(dataset | {"numTraining": cases}, indent=1))

# %% [markdown]
# ## What nnU-Net makes of them
#
# It subtracts each scan's mean and divides by its deviation. Without clipping, bone, metal and what lies outside of the
# scanner's circle set the scale; with it the network meets the values that it was trained on.

# %%
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for values, name in ((before, "as the files are"), (after, "clipped, as in pre-training")):
    scaled = np.concatenate([(one - one.mean()) / one.std() for one in map(np.float64, values)])
    ax.hist(scaled, 200, range=(-2, 4), histtype="step", label=name, density=True)
ax.set(xlabel="what the network sees of a voxel", ylabel="share", yscale="log")
ax.legend()
figure.savefig(OUT / "values.png", dpi=120)

# %% [markdown]
# ## The commands

# %%
plan = f"$(basename {OUT}/preprocessed/Dataset007_PGL/ptPlans__pgl____*.json .json)"
print(
    f"""# the released 2.8.1 lacks the last two commands
pip install git+https://github.com/MIC-DKFZ/nnUNet.git@0e495086
export nnUNet_raw={OUT} nnUNet_preprocessed={OUT}/preprocessed nnUNet_results={OUT}/results
nnUNetv2_extract_fingerprint -d 7
nnUNetv2_plan_experiment -d 7
nnUNetv2_preprocess_like_nnssl -d 7 -n pgl -pc {FILE} -am like_pretrained
nnUNetv2_train_pretrained 7 3d_fullres 0 -p {plan} -tr PretrainedTrainer"""
)
