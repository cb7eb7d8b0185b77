# %% [markdown]
# # On a cluster
#
# The same calls as on one machine: a training takes as many workers as `train.num_workers` says, wherever they are.
# Join a cluster that runs (`ray start --head` on one node, `ray start --address=FIRST:6379` on the others) by
# `RAY_ADDRESS=FIRST:6379 python -m pgl_ray.examples.cluster`, or send it as a job, whose settings go with the command,
# for a job has not the environment of the shell that sends it:
# `ray job submit --working-dir . -- env PGL_RAY_STORE=/data/mine PGL_RAY_OUT=/data/out
# python -m pgl_ray.examples.cluster`. Without an address this machine is a cluster of one node. Store and run must lie
# where all nodes see them: a shared folder, or a bucket. Settings are taken from the environment:
#
# - `PGL_RAY_STORE`: a store as `prepare` writes it; without it CT phantoms are made
# - `PGL_RAY_OUT`: a folder that all nodes see, absolute in a job; `PGL_RAY_TINY=1`: a few steps, to see that it runs

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import ray

from pgl_ray import prepare, pretrain
from pgl_ray.config import PrepareConfig, PretrainConfig, RayConfig, load
from pgl_ray.phantom.phantom import write_phantoms
from pgl_ray.shipped import find
from pgl_ray.train.launch import connect
from pgl_ray.train.metrics import read_metrics

TINY = "PGL_RAY_TINY" in os.environ
OUT = Path(os.environ.get("PGL_RAY_OUT", "examples/cluster")).expanduser()  # a job's is not made absolute, but refused
STORE = os.environ.get("PGL_RAY_STORE", f"{OUT}/store")

# %% [markdown]
# ## Who is there
#
# A worker takes one GPU where the cluster has any, else `train.cpus_per_worker`; one CPU at least is kept for the
# stream of views, which runs on all nodes.

# %%
connect(RayConfig())
for node in ray.nodes():
    has = node["Resources"]
    print(
        f"{node['NodeManagerHostname']}: {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs, alive: {node['Alive']}"
    )
have = ray.cluster_resources()
room = int(have.get("GPU", 0)) or max(1, int(have["CPU"] - 1) // 2)
batch = 4 if TINY else 16
workers = max(number for number in range(1, room + 1) if batch % number == 0)
print(f"{workers} workers")

# %%
if "PGL_RAY_STORE" not in os.environ:
    prepared = load(PrepareConfig, [f"source={OUT}/phantoms", f"store={STORE}"])
    write_phantoms(OUT / "phantoms", 3 if TINY else 24, 0, 0, seed=0, shape=(40, 96, 96), spacing_mm=(6.0, 3.5, 3.5))
    prepare.run(prepared)

# %% [markdown]
# ## Pre-training on all of them
#
# The global batch is divided among the workers, as many as divide it, so what is learnt does not depend on their
# number. With `train.min_workers` the run goes on with fewer when a node is lost and takes new ones in. A killed run
# goes on where it was when this cell is run again, also with another number of workers.

# %%
settings = [find("conf/pretrain_small.yaml"), f"index={STORE}", f"run={OUT}/run", "max_steps=300", "ema_decay=0.97"]
settings += ["train.log_every=10", f"train.num_workers={workers}", f"global_batch_size={batch}"]
if TINY:
    settings += ["max_steps=4", "views.size=[16,32,32]", "train.log_every=1"]
trained = pretrain.run(load(PretrainConfig, settings))
print(pretrain.describe(trained))

# %% [markdown]
# ## Does it scale?
#
# Pairs of views per second over all workers, and the share of the time in which they wait for data: where it is large,
# `python -m pgl_ray.bench` says what limits the stream. Each worker's log: `run/logs/`.

# %%
rows = [row for row in read_metrics(trained.run) if "train/loss" in row]
rates = [key for key in rows[-1] if key.endswith("_per_s")]
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
axes[0].plot([row["step"] for row in rows], [row[rates[0]] for row in rows])
axes[0].set(xlabel="step", ylabel="pairs of views per second, higher is better", ylim=(0, None))
axes[1].plot([row["step"] for row in rows], [100 * row["data/wait_share"] for row in rows])
axes[1].set(xlabel="step", ylabel="% of the time waiting for data, lower is better", ylim=(0, 100))
figure.savefig(OUT / "rate.png", dpi=120)
