"""What of the scans that judges are given is not as asked: a sentence each, to be printed and kept, or a refusal."""

from collections import Counter
from collections.abc import Callable, Collection

from pgl_ray.config import ProbeSettings
from pgl_ray.data.facts import same_voxels, some
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index
from pgl_ray.data.voxel_statistics import BODY_HU
from pgl_ray.judge.decoder import LabelledScan
from pgl_ray.judge.matching import GRID_MM, has_body
from pgl_ray.judge.voxels import BACKGROUND, VoxelProbe, choose_scans

LEAST = {"decoder": 1, "matching": 2}  # test scans that must show the same organ; for matching, those with a body


def shortcomings(probe: VoxelProbe, config: ProbeSettings) -> list[str]:
    """What of a probe's scans is not as asked, a sentence each."""
    train, test = probe.scans
    lines = []
    if len(train) < config.num_scans:
        lines.append(f"num_scans={config.num_scans}: split={config.split!r} has {len(train)} labelled scans")
    if len(test) < config.num_test_scans:
        have = f"test_split={config.test_split!r} has {len(test)} labelled scans that are not learnt from"
        lines.append(f"num_test_scans={config.num_test_scans}: {have}")
    more = "; raise num_scans" if probe.has_more else ""
    organs = [name for name in probe.unseen if name != BACKGROUND]
    if organs:
        count = "it counts" if len(organs) == 1 else "they count"
        lines.append(f"no scan to learn from shows {', '.join(organs)}: {count} as never recognised{more}")
    if BACKGROUND in probe.unseen:
        lines.append(
            "no scan to learn from has every organ annotated, so nothing there is known to be background, which counts "
            f"as never recognised{more}"
        )
    if same := same_voxels(train, test):
        lines.append(f"the same voxels are learnt from and tested on: {some(same)}; the figures are too good")
    for scans, samples, purpose in ((train, probe.train, "learn from"), (test, probe.test, "test on")):
        none = [scan.scan_id for scan, sample in zip(scans, samples) if not sample.classes.any()]
        if none and len(none) < len(scans):
            lines.append(f"{len(none)} of the {len(scans)} scans to {purpose} show no organ: {some(none)}")
    return lines


def nowhere_to_search(scans: list[LabelledScan]) -> list[str]:
    """What to say of scans without a body, in a list."""
    none = [scan.record.scan_id for scan in scans if not has_body(scan)]
    where = f"nothing above {BODY_HU} HU on the grid of {GRID_MM:.0f} mm"
    return [f"no place is searched in scans with {where}: {some(none)}"] if none else []


def check_organs(
    index: Index,
    config: ProbeSettings,
    judges: tuple[str, ...],
    tested: list[ScanRecord],
    searched: Collection[str] | None = None,
) -> None:
    """Refuses scans to test on whose organs some judge has nothing to say of.

    Args:
        index: of the store.
        config: of the probe.
        judges: that are asked.
        tested: the scans.
        searched: names of those with a body; none: where the store knows of any voxel above air.

    Raises:
        ValueError: names what would help.
    """
    read = {scan.scan_id for scan in tested} if searched is not None else set()
    known = read - set(searched or ())  # to have no body

    def lacking(scans: list[ScanRecord]) -> list[str]:
        bodies = [scan for scan in scans if scan.scan_id not in known and scan.foreground_share > 0]
        counts = {"decoder": _scans_with_one_organ(scans), "matching": _scans_with_one_organ(bodies)}
        return [judge for judge in judges if judge in LEAST and counts[judge] < LEAST[judge]]

    if not (out := lacking(tested)):
        return
    where = "two of" if _scans_with_one_organ(tested) else "any of"
    body = f" with a body (something above {BODY_HU} HU)" if where == "two of" else ""
    ways = _ways_out(index, config, lambda scans: not set(out) & set(lacking(scans)))
    rest = ",".join(judge for judge in judges if judge not in out) or "voxels"
    ways.append(f"leave {' and '.join(out)} out: judges=[{rest}]")
    raise ValueError(
        f"judges=[{','.join(judges)}]: no organ occurs in {where} the {len(tested)} scans to test on{body} "
        f"(num_test_scans={config.num_test_scans}, test_split={config.test_split!r}): {', or '.join(ways)}"
    )


def _scans_with_one_organ(scans: list[ScanRecord]) -> int:
    """In how many scans the organ is annotated, and occurs, that is in most of them."""
    organs = Counter(value for scan in scans for value in set(scan.labelled) & set(scan.label_voxels))
    return max(organs.values(), default=0)


def _ways_out(index: Index, config: ProbeSettings, enough: Callable[[list[ScanRecord]], bool]) -> list[str]:
    """Other scans to test on that are enough: more of the split, or another split."""
    ways = []
    for split in sorted(index.labelled_splits, key=lambda split: split != config.test_split):
        changes = {"test_split": split, "num_test_scans": len(index.scans)}
        try:
            pool = choose_scans(index, config.model_copy(update=changes))[1]
        except ValueError:  # all of them are learnt from
            continue
        if split != config.test_split:
            ways += [f"choose test_split={split}"] if enough(pool[: config.num_test_scans]) else []
        elif enough(pool):
            numbers = range(config.num_test_scans + 1, len(pool) + 1)
            ways.append(f"raise num_test_scans to {next(num for num in numbers if enough(pool[:num]))}")
    return ways
