"""Points of a sweep's space: the values that one trial takes, how they are drawn, which space they are of, and the
trial's name by them."""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pgl_ray.config import TuneConfig

LEARNING_RATE = "finetune.optim.lr"  # that population based training changes
LISTED = ("choice", "grid_search")
Space = dict[str, dict[str, list[Any]]]  # key -> verb -> its arguments


class Point(NamedTuple):
    """A point of the space.

    Attributes:
        name: of its folder, from its values.
        values: key of the space, or "arm", -> value.
    """

    name: str
    values: dict[str, Any]


def num_trials_of(config: TuneConfig) -> int:
    """How many points a sweep draws, those that it draws twice included."""
    grids = [len(verb["grid_search"]) for verb in config.space.values() if "grid_search" in verb]
    arms = 1 if config.search == "optuna" else max(1, len(config.arms))
    return config.num_trials * arms * math.prod(grids)


def draw(config: TuneConfig) -> list[Point]:
    """Every point once; the arms run fastest, so that a sweep that is cut off has the same points of each. All arms and
    points of the grids share a draw: more of them add trials and change none."""
    import numpy as np

    rng = np.random.RandomState(config.seed)
    grids = {key: verbs["grid_search"] for key, verbs in config.space.items() if "grid_search" in verbs}
    axes = [*grids.values(), list(config.arms)] if config.arms else list(grids.values())
    points = {}
    for _ in range(config.num_trials):
        drawn = {}
        for key, verbs in config.space.items():
            if key not in grids:
                value = domain(verbs).sample(random_state=rng)
                drawn[key] = decoded(value.item() if isinstance(value, np.generic) else value)
        for point in itertools.product(*axes):
            values = {"arm": point[-1]} if config.arms else {}
            values |= dict(zip(grids, point)) | drawn
            trial = Point(name_of(values), values)
            points.setdefault(trial.name, trial)
    return list(points.values())


def domain(verbs: dict[str, list[Any]]) -> Any:
    """Ray Tune's domain of one key; lists among the choices as text, for Optuna takes none."""
    from ray import tune

    [(verb, args)] = verbs.items()
    if verb == "choice":
        return tune.choice([json.dumps(arg) if isinstance(arg, list) else arg for arg in args])
    with named(f"{verb}{args}"):
        try:
            return getattr(tune, verb)(*args)
        except TypeError as error:
            raise ValueError(error) from None


def whole_space(config: dict[str, Any]) -> Space:
    """The space of a config, such as sweep.json, with its arms as a choice."""
    return ({"arm": {"choice": list(config["arms"])}} if config["arms"] else {}) | config["space"]


def of_space(config: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether a trial's values are of the arms and the space that a config has; pbt gives learning rates of its own."""
    space, free = whole_space(config), LEARNING_RATE if config["scheduler"]["kind"] == "pbt" else None
    return values.keys() == space.keys() and all(k == free or _may_be(space[k], value) for k, value in values.items())


def covers(earlier: Space, space: Space) -> bool:
    """Whether all that can be drawn from a space could be drawn from an earlier one, too."""
    return earlier.keys() == space.keys() and all(
        verbs.keys() == earlier[key].keys() and all(_may_be(earlier[key], value) for value in _ends(verbs))
        for key, verbs in space.items()
    )


def _may_be(verbs: dict[str, list[Any]], value: Any) -> bool:
    ((verb, args),) = verbs.items()
    if verb in LISTED:
        return value in map(decoded, args)
    low, high = _ends(verbs)
    slack = 1e-9 * max(abs(low), abs(high))  # 0.3 of quniform is 0.30000000000000004
    return isinstance(value, int | float) and low - slack <= value <= high + slack


def _ends(verbs: dict[str, list[Any]]) -> list[Any]:
    """What is listed, or the lowest and the highest."""
    ((verb, args),) = verbs.items()
    return list(map(decoded, args)) if verb in LISTED else sorted([args[0], args[1] - (verb == "randint")])


@contextlib.contextmanager
def named(subject: str) -> Iterator[None]:
    """What is refused inside is said to be of this."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{subject}: {error}") from None


def title_of(values: dict[str, Any]) -> str:
    """A point in words."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def decoded(value: Any) -> Any:
    """A value that Ray Tune drew; lists travel as text."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def values_of(trial: dict[str, Any]) -> dict[str, Any]:
    """The values of a trial as Ray Tune has it, the arm first."""
    values = {key: decoded(value) for key, value in trial["values"].items()}
    return ({"arm": values.pop("arm")} if "arm" in values else {}) | values


def name_of(values: dict[str, Any]) -> str:
    """A trial's name, from its values."""
    return hash_of(values)[:8]


def own_name(config: TuneConfig, trial_id: str, point: dict[str, Any]) -> str:
    """The name of one of Ray Tune's trials. It stays that of the first start: pbt gives a trial another one's config
    whole, with its name."""
    path = Path(config.run) / "tune" / f"{trial_id}.name"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(point.get("name") or name_of(values_of(point)))
    return path.read_text()


def hash_of(value: Any) -> str:
    """Of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short(key: str) -> str:
    """The last part of a dotted key, which tells it apart; of seeds all that share it."""
    return key.split("+")[-1].strip().rsplit(".", 1)[-1]


def seedless(values: dict[str, Any]) -> str:
    """All values of a point but its seeds, as a text that is equal where they are."""
    return repr(sorted((key, value) for key, value in values.items() if short(key) != "seed"))
