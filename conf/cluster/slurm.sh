#!/bin/bash
# A Ray cluster inside one SLURM allocation, and a door on it:
#   sbatch --nodes=4 --gpus-per-node=4 --cpus-per-task=32 conf/cluster/slurm.sh \
#     pretrain conf/pretrain.yaml index=/shared/stores/mine run=/shared/runs/pgl train.num_workers=16
# pgl_ray is installed in a virtual environment that all nodes see (VENV). Typed again, the command continues the run;
# --requeue lets SLURM do so. A preemption or the time limit ends the door at once, and the run goes on from its last
# checkpoint: lower train.checkpoint_every where 200 steps take long.
#SBATCH --job-name=pgl_ray
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

VENV=${VENV:-$PWD/.venv}
PORT=${PORT:-6379}
WAIT_S=${WAIT_S:-120}
export PATH=$VENV/bin:$PATH RAY_USAGE_STATS_ENABLED=0
# Other users of these nodes reach every port of Ray: only who has this token gets in.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}')
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
gpus=${SLURM_GPUS_ON_NODE:-0}

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait' EXIT
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --block --node-ip-address="$address" --port="$PORT" --dashboard-host=127.0.0.1 \
  --num-cpus="$cpus" --num-gpus="$gpus" &
pids+=($!)
for host in "${hosts[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$host" --overlap \
    ray start --block --address="$address:$PORT" --num-cpus="$cpus" --num-gpus="$gpus" &
  pids+=($!)
done

# all nodes are there, or it says how many came
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap python - "$address:$PORT" "${#hosts[@]}" "$WAIT_S" <<'PYTHON'
import sys
import time

import ray

address, due, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
until, alive = time.monotonic() + seconds, 0
while alive < due:
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, ignore_reinit_error=True)
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        pass
    if alive < due and time.monotonic() > until:
        sys.exit(f"slurm.sh: {alive} of {due} Ray nodes came within {seconds:.0f} s")
    time.sleep(1)
PYTHON

door=$1
shift
export RAY_ADDRESS="$address:$PORT" # not all doors have a key for it
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap python -m "pgl_ray.$door" "$@"
