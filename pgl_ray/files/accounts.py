"""Every file accounted for: of files of one name the one that counts, and what is left over, said in a few lines."""

import json
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from isal import igzip

from pgl_ray.files import ct
from pgl_ray.files.source import Fault, Inventory, files_of
from pgl_ray.files.walk import Tree

NUM_REASONS = 10  # that are printed
NUM_NAMES = 3  # of files, for each
NIFTI = (".nii", ".nii.gz")


def one_of(paths: list[Path], known: Collection[str], inventory: Inventory) -> Path | None:
    """Of files that one name fits, such as ct.nii and ct.nii.gz: the one that counts where they hold the same, none
    where they do not."""
    if len(paths) == 1:
        return paths[0]
    paths = sorted(paths, key=lambda path: (str(path) not in known, len(path.name), path.name))
    others = [path for path in paths[1:] if not _same(paths[0], path)]
    if others:
        names = ", ".join(path.name for path in paths[1:])
        inventory.faults.append(Fault(str(paths[0]), f"of one name with {names}, and they differ: keep one of them"))
        inventory.seen.update(str(file) for path in paths for file in files_of(path))
        return None
    inventory.left_out.extend(Fault(str(path), f"holds the same as: {paths[0]}") for path in paths[1:])
    inventory.seen.update(str(file) for path in paths[1:] for file in files_of(path))
    return paths[0]


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold the same volume."""
    try:
        if all(path.name.lower().endswith(NIFTI) for path in (one, other)):
            return _inflated(one) == _inflated(other)
        first, second = ct.read_scan(one), ct.read_scan(other)
    except (ValueError, OSError, EOFError, zlib.error):
        return False
    return bool(np.array_equal(first.voxels, second.voxels) and np.allclose(first.affine, second.affine, atol=1e-3))


def _inflated(path: Path) -> bytes:
    if not path.name.lower().endswith(".gz"):
        return path.read_bytes()
    with igzip.open(path) as stream:
        return stream.read()


def unused(tree: Tree, inventory: Inventory) -> list[Fault]:
    """Files that nothing has been said of."""
    accounted = {fault.source for fault in (*inventory.faults, *inventory.left_out)} | inventory.seen
    left = [path for path in tree.paths if path not in accounted]
    return [Fault(path, _reason(path, tree)) for path in left]


def _reason(path: str, tree: Tree) -> str:
    stem, _, suffix = path.rpartition(".")
    if suffix.lower() == "img" and f"{stem}.hdr" not in tree.files:
        return "voxels without their header (.hdr)"
    if suffix.lower() in ("raw", "zraw"):
        return "voxels that no header (.mhd, .nhdr) names"
    return "no format of CT"


def grouped(left_out: Iterable[Fault]) -> list[str]:
    """Lines on what is not used: the number, and for each reason how many, and the first of them."""
    reasons = defaultdict(list)
    for fault in left_out:
        reasons[fault.reason.split(": /")[0]].append(fault.source)
    total = sum(map(len, reasons.values()))
    if not total:
        return []
    lines = [f"{total} file{'s' * (total != 1)} not used:"]
    for reason, paths in sorted(reasons.items(), key=lambda item: -len(item[1]))[:NUM_REASONS]:
        more = ", ..." * (len(paths) > NUM_NAMES)
        names = ", ".join(" ".join(path.split("\n")) for path in paths[:NUM_NAMES])
        lines.append(f"  {len(paths)}: {' '.join(reason.split())}: {names}{more}")
    if len(reasons) > NUM_REASONS:
        lines.append(f"  and {len(reasons) - NUM_REASONS} reasons more")
    return lines


def skipped(failed: Iterable[Fault], left_out: Iterable[Fault]) -> list[str]:
    """Lines that close a door's output: what failed, each with its reason, then what is not used, in groups."""
    lines = [f"  {fault.source}: {' '.join(fault.reason.split())}" for fault in failed]
    return ([f"{len(lines)} left out:", *lines] if lines else []) + grouped(left_out)


def json_lines(faults: Iterable[Fault]) -> bytes:
    """Faults as a file of lines."""
    return "".join(json.dumps(fault._asdict(), ensure_ascii=True) + "\n" for fault in faults).encode()
