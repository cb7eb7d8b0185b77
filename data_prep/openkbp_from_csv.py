"""OpenKBP as it is published (sparse CSV files, folder provided-data of ababier/open-kbp) -> NIfTI for openkbp.yaml.

    python data_prep/openkbp_from_csv.py <provided-data> <target> [<table of patients to take>]
    python -m pgl_ray.prepare data_prep/openkbp.yaml source=<target> store=<store>

A CSV names the voxels of a 128 x 128 x 128 grid that are not 0 by their number, the last axis fastest; its axes run
towards the patient's posterior, left and inferior side. ct.csv holds HU + 1000, clipped below at 0. An organ without a
file is not annotated. openkbp_patients.csv lists the patients of pgl_ray's published results.
"""

import csv
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (128, 128, 128)
OFFSET = 1000
ORGANS = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")  # values 1 to 7
SPLITS = {"train-pats": "train", "validation-pats": "validation", "test-pats": "test"}


def read_sparse(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the voxels that a file names, and their values (1 in a mask, which states none).

    Raises:
        ValueError: not such a file, or voxels outside the grid.
    """
    lines = path.read_text().split()[1:]
    cells = [line.partition(",") for line in lines]
    try:
        numbers = np.array([int(number) for number, _, _ in cells], np.int64)
        values = np.array([float(value or 1) for _, _, value in cells])
    except ValueError as error:
        raise ValueError(f"{path}: no sparse CSV of OpenKBP ({error})") from None
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < np.prod(SHAPE):
        raise ValueError(f"{path}: voxels {numbers.min()} to {numbers.max()}, the grid has 0 to {np.prod(SHAPE) - 1}")
    return numbers, values


def as_nifti(volume: np.ndarray, voxel_mm: np.ndarray) -> nib.Nifti1Image:
    """A published grid with its axes towards left, posterior, superior; the first voxel lies at 0.

    Args:
        volume: [128, 128, 128] towards posterior, left, inferior.
        voxel_mm: voxel size as published: of both axes within a slice, and between slices.
    """
    image = nib.Nifti1Image(np.ascontiguousarray(volume.transpose(1, 0, 2)[:, :, ::-1]), None)
    image.set_sform(np.diag([-voxel_mm[1], -voxel_mm[0], voxel_mm[2], 1]), "scanner")
    image.header.set_xyzt_units("mm")
    return image


def convert(patient: Path, target: Path) -> list[str]:
    """Writes images/<patient>.nii.gz and labels/<patient>.nii.gz; where organs overlap, the larger value stands.

    Returns:
        The annotated organs.

    Raises:
        ValueError, OSError: a file that is missing or damaged.
    """
    voxel_mm = np.loadtxt(patient / "voxel_dimensions.csv")
    if voxel_mm.shape != (3,) or not (voxel_mm > 0).all():
        raise ValueError(f"{patient / 'voxel_dimensions.csv'}: {voxel_mm}, expected three lengths in mm")
    ct, label = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.uint8)
    numbers, values = read_sparse(patient / "ct.csv")
    if not numbers.size or values.min() < 0 or values.max() > 2**15 - 1:
        raise ValueError(f"{patient / 'ct.csv'}: no voxels, or values below 0 or above {2**15 - 1}")
    ct.reshape(-1)[numbers] = np.rint(values)
    organs = []
    for value, organ in enumerate(ORGANS, 1):
        if (patient / f"{organ}.csv").is_file():
            inside, _ = read_sparse(patient / f"{organ}.csv")
            label.reshape(-1)[inside] = value
            organs += [organ] if inside.size else []
    for kind, volume in (("images", ct - np.int16(OFFSET)), ("labels", label)):
        (target / kind).mkdir(parents=True, exist_ok=True)
        nib.save(as_nifti(volume, voxel_mm), target / kind / f"{patient.name}.nii.gz")
    return organs


def main(source: str, target: str, table: str = "") -> None:
    """Converts OpenKBP's patients, or those of `table` alone, and says what could not be converted."""
    patients = [path for folder in SPLITS for path in sorted(Path(source, folder).glob("pt_*")) if path.is_dir()]
    if table:
        with open(table, newline="") as file:
            wanted = {row["patient"] for row in csv.DictReader(file)}
        if absent := wanted - {path.name for path in patients}:
            sys.exit(f"openkbp: {table} names patients that are not in {source}: {', '.join(sorted(absent)[:5])}")
        patients = [path for path in patients if path.name in wanted]
    if not patients:
        sys.exit(f"openkbp: no {' or '.join(f'{folder}/pt_*' for folder in SPLITS)} in {source}: give provided-data")
    rows, failed = [], 0
    for patient in patients:
        try:
            organs = convert(patient, Path(target))
            rows.append((patient.name, SPLITS[patient.parent.name], " ".join(organs)))
        except (ValueError, OSError) as error:
            failed += 1
            print(f"openkbp: left out: {patient.name}: {error}", file=sys.stderr)
    if rows:
        with Path(target, "patients.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("patient", "split", "labelled_organs"), *rows])
    print(f"openkbp: {len(rows)} of {len(patients)} patients in {target}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit("usage: python data_prep/openkbp_from_csv.py <provided-data> <target> [<table of patients to take>]")
    main(*sys.argv[1:])
