"""What keeps Ray quiet; imported by every Ray worker process first, so it imports nothing heavy."""

import logging
import os
import warnings
from pathlib import Path

# Ray reads these at import, in this process and in every worker; hence they are set before the first `import ray`.
WATCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # Ray's switch: 1 where nodes may be taken away
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon the death of a worker is seen
    WATCH: "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at a barrier take the cores from the tasks that render views
}


def quiet_data() -> None:
    """Ray Data's log goes by a file that lies beside this one, on each node elsewhere; before ray.data is imported."""
    os.environ.setdefault("RAY_DATA_LOGGING_CONFIG", str(Path(__file__).with_name("quiet_data_log.yaml")))


def quiet_worker() -> None:
    """Set-up hook of every Ray worker process: keeps Ray's own notes off the console."""
    quiet_data()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    for name in ("ray.train", "ray.data", "ray.train.v2._internal.execution.controller.placement_group_cleaner"):
        logging.getLogger(name).setLevel(logging.ERROR)
