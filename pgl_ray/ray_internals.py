"""Every private name of Ray that this package uses; no other file has one.

They are Ray 2.60's: pyproject.toml lets in no other minor before it was tried. Where Ray has changed one, a run goes on
with Ray's own behaviour, `changed` says so, and tests/test_ray_internals.py fails with "Ray changed".

At the top level and not in train/, for data/stream needs it as well. Every worker process of Ray imports it first, so
nothing heavy is imported at its top, Ray neither.
"""

import contextlib
import importlib.util
import json
import logging
import os
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

WAIT_S = 0.5  # between two looks of Ray Train at whether there is room for workers
IDLE_S = 0.05  # between two looks of Ray Data's executor at what there is to do while nothing runs

_EXECUTION = "ray.data._internal.execution"
_POLICIES = f"{_EXECUTION}.backpressure_policy"
_MAPS = "ray.data._internal.logical.operators.map_operator"
_TRAIN = "ray.train.v2._internal.execution"


class Use(NamedTuple):
    """Names of Ray's, as pkgutil.resolve_name takes them, and what a run does without them."""

    names: tuple[str, ...]
    instead: str


BLOCKS = Use(
    (
        f"{_POLICIES}:ENABLED_BACKPRESSURE_POLICIES",
        f"{_POLICIES}:ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY",
        f"{_POLICIES}:BackpressurePolicy.can_add_input",
        f"{_POLICIES}:BackpressurePolicy.max_task_output_bytes_to_read",
        f"{_EXECUTION}.interfaces:PhysicalOperator.name",
        f"{_EXECUTION}.interfaces:PhysicalOperator.metrics",
        f"{_EXECUTION}.interfaces:PhysicalOperator.num_active_tasks",
        f"{_EXECUTION}.interfaces:PhysicalOperator.output_dependencies",
        f"{_EXECUTION}.interfaces.op_runtime_metrics:OpRuntimeMetrics.average_bytes_per_output",
        f"{_EXECUTION}.streaming_executor_state:OpState.total_enqueued_input_blocks",
        f"{_EXECUTION}.streaming_executor_state:OpState.total_enqueued_output_blocks",
        f"{_MAPS}:MapBatches._get_operator_name",
        "ray.data:DataContext.set_config",
        "ray.data:DataContext.override_object_store_memory_limit_fraction",
    ),
    "Ray Data's own budget of bytes decides how far the stream runs ahead: it may fill the object store, or stand "
    "still in a small one",
)
WORKERS = Use(
    (
        "ray.train.v2.api.data_parallel_trainer:create_scaling_policy",
        f"{_TRAIN}.scaling_policy:ElasticScalingPolicy._count_possible_workers",
        f"{_TRAIN}.scaling_policy:ElasticScalingPolicy.make_decision_for_non_running_worker_group",
        f"{_TRAIN}.scaling_policy:ElasticScalingPolicy.make_decision_for_running_worker_group",
        f"{_TRAIN}.scaling_policy:NoopDecision",
    ),
    "Ray Train alone decides how many workers an elastic run has, and waits for them without end; with a number that "
    "does not divide global_batch_size it ends with an error: leave out train.min_workers then",
)
REPORTS = Use((f"{_TRAIN}.context:logger",), "each worker logs a line at each of its reports")
CLEANER = Use((f"{_TRAIN}.controller.placement_group_cleaner:logger",), "Ray Train may log a line each second")
GROWTH = Use(
    (
        "ray._private.state:GlobalState.get_cluster_config",
        "ray.autoscaler._private.kuberay.autoscaling_config:AutoscalingConfigProducer",
    ),
    "on a cluster that grows, nodes that are up are counted, and no others: have them started first",
)
LAUNCHES = Use(
    ("ray.autoscaler.v2.sdk:get_cluster_status",),
    "why nodes of a cluster that grows do not come is said by `ray status` alone",
)
USES = (BLOCKS, WORKERS, REPORTS, CLEANER, GROWTH, LAUNCHES)


def missing(use: Use) -> list[str]:
    """Those of a use's names that the installed Ray has not."""
    lost = []
    for name in use.names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            lost.append(name)
    return lost


def changed() -> list[str]:
    """What to tell the user of names that Ray has changed, a line for each use; imports Ray Data and Ray Train."""
    import ray

    lost = {use.instead: missing(use) for use in USES}
    if not lost[BLOCKS.instead] and not _names_operators():
        lost[BLOCKS.instead] = ["operators named MapBatches(...)"]
    return [f"Ray {ray.__version__} has no {', '.join(names)}: {instead}" for instead, names in lost.items() if names]


# -- Ray Data ---------------------------------------------------------------------------------------------------------


def bound_blocks(context: Any, laid_out: type, most_laid_out: int, least: int, room: float) -> bool:
    """Bounds what waits between the operators of a stream by its number of blocks.

    Ray bounds it by bytes, which for rows of a plan is no bound, and for batches one that a small object store cannot
    meet: there the stream stands still. Only the limits of bytes and of tasks are public; a policy of one's own goes
    in by `ray.data._internal.execution.backpressure_policy.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY`. It knows the
    operators by their names, `MapBatches(<class>)`.

    Args:
        context: Ray Data's DataContext, changed in place.
        laid_out: class of the callable that lays out the plan, by which Ray names its operator.
        most_laid_out: its blocks that may wait, and those of any operator.
        least: batches that may always be rendered or under way.
        room: bytes that they may fill where there is more; a task in a new process, which takes seconds to start,
            holds up all behind it, so more of them keep the training going.

    Returns:
        False where Ray has changed one of the names: nothing was done.
    """
    if missing(BLOCKS) or not _names_operators():
        return False
    from ray.data._internal.execution import backpressure_policy as policies

    keep_ahead = _keep_ahead(policies.BackpressurePolicy, laid_out.__name__, most_laid_out, least, room)
    ways = [*policies.ENABLED_BACKPRESSURE_POLICIES, keep_ahead]
    context.set_config(policies.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, ways)
    # Ray Data's budget of bytes stands still where the store is small: the number of blocks is bounded instead
    context.override_object_store_memory_limit_fraction = 1e6
    return True


def _names_operators() -> bool:
    """Whether Ray names an operator as `bound_blocks` takes it to."""
    from ray.data._internal.logical.operators import map_operator

    try:
        name = map_operator.MapBatches._get_operator_name(None, map_operator.MapBatches.__name__, Use((), ""))
    except Exception:  # whatever a method does that has changed
        return False
    return name == "MapBatches(Use)"


def _keep_ahead(base: type, laid_out: str, most_laid_out: int, least: int, room: float) -> type:
    """The policy of `bound_blocks`; `base`: Ray Data's class of such policies."""

    class KeepAhead(base):
        def __init__(self, context: Any, topology: Any, *others: Any) -> None:
            super().__init__(context, topology, *others)
            self.states = topology  # operator -> its state

        def can_add_input(self, op: Any) -> bool:
            after = [self.states[consumer] for consumer in op.output_dependencies]
            waiting = sum(state.total_enqueued_input_blocks() for state in after)
            if laid_out in op.name:
                return waiting < most_laid_out and not op.num_active_tasks()
            if not op.name.startswith("MapBatches"):
                return True
            ready = sum(state.total_enqueued_output_blocks() for state in (self.states[op], *after))
            size = op.metrics.average_bytes_per_output
            most = max(least, min(most_laid_out, int(room // size))) if size else least
            return op.num_active_tasks() + waiting + ready < most

        def max_task_output_bytes_to_read(self, op: Any) -> None:
            """Asked of all operators at the start of each of the executor's rounds, which waits only for tasks: while
            none runs, since enough is rendered, it would take up a core."""
            if op is next(iter(self.states)) and not any(each.num_active_tasks() for each in self.states):
                time.sleep(IDLE_S)

    return KeepAhead


# -- Ray Train --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_parts(batch_size: int, spare_cpus: float, check_wait: Callable[[float, bool], None]) -> Iterator[None]:
    """While it lasts, Ray's elastic trainers take only numbers of workers that divide a global batch, and do not wait
    for ever.

    ScalingConfig has a least and a most number and nothing between: by public names, the workers beyond a divisor
    could only stand by, with a GPU each, and on CPUs nothing would be left for the views. A trainer makes its policy by
    `ray.train.v2.api.data_parallel_trainer.create_scaling_policy`, which is put aside for the time. Where Ray has
    changed it, nothing is done.

    Args:
        batch_size: global.
        spare_cpus: Ray CPUs that the workers leave free.
        check_wait: called in Ray Train's controller while there are no workers, with the seconds since there were, and
            whether Ray sees room for them; raises where that ends the run.
    """
    if missing(WORKERS):
        yield
        return
    import ray
    import ray.train.v2.api.data_parallel_trainer as trainer
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

    class WholeParts(ElasticScalingPolicy):
        since: float | None = None  # that there are no workers

        def _count_possible_workers(self, *args: Any) -> int:
            room = ray.cluster_resources().get("CPU", 0) - spare_cpus  # or nothing would make the views
            own = self.scaling_config.resources_per_worker["CPU"]
            possible = min(super()._count_possible_workers(*args), int(room // own))
            return max((num for num in range(1, possible + 1) if batch_size % num == 0), default=0)

        def make_decision_for_running_worker_group(self, *args: Any, **kwargs: Any) -> Any:
            self.since = None
            return super().make_decision_for_running_worker_group(*args, **kwargs)

        def make_decision_for_non_running_worker_group(self) -> Any:
            decision = super().make_decision_for_non_running_worker_group()
            has_room = not isinstance(decision, NoopDecision)
            self.since = time.monotonic() if self.since is None else self.since
            check_wait(time.monotonic() - self.since, has_room)
            if not has_room:
                time.sleep(WAIT_S)  # Ray asks again at once
            return decision

    def policy(config: Any) -> Any:
        return WholeParts(config) if config.elasticity_enabled else original(config)

    original, trainer.create_scaling_policy = trainer.create_scaling_policy, policy
    try:
        yield
    finally:
        trainer.create_scaling_policy = original


# -- clusters that grow: train/autoscaler.py -------------------------------------------------------------------------

HEAD = "node:__internal_head__"  # a resource that only the head has, by which Ray's documentation names it
MONITOR = "monitor.py"  # the autoscaler's process, on the head, and its options:
MONITOR_GCS, MONITOR_CONFIG, MONITOR_LOGS = "--gcs-address=", "--autoscaling-config=", "--logs-dir="
MONITOR_LOG, KUBERAY_LOGS = "monitor.log", "/tmp/ray/session_latest/logs"
FAILED_LAUNCH = re.compile(r"Failed to launch \d+ nodes of type (\S+): (.*)")  # in its log
KUBERAY_CLUSTER = "RAY_CLUSTER_NAME"  # in the environment of KubeRay's containers


def published_config() -> Any:
    """How the connected cluster may grow, where a platform has published it in the cluster's GCS: Ray's ClusterConfig;
    call it where nothing of GROWTH is `missing`."""
    from ray._private.state import state

    return state.get_cluster_config()


def kuberay_config(cluster: str, namespace: str) -> dict[str, Any]:
    """What Kubernetes says of a cluster, as a file for `ray up` would; to be asked in the pod of its head.

    Raises:
        Exception: of any kind, without a right to ask, without an answer, at an answer of another version.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    return AutoscalingConfigProducer(cluster, namespace)()


def failed_launches() -> list[str]:
    """Kinds of nodes that the connected cluster's autoscaler could not start lately. Ray's first one does not tell."""
    if missing(LAUNCHES):
        return []
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        failed = get_cluster_status(ray.get_runtime_context().gcs_address).failed_launches
    except Exception:  # a line more or less for the user, of an interface that may change
        return []
    return [launch.ray_node_type_name for launch in failed]


# -- Ray Train's logs -------------------------------------------------------------------------------------------------


def quiet_reports() -> None:
    """Keeps `Reporting training result` off a worker's log. `ray.train.v2._internal.execution.context` names its logger
    after its file, so LoggingConfig does not reach it."""
    if not missing(REPORTS):
        pkgutil.resolve_name(REPORTS.names[0]).setLevel(logging.WARNING)


def quiet_cleaner() -> None:
    """Keeps a line a second off the console, where there is no dashboard to ask for placement groups. The level is set
    by the logger's name, `ray.train.v2._internal.execution.controller.placement_group_cleaner`, before Ray makes it:
    LoggingConfig reaches only the workers."""
    logging.getLogger(CLEANER.names[0].partition(":")[0]).setLevel(logging.ERROR)


# What stands in the text of Ray's errors, which have no other mark; without it the last line of an error is shown.
MEMORY_MONITOR = "RAY_memory_usage_threshold"  # in the memory monitor's page of advice
RENDERERS_WRAPPER = "UserCodeException"  # Ray Data's, around the renderer's own error


# -- logs, jobs, start-up ---------------------------------------------------------------------------------------------

DATA_LOG = Path(__file__).parent / "train" / "quiet_data_log.yaml"
# Classes that it names; without one of them Ray Data could not be imported
DATA_LOG_CLASSES = {
    "data/_internal/logging.py": ("HiddenRecordFilter", "SessionFileHandler"),
    "_private/log.py": ("PlainRayHandler",),
}


def data_log() -> str | None:
    """Path of a logging config for Ray Data with its own handlers and no more than errors on the console, which its
    public logger has not before `import ray.data` and must have at it; none: Ray has changed them. Ray is not imported.
    """
    spec = importlib.util.find_spec("ray")
    for file, names in DATA_LOG_CLASSES.items():
        path = Path(spec.submodule_search_locations[0], file) if spec else Path()
        text = path.read_text() if path.is_file() else ""
        if any(f"class {name}" not in text for name in names):
            return None
    return str(DATA_LOG)


def job_runtime_env() -> dict[str, Any]:
    """The runtime_env that `ray job submit` gave to this process; empty where it runs in no job.

    Ray refuses a job whose driver sets what its runtime_env sets already, and tells it to the driver by an environment
    variable, ray._private.runtime_env.constants.RAY_JOB_CONFIG_JSON_ENV_VAR. Where Ray has renamed it, ray.init
    says what it refuses.
    """
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
