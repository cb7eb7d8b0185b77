"""Checkpoints of a run: which there are and whether they are whole, writing one, reading one.

A checkpoint is a folder checkpoint_<step> with state.pt and, with its sha256, checkpoint.json. It gets its name when
all of it is on the disk, so what has the name is whole.
"""

import contextlib
import hashlib
import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

import pgl_ray
from pgl_ray.data.durable import put_in_place
from pgl_ray.paths import is_url
from pgl_ray.train import run_paths
from pgl_ray.train.metrics import whole_lines
from pgl_ray.train.records import CheckpointMeta, parse
from pgl_ray.train.retry import retried
from pgl_ray.train.run_files import BEST, MANIFEST, NAME, SCANS, STATE, write_json

EXPORTED = (".pt2", ".onnx")  # programs, not weights by name
PICKLE = b"\x80"  # first byte of pickles, as torch.save wrote them before it wrote zip files
PREFIX = {"pretrain": "online.encoder.", "finetune": "encoder."}  # of the encoder's keys, by door


def named(run: str | Path) -> list[tuple[Path, int]]:
    """All folders with a checkpoint's name, with their steps, the newest last."""
    matches = [(place, NAME.fullmatch(place.name)) for place in Path(run).glob("checkpoint_*")]
    return sorted(((place, int(name[1])) for place, name in matches if name), key=lambda one: one[1])


def checkpoints(run: str | Path) -> list[tuple[Path, int]]:
    """All checkpoints that were written to their end, with their steps, the newest last."""
    return [(place, step) for place, step in named(run) if (place / MANIFEST).exists()]


def committed(run: str | Path) -> tuple[Path, int] | None:
    """The newest checkpoint that was written to its end, and its step."""
    written = checkpoints(run)
    return written[-1] if written else None


def committed_step(run: str | Path) -> int:
    """Step at which the run continues; 0 for a new one. A run may lie in a bucket."""
    mirror = run_paths.mirror(run)
    if mirror:
        return max(mirror.steps(), default=0)
    newest = committed(run)
    return newest[1] if newest else 0


def trained_on(run: str | Path) -> list[str]:
    """Kinds of device that a run was trained on up to its newest checkpoint, as `model.device.kind` names them; none:
    there is none yet."""
    newest = committed(run)
    return json.loads((newest[0] / MANIFEST).read_text()).get("devices", []) if newest else []


def figures_of(place: Path) -> dict[str, float]:
    """A checkpoint's metrics, as far as it has any."""
    return json.loads((place / MANIFEST).read_text()).get("metrics", {})


def damage_of(place: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, or none."""
    try:
        expected = json.loads((place / MANIFEST).read_text())["sha256"]
        with (place / STATE).open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == expected
        return None if same else f"{STATE} has another sha256 than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return f"{MANIFEST} is no JSON"
    except (KeyError, TypeError):
        return f"{MANIFEST} holds no sha256"


def _zip_damage(path: Path) -> str | None:
    """What the CRC-32 inside a file of torch.save say, which torch writes and does not check; none if all is well."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged zip file raises a dozen kinds
        return f"{type(error).__name__}: {error}"
    return f"the CRC of {bad} is wrong" if bad else None


# -- writing -----------------------------------------------------------------------------------------------------------


def write_checkpoint(run: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes a checkpoint's folder aside, brings it to the disk, then gives it its name.

    Args:
        run: folder of the run.
        step: steps done.
        state: tensors and plain values.
        facts: what else checkpoint.json says.

    Raises:
        OSError: storage fails; what has been there before is as it was.
    """
    place, began = folder_of(run, step), time.monotonic()
    aside = place.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    digest = write_state(aside / STATE, state)
    facts = {"step": step, "sha256": digest, "write_s": round(time.monotonic() - began, 3), **facts}
    write_json(aside / MANIFEST, facts | {"time": time.time(), "versions": versions()})
    if place.exists():  # written before, and then continued from an earlier one
        set_aside(place, ".old")
    put_in_place(aside, place)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"checkpoint_{step:08d}"


def set_aside(place: Path, suffix: str) -> Path:
    """Takes a checkpoint's name away, so that it counts no more; its new path."""
    aside = place.with_name(place.name + suffix)
    shutil.rmtree(aside, ignore_errors=True)
    return place.rename(aside)


class _Hashed:
    """A file that is written from its start to its end: keeps the sha256, and the error that torch hides."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_state(path: Path, state: dict[str, Any]) -> str:
    """torch.save written aside, brought to the disk, then renamed; the sha256.

    Raises:
        OSError: storage fails.
    """
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            hashed = _Hashed(file)
            try:
                torch.save(state, cast(IO[bytes], hashed))  # its annotation wants all of a file, it calls these two
            except RuntimeError as error:
                raise hashed.error or error from None
        put_in_place(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    return hashed.sha256.hexdigest()


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    return {"pgl_ray": pgl_ray.__version__, "torch": str(torch.__version__)}


# -- reading -----------------------------------------------------------------------------------------------------------


def resumed(run: str) -> dict[str, Any] | None:
    """State of the newest checkpoint of a run, from which this start of its workers continues; none for a new run.

    It lies on the host: what takes a part of it copies that to its own device, and nothing stays there twice.
    """

    def read() -> dict[str, Any] | None:
        newest = committed(run)
        return read_state(newest[0] / STATE) if newest else None

    return retried(read, f"run={run} cannot be read")


def read_state(path: Path, given: str = "") -> dict[str, Any]:
    """Reads a file written by torch.save; never unpickles code.

    Args:
        given: what the user wrote, for messages; "": "checkpoint" and its path.

    Raises:
        ValueError: missing, damaged, or no such file.
    """
    given = given or f"checkpoint {path}"
    if not path.is_file():
        raise ValueError(f"{given} does not exist")
    if path.suffix in EXPORTED:
        raise ValueError(f"{given}: weights are not read from {path.suffix}: export it as .safetensors instead")
    damage = _zip_damage(path) if zipfile.is_zipfile(path) else None
    if damage:
        raise ValueError(f"{given} is damaged or no pgl_ray checkpoint: {damage}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged zip file
        raise ValueError(f"{given} {_why_unread(path, error)}") from error


def _why_unread(path: Path, error: Exception) -> str:
    """What a file is that torch.load refuses, and what to give instead; torch's own texts are pages for programmers."""
    with path.open("rb") as file:
        head = file.read(2)
    if not head:
        return "is empty (0 bytes): copy or save it again"
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    pickled = any(name.endswith("/data.pkl") for name in names) or head[:1] == PICKLE
    if pickled and (
        type(error).__name__ == "UnpicklingError" or any(name.endswith("/constants.pkl") for name in names)
    ):
        return (
            "holds more than tensors, which is not loaded for safety: save its state_dict alone, "
            "torch.save(model.state_dict(), 'weights.pth'), or .safetensors"
        )
    return "is damaged or no file that torch.save wrote: copy it again, or give one of torch.save, or .safetensors"


def state_of(run: str) -> dict[str, Any]:
    """State of a run folder (its best or newest checkpoint), of a checkpoint folder, or of a .pt file; its "meta" is a
    `CheckpointMeta`."""
    state = read_state(file_of(run))
    meta = state.get("meta") if isinstance(state, dict) else None
    if not isinstance(meta, dict) or meta.get("door") not in PREFIX or "model" not in state:
        raise ValueError(f"{run} is no checkpoint of pgl_ray: give the folder of a pretrain or finetune run")
    return state | {"meta": parse(CheckpointMeta, meta | {"steps": state.get("step")}, f"checkpoint {run} is")}


def file_of(run: str) -> Path:
    """The file that a run's network is read from: best.pt, or of a pre-training the newest committed checkpoint; of a
    run in a bucket this machine's copy of it.

    Raises:
        ValueError: no run, or no checkpoint in it.
    """
    path = run_paths.network(run)
    if not path.exists():
        raise ValueError(f"run {run} does not exist")
    for file in (path, path / BEST, path / STATE):
        if file.is_file():
            return file
    newest = committed(path)
    if not newest:
        raise ValueError(f"{run} holds no checkpoint: is it a run folder, and did the run get as far as its first one?")
    return newest[0] / STATE


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def outdated(run: Path) -> bool:
    """Whether a fine-tuning's best network is another one than that which its evaluation is of, which has been trained
    on since; not of a run in a bucket, of whose network this machine may have an earlier copy."""
    if is_url(run_paths.origin(run)):
        return False
    made = json.loads((whole_lines(run / "evaluation" / SCANS) or ["{}"])[0])
    return "checkpoint" in made and (run / BEST).is_file() and made["checkpoint"] != sha256_of(run / BEST)


def below(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries whose keys start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
