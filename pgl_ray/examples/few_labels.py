# %% [markdown]
# # Organs from few labels
#
# A segmentation network is fine-tuned on a few labelled scans, once from random weights and once from a pre-trained
# encoder, and both are compared on scans that neither has seen. Settings are taken from the environment:
#
# - `PGL_RAY_CTS`: CTs and label maps in nnU-Net's or MSD's folders (imagesTr, labelsTr, imagesTs, labelsTs); without it
#   CT phantoms with nine organs are made
# - `PGL_RAY_INIT`: the encoder, a run or `pretrained:NAME`. The weights that come along were trained on heads and
#   necks: for other parts of the body give a run of your own, as `own_folder` makes it
# - `PGL_RAY_OUT`: where everything is written; `PGL_RAY_TINY=1`: a few steps, to see that it runs

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np

from pgl_ray import evaluate, finetune, predict, prepare, report
from pgl_ray.config import EvaluateConfig, FailedRun, FinetuneConfig, PredictConfig, PrepareConfig, ReportConfig, load
from pgl_ray.phantom.phantom import write_phantoms
from pgl_ray.shipped import find

TINY = "PGL_RAY_TINY" in os.environ
OUT = Path(os.environ.get("PGL_RAY_OUT", "examples/few_labels")).absolute()
INIT = os.environ.get("PGL_RAY_INIT", "pretrained:openkbp_small")
CTS = os.environ.get("PGL_RAY_CTS", f"{OUT}/phantoms")
if "PGL_RAY_CTS" not in os.environ:
    write_phantoms(CTS, 0, 2 if TINY else 5, 1 if TINY else 6, seed=0, shape=(40, 96, 96), spacing_mm=(6.0, 3.5, 3.5))

# %%
prepared = prepare.run(PrepareConfig(source=CTS, store=f"{OUT}/store"))
try:
    print(prepare.describe(prepared))
except FailedRun as error:  # some files cannot be used: named above
    print(error)

# %% [markdown]
# ## Fine-tuning
#
# `conf/finetune_small.yaml` is made for few labels: a light decoder, AdamW, patches around organs.

# %%
settings = [find("conf/finetune_small.yaml"), f"index={prepared.store}", "num_scans=5"]
settings += ["patch.size=[24,64,64]", "max_steps=200"]
if TINY:
    settings += ["max_steps=2", "patch.size=[16,32,32]", "num_scans=2", "patches_per_scan=1", "global_batch_size=1"]
runs = {}
for name, init in {"random": "random", "pretrained": INIT}.items():
    if TINY and name == "random":
        continue
    runs[name] = finetune.run(load(FinetuneConfig, [*settings, f"init={init}", f"run={OUT}/{name}"])).run

# %% [markdown]
# ## On scans that neither network has seen
#
# Dice, IoU and distances of surfaces in mm per organ, and the paired difference with its 95 % interval.

# %%
for name, run in runs.items():
    compare = [f"compare={runs['random']}"] if name != "random" and "random" in runs else []
    evaluated = evaluate.run(load(EvaluateConfig, [f"run={run}", f"index={prepared.store}", *compare]))
    print(evaluate.describe(evaluated))
print("read", report.run(ReportConfig(run=list(runs.values()), output=f"{OUT}/report.html")))

# %% [markdown]
# ## A new CT
#
# `predict` takes any CT file and writes a label map on its own grid, with a page to look at it.

# %%
new = sorted(Path(CTS).glob("imagesTs/*"))[0]
for name, run in runs.items():
    predict.run(PredictConfig(run=run, input=str(new), output=f"{OUT}/{name}.nii.gz"))

# %%
truth = new.parents[1] / "labelsTs" / new.name.replace("_0000.", ".")
labels = {"by hand": truth} if truth.is_file() else {}
labels |= {name: OUT / f"{name}.nii.gz" for name in runs}
ct = nibabel.as_closest_canonical(nibabel.load(new))
middle = ct.shape[1] // 2  # x to the right, y to the front, z to the head
figure, axes = plt.subplots(1, len(labels), figsize=(3.4 * len(labels), 3.2), layout="constrained", squeeze=False)
for ax, (name, path) in zip(axes[0], labels.items()):
    label = np.asanyarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)[::-1, middle].T
    ax.imshow(np.asanyarray(ct.dataobj)[::-1, middle].T, cmap="gray", vmin=-200, vmax=300, origin="lower")
    ax.imshow(np.ma.masked_equal(label, 0), cmap="tab10", vmin=1, vmax=10, alpha=0.6, origin="lower")
    ax.set_aspect(ct.header.get_zooms()[2] / ct.header.get_zooms()[0])
    ax.set_title(name, fontsize=9)
    ax.set_axis_off()
figure.savefig(OUT / "organs.png", dpi=130)
