"""What the package takes from inside Ray is there, as it was; and without it a run goes on with Ray's own ways."""

import inspect
import math
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from pgl_ray import config, ray_internals
from pgl_ray.checkup import doctor_facts
from pgl_ray.data import stream
from pgl_ray.train import autoscaler, launch, quiet

ray = pytest.importorskip("ray")
HOME = Path(ray.__file__).parent
NAMES = [name for use in ray_internals.USES for name in use.names]


def there(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def breaks(monkeypatch, name: str) -> None:
    """Takes a name away from Ray, as a new version may."""
    module, _, attribute = name.partition(":")
    owner, _, last = attribute.rpartition(".")
    place = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
    for one in [one for one in getattr(place, "__mro__", [place]) if last in vars(one)]:
        monkeypatch.delattr(one, last)


# -- "Ray changed X" ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ray_has_the_name(name):
    assert there(name), f"Ray changed {name}: see its use in pgl_ray/ray_internals.py"


def test_ray_names_operators_after_their_callables():
    from ray.data._internal.logical.operators import map_operator

    name = map_operator.MapBatches._get_operator_name(None, "MapBatches", stream.LayOut(None))
    assert name == "MapBatches(LayOut)", "Ray changed the names of its operators"


def test_ray_asks_policies_as_ours_answers():
    from ray.data._internal.execution import backpressure_policy as policies
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

    made = inspect.signature(policies.BackpressurePolicy.__init__).parameters
    assert list(made)[1:3] == ["data_context", "topology"], "Ray changed how it makes a backpressure policy"
    for method in ("can_add_input", "max_task_output_bytes_to_read"):
        asked = inspect.signature(getattr(policies.BackpressurePolicy, method)).parameters
        assert list(asked) == ["self", "op"], f"Ray changed how it asks a policy {method}"
    called = inspect.getsource(ElasticScalingPolicy)
    assert "self._count_possible_workers(" in called, "Ray changed how it counts workers"
    trainer = inspect.getsource(pkgutil.resolve_name("ray.train.v2.api.data_parallel_trainer"))
    assert "create_scaling_policy(self.scaling_config)" in trainer, "Ray changed how it makes a scaling policy"


def test_ray_logs_by_the_classes_of_our_config():
    path = ray_internals.data_log()
    assert path, "Ray changed the classes of its logging: pgl_ray/train/quiet_data_log.yaml"
    told = yaml.safe_load(Path(path).read_text())
    parts = [*told["handlers"].values(), *told["filters"].values()]
    for name in (part.get("class") or part["()"] for part in parts):
        assert there(":".join(name.rsplit(".", 1))), f"Ray changed {name}"
    assert {name.rsplit(".", 1)[1] for part in parts for name in [part.get("class") or part["()"]]} == {
        name for names in ray_internals.DATA_LOG_CLASSES.values() for name in names
    }


def test_ray_still_has_the_texts():
    from ray._private import ray_constants
    from ray._private.runtime_env import constants, working_dir

    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == "RAY_JOB_CONFIG_JSON_ENV_VAR", "Ray changed a job's variable"
    assert there(f"ray.data.exceptions:{ray_internals.RENDERERS_WRAPPER}"), "Ray changed UserCodeException"
    assert in_ray(ray_internals.MEMORY_MONITOR), "Ray changed the advice of its memory monitor"
    folder = f"/{ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME}/working_dir_files/"
    assert folder == config.JOB_FOLDER and '"working_dir_files"' in inspect.getsource(working_dir), (
        "Ray changed where it unpacks a job's working directory"
    )


def test_ray_still_reads_where_its_files_go(monkeypatch):
    """So that a config has no key for it."""
    from ray._common import utils

    monkeypatch.setenv("RAY_TMPDIR", "/somewhere")
    assert utils.get_default_ray_temp_dir() == doctor_facts.rays_folder() == "/somewhere/ray", "Ray changed it"
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert utils.get_default_ray_temp_dir() == doctor_facts.rays_folder() == "/elsewhere/ray", "Ray changed it"


def test_ray_starts_its_autoscaler_as_we_look_for_it():
    from dataclasses import fields

    from ray._private import services
    from ray.autoscaler.v2 import schema

    text = inspect.getsource(services.start_monitor)
    options = ray_internals.MONITOR_CONFIG, ray_internals.MONITOR_LOGS, ray_internals.MONITOR_GCS
    for word in (ray_internals.MONITOR, *options):
        assert word in text, f"Ray changed its autoscaler's command: {word}"
    assert in_ray(ray_internals.HEAD), "Ray changed the resource that only a head has"
    assert "failed_launches" in {field.name for field in fields(schema.ClusterStatus)}, "Ray changed its status"
    assert "ray_node_type_name" in {field.name for field in fields(schema.LaunchRequest)}, "Ray changed its status"
    assert in_ray("Failed to launch {} nodes of type {}: {}"), "Ray changed its autoscaler's log"


def in_ray(text: str) -> bool:
    """Whether a text occurs in Ray's code, compiled or not."""
    if text.encode() in (HOME / "_raylet.so").read_bytes():
        return True
    return any(text in path.read_text(errors="ignore") for path in HOME.rglob("*.py"))


RAYS = [name for name in {**quiet.QUIET, **launch.WATCHED} if name.startswith("RAY_")]


@pytest.mark.parametrize("name", [*RAYS, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "RAY_DATA_LOGGING_CONFIG"])
def test_ray_reads_the_variable(name):
    assert in_ray(name), f"Ray changed {name}"


# -- what ours do ------------------------------------------------------------------------------------------------------


class Operator:
    """As much of an operator of Ray Data as a policy asks for."""

    def __init__(self, name: str, active: int = 0, size: int | None = None, after: tuple = ()):
        self.name, self.active, self.output_dependencies = name, active, list(after)
        self.metrics = SimpleNamespace(average_bytes_per_output=size)

    def num_active_tasks(self) -> int:
        return self.active


def state(waiting: int = 0, ready: int = 0) -> SimpleNamespace:
    blocks = {"total_enqueued_input_blocks": lambda: waiting, "total_enqueued_output_blocks": lambda: ready}
    return SimpleNamespace(**blocks)


@pytest.mark.parametrize(
    ("now", "may_lay_out", "may_render"),
    [
        ({}, True, True),
        ({"rows": 8}, False, True),
        ({"active": 3}, True, True),
        ({"active": 4}, True, False),
        ({"active": 1, "waiting": 2, "ready": 1}, True, False),
        ({"active": 4, "size": 200}, True, True),  # five fit in the room
        ({"active": 5, "size": 200}, True, False),
        ({"active": 7, "size": 1}, True, True),
        ({"active": 8, "size": 1}, True, False),  # never more than that
    ],
)
def test_blocks_are_bounded_by_their_number(now, may_lay_out, may_render):
    import ray.data

    now = {"rows": 0, "active": 0, "waiting": 0, "ready": 0, "size": None} | now
    split = Operator("split")
    render = Operator("MapBatches(PairRenderer)", now["active"], now["size"], (split,))
    lay_out = Operator("MapBatches(LayOut)->StreamingRepartition", after=(render,))
    states = {lay_out: state(), render: state(now["rows"], now["ready"]), split: state(now["waiting"])}
    context = ray.data.DataContext()
    assert ray_internals.bound_blocks(context, stream.LayOut, 8, least=4, room=1000.0)
    assert context.override_object_store_memory_limit_fraction == 1e6
    *theirs, ours = context.get_config("backpressure_policies.enabled")
    policy = ours(context, states, None)
    assert len(theirs) == 3 and policy.can_add_input(split)
    assert (policy.can_add_input(lay_out), policy.can_add_input(render)) == (may_lay_out, may_render)
    assert policy.max_task_output_bytes_to_read(render) is None


def no_end(waited_s: float, has_room: bool) -> None:
    """The wait for workers is never over."""


@pytest.mark.parametrize(("cpus", "batch", "workers"), [(9, 12, 4), (4, 8, 2), (4, 12, 3), (4, 7, 1), (1, 8, 0)])
def test_elastic_runs_take_divisors_of_the_batch(monkeypatch, cpus, batch, workers):
    import ray.train
    import ray.train.v2.api.data_parallel_trainer as trainer

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    theirs, scaling = trainer.create_scaling_policy, ray.train.ScalingConfig
    each = {"resources_per_worker": {"CPU": 1.0}}
    with ray_internals.whole_parts(batch, 1, no_end):
        policy = trainer.create_scaling_policy(scaling(num_workers=(1, 4), **each))
        assert policy._count_possible_workers({"node": {"CPU": 8.0}}) == workers
        fixed = trainer.create_scaling_policy(scaling(num_workers=3, **each))
        assert type(fixed).__name__ == "FixedScalingPolicy"
    assert trainer.create_scaling_policy is theirs


def test_the_wait_begins_when_there_are_no_workers(monkeypatch):
    """And anew when there have been some; whether there is room is told, too."""
    import ray.train
    import ray.train.v2.api.data_parallel_trainer as trainer

    told, clock = [], iter(range(100, 200))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 9})
    monkeypatch.setattr(ray_internals, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=told.append))
    with ray_internals.whole_parts(4, 1, lambda *words: told.append(words)):
        scaling = ray.train.ScalingConfig(num_workers=(2, 4), resources_per_worker={"CPU": 1.0})
        policy = trainer.create_scaling_policy(scaling)
    policy._maybe_send_resource_request = lambda: None
    for cpus in (1.0, 1.0, 2.0, None, 1.0):
        if cpus is None:  # looked at by Ray a while after they have started
            policy.make_decision_for_running_worker_group(SimpleNamespace(start_time=math.inf), None)
            continue
        policy._get_reserved_resources = lambda cpus=cpus: {"node": {"CPU": cpus}}
        policy.make_decision_for_non_running_worker_group()
    pause = ray_internals.WAIT_S
    assert told == [(1, False), pause, (2, False), pause, (3, True), (1, False), pause]


# -- clusters that grow -----------------------------------------------------------------------------------------------

FILE = {"available_node_types": {"gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3}}, "max_workers": 3}


def process(*words: str) -> SimpleNamespace:
    return SimpleNamespace(cmdline=lambda: ["python", *words])


@pytest.fixture
def head(monkeypatch, tmp_path):
    """What a task on the head says where these processes run there."""
    import psutil

    monkeypatch.delenv(ray_internals.KUBERAY_CLUSTER, raising=False)
    (tmp_path / "up.yaml").write_text(yaml.safe_dump(FILE))

    def says(*processes) -> dict | None:
        monkeypatch.setattr(psutil, "process_iter", lambda: iter(processes))
        return autoscaler.head_config("10.0.0.1:6379")

    return says


def test_the_autoscalers_file_is_read_on_the_head(head, tmp_path):
    monitor, file = "/ray/autoscaler/v2/monitor.py", f"--autoscaling-config={tmp_path}/up.yaml"
    ours, others = "--gcs-address=10.0.0.1:6379", "--gcs-address=10.0.0.1:6380"
    logs = process("/ray/_private/log_monitor.py", ours)
    assert head(logs, process(monitor, ours, file)) == FILE
    assert head(logs, process(monitor, others, file), process(monitor, ours)) is None  # a cluster of fixed nodes
    assert head(logs) is None


def test_why_nodes_did_not_come_is_read_in_the_log(head, tmp_path):
    why = "VcpuLimitExceeded: you have more than 0"
    lines = [
        "Failed to launch 2 nodes of type small: old",
        f"x INFO y -- Failed to launch 1 nodes of type small: {why}",
    ]
    (tmp_path / "monitor.log").write_text("\n".join([*lines, "Failed to launch 1 nodes of type gpu: no spot", ""]))
    head(process("/ray/autoscaler/v2/monitor.py", "--gcs-address=10.0.0.1:6379", f"--logs-dir={tmp_path}"))
    assert autoscaler.head_failures("10.0.0.1:6379") == {"small": why, "gpu": "no spot"}


def test_under_kuberay_kubernetes_is_asked(head, monkeypatch, tmp_path):
    """Where the autoscaler runs beside the head, and not in its container."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    asked = []

    class Producer:
        def __init__(self, cluster, namespace):
            asked.append((cluster, namespace))

        def __call__(self):
            return FILE

    monkeypatch.setenv(ray_internals.KUBERAY_CLUSTER, "pgl-ray")
    (tmp_path / "namespace").write_text("lab")
    assert head() == autoscaler.UNREADABLE  # no file of Kubernetes'
    monkeypatch.setattr(autoscaler, "NAMESPACE", tmp_path / "namespace")
    monkeypatch.setattr(autoscaling_config, "AutoscalingConfigProducer", Producer)
    assert head() == FILE and asked == [("pgl-ray", "lab")]
    assert head(process("/ray/autoscaler/v2/monitor.py", "--gcs-address=10.0.0.1:6379")) is None
    monkeypatch.setattr(Producer, "__call__", lambda self: 1 / 0)
    assert head() == autoscaler.UNREADABLE


def test_a_published_maximum_comes_first(monkeypatch):
    from ray._private.state import state
    from ray.core.generated import autoscaler_pb2

    from pgl_ray.train import capacity

    published = autoscaler_pb2.ClusterConfig()
    published.node_group_configs.add(name="gpu", max_count=4, resources={"CPU": 8, "GPU": 2})
    monkeypatch.setattr(state, "get_cluster_config", lambda: published)
    assert capacity.kinds_of(autoscaler.config()) == ((capacity.Kind({"CPU": 8, "GPU": 2}, 4),), 4)
    published.node_group_configs[0].max_count = -1  # any number
    assert capacity.kinds_of(autoscaler.config())[1] > 10**9


@pytest.mark.parametrize("name", [*ray_internals.GROWTH.names, *ray_internals.LAUNCHES.names])
def test_without_a_name_nodes_that_are_up_are_all(monkeypatch, name):
    breaks(monkeypatch, name)
    if name in ray_internals.GROWTH.names:
        assert autoscaler.config() is None
    else:
        assert autoscaler.failures() == {}


# -- what happens without --------------------------------------------------------------------------------------------


def test_nothing_is_said_of_this_ray():
    assert ray_internals.changed() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_name_is_said_with_what_happens(monkeypatch, name):
    breaks(monkeypatch, name)
    [note] = ray_internals.changed()
    (use,) = [use for use in ray_internals.USES if name in use.names]
    assert note == f"Ray {ray.__version__} has no {name}: {use.instead}"


@pytest.mark.parametrize("name", ray_internals.BLOCKS.names)
def test_without_a_name_ray_bounds_the_stream_itself(monkeypatch, name):
    import ray.data

    context = ray.data.DataContext()
    before = dict(vars(context)) | {"configs": dict(context._kv_configs)}
    breaks(monkeypatch, name)
    assert not ray_internals.bound_blocks(context, stream.LayOut, 8, 4, 1000.0)
    assert vars(context) == {key: value for key, value in before.items() if key != "configs"}
    assert context._kv_configs == before["configs"]


def test_without_the_operators_names_ray_bounds_the_stream(monkeypatch):
    import ray.data
    from ray.data._internal.logical.operators import map_operator

    monkeypatch.setattr(map_operator.MapBatches, "_get_operator_name", lambda self, op_name, fn: op_name)
    assert not ray_internals.bound_blocks(ray.data.DataContext(), stream.LayOut, 8, 4, 1000.0)
    assert "operators named MapBatches(...)" in ray_internals.changed()[0]


@pytest.mark.parametrize("name", ray_internals.WORKERS.names)
def test_without_a_name_ray_counts_workers_itself(monkeypatch, name):
    import ray.train.v2.api.data_parallel_trainer as trainer

    theirs = trainer.create_scaling_policy
    breaks(monkeypatch, name)
    with ray_internals.whole_parts(8, 1, no_end):
        assert getattr(trainer, "create_scaling_policy", theirs) is theirs


def test_without_a_logger_nothing_is_silenced(monkeypatch):
    breaks(monkeypatch, ray_internals.REPORTS.names[0])
    ray_internals.quiet_reports()


@pytest.mark.parametrize("file", ray_internals.DATA_LOG_CLASSES)
def test_without_a_class_ray_data_logs_as_it_likes(monkeypatch, file):
    monkeypatch.delenv("RAY_DATA_LOGGING_CONFIG", raising=False)
    monkeypatch.setitem(ray_internals.DATA_LOG_CLASSES, file, ("NoSuchHandler",))
    quiet.quiet_data()
    assert "RAY_DATA_LOGGING_CONFIG" not in quiet.os.environ


def test_an_unknown_error_is_shown_by_its_last_line(monkeypatch):
    text = "Advice\nValueError: from the renderer\nray.data.exceptions.UserCodeException(ValueError): wrapped"
    assert launch.first_cause(RuntimeError(text)).endswith("ValueError: from the renderer")
    monkeypatch.setattr(ray_internals, "RENDERERS_WRAPPER", "another word")
    assert launch.first_cause(RuntimeError(text)).endswith("wrapped")


@pytest.mark.cluster
def test_the_head_answers_a_trial_in_a_placement_group(ray_cluster):
    """A trial's group holds what it trains on, and the head is elsewhere: what asks the head leaves the group."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.placement_group([{"CPU": 0.01}])
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    try:
        trial = ray.remote(autoscaler.config).options(num_cpus=0.01, scheduling_strategy=inside)
        assert ray.get(trial.remote()) is None  # the cluster does not grow, says its head
    finally:
        ray.util.remove_placement_group(group)


@pytest.mark.cluster
def test_a_stream_under_rays_own_bounds_is_the_same(ray_cluster, monkeypatch):
    from ray.data._internal.logical.operators import map_operator

    monkeypatch.setattr(map_operator.MapBatches, "_get_operator_name", lambda self, op_name, fn: op_name)
    plan = stream.Plan(tuple(f"s{i}" for i in range(9)), 1, 4, 6, 0)
    told = stream.dataset(plan, lambda rows: rows, 2, 2, 0.5).take_all()
    want = plan.columns(2, 6)
    for name in want:
        np.testing.assert_array_equal([row[name] for row in told], want[name])
