# %% [markdown]
# # A sweep
#
# Which settings learn the most here? Every trial pre-trains an encoder and is judged by a linear probe of its frozen
# features on labelled scans, which takes seconds. Ray Tune runs as many trials at a time as the cores or GPUs hold; the
# same command again goes on where it was interrupted. Settings are taken from the environment:
#
# - `PGL_RAY_STORE`: a store with labels, as `prepare` writes it; without it CT phantoms with nine organs are made
# - `PGL_RAY_OUT`: where everything is written; `PGL_RAY_TINY=1`: a few steps, to see that it runs

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from pgl_ray import prepare, report, tune
from pgl_ray.config import PrepareConfig, ReportConfig, TuneConfig, build
from pgl_ray.phantom.phantom import write_phantoms
from pgl_ray.shipped import find

TINY = "PGL_RAY_TINY" in os.environ
OUT = Path(os.environ.get("PGL_RAY_OUT", "examples/sweep")).absolute()
STORE = os.environ.get("PGL_RAY_STORE", f"{OUT}/store")
if "PGL_RAY_STORE" not in os.environ:
    counts = (0, 2, 1) if TINY else (12, 5, 5)
    write_phantoms(OUT / "phantoms", *counts, seed=0, shape=(40, 96, 96), spacing_mm=(6.0, 3.5, 3.5))
    prepare.run(PrepareConfig(source=f"{OUT}/phantoms", store=STORE))

# %% [markdown]
# ## What is tried
#
# `base_pretrain` is what all trials share, `space` what they differ in: each key is one of the config's, each value one
# of Ray Tune's verbs. `scheduler: {kind: asha}` would stop the worse half early. Ready-made sweeps, the paper's tables
# among them: `tune_spaces/`.

# %%
base = OmegaConf.to_container(OmegaConf.load(find("conf/pretrain_small.yaml")))
base |= {"max_steps": 150, "ema_decay": 0.95, "views": {"size": [24, 48, 48], "foreground": True}}
base |= {"split": "train"}  # not the scans that are judged on
probe = {"judges": ["voxels"], "size": [24, 48, 48], "num_scans": 5, "num_test_scans": 5}
if TINY:
    base |= {"max_steps": 2, "global_batch_size": 2, "views": {"size": [16, 32, 32]}}
    probe |= {"size": [16, 32, 32], "num_scans": 2, "num_test_scans": 1}
values = {"index": STORE, "run": f"{OUT}/sweep", "base_pretrain": base, "base_probe": probe, "base_finetune": None}
values |= {"judge": "probe/balanced_accuracy", "max_concurrent": 2}
values |= {"space": {"pretrain.optim.lr": {"grid_search": [1.5] if TINY else [0.5, 1.0, 1.5, 2.5]}}}
config = build(TuneConfig, values)

# %%
swept = tune.run(config)
print(tune.describe(swept))
print("read", report.run(ReportConfig(run=[swept.folder])))

# %% [markdown]
# ## What came out
#
# One row per trial in `trials.parquet`; `best.yaml` holds the settings of the best, ready for `pretrain`.

# %%
rows = sorted(pq.read_table(f"{swept.folder}/trials.parquet").to_pylist(), key=lambda row: row["pretrain.optim.lr"])
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot([row["pretrain.optim.lr"] for row in rows], [row["score"] for row in rows], "o-")
ax.set(xlabel="learning rate of pre-training", ylabel="balanced accuracy, higher is better")
figure.savefig(OUT / "scores.png", dpi=120)
print(Path(f"{swept.folder}/best.yaml").read_text())
