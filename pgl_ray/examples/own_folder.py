# %% [markdown]
# # From your own folder of CTs to an encoder, in ten minutes
#
# No labels are needed. Open this file as a notebook, or run it: `python -m pgl_ray.examples.own_folder`. Settings are
# taken from the environment:
#
# - `PGL_RAY_CTS`: your folder (NIfTI, NRRD, MHA, DICOM, in any sub-folders); without it CT phantoms are made
# - `PGL_RAY_OUT`: where everything is written
# - `PGL_RAY_TINY=1`: a few steps, to see that it runs

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from pgl_ray import api, inspect, prepare, pretrain, report
from pgl_ray.config import FailedRun, InspectConfig, PrepareConfig, PretrainConfig, ReportConfig, load
from pgl_ray.data.sampling import sample_pair
from pgl_ray.phantom.phantom import write_phantoms
from pgl_ray.prior import overlap_box
from pgl_ray.shipped import find
from pgl_ray.train.metrics import read_metrics

TINY = "PGL_RAY_TINY" in os.environ
OUT = Path(os.environ.get("PGL_RAY_OUT", "examples/own_folder")).absolute()
CTS = os.environ.get("PGL_RAY_CTS", f"{OUT}/phantoms")
if "PGL_RAY_CTS" not in os.environ:
    write_phantoms(CTS, 3 if TINY else 24, 0, 0, seed=0, shape=(40, 96, 96), spacing_mm=(6.0, 3.5, 3.5))

# %% [markdown]
# ## Files to a store
#
# Every CT becomes an array whose axes run towards head, back and left. Files that cannot be used are named, the others
# are converted. `inspect.html` shows all of them: look at it before you train.

# %%
prepared = prepare.run(PrepareConfig(source=CTS, store=f"{OUT}/store"))
try:
    print(prepare.describe(prepared))
except FailedRun as error:  # some files cannot be used: named above
    print(error)
print("look at", inspect.run(InspectConfig(store=prepared.store)))

# %% [markdown]
# ## What is learnt from
#
# Two random crops of a scan (blue and orange) are made into views of one size; yellow is the region that both show.
# PGL makes the features of that region agree, place by place.

# %%
settings = [find("conf/pretrain_small.yaml"), f"index={prepared.store}", f"run={OUT}/run", "max_steps=600"]
settings += ["ema_decay=0.98", "train.log_every=10"]  # the target turns over as often as in the file's 1,500 steps
if TINY:
    settings += ["max_steps=3", "global_batch_size=4", "views.size=[16,32,32]", "train.log_every=1"]
config = load(PretrainConfig, settings)

store = api.open_store(prepared.store)
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for number, (record, ax) in enumerate(zip(store.scans, axes)):
    scan = api.read_scan(store, record.scan_id)
    priors = sample_pair(np.random.default_rng(number), record.shape, config.views, record.foreground_box)
    region = overlap_box(priors[0].box, priors[1].box)
    ax.imshow(scan.voxels[region[0].sum() // 2], cmap="gray", vmin=-200, vmax=300)
    for box, color in ((priors[0].box, "#56B4E9"), (priors[1].box, "#E69F00"), (region, "#F0E442")):
        (top, bottom), (left, right) = box[1:]
        frame = plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=2)
        ax.add_patch(frame)
    ax.set_aspect(scan.spacing_mm[1] / scan.spacing_mm[2])
    ax.set_title(record.scan_id, fontsize=9)
    ax.set_axis_off()
figure.savefig(OUT / "views.png", dpi=120)

# %% [markdown]
# ## Pre-training
#
# Run the cell again after an interruption: it goes on from the newest checkpoint.

# %%
trained = pretrain.run(config)
print(pretrain.describe(trained))
print("read", report.run(ReportConfig(run=[trained.run])))

# %%
rows = [row for row in read_metrics(trained.run) if "train/loss" in row]
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot([row["step"] for row in rows], [row["train/loss"] for row in rows])
ax.set(xlabel="step", ylabel="loss, lower is better")
figure.savefig(OUT / "loss.png", dpi=120)

# %% [markdown]
# ## What next
#
# - look at the features: `PGL_RAY_INIT=examples/own_folder/run python -m pgl_ray.examples.what_it_sees`
# - organs from few labels: `PGL_RAY_INIT=examples/own_folder/run python -m pgl_ray.examples.few_labels`
# - the weights as a file: `python -m pgl_ray.export run=examples/own_folder/run output=encoder.safetensors`
