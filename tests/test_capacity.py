"""What a run may ask a cluster for: clusters as they are and as they can be, all made up."""

import itertools
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pgl_ray import config as c
from pgl_ray import ray_internals
from pgl_ray.config import FailedRun
from pgl_ray.model import device as on
from pgl_ray.train import autoscaler, capacity, checkpoint, follow, launch, nodes
from pgl_ray.train.capacity import Cluster, Kind
from pgl_ray.train.quiet import WATCH
from pgl_ray.train.writer import Writer

CLUSTER = Path(__file__).resolve().parents[1] / "conf" / "cluster"
GPU = Kind({"CPU": 8.0, "GPU": 1.0}, 8)
HEAD = Cluster({"CPU": 2.0}, (), (GPU,), 8)  # conf/cluster: a head alone, and nodes with a GPU each
FIXED = Cluster({"CPU": 4.0}, ({"CPU": 4.0}, {"CPU": 4.0}))


def train(**values) -> c.TrainConfig:
    return c.build(c.TrainConfig, values)


@pytest.fixture
def here(monkeypatch):
    """Sets the cluster that is there."""
    monkeypatch.setenv(WATCH, "1")
    monkeypatch.delenv(nodes.WAIT_S, raising=False)
    return lambda cluster: monkeypatch.setattr(nodes, "cluster", lambda: cluster)


# -- how many fit -----------------------------------------------------------------------------------------------------

NODE = st.fixed_dictionaries({"CPU": st.integers(0, 5), "GPU": st.integers(0, 3)})


def packed(nodes: list[dict], cpus: int, gpus: int, spare: int) -> int:
    """Workers that fit, one after another, on the best of all choices of the node that keeps the spare CPUs."""
    best = 0
    for keeper in range(len(nodes)):
        if nodes[keeper]["CPU"] < spare:
            continue
        num = 0
        for k, node in enumerate(nodes):
            left_cpus, left_gpus = node["CPU"] - spare * (k == keeper), node["GPU"]
            while left_cpus >= cpus and left_gpus >= gpus:
                left_cpus, left_gpus, num = left_cpus - cpus, left_gpus - gpus, num + 1
        best = max(best, num)
    return best


@pytest.mark.slow
@given(NODE, st.lists(NODE, max_size=3), st.lists(st.tuples(NODE, st.integers(0, 2)), max_size=2), st.integers(0, 4),
       st.integers(1, 2), st.integers(0, 1), st.integers(1, 2))  # fmt: skip
def test_room_is_that_of_packing_node_by_node(head, others, kinds, most, cpus, gpus, spare):
    cluster = Cluster(head, tuple(others), tuple(Kind(*kind) for kind in kinds), most)
    each = {"CPU": float(cpus), "GPU": float(gpus)}
    up = packed([head, *others], cpus, gpus, spare)
    assert cluster.room_now(each, spare) == up
    possible = [node for node, num in kinds for _ in range(num)]
    chosen = itertools.combinations(possible, min(most, len(possible)))
    largest = max(packed([head, *nodes], cpus, gpus, spare) for nodes in chosen)
    found = cluster.room(each, spare)
    assert up <= found <= max(up, largest)
    if most >= len(possible):  # else the spare CPU may be worth a node that holds fewer workers
        assert found == max(up, largest)


def test_tenths_of_a_cpu_add_up():
    assert Cluster({"CPU": 1.0}).room({"CPU": 0.1}) == 10
    assert Cluster({"CPU": 1.3}).room({"CPU": 0.1}, 1) == 3


def test_memory_is_asked_for_where_every_node_says_what_it_has():
    up = Cluster({"memory": 8e9}, ({"memory": 16e9},))
    assert (up.memory(4e9), up.memory(1e12)) == ({"memory": 4e9}, {"memory": 16e9})
    large = Kind({"CPU": 8.0, "memory": 64e9}, 2)
    assert Cluster({"memory": 8e9}, (), (large,), 2).memory(1e12) == {"memory": 64e9}
    assert Cluster({"memory": 8e9}, (), (large, GPU), 2).memory(4e9) == {}  # Ray would never start the second kind


# -- what an autoscaler can start -------------------------------------------------------------------------------------


def test_kinds_of_a_config():
    types = {
        "head": {"resources": {"CPU": 2}, "max_workers": 0},
        "small": {"resources": {"CPU": 4}, "max_workers": 3},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}},  # as many as there may be at all
        "never": {"max_workers": 0},
    }
    config = {"available_node_types": types, "head_node_type": "head", "max_workers": 5}
    kinds = (Kind({"CPU": 4}, 3), Kind({"CPU": 8, "GPU": 1}, 5))
    assert capacity.kinds_of(config) == (kinds, 5)
    types["gpu"]["resources"] = {}  # as in the file, before the cloud was asked
    assert capacity.kinds_of(config) is None
    assert capacity.kinds_of(autoscaler.UNREADABLE) is None


def test_the_shipped_kuberay_cluster_can_have_eight_gpus():
    """Through Ray's own reading of the RayCluster."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    custom = yaml.safe_load((CLUSTER / "raycluster.yaml").read_text())
    custom["metadata"]["namespace"] = "default"
    kinds, most = capacity.kinds_of(autoscaling_config._derive_autoscaling_config_from_ray_cr(custom))
    (kind,) = kinds
    assert (kind.resources["CPU"], kind.resources["GPU"], kind.most, most) == (8, 1, 8, 8)
    assert Cluster({"CPU": 2.0}, (), kinds, most).room({"CPU": 0.5, "GPU": 1.0}, 1) == 8


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_shipped_clouds_can_have_eight_gpus(name):
    """With what `ray up` finds out of the instances filled in."""
    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    for kind in config["available_node_types"].values():
        kind["resources"] = kind["resources"] or {"CPU": 8, "GPU": 1, "memory": 3e10}
    kinds, most = capacity.kinds_of(config)
    assert Cluster({"CPU": 2.0}, (), kinds, most).room({"CPU": 0.5, "GPU": 1.0}, 1) == 8


# -- what a run may ask for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "values", "use_gpu"),
    [
        (HEAD, {}, True),  # not silently on the head's CPUs
        (HEAD, {"num_workers": 8}, True),
        (HEAD, {"device": "cpu", "num_workers": 8}, False),
        (HEAD, {"min_workers": 2, "num_workers": 99}, True),
        (FIXED, {"num_workers": 3, "cpus_per_worker": 3}, False),
        (Cluster({"CPU": 2.0}, ({"CPU": 8.0, "GPU": 2.0},)), {"num_workers": 2}, True),
        (Cluster({}, (), (Kind({"CPU": 2.0}, 2),), 2), {"num_workers": 2}, False),
        (Cluster({"CPU": 2.0}, unknown=True), {"device": "cuda", "num_workers": 99}, True),
        (Cluster({"CPU": 2.0}, unknown=True), {"device": "cpu", "num_workers": 99}, False),
        (Cluster({"CPU": 2.0, "GPU": 1.0}, unknown=True), {}, True),
    ],
)
def test_what_can_be_is_accepted(here, cluster, values, use_gpu):
    here(cluster)
    assert nodes.check_resources(train(**values)) is use_gpu


MAXIMUM = r"the cluster has 2 CPUs and 0 GPUs and can have 66 CPUs and 8 GPUs \(8 nodes of 8 CPUs and 1 GPU\)"


@pytest.mark.parametrize(
    ("cluster", "values", "text"),
    [
        (HEAD, {"num_workers": 9}, rf"train.num_workers=9 need 9 GPUs, {MAXIMUM}: lower it, or take train.device=cpu"),
        (HEAD, {"min_workers": 9, "num_workers": 12}, "train.min_workers=9 need 9 GPUs"),
        (
            HEAD,
            {"num_workers": 8, "cpus_per_worker": 8.5},
            r"= 69 CPUs, .*lower one of them or raise the maximum of the",
        ),
        (HEAD, {"cpus_per_worker": 9}, "node by node there is room for 0 workers, the cluster has 2 CPUs and 0 GPUs"),
        (
            FIXED,
            {"num_workers": 1, "cpus_per_worker": 6},
            "node by node there is room for 0 .*one of them or add nodes",
        ),
        (FIXED, {"num_workers": 2, "device": "cuda"}, "need 2 GPUs, the cluster has 12 CPUs and 0 GPUs: lower it"),
        (
            Cluster({"CPU": 2.0}, unknown=True),
            {},
            "its autoscaler's maximum cannot be read: say where to train",
        ),
        (
            Cluster({}, (), (GPU, Kind({"CPU": 4.0}, 3)), 4),
            {"num_workers": 5},
            r"can have 32 CPUs and 4 GPUs \(8 nodes of 8 CPUs and 1 GPU or 3 nodes of 4 CPUs and 0 GPUs, 4 in all\)",
        ),
    ],
)
def test_what_can_never_be_is_refused_in_a_line(here, cluster, values, text):
    here(cluster)
    with pytest.raises(ValueError, match=text) as error:
        nodes.check_resources(train(**values))
    assert "\n" not in str(error.value)


# -- waiting for nodes ------------------------------------------------------------------------------------------------


class Group:
    """A placement group that is there after some looks."""

    def __init__(self, looks: int):
        self.looks, self.asked, self.removed = looks, None, False

    def wait(self, seconds: float) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.fixture
def group(monkeypatch):
    """What a cluster is asked for, and how many looks it takes."""
    import ray

    group = Group(2)

    def ask(bundles, strategy):
        group.asked = bundles
        return group

    monkeypatch.setattr(ray.util, "placement_group", ask)
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: setattr(group, "removed", True))
    monkeypatch.setattr(autoscaler, "failures", lambda: {"gpu": "VcpuLimitExceeded"})
    return group


def test_nodes_are_asked_for_and_waited_for(here, group, capsys):
    here(HEAD)
    assert nodes.await_nodes(train(num_workers=2), None)
    assert group.asked == [{"CPU": 0.5, "GPU": 1.0}] * 2 + [{"CPU": 1}] and group.removed
    waits, failed, there = capsys.readouterr().out.splitlines()
    assert waits == (
        "  waiting for nodes, at most 30:00: there is room for 0 of train.num_workers=2 workers of 0.5 CPU and 1 GPU "
        "each; the cluster has 2 CPUs and 0 GPUs and can have 66 CPUs and 8 GPUs (8 nodes of 8 CPUs and 1 GPU)"
    )
    assert failed == "  nodes that could not be started: gpu: VcpuLimitExceeded" and there.startswith("  nodes are the")


def test_nodes_that_do_not_come_end_the_run(here, group, monkeypatch, capsys):
    here(HEAD)
    monkeypatch.setenv(nodes.WAIT_S, "0")
    with pytest.raises(FailedRun, match=r"after 0:00 there is room for 0 .*; gpu: VcpuLimitExceeded"):
        nodes.await_nodes(train(), None)
    assert group.removed


def test_what_is_there_is_not_waited_for(here, group, capsys, monkeypatch):
    here(FIXED)
    group.looks = 0
    nodes.await_nodes(train(), None)
    assert group.removed and capsys.readouterr().out == ""
    here(Cluster({"CPU": 2.0}, ({"CPU": 8.0, "GPU": 1.0},), (GPU,), 8))
    group.looks = 0
    nodes.await_nodes(train(), None)
    assert group.removed and capsys.readouterr().out == ""
    here(FIXED)
    monkeypatch.setenv(WATCH, "0")  # this process's own
    group.asked = None
    nodes.await_nodes(train(), None)
    assert group.asked is None


def test_fixed_nodes_that_others_use_are_waited_for(here, group, monkeypatch, capsys):
    """As those of a cluster that grows: it is said, and it ends."""
    here(FIXED)
    nodes.await_nodes(train(), None)
    assert group.asked == [{"CPU": 0.5}]  # no whole CPU besides, which the others' views may never leave
    assert "waiting at most 30:00 for nodes, or for other work" in capsys.readouterr().out
    monkeypatch.setenv(nodes.WAIT_S, "0")
    group.looks = 9
    with pytest.raises(FailedRun, match="after 0:00"):
        nodes.await_nodes(train(), None)


def test_nodes_that_others_use_are_waited_for(here, group, capsys):
    here(Cluster({"CPU": 2.0}, ({"CPU": 8.0, "GPU": 1.0},), (GPU,), 8))
    nodes.await_nodes(train(), None)
    assert capsys.readouterr().out.startswith(
        "  waiting at most 30:00 for nodes, or for other work: there is room for 1 "
    )


def test_fixed_nodes_that_are_lost_are_named(here, group, capsys):
    """A node more may be joined by hand."""
    here(Cluster({"CPU": 1.5}))
    assert nodes.missing(train(num_workers=2), False).endswith("0.5 CPU each; the cluster has 1.5 CPUs and 0 GPUs")


# -- elastic runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elastic", [{"min_workers": 2, "max_workers": 8}, {"num_workers": 8}])
def test_a_start_that_fails_at_each_loss_ends_no_run(tmp_path, elastic):
    """Ray asks for the workers of before, in vain, and does so at every loss; losses alone end a run."""
    from ray.train import v2
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

    config = launch.run_config(str(tmp_path / "r"), train(max_failures=20, **elastic))
    policy, errors = DefaultFailurePolicy(config.failure_config), v2.api.exceptions
    lost = errors.WorkerGroupError("a node is lost", {0: RuntimeError("gloo")})
    stale = errors.ControllerError(WorkerGroupStartupTimeoutError(num_workers=8))
    decided = [policy.make_decision(error).name for _ in range(20) for error in (lost, stale)]
    assert decided == ["RETRY"] * 40 and policy.make_decision(lost).name == "RAISE"


@pytest.fixture
def controller(monkeypatch, tmp_path):
    """Ray Train's own, of an elastic run that has lost its workers; called with the nodes that Ray sees, it goes on
    until the run ends, and gives the run's last words and the starts that it has tried."""
    import asyncio

    import ray
    import ray.train.v2.api.data_parallel_trainer as trainer
    from ray.train import v2
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.callback_manager import CallbackManager
    from ray.train.v2._internal.execution.controller import controller, state
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 99})
    monkeypatch.setattr(ray_internals, "WAIT_S", 0.01)
    wished, starts = train(min_workers=2, max_workers=8, max_failures=0), []
    errors = v2.api.exceptions

    def start(num_workers, resources_per_worker):
        starts.append(num_workers)
        time.sleep(0.01)
        raise WorkerGroupStartupTimeoutError(num_workers=num_workers)

    def ends(reserved: dict) -> tuple[str, list[int]]:
        end = partial(nodes.check_wait, wished, True, 0.2)
        with ray_internals.whole_parts(8, nodes.FEED_CPUS, end):
            policy = trainer.create_scaling_policy(launch.scaling(wished, True))
        policy._maybe_send_resource_request, policy._get_reserved_resources = lambda: None, lambda: reserved
        run = controller.TrainController.__new__(controller.TrainController)
        run._state = state.RestartingState(training_failed_error=errors.WorkerGroupError("x", {}))
        run._scaling_policy, run._controller_callback_manager = policy, CallbackManager([])
        run._failure_policy = DefaultFailurePolicy(launch.run_config(str(tmp_path / "r"), wished).failure_config)
        run._worker_group, run._manages_replica_groups, run._start_worker_group = None, False, start
        for _ in range(1000):
            asyncio.run(run._run_control_loop_iteration())
            if isinstance(run._state, state.ShuttingDownState):
                return launch.first_cause(run._state.next_state.training_failed_error), starts
        raise AssertionError("it goes on")

    return ends


def test_an_elastic_run_below_its_least_size_ends(here, controller):
    """After the wait that it has said, in which Ray asks now and then."""
    here(Cluster({"CPU": 2.0}, ({"CPU": 8.0, "GPU": 1.0},)))
    told, starts = controller({"node": {"CPU": 8.0, "GPU": 1.0}})
    assert told.startswith("after 0:00 there is room for 1 of train.min_workers=2 workers of") and not starts
    assert told.endswith(": add nodes, or lower train.min_workers, and type the command again: it continues")


def test_an_elastic_run_that_cannot_start_ends(here, controller, monkeypatch):
    """Ray sees room, for it knows nothing of other work there; its own limit of failed starts is none."""
    monkeypatch.setattr(nodes, "START_S", 0.1)
    here(Cluster({"CPU": 2.0}, ({"CPU": 8.0, "GPU": 4.0},)))
    told, starts = controller({"node": {"CPU": 8.0, "GPU": 4.0}})
    assert told.startswith("after 0:00 no workers have started, though Ray sees room") and "pgl_ray.doctor" in told
    assert len(starts) > 4 and set(starts) == {4}


@pytest.mark.parametrize(
    ("cluster", "most"),
    [
        (FIXED, 8),  # others may be joined by hand
        (Cluster({"CPU": 2.0}, unknown=True), 8),
        (Cluster({"CPU": 2.0}, (), (GPU._replace(most=3),), 8), 3),
        (HEAD, 8),
    ],
)
def test_elastic_runs_are_bounded_by_what_can_be(here, capsys, cluster, most):
    here(cluster)
    use_gpu = cluster is not FIXED
    scaling = launch.scaling(train(min_workers=2, max_workers=8, cpus_per_worker=3), use_gpu)
    said = capsys.readouterr().out
    assert scaling.num_workers == (2, most) and said.startswith("note: there can be room for 3 of") == (most == 3)


def test_a_cluster_of_ones_own_can_have_more_cpus_by_name(here, monkeypatch):
    here(Cluster({"CPU": 4.0}))
    monkeypatch.setenv(WATCH, "0")
    with pytest.raises(
        ValueError, match=r"the cluster has 4 CPUs and 0 GPUs: lower one of them or raise ray\.num_cpus"
    ):
        nodes.check_resources(train(num_workers=9))


def test_on_a_cluster_of_ones_own_nothing_is_missing(here, monkeypatch):
    here(HEAD)
    monkeypatch.setenv(WATCH, "0")
    assert nodes.missing(train(), True) is None


def test_lost_nodes_are_said_once_for_each_time(tmp_path, capsys):
    told, looked = iter([None, "  waiting", "  waiting", None, "  waiting"]), threading.Event()

    def missing() -> str | None:
        text = next(told, "end")
        if text == "end":
            looked.set()
            return None
        return text

    with follow.Progress(str(tmp_path), 10, missing, every_s=0.001):
        assert looked.wait(20)
    assert capsys.readouterr().out.splitlines() == ["  waiting", "  waiting"]


def test_prepare_converts_on_the_cpus_that_there_can_be(here, monkeypatch):
    """Not on those of the head, which has none."""
    import ray.data

    from pgl_ray.convert import parallel

    asked = {}

    class Rows:
        def map(self, work, **options):
            asked.update(options)
            return self

        def iter_rows(self):
            return iter(())

    def size(cluster: Cluster, num_items: int = 100) -> int:
        here(cluster)
        assert list(parallel.in_parallel(None, [()] * num_items, c.RayConfig(address="auto"), lambda: int(4e9))) == []
        return asked["compute"].size

    monkeypatch.setattr(launch, "connect", lambda config: None)
    monkeypatch.setattr(nodes, "ask_for", lambda each, num: None)
    monkeypatch.setattr(ray.data, "from_items", lambda rows, override_num_blocks: Rows())
    large = (Kind({"CPU": 8.0, "memory": 16e9}, 5),)
    assert size(Cluster({"memory": 8e9}, (), large, 5)) == 20 and asked["memory"] == 4e9  # four at a time on each
    assert size(Cluster({"memory": 8e9}, (), (GPU,), 8)) == 64 and asked["memory"] is None
    assert size(Cluster({"memory": 8e9}, (), (GPU,), 8), 7) == 7
    assert size(Cluster({"CPU": 2.0, "memory": 8e9}, unknown=True)) == 100


def test_tasks_ask_for_the_nodes_of_all_that_there_can_be(here, monkeypatch):
    """Where some are missing; one that begins late is over at once."""
    import ray

    asked, slept = [], []

    class Task:
        def __init__(self, function):
            self.function = function

        def options(self, **options):
            asked.append(options)
            return self

        def remote(self, until):
            self.function(until)

    monkeypatch.setattr(ray, "remote", Task)
    monkeypatch.setattr(nodes.time, "sleep", slept.append)
    here(HEAD)
    nodes.ask_for({"CPU": 1.0}, 2)
    assert not asked  # the head has them
    nodes.ask_for({"CPU": 1.0, "memory": 4e9}, 64)
    assert asked == [{"num_cpus": 1.0, "memory": 4e9, "max_retries": 0}] and len(slept) == 64
    assert all(11 < seconds <= 12 for seconds in slept)
    monkeypatch.setattr(nodes, "ASKED_S", -5.0)
    nodes.ask_for({"CPU": 1.0}, 3)
    assert slept[64:] == [0.0] * 3
    here(FIXED)
    nodes.ask_for({"CPU": 1.0}, 99)
    assert len(slept) == 67


# -- what is wrong with a node ---------------------------------------------------------------------------------------


def test_a_node_without_a_package_is_named():
    error = "ModuleNotFoundError: No module named 'torch'"
    told = launch.first_cause(RuntimeError(f"ray::execute() (pid=7, ip=10.0.0.3, actor_id=ab)\n  File x\n{error}"))
    mend = "node 10.0.0.3 lacks that package: have the same ones on every node"
    assert told == f"worker 0 failed: {error}: {mend}"
    assert "a node lacks" in launch.first_cause(RuntimeError("ModuleNotFoundError: No module named 'zarr'"))


def test_another_version_of_ray_is_refused_in_a_line(monkeypatch):
    import ray

    def init(**options):
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\nThis process was")

    monkeypatch.setattr(launch.os, "environ", dict(launch.os.environ))
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(FailedRun) as error:
        launch.connect(c.RayConfig(address="10.0.0.1:6379"))
    assert str(error.value) == (
        "no Ray cluster at ray.address=10.0.0.1:6379: Version mismatch: The cluster was started with: Ray: 2.59.0 This "
        "process was"
    )


# -- where a run goes on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        ([], ["cpu"], None),
        (["cpu"], ["cpu"], None),
        (["A100"], ["cpu"], "was trained on A100, and would go on on cpu: train.device=cpu says that it may"),
        (["A100"], ["A100", "L4"], "would go on on A100 and L4: train.device=cuda says"),
        (["A100", "L4"], ["L4"], None),
        (["cpu"], ["A100"], "train.device=cuda says"),
    ],
)
def test_going_on_elsewhere_is_refused(before, now, text):
    found = capacity.other_devices(before, now, 7)
    assert found is None if text is None else text in found and "step 7" in found


def begun(run: Path, devices: list[str] | None) -> tuple[Path, int]:
    """A run that has a checkpoint."""
    run.mkdir()
    writer = Writer(str(run), 2, facts=None if devices is None else {"devices": devices})
    writer.save({"step": 5}, 5, {})
    writer.close()
    return checkpoint.committed(run)


@pytest.mark.slow
def test_the_driver_refuses_cpus_after_gpus(here, tmp_path):
    here(FIXED)
    found = begun(tmp_path / "run", ["NVIDIA H200"])
    with pytest.raises(
        ValueError, match=r"step 5 was trained on NVIDIA H200, and would go on on cpu: train.device=cpu"
    ):
        nodes.await_nodes(train(), found)
    assert nodes.await_nodes(train(device="cpu"), found) is False
    assert nodes.await_nodes(train(), begun(tmp_path / "old", None)) is False  # it is not known


def test_a_worker_refuses_another_gpu(tmp_path, monkeypatch):
    from pgl_ray.train.session import Place, Session

    begun(tmp_path / "run", ["NVIDIA L4"])
    plan = SimpleNamespace(num_steps=10, global_batch_size=4)
    monkeypatch.setattr(on, "kind", lambda device: "NVIDIA T4")

    def session(**values) -> Session:
        place = Place(0, 1, torch.device("cpu"), None, None)
        return Session(str(tmp_path / "run"), plan, train(**values), place)

    assert "would go on on NVIDIA T4: train.device=cuda says" in session().reason
    assert session(device="cuda").reason is None and session(device="cuda").devices == ["NVIDIA T4"]
    plan.num_steps = 5  # it is done
    assert session().reason is None
