"""The answers at the top of a store's page, from what its index says: is it fit to train on, is it whole, what next?"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from pgl_ray.data.store import Index
from pgl_ray.pages.pages import NO, OPEN, YES, Answer, Line, command, percent, plural

FIT, WHOLE = "Is it fit for training?", "Is everything in it?"
SPEED, NEXT = "What would limit speed?", "What to do next?"
FEW = 20  # scans that a self-supervised training is hardly worth


def of_store(index: Index, notes: Mapping[str, Sequence[str]], unused: Sequence[str], epoch: str) -> list[Answer]:
    """The four answers.

    Args:
        index: of the store.
        notes: scan_id -> what stands out.
        unused: per file that is not in the store "failed" or "left out".
        epoch: how long the views of one take, in words.
    """
    odd = [scan_id for scan_id, oddities in notes.items() if oddities]
    return [
        Answer(FIT, [_fit(index, notes, odd)]),
        Answer(WHOLE, [_whole(index, unused)]),
        Answer(SPEED, [_speed(epoch)]),
        Answer(NEXT, [_next(index, odd, unused)]),
    ]


def _fit(index: Index, notes: Mapping[str, Sequence[str]], odd: list[str]) -> Line:
    num = len(index.scans)
    if not odd:
        return Line(
            YES, f"none of {plural(num, 'scan')} stands out by HU, body, size, or voxels that another scan has, too"
        )
    kinds = Counter(re.sub(r"[\d.]+", "…", note.split(":")[0]) for scan_id in odd for note in set(notes[scan_id]))
    kind, often = kinds.most_common(1)[0]
    share = (
        f"{len(odd)} of {plural(num, 'scan')} ({percent(len(odd) / num)}) {'stands' if len(odd) == 1 else 'stand'} out"
    )
    return Line("Look first", f"{share}, {often} of them by “{kind}”; each with its figure below")


def _whole(index: Index, unused: Sequence[str]) -> Line:
    labelled = sum(scan.label_metadata is not None for scan in index.scans)
    labels = f"{labelled} of {plural(len(index.scans), 'scan')} {'has' if labelled == 1 else 'have'} labels"
    counts = Counter(unused)
    if not counts:
        return Line(YES, f"the last prepare left no file out, and none failed; {labels}")
    text = ", ".join(f"{num} {word}" for word, num in sorted(counts.items()))
    return Line(NO, f"{text} by the last prepare, each with its reason below; {labels}")


def _speed(epoch: str) -> Line:
    if epoch.startswith("not measured"):
        return Line(OPEN, epoch)
    return Line("Data at most", epoch)


def _next(index: Index, odd: list[str], unused: Sequence[str]) -> Line:
    if "failed" in unused:
        return Line(
            "Mend what failed", "the reasons stand below; the same prepare command then reads these files alone"
        )
    if odd:
        return Line("Look", "at the scans below that stand out, before anything is trained on them")
    if len(index.scans) < FEW:
        return Line(
            "Take more scans", f"{len(index.scans)} are few to pre-train on; init=pretrained:openkbp_small needs none"
        )
    text = command("bench", "conf/pretrain_small.yaml", f"index={index.store}")
    return Line("Pre-train", f"{text} says how long it would take here")
