"""What of the scans that judges are given is not as asked: a sentence each, to be printed and kept."""

from pgl_ray.config import ProbeSettings
from pgl_ray.data.facts import same_voxels, some
from pgl_ray.data.voxel_statistics import BODY_HU
from pgl_ray.judge.decoder import LabelledScan
from pgl_ray.judge.matching import GRID_MM, has_body
from pgl_ray.judge.voxels import BACKGROUND, VoxelProbe


def shortcomings(probe: VoxelProbe, config: ProbeSettings) -> list[str]:
    """What of a probe's scans is not as asked, a sentence each."""
    train, test = probe.scans
    lines = []
    if len(train) < config.num_scans:
        lines.append(f"num_scans={config.num_scans}: split={config.split!r} has {len(train)} labelled scans")
    if len(test) < config.num_test_scans:
        have = f"test_split={config.test_split!r} has {len(test)} labelled scans that are not learnt from"
        lines.append(f"num_test_scans={config.num_test_scans}: {have}")
    organs = [name for name in probe.unseen if name != BACKGROUND]
    if organs:
        count = "it counts" if len(organs) == 1 else "they count"
        lines.append(f"no scan to learn from shows {', '.join(organs)}: {count} as never recognised; raise num_scans")
    if BACKGROUND in probe.unseen:
        lines.append(
            "no scan to learn from has every organ annotated, so nothing there is known to be background, which counts "
            "as never recognised; raise num_scans"
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
