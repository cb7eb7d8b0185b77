"""python -m pgl_ray.predict run=RUN input=CT output=LABELS [a.b=c ...]: label maps in each CT's own geometry."""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("predict")

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import pgl_ray
from pgl_ray.config import FailedRun, PredictConfig
from pgl_ray.data.durable import check_writable, put_in_place, write_aside
from pgl_ray.data.facts import disagreements
from pgl_ray.data.rendering import AIR, normalise
from pgl_ray.data.voxel_statistics import statistics
from pgl_ray.files import ct, identity
from pgl_ray.files.accounts import json_lines, skipped
from pgl_ray.files.plausible import LabelMap
from pgl_ray.files.resample import onto_grid, resample
from pgl_ray.files.scans import ScanFile, scan_files
from pgl_ray.files.source import Fault
from pgl_ray.files.walk import Tree
from pgl_ray.model import device as on
from pgl_ray.model.inference import pick_device, segment
from pgl_ray.model.segmenter import LightSegmenter, Segmenter
from pgl_ray.pages import viewer
from pgl_ray.train.progress import Stage, num_of
from pgl_ray.train.records import CheckpointMeta
from pgl_ray.train.run_files import write_json
from pgl_ray.train.weights import check_flips, load_segmenter

PAGE = (".html", ".png")
COMPANIONS = (".json", *PAGE)  # of a label map


class Result(NamedTuple):
    """Where the label maps lie, how many there are, and how many of them were there before."""

    output: str
    num_scans: int
    num_finished_before: int


class Job(NamedTuple):
    """A CT and its label map."""

    scan: ScanFile
    target: Path

    def with_suffix(self, suffix: str) -> Path:
        """The file of another kind beside the label map."""
        return self.target.with_name(self.target.name.removesuffix(".nii.gz") + suffix)


def run(config: PredictConfig) -> Result:
    """Writes one label map (.nii.gz) per CT: the label values of the run's store on exactly the CT's grid.

    Beside each label map lie facts about it (.json: volumes in mL, by what it was made) and, with `viewer`, a page
    (.html) and pictures (.png) of it. A scan that was done before, by the same network and settings, is left as it is.
    A file of a folder that cannot be read is named and left out; the others are done.

    Raises:
        ValueError: run, input or output cannot be used.
        FailedRun: some files of the folder failed, or the memory does not suffice.
    """
    jobs, faults, left_out = _work(Path(config.input), Path(config.output))
    device = pick_device(config.inference.device)
    model, meta = load_segmenter(config.run, device)
    if config.tta:
        check_flips(config.run, meta)
    check_writable(f"output={config.output}", _folder_of(config.output))
    maker = _maker(model, meta, config, device)
    many = Path(config.input).is_dir()
    finished = {job for job in jobs if _is_finished(job, maker, config.viewer)}
    _refuse_corrected([job for job in jobs if job not in finished], config.output)
    done_before = f", {len(finished)} of them done before" if finished else ""
    print(f"predict: {len(jobs)} scan{'s' * (len(jobs) != 1)} on {device}{done_before}", flush=True)
    names = {job: job.target.name.removesuffix(".nii.gz") if job.scan.slices else job.scan.path.name for job in jobs}
    failed = {_plain(fault): Path(fault.source).name for fault in faults}
    maps, todo = {}, [job for job in jobs if job not in finished]
    with Stage("predict:", "scan", len(todo)) as stage:
        for job in todo:
            try:
                for note in predict_one(model, meta, job, maker, config):
                    print(f"predict: note: {names[job]}: {note}", flush=True)
            except (ValueError, OSError, MemoryError) as error:
                reason = " ".join(str(error).split()) or "not enough memory"
                if not many:
                    if isinstance(error, OSError):
                        raise
                    reason = reason if job.scan.source in reason else f"{job.scan.source}: {reason}"
                    raise (FailedRun if isinstance(error, MemoryError) else ValueError)(reason) from None
                (maps if isinstance(error, LabelMap) else failed)[_plain(Fault(job.scan.source, reason))] = names[job]
            stage.advance(", ".join(filter(None, (names[job], num_of(failed | maps, "left out")))))
    total = len(jobs) + len(faults)
    if len(maps) == total:  # beside CTs they are none of predict's business
        failed, maps = maps, {}
    _tell_skipped(failed, [*left_out, *maps], Path(config.output))
    if failed:
        listed = ", ".join(list(failed.values())[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
        others = f"; the others are in {config.output}" if len(failed) < total else ""
        raise FailedRun(f"{len(failed)} of {total} files failed: {listed}{others}")
    return Result(config.output, total - len(failed) - len(maps), len(finished))


def _plain(fault: Fault) -> Fault:
    """A fault whose reason does not begin with its source."""
    return fault._replace(reason=fault.reason.removeprefix(f"{fault.source}: "))


def _folder_of(output: str) -> Path:
    """The folder that label maps are written into."""
    path = Path(output).absolute()
    return path.parent if path.name.endswith(".nii.gz") and not path.is_dir() else path


def _tell_skipped(failed: Iterable[Fault], left_out: list[Fault], output: Path) -> None:
    """Prints what failed and which files were not used; a folder of label maps has the latter in left_out.jsonl."""
    for line in skipped(failed, left_out):
        print(f"predict: {line}", flush=True)
    if output.is_dir() and (left_out or (output / "left_out.jsonl").exists()):
        write_aside(output / "left_out.jsonl", json_lines(left_out))


def _maker(model: Segmenter | LightSegmenter, meta: CheckpointMeta, config: PredictConfig, device: torch.device) -> str:
    """Hash of all that decides a label map but the scan: weights, what they expect, windows' overlap, precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    expected = meta.model_dump(include={"hu_window", "labels", "task", "patch_size", "spacing_mm"})
    settings = [expected, config.inference.overlap, config.tta]
    settings += ["bfloat16"] if on.in_bfloat16(device, config.inference.precision) else []
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _is_finished(job: Job, maker: str, viewer: bool) -> bool:
    """Whether the label map was made by the same network from the same files; the facts are written last."""
    try:
        facts = json.loads(job.with_suffix(".json").read_text())
        made = facts["maker"] == maker and facts["stamp"] == job.scan.stamp()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made and all(job.with_suffix(end).is_file() for end in (".nii.gz", *(PAGE if viewer else ())))


def _refuse_corrected(jobs: list[Job], output: str) -> None:
    """Refuses to replace label maps that somebody has changed since predict wrote them.

    Raises:
        ValueError: some were.
    """
    changed = [job.target for job in jobs if _is_corrected(job)]
    if changed:
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(
            f"output={output}: {changed[0]}{others} was changed since predict wrote it, and would be replaced: move it "
            "away, or choose another output"
        )


def _is_corrected(job: Job) -> bool:
    """Whether a label map is another than its facts say; those of earlier versions do not say."""
    try:
        written = json.loads(job.with_suffix(".json").read_text()).get("label_sha256")
        return bool(written) and written != _sha256(job.target)
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _work(source: Path, output: Path) -> tuple[list[Job], list[Fault], list[Fault]]:
    """What is to be done, files that should be done and cannot be, and files that are no CT.

    Raises:
        ValueError: no CT there, or an output that would replace a CT.
    """
    if not source.exists():
        raise ValueError(f"input={source} does not exist")
    to_file = output.name.endswith(".nii.gz") and not output.is_dir()
    if not source.is_dir() and not to_file:
        raise ValueError(f"output={output} must be a file that ends in .nii.gz, for input is one CT")
    if output.resolve() == source.resolve() and source.is_dir():
        raise ValueError(f"output={output} is the input's folder: its label maps would be taken for CTs next time")
    if source.is_dir() and output.exists() and not output.is_dir() and not to_file:
        raise ValueError(f"output={output} is a file: give a folder, for input is one")
    scans, faults, left_out = scan_files(source, "input", [output], _without_made)
    if to_file and len(scans) + len(faults) > 1:
        raise ValueError(
            f"output={output} is one file, and input={source} holds {len(scans) + len(faults)} CTs: name a folder"
        )
    targets = [output] if to_file else [output / f"{_name_of(one, source)}.nii.gz" for one in scans]
    for one, target in zip(scans, targets):
        if target.resolve() == one.path.resolve():
            raise ValueError(f"output={output} would replace the CT {one.path}: choose another")
    jobs = [Job(one, target) for one, target in zip(scans, targets)]
    for job in (job for job in jobs if not _is_made(job.target)):
        if job.target.exists():
            raise ValueError(
                f"output={output}: {job.target} is there, and predict has not written it: choose another "
                "output, or delete that file if a version of before was ended while it wrote"
            )
        for companion in filter(Path.exists, map(job.with_suffix, COMPANIONS)):
            raise ValueError(
                f"output={output}: {companion} is there and would be replaced, and no {job.with_suffix('.json').name} "
                "says that predict has written it: choose another output, or move it away"
            )
    return jobs, faults, left_out


def _without_made(tree: Tree) -> tuple[Tree, list[Fault]]:
    """A folder's files but for what an earlier call wrote."""
    made = [path for path in tree.paths if path.endswith(".nii.gz") and _is_made(Path(path))]
    tree = tree.without(path.removesuffix(".nii.gz") + end for path in made for end in (".nii.gz", *COMPANIONS))
    return tree, [Fault(path, "a label map that predict has written") for path in made]


def _is_made(path: Path) -> bool:
    """Whether predict has written a label map, by the facts beside it."""
    try:
        return "maker" in json.loads(path.with_name(f"{path.name.removesuffix('.nii.gz')}.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _name_of(scan: ScanFile, source: Path) -> str:
    """A scan's id; that of a series that lies in the input's folder itself begins with this folder's name."""
    in_root = scan.slices and scan.path == source.resolve()
    return f"{identity.plain(source.resolve().name)}{identity.JOIN}{scan.scan_id}" if in_root else scan.scan_id


def predict_one(
    model: Segmenter | LightSegmenter, meta: CheckpointMeta, job: Job, maker: str, config: PredictConfig
) -> list[str]:
    """Segments one CT, at the voxel size that the network was trained on.

    Returns:
        In what the CT is unlike the training scans.
    """
    stamp = job.scan.stamp()
    scan = job.scan.read()
    notes = list(scan.notes)
    if meta.data:
        notes += disagreements(meta.data, meta.hu_window, scan.voxels, scan.affine)
    voxels, affine = scan.voxels, scan.affine
    if meta.spacing_mm:
        voxels, _, affine = resample(voxels, None, affine, meta.spacing_mm)
        notes = [note for note in notes if not note.startswith("its voxels are")]
    mean, std = statistics(voxels, meta.hu_window)
    classes = segment(
        model,
        normalise(voxels, meta.hu_window, mean, std),
        meta.patch_size,
        meta.task,
        air=float(normalise(np.array(AIR), meta.hu_window, mean, std)),
        overlap=config.inference.overlap,
        batch_size=config.inference.batch_size,
        flips=config.tta,
        precision=config.inference.precision,
    )
    if voxels is not scan.voxels:
        classes = onto_grid(classes, affine, scan.affine, scan.voxels.shape)
    values = sorted(meta.labels.values())
    label = np.array([0, *values], np.min_scalar_type(values[-1]))[classes]
    organs = viewer.legend(label, meta.labels, scan.affine, nested=meta.task == "binary")
    aside = job.target.with_name(f".part{os.getpid()}.{job.target.name}")
    try:
        ct.write_label(aside, label, job.scan.path, job.scan.slices)
        write_json(job.with_suffix(".json"), {"maker": ""})  # ours, and not whole: what is beside it may be another's
        for end in PAGE:
            job.with_suffix(end).unlink(missing_ok=True)
        written = _sha256(aside)
        put_in_place(aside, job.target)
    finally:
        aside.unlink(missing_ok=True)
    made_by = f"pgl_ray {pgl_ray.__version__}"
    if config.viewer:
        size = f"{' x '.join(map(str, scan.voxels.shape))} voxels"
        spacing = f"{' x '.join(f'{length:.3g}' for length in scan.spacing_mm)} mm (D, H, W)"
        texts = {
            "title": job.target.name.removesuffix(".nii.gz"),
            "subtitle": f"{job.scan.source}: {size} of {spacing}; labels by {config.run}",
            "made_by": made_by,
        }
        page, picture = viewer.make_page(scan.voxels, label, scan.affine, organs, texts, notes)
        write_aside(job.with_suffix(".html"), page.encode())
        write_aside(job.with_suffix(".png"), picture)
    facts = {"input": job.scan.source, "run": config.run, "organs": [organ._asdict() for organ in organs]}
    facts |= {"notes": notes, "made_by": made_by, "maker": maker, "stamp": stamp, "label_sha256": written}
    write_json(job.with_suffix(".json"), facts)
    return notes


def describe(result: Result) -> str:
    """The closing line."""
    before = f", {result.num_finished_before} of them done before" if result.num_finished_before else ""
    return f"predict: {result.num_scans} label map{'s' * (result.num_scans != 1)} in {result.output}{before}"
