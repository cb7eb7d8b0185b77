"""What keeps Ray quiet; imported by every Ray worker process first, so it imports nothing heavy."""

import logging
import os
import warnings

from pgl_ray import ray_internals

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
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of tasks whose answer nobody asks for: those under way when a stream ends
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at a barrier take the cores from the tasks that render views
}
# Of workers alone, for Ray's own processes start more slowly with it. glibc reads it as a process begins. Ray Train
# trains in a thread, whose own arena gives large maps back to the kernel whatever `keep_freed_memory` says: each step
# would fault their pages in anew. Huge ones spare the TLB.
MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"}


def quiet_data() -> None:
    """Ray Data's log goes by a file of this package, on each node elsewhere; before ray.data is imported."""
    if path := ray_internals.data_log():
        os.environ.setdefault("RAY_DATA_LOGGING_CONFIG", path)


def quiet_worker() -> None:
    """Set-up hook of every Ray worker process: keeps Ray's own notes off the console."""
    quiet_data()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray_internals.quiet_cleaner()
