"""python -m pgl_ray.doctor [ray.address=auto] [index=STORE] [run=FOLDER]: what usually goes wrong, before it does.

On every node of a cluster, or on this machine alone: a line for each check, ok or with the mend. Nothing is changed; a
small file is written to the run's folder and removed.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("doctor")

import os
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pgl_ray.checkup import doctor_checks as checks
from pgl_ray.checkup import doctor_storage as storage
from pgl_ray.checkup.doctor_checks import Line
from pgl_ray.checkup.doctor_facts import Gpu, Looker, Machine, machine, rays_folder
from pgl_ray.checkup.doctor_places import Sight, leave_mark, look_at_run, look_at_store, remove_mark, taken_by
from pgl_ray.config import DoctorConfig, FailedRun, RayConfig
from pgl_ray.paths import is_url

HERE = "this machine"
CONNECT_S, ANSWER_S, LOOK_S = 5.0, 35.0, 15.0  # waits for the cluster's port, for facts, for storage
NUM_SCANS = 64  # of a store that are read, if there is time
NUM_TIMES = 5  # that a clock is asked
RAYS_SHARE = 0.3  # of the memory that Ray takes for its object store
WIDTH = 110
COLORS = {"ok": "32", "note": "33", "wrong": "31"}


class Result(NamedTuple):
    """What the checks say.

    Attributes:
        lines: the verdicts.
        num_machines: that were asked, this one included.
        seconds: wall time.
    """

    lines: list[Line]
    num_machines: int
    seconds: float


def run(config: DoctorConfig) -> Result:
    """Looks at all there is, and prints a line for each check; what is wrong is in the result."""
    began = time.monotonic()
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    lines, nodes = _joined(config.ray, address) if address else (storage.socket_path(rays_folder()), [])
    others = f"{len(nodes)} node{'s' * (len(nodes) != 1)} of the cluster at {address} and " if nodes else ""
    hint = "" if address else " alone (a cluster's nodes: ray.address=auto)"
    print(f"doctor: {others}{HERE}{hint}", flush=True)

    lookers = _Lookers(nodes)
    this_machine = _in_time(lambda: _here(config.ray, bool(nodes)), ANSWER_S, lambda why: Machine(HERE, why))
    machines = [this_machine, *lookers.machines()]
    lines += _of_machines(machines, config)
    lines += _of_places(config, machines, lookers)
    _show(lines)
    return Result(lines, len(machines), time.monotonic() - began)


# -- asking -----------------------------------------------------------------------------------------------------------


def _joined(config: RayConfig, address: str) -> tuple[list[Line], list[dict[str, Any]]]:
    """Joins the cluster; a line on it, and its nodes that are alive."""
    mend = "start it (ray start --head), or give the address that its head printed; see conf/cluster/README.md"
    if fault := _unreachable(address):
        return [Line("cluster", "wrong", f"ray.address={address}: {fault}", mend)], []
    try:
        from pgl_ray.train import launch  # takes torch along

        launch.connect(config)
    except (FailedRun, ImportError) as error:
        return [Line("cluster", "wrong", " ".join(str(error).split()), mend)], []
    import ray

    known = ray.nodes()
    alive, lost = [node for node in known if node["Alive"]], [node for node in known if not node["Alive"]]
    have = ray.cluster_resources()
    text = f"{len(alive)} nodes, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
    lines = [Line("cluster", "ok", text)]
    if lost:
        names = checks.listed([node["NodeManagerAddress"] for node in lost])
        lines.append(Line("cluster", "note", f"{len(lost)} lost since its start: {names}", "ray status; restart them"))
    return lines, alive


def _unreachable(address: str) -> str:
    """Why nothing answers at host:port; "": something does, or the address is no such one."""
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        return "its port is no number"
    if not port or not host:
        return ""
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s: is the port open to this machine?"
    except OSError as error:
        return f"{error.strerror or error}"
    return ""


def _in_time(look: Callable[[], Any], seconds: float, otherwise: Callable[[str], Any]) -> Any:
    """What a look gives, or what `otherwise` makes of why it gives nothing: a dead network disk never answers."""
    results = []

    def tried() -> None:
        try:
            results.append(look())
        except Exception as error:  # whatever a check runs into is a finding
            results.append(otherwise(" ".join(str(error).split()) or type(error).__name__))

    thread = threading.Thread(target=tried, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise(_silent(seconds))


def _silent(seconds: float) -> str:
    return f"no answer within {seconds:.0f} s (a network file system that hangs, or a machine that swaps?)"


def _here(config: RayConfig, in_cluster: bool) -> Machine:
    """This machine; where no cluster is named, with the object store that Ray would make."""
    this_machine = parse_facts(HERE, machine())
    if in_cluster:
        return this_machine
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = (config.object_store_mb or 0) * 2**20 or RAYS_SHARE * memory
    return Machine(**{**vars(this_machine), "object_store_bytes": size})


def parse_facts(name: str, facts: dict[str, Any], **others: Any) -> Machine:
    """Facts as `machine` gives them, with what else is known of a node."""
    return Machine(name, **{**facts, "gpus": tuple(Gpu(**gpu) for gpu in facts["gpus"])}, **others)


class _Lookers:
    """An actor on each node."""

    def __init__(self, nodes: list[dict[str, Any]]):
        self.nodes, self.names, self.actors = nodes, names_of(nodes), {}
        if not nodes:
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        for name, node in zip(self.names, nodes):
            options = {"num_cpus": 0, "scheduling_strategy": On(node["NodeID"], soft=False)}
            self.actors[name] = ray.remote(Looker).options(**options).remote(tmp_dir_of(node))

    def machines(self) -> list[Machine]:
        """What each node says of itself."""
        machines = []
        answers = self._ask("machine", ANSWER_S)
        for name, node in zip(self.names, self.nodes):
            facts = answers[name]
            if isinstance(facts, str):
                machines.append(Machine(name, facts))
                del self.actors[name]
                continue
            have = node["Resources"]
            rays = {"object_store_bytes": have.get("object_store_memory", 0), "ray_gpus": have.get("GPU", 0)}
            rays |= {"address": node["NodeManagerAddress"], **self._skew(name)}
            try:
                machines.append(parse_facts(name, facts, **rays))
            except (TypeError, KeyError):  # other facts: another pgl_ray is there
                machines.append(Machine(name, f"runs another pgl_ray, from {facts.get('code_path')}: remove it there"))
        return machines

    def _skew(self, name: str) -> dict[str, Any]:
        """By how much a node's clock is ahead, and how exactly that is known: by the quickest of some answers."""
        import ray

        tries = []
        for _ in range(NUM_TIMES):
            sent = time.time()
            try:
                node_time = ray.get(self.actors[name].now.remote(), timeout=CONNECT_S)
            except ray.exceptions.RayError as error:
                return {"fault": f"has answered once, and no more: {_first_line(error)}"}
            back = time.time()
            tries.append(((back - sent) / 2, node_time - (sent + back) / 2))
        error_s, skew_s = min(tries)
        return {"skew_s": skew_s, "skew_error_s": error_s}

    def sights(self, method: str, *args: Any) -> list[Sight]:
        """What each node that has answered sees of a place."""
        answers = self._ask(method, LOOK_S, *args)
        return [Sight(name, **(seen if isinstance(seen, dict) else {"fault": seen})) for name, seen in answers.items()]

    def _ask(self, method: str, seconds: float, *args: Any) -> dict[str, Any]:
        """Name of a node -> its answer, or why there is none."""
        if not self.actors:
            return {}
        import ray

        asked = {name: getattr(actor, method).remote(*args) for name, actor in self.actors.items()}
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
        answers = {}
        for name, answer in asked.items():
            try:
                answers[name] = ray.get(answer) if answer in ready else _silent(seconds)
            except ray.exceptions.RayTaskError as error:  # its last line is the node's own error
                answers[name] = str(error).strip().splitlines()[-1].strip()
            except ray.exceptions.RayError as error:
                answers[name] = _first_line(error)
        return answers


def tmp_dir_of(node: dict[str, Any]) -> str | None:
    """A node's temporary folder, in which TMP/session_.../sockets/plasma_store lies."""
    path = Path(node.get("ObjectStoreSocketName") or "")
    return str(path.parents[2]) if path.parent.name == "sockets" else None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def names_of(nodes: list[dict[str, Any]]) -> list[str]:
    """What lines call the nodes: their addresses, with a number where several are on one machine."""
    addresses, names = [node["NodeManagerAddress"] for node in nodes], []
    for address in addresses:
        same = f" ({sum(name.split()[0] == address for name in names) + 1})" * (addresses.count(address) > 1)
        names.append(f"{address}{same}")
    return names


# -- checking ---------------------------------------------------------------------------------------------------------


def _of_machines(machines: list[Machine], config: DoctorConfig) -> list[Line]:
    """Of those that have answered, the workers' where there is a cluster."""
    in_bucket = any(is_url(url or "") for url in (config.index, config.run))
    all_ = [one for one in machines if not one.fault]
    workers = [one for one in all_ if one.address] or all_
    lines = checks.answers(machines)
    if not all_:
        return lines
    lines += [*checks.versions(all_), *checks.extras(all_, in_bucket), *checks.code(all_)]
    lines += checks.clocks(all_, in_bucket)
    lines += [*checks.host_names(workers), *checks.interfaces(workers)]
    return [*lines, *checks.shared_memory(workers), *checks.gpus(workers)]


def _of_places(config: DoctorConfig, machines: list[Machine], lookers: _Lookers) -> list[Line]:
    lines, stores, runs = [], [], []
    if config.index:
        scans = _in_time(lambda: some_scans(config.index), LOOK_S, lambda why: [])
        stores = [_seen(lambda: look_at_store(config.index, scans, index=True))]
        stores += lookers.sights("look_at_store", config.index, scans)
        lines += storage.place("index", config.index, stores)
    if config.run:
        runs = _of_run(config.run, lookers)
        lines += storage.place("run", config.run, runs)
    workers = [one for one in machines if not one.fault and one.address] or [one for one in machines if not one.fault]
    lines += storage.reading([one for one in (*stores, *runs) if not one.fault])
    return lines + (storage.disks(workers, runs, is_url(config.run or "")) if workers else [])


def _seen(look: Callable[[], dict[str, Any]]) -> Sight:
    return Sight(HERE, **_in_time(look, LOOK_S, lambda why: {"fault": why}))


def _of_run(run: str, lookers: _Lookers) -> list[Sight]:
    """What all see of a file that this machine writes there, which is gone afterwards."""

    def look() -> list[str] | str:
        return taken_by(run) or [leave_mark(run)]

    marks = _in_time(look, LOOK_S, lambda why: f"cannot be written: {why}")
    if isinstance(marks, str):
        return [Sight(HERE, fault=marks)]
    try:
        return [_seen(lambda: look_at_run(marks[0])), *lookers.sights("look_at_run", marks[0])]
    finally:
        with suppress(OSError):
            remove_mark(marks[0])


def some_scans(index: str) -> list[str]:
    """Keys of some scans' voxels."""
    from pgl_ray.data import shard, store

    scans = list(store.read_index(index).scans)[:NUM_SCANS]
    return [f"scans/{scan.scan_id}/{shard.ARRAY_PATHS['volume']}/{shard.SHARD}" for scan in scans]


# -- showing ----------------------------------------------------------------------------------------------------------


def _show(lines: list[Line]) -> None:
    """Prints the verdicts, the mend below; in colours on a terminal."""
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = max(len(line.check) for line in lines)
    for line in lines:
        state = f"{line.state:5}"
        state = f"\x1b[{COLORS[line.state]}m{state}\x1b[0m" if colored else state
        below = " " * (width + 11)
        text = textwrap.wrap(line.text, WIDTH - len(below), break_long_words=False, break_on_hyphens=False)
        mend = textwrap.wrap(
            f"mend: {line.mend}" if line.mend else "",
            WIDTH - len(below),
            subsequent_indent=" " * 6,
            break_long_words=False,
            break_on_hyphens=False,
        )
        first, *more = text
        print(f"  {line.check:{width}}  {state}  {first}")
        for part in (*more, *mend):
            print(f"{below}{part}")
    sys.stdout.flush()


def describe(result: Result) -> str:
    """The closing line.

    Raises:
        FailedRun: something would stop a run.
    """
    wrong = list(dict.fromkeys(line.check for line in result.lines if line.state == "wrong"))
    notes = list(dict.fromkeys(line.check for line in result.lines if line.state == "note"))
    if wrong:
        raise FailedRun(f"{', '.join(wrong)} would stop a run: mend what is marked wrong, then ask again")
    worth = f", worth a look: {', '.join(notes)}" if notes else ""
    return f"doctor: all is well{worth}, {result.seconds:.0f} s"
