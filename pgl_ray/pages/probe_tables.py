"""What the judges of frozen encoders say, as tables and sentences for the report: readings, controls, upper end."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from pgl_ray.judge.judges import HIGHER_IS_BETTER, IN_FULL
from pgl_ray.judge.readings import in_words
from pgl_ray.pages.run_folders import Run, short_names
from pgl_ray.pages.tables import JUDGED, counted, gathered, number
from pgl_ray.train import run_paths

MORE = {  # a judge's second figure: its key, the head of its column, and how it is written
    "voxels": ("last_map", "last map", ".3f"),
    "decoder": ("hd95_mm", "HD95, mm", ".1f"),
    "matching": ("deformed_mm", "moved, mm", ".1f"),
}
ORGAN_SPECS = {"voxels": ".2f", "decoder": ".2f", "matching": ".0f"}
CONTROLS = ("random", "control")  # how the names of their rows begin


def read(runs: list[Run]) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """Results of `probe` in the runs' folders; in addition those of random encoders and of encoders that they use.

    Returns:
        (file, result) each, and a line for each file of an earlier version, which is left out.
    """
    inits = [run.record.init for run in runs]
    known = {"random", *(run_paths.origin(run.path) for run in runs), *(os.path.realpath(init) for init in inits)}
    inside = sorted({path for run in runs for path in run.path.glob("*probe*.json")})
    outside = sorted({path for run in runs for path in run.path.parent.glob("*probe*.json")})
    results, old = [], []
    for path in dict.fromkeys([*inside, *outside]):
        result = _result(path)
        if not result or not (path in inside or result["init"] in known or os.path.realpath(result["init"]) in known):
            continue
        if {"readings", "controls", "ceiling", "sentences", "pictures"} <= set(result):
            results.append((path, result))
        else:
            old.append(f"{path} is of an earlier version and left out: python -m pgl_ray.probe judges again")
    return results, old


def _result(path: Path) -> dict[str, Any] | None:
    """A probe's result; none where the file is something else, for only its name speaks for it."""
    try:
        result = json.loads(path.read_text())
    except ValueError:
        return None
    return result if isinstance(result, dict) and {"init", "recall", "balanced_accuracy"} <= set(result) else None


def table(probes: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any] | None:
    """Every reading of every encoder that was judged, its controls and its upper end; a value is best of its column
    where all of these were scored on the same test scans, organs and voxels.

    Returns:
        heads: of the columns; rows: name, cells (text, ci, best), window, num_scans; sentences, notes and files of the
        probes; organs: see `by_organ`. None without probes.
    """
    if not probes:
        return None
    judges = [judge for judge in JUDGED if any(judge in counted(result) for _, result in probes)]
    rows: list[dict[str, Any]] = []
    tested: dict[str, set[frozenset]] = {judge: set() for judge in judges}
    named = list(zip(names_of(probes), (result for _, result in probes)))
    for encoder, result in named:
        for name, scores in scored(encoder, result).items():
            for judge in tested.keys() & scores.keys():
                tested[judge].add(_tested(judge, scores[judge]["details"]))
            row = {"name": name, "cells": [cell for judge in judges for cell in _cells(judge, scores.get(judge))]}
            row |= {"window": window_of(result)}
            row |= {"num_scans": f"{result['num_train_scans']} / {result['num_test_scans']}"}
            same = [one for one in rows if all(one[key] == row[key] for key in ("name", "cells", "window"))]
            if not same:  # random weights are judged with each encoder of their size
                rows.append(row)
    for column, judge in enumerate(judges):
        values = [row["cells"][2 * column]["value"] for row in rows]
        known = [value for value in values if value is not None]
        ranked = len(set(known)) > 1 and len(tested[judge]) == 1
        best = (max if HIGHER_IS_BETTER[judge] else min)(known) if ranked else None
        for row in rows:
            cell = row["cells"][2 * column]
            cell["best"] = best is not None and cell["value"] == best
    sentences = [f"{name}, {line}." for name, result in named for line in result["sentences"]]
    if unlike := "; ".join(IN_FULL[judge] for judge in judges if len(tested[judge]) > 1):
        same = "the same test scans, organs and voxels"
        sentences = [f"Not all results are of {same}, so none is called best: {unlike}.", *sentences]
    boxes = {f"{result['body_box_mm']:.1f} mm" for _, result in probes if result["body_box_mm"] is not None}
    return {
        "heads": [head for judge in judges for head in (JUDGED[judge][0], MORE[judge][1])],
        "rows": rows,
        "sentences": sentences,
        "notes": gathered((name, note) for name, result in named for note in result["notes"]),
        "organs": by_organ(named, judges),
        "body_box": ", ".join(sorted(boxes)),
        "files": list(dict.fromkeys(str(path) for path, _ in probes)),
    }


def window_of(result: dict[str, Any]) -> str:
    """Size of the windows that the encoder saw; of results of earlier versions it is not known."""
    return "x".join(map(str, result.get("size") or ["?"]))


def names_of(probes: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Short names of the encoders that were judged, with the file's where one was judged several times."""
    inits = [result["init"].rstrip("/") for _, result in probes]
    names = [name_of(init, short) for init, short in zip(inits, short_names(inits))]
    several = {name for name, count in Counter(names).items() if count > 1} - {"random"}  # which are all the same
    return [f"{name}, {path.stem}" if name in several else name for name, (path, _) in zip(names, probes)]


def name_of(init: str, short: str = "") -> str:
    """Name of an encoder that is judged, which no control has: `short`, or the last part of its path; in the folder
    above where that is what controls are called."""
    path = Path(init)
    short = short or path.name
    return str(Path(*path.parts[-2:])) if short in CONTROLS and init != "random" else short


def scored(name: str, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> judge -> score: the readings, the one that counts first, then what they are to be compared with."""
    words = in_words(result["readings"])
    rows = {f"{name}, {words[reading]}": scores for reading, scores in result["readings"].items()}
    rows |= result["controls"]  # of random weights that are judged themselves, the same rows
    return rows | ({"trained with all labels": result["ceiling"]} if result["ceiling"] else {})


def _tested(judge: str, details: dict[str, Any]) -> frozenset:
    """What a judge scored: (scan, organ, number of its voxels as far as it is known) each."""
    if judge != "voxels":
        return frozenset((row["scan_id"], row["organ"], row.get("target_voxels")) for row in details.get("rows", []))
    counts = zip(details.get("scans", []), details.get("counts", []))
    return frozenset((scan, *one) for scan, of_scan in counts for one in zip(details["classes"], of_scan) if one[1])


def _cells(judge: str, score: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The judge's value with its interval, and its second figure."""
    value, second = (None, None) if score is None else (score["value"], score["details"].get(MORE[judge][0]))
    bounds = score and score["ci95"]
    spec = JUDGED[judge][1]
    interval = f"{bounds[0]:{spec}} to {bounds[1]:{spec}}" if bounds else ""
    return [
        {"text": number(value, spec), "ci": interval, "value": value, "best": False},
        {"text": number(second, MORE[judge][2]), "ci": "", "value": second, "best": False},
    ]


def by_organ(probes: list[tuple[str, dict[str, Any]]], judges: list[str]) -> dict[str, Any]:
    """Organ by organ: recall, Dice and matching error of each encoder that counts and of its strongest control.

    Args:
        probes: name of the encoder and result of each.
        judges: that any has asked.

    Returns:
        groups: (judge in full, names of its columns); rows: (organ, texts).
    """
    groups, columns, several = [], [], len({window_of(result) for _, result in probes}) > 1
    for judge in judges:
        named: dict[str, dict[str, float]] = {}
        for encoder, result in probes:
            if judge in counted(result):
                named[encoder] = _organs(judge, counted(result)[judge])
            if judge in result["standing"]:
                low_is = result["standing"][judge]["low_is"]
                name = f"{low_is}, {window_of(result)}" if several else low_is
                scores = _organs(judge, result["controls"][low_is][judge])
                if named.get(name, scores) != scores:  # of an encoder of another size
                    name = f"{name}, beside {encoder}"
                named[name] = scores
        groups.append((IN_FULL[judge].replace("balanced accuracy of", "recall of"), list(named)))
        columns += [(judge, values) for values in named.values()]
    organs = list(dict.fromkeys(organ for _, values in columns for organ in values))
    rows = [
        (organ.replace("_", " "), [number(values.get(organ), ORGAN_SPECS[judge]) for judge, values in columns])
        for organ in organs
    ]
    return {"groups": groups, "rows": rows}


def _organs(judge: str, score: dict[str, Any]) -> dict[str, float]:
    if judge == "voxels":
        return score["details"]["recall"]
    if judge == "decoder":
        return {organ: one["dice"] for organ, one in score["details"]["organs"].items()}
    return score["details"]["organs"]
