"""python -m pgl_ray.probe [file.yaml] index=STORE [init=RUN] [a.b=c ...]: what a frozen encoder knows of anatomy.

Three judges, seconds to a minute each on a CPU: a linear classifier of voxels, a light decoder, and point matching.
All need a handful of labelled scans and no training of the encoder, so they compare encoders long before a fine-tuning
would; and every encoder, random ones too, is judged in the same state.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("probe")

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pgl_ray import encoders
from pgl_ray.config import PRETRAINED, FailedRun, ProbeConfig
from pgl_ray.data.durable import check_writable_file, write_aside
from pgl_ray.data.store import Index, read_index
from pgl_ray.judge import readings
from pgl_ray.judge.judges import JUDGES, Judges, Score, Standing, answer, to_device
from pgl_ray.judge.readings import in_words
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resnet import Encoder, init_kaiming_uniform
from pgl_ray.pages import feature_pictures, probe_tables
from pgl_ray.pages.figures import to_bytes
from pgl_ray.train import run_paths
from pgl_ray.train.run_files import write_json

FIRST = "reestimated"  # the reading that counts for a trained encoder


@dataclass(frozen=True)
class ProbeResult:
    """What the judges say.

    Attributes:
        init: the encoder, as in the config.
        num_train_scans, num_test_scans: scans used.
        size: window that the encoder saw, voxels (D, H, W).
        steps: that the encoder's training had done; none: not known.
        readings: reading -> judge -> score, plain values.
        controls: name -> judge -> score, of random weights in each reading and of the control.
        ceiling: judge -> score of the encoder that was trained with all labels; empty: none was given.
        standing: judge -> where the reading that counts stands.
        sentences: the standings in words.
        notes: what of the scans is not as asked, and which of them the networks have seen in training.
        balanced_accuracy, recall: of the voxel probe in the reading that counts; none where it was not asked.
        body_box_mm: median matching error of the place in the body's box; none where matching was not asked.
        pictures: names of the files beside the result, where matching was asked of an encoder that was trained.
        seconds: wall time.
    """

    init: str
    num_train_scans: int
    num_test_scans: int
    size: tuple[int, int, int]
    steps: int | None
    readings: dict[str, dict[str, Any]]
    controls: dict[str, dict[str, Any]]
    ceiling: dict[str, Any]
    standing: dict[str, dict[str, Any]]
    sentences: list[str]
    notes: list[str]
    balanced_accuracy: float | None
    recall: dict[str, float] | None
    body_box_mm: float | None
    pictures: list[str]
    seconds: float

    def value(self, judge: str) -> float:
        """Of the reading that counts."""
        return next(iter(self.readings.values()))[judge]["value"]

    def answer(self, name: str) -> str:
        """Is the encoder better than random weights, by how much, and how sure is that: one sentence, of `name`."""
        standing = {judge: Standing(**one) for judge, one in self.standing.items()}
        return answer(name, standing, {judge: self.value(judge) for judge in standing})


def run(config: ProbeConfig) -> ProbeResult:
    """Judges the encoder of `config.init` and writes the JSON file.

    Raises:
        ValueError: an index without labelled scans, or an encoder that cannot be used with it.
        FailedRun: the encoder's features are not finite.
    """
    began = time.monotonic()
    if config.output:
        check_writable_file(f"output={config.output}", Path(config.output))
    index = read_index(config.index)
    own = encoders.read("init", config, index)
    ends = encoders.read_ends(config, index, own)
    config = config.model_copy(update={"size": config.size or own.view_size})
    judges = Judges(index, config, config.judges, config.decoder_seeds)
    notes: list[str] = []
    _note(notes, *judges.notes)
    encoder, more = own.ready(index, judges.probe.scans[1])
    encoder = to_device(encoder)
    _note(notes, *more)
    if not readings.norms(encoder):
        _note(notes, f"the encoder of init={config.init} has no BatchNorm: there is one reading of it")
    judged = _read(judges, encoder, config.init != "random", config.all_readings, notes)
    controls, ceiling = _ends(config, index, judges, encoder, judged, ends, notes)
    first = next(iter(judged.values()))
    standing = {
        judge: Standing.of(judge, score, {name: one[judge] for name, one in controls.items()}, high)
        for judge, score in first.items()
        for high in [ceiling[judge].value if ceiling else None]
        if controls
    }
    voxel, place = first.get("voxels"), _place(config)
    result = ProbeResult(
        init=config.init,
        num_train_scans=len(judges.probe.train),
        num_test_scans=len(judges.probe.test),
        size=judges.size,
        steps=own.source.meta.steps if own.source and own.source.meta else None,
        readings={reading: _plain(scores) for reading, scores in judged.items()},
        controls={name: _plain(scores) for name, scores in controls.items()},
        ceiling=_plain(ceiling),
        standing={judge: dataclasses.asdict(one) for judge, one in standing.items()},
        sentences=[f"{judge}: {one.sentence(judge, first[judge].value)}" for judge, one in standing.items()],
        notes=notes,
        balanced_accuracy=voxel and voxel.value,
        recall=voxel and voxel.details["recall"],
        body_box_mm=judges.body_box_mm() if "matching" in config.judges else None,
        pictures=[],
        seconds=round(time.monotonic() - began, 2),
    )
    if place:
        _write(*place, result, {})  # what was judged is kept, whatever becomes of the pictures
        if figures := _figures(config, judges, encoder, judged, controls):
            pictures, seconds = [picture_name(place[1], name) for name in figures], round(time.monotonic() - began, 2)
            result = dataclasses.replace(result, pictures=pictures, seconds=seconds)
            _write(*place, result, figures)
    return result


def _note(notes: list[str], *lines: str) -> None:
    """Prints lines and keeps them."""
    for line in lines:
        print(f"probe: note: {line}", flush=True)
    notes += lines


def _read(
    judges: Judges, encoder: Encoder, trained: bool, all_readings: bool, notes: list[str], whose: str = ""
) -> dict[str, dict[str, Score]]:
    """Reading -> what the judges say; the one that counts comes first.

    A trained encoder's other readings are only those of the voxel probe, which is quick, unless all are asked for; of
    controls, whose strongest reading counts, all judges read all. A reading that the network does not survive (without
    BatchNorm a deep one's values may grow beyond all bounds) is left out and said, unless it is the one that counts.
    """
    first, *others = readings.possible(encoder, trained)
    judged = {first: judges.judge(encoder, first)}
    only = JUDGES if all_readings or not trained else ("voxels",)
    for reading in others:
        try:
            scores = judges.judge(encoder, reading, only)
        except FailedRun as error:
            _note(notes, f"{whose}{readings.IN_WORDS[reading]}: {error}: not judged so")
            continue
        judged |= {reading: scores} if scores else {}
    return judged


def _ends(
    config: ProbeConfig,
    index: Index,
    judges: Judges,
    encoder: Encoder,
    judged: dict[str, dict[str, Score]],
    ends: dict[str, encoders.Weighted],
    notes: list[str],
) -> tuple[dict[str, dict[str, Score]], dict[str, Score]]:
    """Name -> scores of the controls, and the scores of the upper end."""
    if not config.ends:
        chance = {}
    elif config.init == "random":
        chance = judged
    else:
        chance = _read(judges, _random_like(encoder, config.seed), False, True, notes, "random: ")
    controls = {f"random, {in_words(chance)[reading]}": scores for reading, scores in chance.items()}
    ceiling: dict[str, Score] = {}
    for key, one in ends.items():
        other, more = one.ready(index, judges.probe.scans[1])
        _note(notes, *more)
        if key == "ceiling":
            ceiling = judges.judge(to_device(other), FIRST)
            continue
        of_control = _read(judges, to_device(other), True, True, notes, f"{key}: ")
        controls |= {f"control, {in_words(of_control)[reading]}": scores for reading, scores in of_control.items()}
    return controls, ceiling


def _random_like(encoder: Encoder, seed: int) -> Encoder:
    """Random weights of the same size, up to the same stage."""
    other = build_encoder(**encoder.settings)
    init_kaiming_uniform(other, seed)
    other.stop_at(encoder.last)
    return to_device(other)


def _plain(scores: dict[str, Score]) -> dict[str, Any]:
    return {judge: score.plain() for judge, score in scores.items()}


def _figures(
    config: ProbeConfig,
    judges: Judges,
    encoder: Encoder,
    judged: dict[str, dict[str, Score]],
    controls: dict[str, dict[str, Score]],
) -> dict[str, Figure]:
    """Pictures of what point matching finds, and of the features, beside those of random weights' strongest reading."""
    if "matching" not in config.judges or config.init == "random":
        return {}
    own, name = next(iter(judged)), probe_tables.name_of(config.init)
    title = f"{name}, {in_words(judged)[own]}: median matching error {judged[own]['matching'].value:.0f} mm"
    drawn = {title: (encoder, own)}
    states = readings.possible(encoder, False)
    names = {f"random, {in_words(states)[reading]}": reading for reading in states}
    errors = {name: scores["matching"].value for name, scores in controls.items() if name in names}
    if errors:
        best = min(errors, key=errors.get)
        drawn[f"{best}: median matching error {errors[best]:.0f} mm"] = _random_like(encoder, config.seed), names[best]
    maps = {title: judges.maps(*one) for title, one in drawn.items()}
    return feature_pictures.draw(judges.test, judges.names, config.size, maps)


def _write(folder: str, name: str, result: ProbeResult, figures: dict[str, Figure]) -> None:
    """The JSON file, after the pictures that it names."""
    for picture, figure in figures.items():
        with run_paths.results(folder, picture_name(name, picture)) as path:
            write_aside(path, to_bytes(figure, "png", dpi=150))
    with run_paths.results(folder, name) as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(result))


def picture_name(name: str, picture: str) -> str:
    """matching.png beside probe.json, X.matching.png beside X.probe.json."""
    stem = name.removesuffix(".json").removesuffix("probe").removesuffix(".")
    return f"{stem}.{picture}" if stem else picture


def _place(config: ProbeConfig) -> tuple[str, str] | None:
    """Folder and name of the result: a run has one, checkpoints one each beside them, for a folder may hold several."""
    if config.output:
        return os.path.split(os.path.abspath(config.output))
    if config.init == "random" or config.init.startswith(PRETRAINED):  # the package is no place for results
        return None
    if not run_paths.is_checkpoint(config.init):
        return config.init, "probe.json"
    folder, name = os.path.split(config.init)
    return folder, f"{name}.probe.json"


def table(result: ProbeResult) -> str:
    """What the judges say as text: a line per reading and control."""
    asked = [judge for judge in JUDGES if judge in next(iter(result.readings.values()))]
    heads = {"voxels": f"{'voxels':>8}{'last map':>10}", "decoder": f"{'Dice':>8}{'HD95 mm':>9}"}
    heads["matching"] = f"{'match mm':>10}{'deformed':>10}"
    words, name = in_words(result.readings), probe_tables.name_of(result.init)
    rows = {f"{name}, {words[reading]}": one for reading, one in result.readings.items()}
    chance = result.init == "random"  # is its own control
    rows |= {name: one for name, one in result.controls.items() if not chance or name.startswith("control")}
    rows |= {"trained with all labels": result.ceiling} if result.ceiling else {}
    width = max(34, *(len(name) + 1 for name in rows))
    lines = [f"{'encoder':<{width}}" + "".join(heads[judge] for judge in asked)]
    for name, scores in rows.items():
        line = f"{name:<{width}}"
        for judge in asked:
            value, extra = scores[judge]["value"] if judge in scores else None, scores.get(judge, {}).get("details", {})
            if judge == "voxels":
                line += _cell(value, 8, 3) + _cell(extra.get("last_map"), 10, 3)
            elif judge == "decoder":
                line += _cell(value, 8, 3) + _cell(extra.get("hd95_mm"), 9, 1)
            else:
                line += _cell(value, 10, 1) + _cell(extra.get("deformed_mm"), 10, 1)
        lines.append(line)
    if result.body_box_mm is not None:
        lines.append(f"point matching by the place in the body's box alone: {result.body_box_mm:.1f} mm")
    return "\n".join(lines)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def describe(result: ProbeResult) -> str:
    """The table, where each judge stands, and the closing line."""
    first = next(iter(result.readings))
    text = "\n".join([table(result), *result.sentences])
    how = in_words(result.readings)[first]
    seen = f"{result.num_train_scans} labelled scans, windows of {'x'.join(map(str, result.size))}"
    line = f"init={result.init}, {how}, {seen}, {result.seconds} s"
    organs = result.readings[first].get("decoder", {}).get("details", {}).get("organs", {})
    if organs:
        of_each = (f"{name} {_cell(one['dice'], 0, 3)}, {_cell(one['hd95_mm'], 0, 1)}" for name, one in organs.items())
        text += f"\norgans by the decoder, Dice and HD95 in mm: {'; '.join(of_each)}"
    if result.recall is None:
        return f"{text}\nprobe: done; {line}"
    worst = min(result.recall, key=result.recall.get)
    return (
        f"{text}\nprobe: balanced accuracy {result.balanced_accuracy:.4f} over {len(result.recall)} classes of "
        f"{result.num_test_scans} scans (chance {1 / len(result.recall):.3f}), weakest {worst} "
        f"{result.recall[worst]:.3f}; {line}"
    )
