"""What machines see of a store and a run, and what room there is, as the doctor's lines; no door itself."""

from collections.abc import Sequence

from pgl_ray.checkup.doctor_checks import Line, gb, grouped, listed
from pgl_ray.checkup.doctor_facts import Machine
from pgl_ray.checkup.doctor_places import Sight
from pgl_ray.paths import is_url

SLOW_MB_S, SLOW_S = 30.0, 0.3  # of reading scans, and of a small read from a bucket
RAYS_FULL = 0.95  # use of the disk from which on Ray writes no objects there (local_fs_capacity_threshold)
LEAST_BYTES, FEW_BYTES = 2e9, 10e9  # free for a run: two checkpoints of the default network have 1.4 GB
SOCKET = "/session_2026-11-29_05-52-53_123456_1234567/sockets/plasma_store"  # what Ray adds to its temporary folder
MOST_SOCKET = 107  # characters of a unix socket's path

FREE = "free some space"
SHARE = "store and run must lie on storage that all nodes see at the same path (NFS, Lustre, EFS), or in a bucket"
CREDENTIALS = (
    "give every node the bucket's credentials, region and endpoint before `ray start` (AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...)"
)


def place(what: str, url: str, sights: Sequence[Sight]) -> list[Line]:
    """Whether all machines see the same store (`what`: index) or run as the first one, and can write to a run."""
    first, lines, given = sights[0], [], f"{what}={url}"
    for (fault, mend), names in grouped(sights, lambda one: one.fault and (one.fault, one.mend)).items():
        lines.append(Line(what, "wrong", f"{listed(names)}: {given}: {fault}", mend or _mend(url, fault)))
    other = [one.name for one in sights if not one.fault and not first.fault and one.mark != first.mark]
    if other:
        lines.append(Line(what, "wrong", f"{listed(other)}: at {given} lies another one than here", SHARE))
    for why, names in grouped(sights, lambda one: one.read_only).items():
        state, so = ("wrong", "") if what == "run" else ("note", ", so prepare cannot add to it")
        lines.append(Line(what, state, f"{listed(names)}: {given} cannot be written: {why}{so}", _mend(url, why)))
    seen = "seen" if what == "index" else "written, read and removed a file"
    by = f" by all {len(sights)}" if len(sights) > 1 else ""
    return lines or [Line(what, "ok", f"{url}: {seen}{by}")]


def _mend(url: str, fault: str) -> str:
    if "obstore" in fault:
        return "there: pip install 'pgl_ray[cloud]', or obstore"
    if "conditional writes" in fault:
        from pgl_ray.data.lease import MEND  # not at the top: it needs packages, and this says which ones lack

        return MEND
    if "no run of pgl_ray" in fault:
        return f"choose another run=..., a new or empty one, such as {url}/run1"
    if "No module named" in fault:
        return "install what is missing there"
    if is_url(url):
        return "make the bucket" if "no such bucket" in fault else CREDENTIALS
    if any(word in fault.lower() for word in ("permission", "read-only")):
        return "let this user write there on every node (owner, mount options, root_squash)"
    mends = {"is no folder": f"another folder than {url}, or move that file away", "No space": FREE}
    return next((mend for part, mend in mends.items() if part in fault), SHARE)


def reading(sights: Sequence[Sight]) -> list[Line]:
    """How fast scans and small objects are read."""
    lines = []
    for sight in sights:
        if sight.read_mb_s is not None and sight.read_mb_s < SLOW_MB_S:
            text = f"{sight.name}: scans are read at {sight.read_mb_s:.0f} MB/s, so training may wait for data"
            mend = "a faster disk, a copy of the store on it, or a bucket nearby; stream.pairs_per_region=8 reads less"
            lines.append(Line("reading", "note", text, mend))
        if sight.latency_s is not None and sight.latency_s > SLOW_S:
            text = f"{sight.name}: a small read from the bucket takes {sight.latency_s * 1000:.0f} ms"
            mend = "a bucket in the nodes' own region, or a copy of the store on a disk"
            lines.append(Line("reading", "note", text, mend))
    speeds = [sight.read_mb_s for sight in sights if sight.read_mb_s is not None]
    waits = [sight.latency_s for sight in sights if sight.latency_s is not None]
    texts = [f"scans at {min(speeds):.0f} MB/s"] if speeds else []
    texts += [f"a small read takes {max(waits) * 1000:.0f} ms"] if waits else []
    return lines or ([Line("reading", "ok", ", ".join(texts))] if texts else [])


def disks(machines: Sequence[Machine], runs: Sequence[Sight], in_bucket: bool) -> list[Line]:
    """Whether there is room for what Ray and a run write; `in_bucket`: whether the run lies in one, copies here."""
    lines = []
    clear = "free some space, or another folder: ray start --temp-dir=DIR, here RAY_TMPDIR=DIR"
    for one in machines:
        folder, free, total = one.disks["ray"]
        if free < (1 - RAYS_FULL) * total:
            text = f"{one.name}: the disk of {folder} is {1 - free / total:.0%} full: Ray writes no objects there"
            lines.append(Line("disks", "wrong", text, clear))
    rooms = [(one.name, "the run", one.free_bytes) for one in runs if one.total_bytes]
    rooms += [(one.name, one.disks["cache"][0], one.disks["cache"][1]) for one in machines if in_bucket]
    for name, what, free in rooms:
        if free < FEW_BYTES:
            text = f"{name}: {gb(free)} free for {what}; two checkpoints of the default network have 1.4 GB"
            lines.append(Line("disks", "wrong" if free < LEAST_BYTES else "note", text, FREE))
    ray = min(machines, key=lambda one: one.disks["ray"][1]).disks["ray"]
    least = min((free for _, _, free in rooms), default=None)
    for_run = f", {gb(least)} for the run" if least is not None else ""
    return lines or [Line("disks", "ok", f"{gb(ray[1])} free for Ray in {ray[0]}{for_run}")]


def socket_path(folder: str) -> list[Line]:
    """Whether Ray's sockets find room in the path of `folder`, the temporary one of a Ray that starts here."""
    too_long = len(folder) + len(SOCKET) - MOST_SOCKET
    if too_long <= 0:
        return []
    mend = f"a RAY_TMPDIR that is {too_long} characters shorter, such as /tmp"
    return [Line("sockets", "wrong", f"{folder} is too long for Ray's sockets", mend)]
