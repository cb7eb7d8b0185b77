"""python -m pgl_ray.predict run=RUN input=CT output=LABELS [a.b=c ...]: label maps in each CT's own geometry."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgl_ray.config import FailedRun, PredictConfig, command
from pgl_ray.data import ct, dicom, store
from pgl_ray.data.layout import series_names
from pgl_ray.data.resample import onto_grid, resample
from pgl_ray.data.stream import AIR
from pgl_ray.data.views import normalise
from pgl_ray.model.inference import pick_device, segment
from pgl_ray.model.segmenter import Segmenter
from pgl_ray.train.checkpoint import load_segmenter


class Result(NamedTuple):
    """Where the label maps lie, and how many there are."""

    output: str
    num_scans: int


def run(config: PredictConfig) -> Result:
    """Writes one label map (.nii.gz) per CT: the label values of the run's store on exactly the CT's grid.

    A file of a folder that cannot be read is named and left out; the others are done.

    Raises:
        ValueError: run, input or output cannot be used.
        FailedRun: some files of the folder failed.
    """
    jobs = _jobs(Path(config.input), Path(config.output))
    device = pick_device(config.inference.device)
    model, meta = load_segmenter(config.run, device)
    print(f"predict: {len(jobs)} scan{'s' * (len(jobs) != 1)} on {device}", flush=True)
    failed, began = [], time.monotonic()
    for done, (source, slices, target) in enumerate(jobs, 1):
        try:
            _predict(model, meta, source, slices, target, config)
        except (ValueError, OSError) as error:
            if not Path(config.input).is_dir():
                raise
            failed.append(source.name)
            print(f"predict: left out: {' '.join(str(error).split())}", flush=True)
        rate = (time.monotonic() - began) / done
        progress = f"{done}/{len(jobs)} scans, {rate:.1f} s per scan, {(len(jobs) - done) * rate:.0f} s left"
        print(f"predict: {progress}; {source.name}", flush=True)
    if failed:
        raise FailedRun(
            f"{len(failed)} of {len(jobs)} files failed: {', '.join(failed)}; the others are in {config.output}"
        )
    return Result(config.output, len(jobs))


def _jobs(source: Path, output: Path) -> list[tuple[Path, tuple[str, ...], Path]]:
    """CTs (a file, or a folder and the slices of a DICOM series in it) and their label maps.

    Raises:
        ValueError: no CT there, two CTs of one name, or an output that would replace a CT.
    """
    if not source.exists():
        raise ValueError(f"input={source} does not exist")
    if not source.is_dir():
        if not output.name.endswith(".nii.gz") or output.is_dir():
            raise ValueError(f"output={output} must be a file that ends in .nii.gz, for input is one CT")
        jobs = [(source, (), output)]
    else:
        found = dicom.find(source).series
        files = sorted(path for path in source.iterdir() if path.is_file() and ct.is_volume(path))
        scans = [(path, (), ct.bare_name(path)) for path in files]
        scans += [(Path(one.folder), one.slices, name) for one, name in zip(found, series_names(found, source))]
        if not scans:
            raise ValueError(f"input={source} holds no CT ({', '.join(ct.SUFFIXES)}) at its top level, nor DICOM below")
        if len(found) == len(scans) == 1 and output.name.endswith(".nii.gz"):
            return [(*scans[0][:2], output)]
        if output.exists() and not output.is_dir():
            raise ValueError(f"output={output} is a file: give a folder, for input is one")
        twice = [name for name, count in Counter(name for *_, name in scans).items() if count > 1]
        if twice:
            raise ValueError(
                f"input={source} holds several files named {', '.join(twice)}: their label maps would collide"
            )
        jobs = [(path, slices, output / f"{name}.nii.gz") for path, slices, name in scans]
    for path, _, target in jobs:
        if target.resolve() == path.resolve():
            raise ValueError(f"output={output} would replace the CT {path}: choose another")
    return jobs


def _predict(
    model: Segmenter,
    meta: dict[str, Any],
    source: Path,
    slices: tuple[str, ...],
    target: Path,
    config: PredictConfig,
) -> None:
    """Segments one CT, at the voxel size that the network was trained on. Written aside, then renamed."""
    scan = ct.read_scan(source, slices)
    voxels, affine = scan.voxels, scan.affine
    if meta.get("spacing_mm"):
        voxels, _, affine = resample(voxels, None, affine, tuple(meta["spacing_mm"]))
    window = tuple(meta["hu_window"])
    mean, std = store.statistics(voxels, window)
    classes = segment(
        model,
        normalise(voxels, window, mean, std),
        meta["patch_size"],
        meta["task"],
        air=float(normalise(np.array(AIR), window, mean, std)),
        overlap=config.inference.overlap,
        batch_size=config.inference.batch_size,
    )
    if voxels is not scan.voxels:
        classes = onto_grid(classes, affine, scan.affine, scan.voxels.shape)
    values = sorted(meta["labels"].values())
    values = np.array([0, *values], np.min_scalar_type(values[-1]))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".part{os.getpid()}.{target.name}")
    try:
        ct.write_label(aside, values[classes], source, slices)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def describe(result: Result) -> str:
    """The closing line."""
    return f"predict: {result.num_scans} label map{'s' * (result.num_scans != 1)} in {result.output}"


def main() -> None:
    command("predict", PredictConfig, run, describe)


if __name__ == "__main__":
    main()
