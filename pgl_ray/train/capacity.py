"""What a Ray cluster has, what its autoscaler can make of it, and whether a run may go on there. Numbers and names: Ray
is asked in `launch`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pgl_ray.model.device import CPU

Resources = Mapping[str, float]  # of a node or of a worker, by Ray's names: CPU, GPU, memory

TINY = 1e-9  # of a resource; sums of tenths are no whole numbers


class Kind(NamedTuple):
    """Nodes of one kind that an autoscaler can start: what each has, and how many there may be."""

    resources: Resources
    most: int


@dataclass(frozen=True)
class Cluster:
    """A cluster as it is, and as it can be.

    Attributes:
        head: what the head has.
        others: what each other node that is up has.
        kinds: nodes that the autoscaler can start, those of them that are up included; none: no autoscaler.
        most: nodes of all kinds together.
        unknown: there is an autoscaler, and what it can start cannot be read.
    """

    head: Resources
    others: tuple[Resources, ...] = ()
    kinds: tuple[Kind, ...] = ()
    most: int = 0
    unknown: bool = False

    @property
    def grows(self) -> bool:
        """Whether there may be more nodes than there are."""
        return self.unknown or bool(self.kinds)

    def now(self, name: str) -> float:
        """What all nodes that are up have of a resource."""
        return sum(node.get(name, 0) for node in (self.head, *self.others))

    def limit(self, name: str) -> float:
        """What there can be of a resource."""
        return max(self.now(name), _total(self._largest({name: 1.0}), name))

    def memory(self, wanted: float) -> dict[str, float]:
        """What a task that takes `wanted` bytes shall ask for: no more than the largest node has, and nothing where it
        is not known what nodes that can come will have, for an autoscaler starts none of these for what asks."""
        if any("memory" not in kind.resources for kind in self.kinds) or self.unknown:
            return {}
        nodes = (self.head, *self.others, *(kind.resources for kind in self.kinds))
        return {"memory": float(min(wanted, max(node.get("memory", 0) for node in nodes)))}

    def room_now(self, each: Resources, spare: float = 0) -> int:
        """How many of what takes `each` fit on the nodes that are up, with `spare` CPUs left on one of them."""
        return _fit([(node, 1) for node in (self.head, *self.others)], each, spare)

    def room(self, each: Resources, spare: float = 0) -> int:
        """The same of the nodes that there can be."""
        return max(self.room_now(each, spare), _fit(self._largest(each), each, spare))

    def in_words(self) -> str:
        """What is up, and what can be: for messages."""
        now = f"the cluster has {_amounts(self.now('CPU'), self.now('GPU'))}"
        if self.unknown:
            return f"{now}; its autoscaler's maximum cannot be read"
        if not self.kinds:
            return now
        kinds = " or ".join(f"{kind.most} nodes of {_amounts(*_both(kind.resources))}" for kind in self.kinds)
        bound = f", {self.most} in all" if self.most < sum(kind.most for kind in self.kinds) else ""
        return f"{now} and can have {_amounts(self.limit('CPU'), self.limit('GPU'))} ({kinds}{bound})"

    def _largest(self, each: Resources) -> list[tuple[Resources, int]]:
        """Head and nodes that can be, with their numbers; where they are bounded together, those that hold most of
        what takes `each`."""
        nodes, left = [(self.head, 1)], self.most
        for kind in sorted(self.kinds, key=lambda kind: -_holds(kind.resources, each)):
            nodes.append((kind.resources, min(kind.most, left)))
            left -= nodes[-1][1]
        return nodes


def _holds(node: Resources, each: Resources) -> int:
    """How many of what takes `each` fit on a node."""
    return min(int((node.get(name, 0) + TINY) // amount) for name, amount in each.items() if amount > 0)


def _fit(nodes: Sequence[tuple[Resources, int]], each: Resources, spare: float) -> int:
    held = sum(_holds(node, each) * num for node, num in nodes)
    if not spare:
        return held
    loss = [
        _holds(node, each) - _holds({**node, "CPU": node["CPU"] - spare}, each)
        for node, num in nodes
        if num and node.get("CPU", 0) + TINY >= spare
    ]
    return held - min(loss) if loss else 0


def _total(nodes: Sequence[tuple[Resources, int]], name: str) -> float:
    return sum(node.get(name, 0) * num for node, num in nodes)


def _both(node: Resources) -> tuple[float, float]:
    return node.get("CPU", 0), node.get("GPU", 0)


def _amounts(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'s' * (cpus != 1)} and {gpus:g} GPU{'s' * (gpus != 1)}"


def kinds_of(config: Mapping[str, Any]) -> tuple[tuple[Kind, ...], int] | None:
    """Kinds of nodes of an autoscaler, and how many there may be of all; none where it does not say what they have.

    Args:
        config: as `ray up` takes it: available_node_types, head_node_type, max_workers.
    """
    types, most = config.get("available_node_types") or {}, config.get("max_workers")
    bound = 2 if most is None else most  # Ray's own default
    kinds = [
        Kind(kind.get("resources") or {}, kind.get("max_workers", bound))
        for name, kind in types.items()
        if name != config.get("head_node_type") and kind.get("max_workers", bound) > 0
    ]
    if not types or any(not kind.resources for kind in kinds):
        return None
    return tuple(kinds), bound


def other_devices(before: list[str], now: list[str], step: int) -> str | None:
    """Why a run does not go on here: its numbers would change with the device, silently; none: nothing is new.

    Args:
        before: kinds of device of the checkpoint; empty: not known.
        now: those of the workers.
        step: of the checkpoint.
    """
    if not before or set(now) <= set(before):
        return None
    device = "cpu" if now == [CPU] else "cuda"
    return (
        f"the checkpoint at step {step} was trained on {' and '.join(before)}, and would go on on {' and '.join(now)}: "
        f"train.device={device} says that it may; else find it such nodes"
    )
