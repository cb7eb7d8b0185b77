"""From facts to verdicts: each check takes what machines say and gives the doctor's lines, no door itself."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pgl_ray.checkup.doctor_facts import EXTRAS, NEEDED, Machine
from pgl_ray.checkup.doctor_places import Sight

NUM_NAMED = 3  # names in a line
MAIN_PACKAGES = ("torch", "ray", "zarr", "monai")  # packages that the line of versions names
ALIKE = ("torch", "ray")  # packages that must be the same on all nodes
SKEW_S, SKEW_OF_BUCKETS_S = 2.0, 600.0  # from when on it is said; buckets refuse requests from 15 minutes on
BATCH_BYTES = 75e6  # of 128 pairs of 16x96x96
LEAST_STORE_BYTES = 75 * 2**20  # of Ray's object store
BUSY_MB = 2000  # of a GPU's memory


class Line(NamedTuple):
    """A verdict. `state`: ok; note, worth knowing; wrong, a run would stop. `mend`: what to do about it."""

    check: str
    state: Literal["ok", "note", "wrong"]
    text: str
    mend: str = ""


def listed(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def grouped(machines: Iterable[Machine | Sight], text: Callable) -> dict[str, list[str]]:
    """What `text` says of machines -> names of those of which it says so; "" is nothing."""
    names = defaultdict(list)
    for one in machines:
        if said := text(one):
            names[said].append(one.name)
    return dict(names)


def gb(num: float) -> str:
    """Bytes in words."""
    return f"{num / 1e9:.1f} GB" if num >= 1e9 else f"{num / 1e6:.0f} MB"


def _public(version: str) -> str:
    """A version without the build's mark: +cpu and +cu130 work together."""
    return version.partition("+")[0]


def _of_several(machines: Sequence[Machine], check: str, text: str) -> list[Line]:
    """What is well of several machines; of one there is nothing to say."""
    return [Line(check, "ok", text)] if len(machines) > 1 else []


# -- nodes and what is installed --------------------------------------------------------------------------------------


def answers(machines: Sequence[Machine]) -> list[Line]:
    """Whether every machine says something of itself."""
    mend = "see the node's logs (/tmp/ray/session_latest/logs), `ray status`; restart its `ray start`"
    silent = grouped(machines, lambda one: one.fault)
    lines = [Line("answers", "wrong", f"{listed(names)}: {fault}", mend) for fault, names in silent.items()]
    return lines or _of_several(machines, "answers", f"all {len(machines)}, this machine included")


def versions(machines: Sequence[Machine]) -> list[Line]:
    """Whether Python and the packages are those that are needed, and the same as on the first machine."""
    first, lines = machines[0], []
    lacking = grouped(machines, lambda one: _install(one, lambda have, need: have is None))
    lines += [
        Line("versions", "wrong", f"{listed(names)}: not installed: {what}", f"there: pip install {what}")
        for what, names in lacking.items()
    ]
    unfit = grouped(machines, lambda one: _install(one, _is_unfit))
    lines += [
        Line("versions", "wrong", f"{listed(names)}: of another version than needed: {what}", f"pip install {what}")
        for what, names in unfit.items()
    ]
    mend = "install the same everywhere: one image, or pip install -c constraints.txt in each environment"
    for what, names in grouped(machines, lambda one: _python(one, first)).items():
        minor = what.split()[1].rsplit(".", 1)[0] != first.python.rsplit(".", 1)[0]
        lines.append(Line("versions", "wrong" if minor else "note", f"{listed(names)}: {what}", mend))
    for must in (True, False):
        differ = grouped(machines, lambda one, must=must: _differences(one, first, must))
        state = "wrong" if must else "note"
        lines += [Line("versions", state, f"{listed(names)}: {what}", mend) for what, names in differ.items()]
    installed = ", ".join(f"{name} {first.versions[name]}" for name in MAIN_PACKAGES if name in first.versions)
    return lines or [Line("versions", "ok", f"python {first.python}, {installed}{' everywhere' * (len(machines) > 1)}")]


def _install(one: Machine, wanted: Callable[[str | None, str], bool]) -> str:
    """Requirements of those packages for whose version and need `wanted` holds, for pip."""
    return " ".join(f"'{name}{need}'" for name, need in NEEDED.items() if wanted(one.versions.get(name), need))


def _is_unfit(have: str | None, need: str) -> bool:
    try:
        return have is not None and not SpecifierSet(need).contains(Version(have), prereleases=True)
    except InvalidVersion:  # somebody's own build
        return False


def _python(machine: Machine, first: Machine) -> str:
    return f"python {machine.python} where {first.name} has {first.python}" if machine.python != first.python else ""


def _differences(one: Machine, first: Machine, must: bool) -> str:
    """In what packages a machine differs from the first, of those that must be alike or of the others."""
    differences = []
    for name in NEEDED:
        ours, theirs = first.versions.get(name), one.versions.get(name)
        if (name in ALIKE) == must and ours and theirs and _public(ours) != _public(theirs):
            differences.append(f"{name} {theirs} where {first.name} has {ours}")
    return ", ".join(differences)


def extras(machines: Sequence[Machine], in_bucket: bool) -> list[Line]:
    """Which optional packages are there; `in_bucket`: whether store or run lies in a bucket."""
    first, lines = machines[0], []
    have = {one.name: {extra for extra, names in EXTRAS.items() if one.versions.keys() >= {*names}} for one in machines}
    if in_bucket:
        lacking = [name for name, installed in have.items() if "cloud" not in installed]
        mend = "there: pip install 'pgl_ray[cloud]', or obstore"
        lines += [Line("extras", "wrong", f"{listed(lacking)}: no obstore, for buckets", mend)] if lacking else []
    ours = have[first.name]
    text = f"installed: {', '.join(sorted(ours)) or 'none'}"
    if rest := sorted(EXTRAS.keys() - ours):
        text += f"; not: {', '.join(rest)} (pip install 'pgl_ray[{rest[0]}]')"
    reported = {"cloud"} if lines else set()
    others = grouped(machines, lambda one: _unlike(have[one.name] - reported, ours - reported))
    lines += [
        Line("extras", "note", f"{listed(names)}: {what}", "install the same everywhere")
        for what, names in others.items()
    ]
    return lines or [Line("extras", "ok", text)]


def _unlike(theirs: set[str], ours: set[str]) -> str:
    parts = [f"without {', '.join(sorted(ours - theirs))}"] * bool(ours - theirs)
    return " and ".join([*parts, *[f"with {', '.join(sorted(theirs - ours))} besides"] * bool(theirs - ours)])


def code(machines: Sequence[Machine]) -> list[Line]:
    """Whether all import the same pgl_ray."""
    first = machines[0]
    others = grouped(machines, lambda one: one.code_path if one.code != first.code else "")
    mend = "pip uninstall pgl_ray there: nodes take what the command sends; or install the same version everywhere"
    lines = [
        Line("code", "wrong", f"{listed(names)}: other code than here is imported, from {path}", mend)
        for path, names in others.items()
    ]
    same = ", the same on all nodes" if len(machines) > 1 else f" from {first.code_path}"
    return lines or [Line("code", "ok", f"pgl_ray {first.code}{same}")]


def clocks(machines: Sequence[Machine], in_bucket: bool) -> list[Line]:
    """Whether the nodes' clocks agree with this machine's."""
    lines, mend = [], "keep the clocks in step there: timedatectl set-ntp true, or chrony"
    for machine in machines:
        if abs(machine.skew_s) - machine.skew_error_s <= SKEW_S:
            continue
        wrong = in_bucket and abs(machine.skew_s) > SKEW_OF_BUCKETS_S
        why = "buckets refuse its requests" if wrong else "logs and events come in the wrong order"
        way = "ahead of" if machine.skew_s > 0 else "behind"
        text = f"{machine.name}: its clock is {abs(machine.skew_s):.1f} s {way} this machine's: {why}"
        lines.append(Line("clocks", "wrong" if wrong else "note", text, mend))
    most = max(abs(machine.skew_s) + machine.skew_error_s for machine in machines)
    return lines or _of_several(machines, "clocks", f"within {max(most, 0.001):.3f} s")


# -- the network ------------------------------------------------------------------------------------------------------


def host_names(machines: Sequence[Machine]) -> list[Line]:
    """Whether each node's own name leads to an address that the others reach: gloo, which CPU training takes, listens
    there."""
    state = "note" if any(machine.gpus for machine in machines) else "wrong"
    lines = []
    if len({machine.address for machine in machines}) == 1:  # on one machine gloo takes what there is
        return []
    for machine in machines:
        known = {address for addresses in machine.interfaces.values() for address in addresses}
        leads = f"its name {machine.host} leads to {machine.host_address or 'no address'}"
        if "GLOO_SOCKET_IFNAME" in machine.chosen:
            continue
        if not machine.host_address or machine.host_address.startswith("127."):
            why = ", where the others cannot reach it"
        elif known and machine.host_address not in known:
            why = ", which is none of its own"
        else:
            continue
        mend = f"GLOO_SOCKET_IFNAME={_interface(machine) or 'eth0'} before its `ray start`, or mend its /etc/hosts"
        lines.append(Line("host names", state, f"{machine.name}: {leads}{why}: training on CPUs (gloo) fails", mend))
    text = "each leads to an address of its own, or GLOO_SOCKET_IFNAME is set"
    return lines or [Line("host names", "ok", text)]


def _interface(machine: Machine) -> str:
    """The interface that has the address by which the cluster knows a machine; "": none."""
    return next((name for name, addresses in machine.interfaces.items() if machine.address in addresses), "")


def interfaces(machines: Sequence[Machine]) -> list[Line]:
    """Whether the interfaces that variables name are there, and reach other machines."""
    one_machine, lines = len({machine.address for machine in machines}) == 1, []
    for machine in machines:
        for variable, value in machine.chosen.items():
            matched = _matching(value, machine.interfaces) if machine.interfaces else ["unknown"]
            known = f"there are {', '.join(machine.interfaces)}"
            if not matched:
                text = f"{machine.name}: {variable}={value} is none of its interfaces; {known}"
            elif not one_machine and matched == ["lo"]:
                text = f"{machine.name}: {variable}={value} reaches no other machine"
            else:
                continue
            mend = f"{variable}={_interface(machine) or 'NAME'} before its `ray start`"
            lines.append(Line("interfaces", "wrong", text, mend))
    named = Counter(filter(None, map(_interface, machines)))
    text = ", ".join(f"{name} ({num})" if len(named) > 1 else name for name, num in named.items())
    return lines or ([Line("interfaces", "ok", f"{text} with the address that Ray knows")] if text else [])


def _matching(value: str, known: dict[str, list[str]]) -> list[str]:
    """Interfaces that a variable's value means: names, NCCL's also beginnings of names, =exact, or ^but those."""
    if value.startswith("^"):
        without = tuple(value[1:].lstrip("=").split(","))
        return [name for name in known if not name.startswith(without)]
    if value.startswith("="):
        return [name for name in known if name in value[1:].split(",")]
    exact = [name for name in known if name in value.split(",")]
    return exact or [name for name in known if name.startswith(tuple(value.split(",")))]


# -- memory, GPUs -----------------------------------------------------------------------------------------------------


def shared_memory(machines: Sequence[Machine]) -> list[Line]:
    """Whether the object store has room in /dev/shm, and for batches in itself."""
    mend = "more of it: docker run --shm-size=10g, in Kubernetes an emptyDir of medium Memory at /dev/shm"
    if min((one.shm_bytes for one in machines if _too_small(one) and one.shm_bytes), default=0) >= LEAST_STORE_BYTES:
        mend += "; or less object store: ray start --object-store-memory=BYTES, here ray.object_store_mb=N"
    small = grouped(machines, _too_small)
    lines = [Line("shared memory", "note", f"{listed(names)}: {what}", mend) for what, names in small.items()]
    tight = grouped(machines, lambda one: gb(one.object_store_bytes) * (0 < one.object_store_bytes < 2 * BATCH_BYTES))
    why = f"a batch of 128 pairs takes {gb(BATCH_BYTES)}, and what finds no room goes over the disk"
    more = "ray start --object-store-memory=BYTES with more, here ray.object_store_mb=N"
    lines += [Line("object store", "note", f"{listed(names)}: {size}: {why}", more) for size, names in tight.items()]
    least = min((one.object_store_bytes for one in machines if one.object_store_bytes), default=0)
    sizes = [one.shm_bytes for one in machines if one.shm_bytes is not None]
    shm = f"/dev/shm of {gb(min(sizes))}" if sizes else "no /dev/shm"
    at_least = " at least" * (len(machines) > 1)
    return lines or [Line("shared memory", "ok", f"object store of {gb(least)}, {shm}{at_least}")]


def _too_small(machine: Machine) -> str:
    if machine.shm_bytes is None or machine.object_store_bytes <= machine.shm_bytes:
        return ""
    room = f"/dev/shm has {gb(machine.shm_bytes)}, the object store {gb(machine.object_store_bytes)}"
    return f"{room}: Ray keeps it on the disk, which is slow"


def gpus(machines: Sequence[Machine]) -> list[Line]:
    """Whether GPUs answer, torch computes on them, Ray counts them, and nobody else is on them."""
    lines = []
    driver = "reinstall the driver or reboot; in a container: --gpus all and NVIDIA's container toolkit"
    for fault, names in grouped(machines, lambda one: one.gpu_fault).items():
        lines.append(Line("gpus", "wrong", f"{listed(names)}: a GPU is there, and does not answer: {fault}", driver))
    build = "a CUDA build of torch that the driver knows: pip install torch from https://pytorch.org"
    for fault, names in grouped(machines, lambda one: one.cuda_fault).items():
        lines.append(Line("gpus", "wrong", f"{listed(names)}: torch cannot compute on the GPUs: {fault}", build))
    for text, names in grouped(machines, _miscounted).items():
        mend = "ray start --num-gpus=N, and no CUDA_VISIBLE_DEVICES that hides them"
        lines.append(Line("gpus", "note", f"{listed(names)}: {text}", mend))
    for text, names in grouped(machines, _busy).items():
        lines.append(Line("gpus", "note", f"{listed(names)}: {text}", "end what runs there: nvidia-smi names it"))
    drivers = grouped(machines, lambda one: ", ".join(sorted({gpu.driver for gpu in one.gpus})))
    if len(drivers) > 1:
        text = "; ".join(f"{driver} on {listed(names)}" for driver, names in drivers.items())
        lines.append(Line("gpus", "note", f"drivers differ: {text}", "install the same everywhere"))
    kinds = Counter(gpu.name for one in machines for gpu in one.gpus)
    text = ", ".join(f"{num} x {name}" for name, num in kinds.items())
    return lines or [Line("gpus", "ok", f"{text}, driver {next(iter(drivers))}" if kinds else "none: training on CPUs")]


def _miscounted(machine: Machine) -> str:
    if machine.ray_gpus is None or machine.gpu_fault or machine.ray_gpus == len(machine.gpus):
        return ""
    return f"Ray counts {machine.ray_gpus:g} GPUs, the driver {len(machine.gpus)}"


def _busy(machine: Machine) -> str:
    used = {i: gpu.used_mb for i, gpu in enumerate(machine.gpus) if gpu.used_mb > BUSY_MB}
    return ", ".join(f"GPU {i} has {used_mb / 1000:.0f} GB in use" for i, used_mb in used.items())
