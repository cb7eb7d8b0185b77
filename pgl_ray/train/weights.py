"""Networks as runs left them; initial weights from runs, from this package (pretrained/), exported safetensors, MONAI's
and MedicalNet's ResNets, and what of them fits."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgl_ray.config import PRETRAINED, ViewsConfig, another_store
from pgl_ray.model import device as on
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import LightSegmenter, Segmenter, build_segmenter
from pgl_ray.train import checkpoint, run_paths
from pgl_ray.train.records import CheckpointMeta, parse

NUM_NAMES = 3  # names of a kind that a line shows
COUNTER = "num_batches_tracked"  # of BatchNorm: no weight, and of one shape in every network
FOLDER = Path(__file__).parents[1] / "pretrained"  # of the weights that come with pgl_ray, each with its card


def load_encoder(run: str) -> tuple[Encoder | ResEncoder, CheckpointMeta]:
    """The online encoder of a pre-training run, or the encoder of a fine-tuned one.

    Args:
        run: run folder, checkpoint folder or .pt file.

    Returns:
        The encoder on the CPU, and what the checkpoint says of it.

    Raises:
        ValueError: no checkpoint, or one of another architecture.
    """
    state = checkpoint.state_of(run)
    meta: CheckpointMeta = state["meta"]
    encoder = build_encoder(**meta.encoder)
    _fill(encoder, checkpoint.below(checkpoint.PREFIX[meta.door], state["model"]), run)
    return encoder, meta


def load_segmenter(run: str, device: torch.device | str = "cpu") -> tuple[Segmenter | LightSegmenter, CheckpointMeta]:
    """The best segmentation network of a fine-tuning run, in eval mode.

    Returns:
        The network on `device`, and what the checkpoint says of it.

    Raises:
        ValueError: not a fine-tuning run.
    """
    state = checkpoint.state_of(run)
    meta: CheckpointMeta = state["meta"]
    if meta.door != "finetune":
        raise ValueError(f"{run} is a {meta.door} run: give a fine-tuning run")
    model = build_segmenter(build_encoder(**meta.encoder), meta.num_outputs, meta.decoder)
    _fill(model, state["model"], run)
    return on.lay_out(model, torch.device(device)).eval(), meta


def check_flips(run: str, meta: CheckpointMeta) -> None:
    """Refuses test-time augmentation of a network that has never seen a mirrored body.

    Args:
        run: as the user named it.
        meta: of the network.

    Raises:
        ValueError: it was trained without flips.
    """
    patch = json.loads(meta.config or "{}").get("patch") or {}
    if patch.get("flip_prob") == 0:
        raise ValueError(
            f"tta=true averages over flips, and run={run} was trained without them (patch.flip_prob=0): leave tta out"
        )


def _fill(module: nn.Module, weights: dict[str, Tensor], run: str) -> None:
    """Loads weights whose keys and shapes must all fit."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{run} holds weights of another architecture: {' '.join(str(error).split())[:160]}") from None


@dataclass(frozen=True)
class Source:
    """Tensors to start from.

    Attributes:
        init: where they come from, as given.
        tensors: by the keys of the network that they are for.
        wanted: keys that the network should find among them.
        left_out: keys of the file that nothing starts from: heads, targets, classifiers, stages that were not trained.
        level: number of the encoder's last map that was trained.
        meta: what the file says of itself; none: nothing.
    """

    init: str
    tensors: dict[str, Tensor]
    wanted: list[str]
    left_out: list[str]
    level: int
    meta: CheckpointMeta | None

    @property
    def view_size(self) -> tuple[int, int, int]:
        """(D, H, W) of the views that the encoder was trained on; the default where that is not known."""
        return self.meta.view_size if self.meta else ViewsConfig().size


@dataclass(frozen=True)
class Report:
    """What became of each tensor; names are those of the network.

    Attributes:
        init: where the weights come from, as given.
        loaded: tensors that were taken over.
        missing: the network has them, the file does not.
        unexpected: the file has them, the network does not.
        other_shape: name -> (shape in the file, shape in the network).
        left_out: keys of the file that nothing starts from.
        trained_on: what the file knows of the scans of its training, as `data.facts.training_facts` gives it; or {}.
    """

    init: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    other_shape: dict[str, tuple[list[int], list[int]]]
    left_out: list[str]
    trained_on: dict[str, Any]

    def mismatches(self) -> str:
        """What does not fit, in half a sentence; "" if all does."""
        shapes = [f"{name} {_times(theirs)}, here {_times(ours)}" for name, (theirs, ours) in self.other_shape.items()]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return ", ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names)

    def random_encoder(self) -> str:
        """How much of a segmentation network's encoder stays random, in half a sentence; "" where nothing does."""
        names = [name for name in (*self.other_shape, *self.missing) if name.startswith("encoder.")]
        return f"{len(names)} tensors of the encoder ({_some(names)})" if names else ""

    def lines(self) -> list[str]:
        """One line, and a second one where something did not fit."""
        num = len(_weights(self.loaded))
        text = f"{num} of {num + len(self.missing) + len(self.other_shape)} tensors from {self.init}"
        if self.left_out:
            text += f", {len(self.left_out)} of its others left out ({_some(self.left_out)})"
        wrong = self.mismatches()
        return [text, f"at random or not used: {wrong}"] if wrong else [text]


def _times(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _weights(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(COUNTER)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:NUM_NAMES]) + (", ..." if len(names) > NUM_NAMES else "")


def read(
    init: str, settings: dict[str, Any] | None, hu_window: tuple[float, float] | None, allow_partial: bool = False
) -> tuple[Encoder | ResEncoder, Source]:
    """An encoder of the right architecture, not yet filled, and the tensors for it.

    Args:
        init: folder or .pt file of a run; pretrained:NAME; .safetensors as `export` writes it; .pth of plain tensors
            with the keys of MONAI's ResNets (MedicalNet's too), with or without a prefix such as "module.".
        settings: of the encoder; none: the file's own, and where it has none the default.
        hu_window: of the scans that it will see; none: the file's own.
        allow_partial: whether the file's encoder may have other settings.

    Raises:
        ValueError: no such file, another HU window, or another architecture.
    """
    file, meta = _read(init)
    if hu_window is not None and meta and list(meta.hu_window) != list(hu_window):
        raise ValueError(
            f"init={init} was trained with hu_window={list(meta.hu_window)}, the index has {list(hu_window)}: "
            f"{another_store('hu_window', meta.hu_window)}"
        )
    wanted, known = json.loads(json.dumps([settings, meta and meta.encoder]))
    if wanted and known and not allow_partial and wanted != known:
        raise ValueError(
            f"init={init} holds an encoder {known}, the config asks for {wanted}: leave encoder.* out, or take what "
            "fits by allow_partial=true"
        )
    encoder = build_encoder(**(wanted or known or {}))
    return encoder, _for_encoder(init, file, meta, encoder)


def for_segmenter(source: Source, model: Segmenter | LightSegmenter) -> Source:
    """The same for a segmentation network: only its encoder, or, from a run of Models Genesis, whose network is the
    paper's `Segmenter`, all of that but the head."""
    tensors = {f"encoder.{name}": value for name, value in source.tensors.items()}
    wanted, left_out = [f"encoder.{name}" for name in source.wanted], source.left_out
    if source.meta and source.meta.method == "genesis" and isinstance(model, Segmenter):
        parts = ("aspp.", "ups.")
        restorer = checkpoint.below("online.", checkpoint.state_of(source.init)["model"])
        tensors |= {name: value for name, value in restorer.items() if name.startswith(parts)}
        wanted += [name for name in model.state_dict() if name.startswith(parts)]
        left_out = [name for name in left_out if not name.removeprefix("online.").startswith(parts)]
    return Source(source.init, tensors, wanted, left_out, source.level, source.meta)


def fill(module: nn.Module, source: Source, allow_partial: bool = False) -> Report:
    """Copies tensors into a network; counters of batches may be missing, and are nothing that fits.

    Raises:
        ValueError: names or shapes differ and allow_partial is not set, or nothing fits.
    """
    own, given = module.state_dict(), source.tensors
    common = [name for name in given if name in own]
    other_shape = {n: (list(given[n].shape), list(own[n].shape)) for n in common if given[n].shape != own[n].shape}
    report = Report(
        init=source.init,
        loaded=[name for name in common if name not in other_shape],
        missing=[name for name in _weights(source.wanted) if name not in given],
        unexpected=[name for name in given if name not in own],
        other_shape=other_shape,
        left_out=source.left_out,
        trained_on=source.meta.data if source.meta else {},
    )
    wrong = report.mismatches()
    if not _weights(report.loaded):
        raise ValueError(f"init={source.init} holds nothing that fits the network: {wrong}")
    if wrong and not allow_partial:
        raise ValueError(f"init={source.init} does not fit the network: {wrong}; allow_partial=true takes the rest")
    module.load_state_dict({name: given[name] for name in report.loaded}, strict=False)
    return report


# -- files ------------------------------------------------------------------------------------------------------------


def locate(init: str | os.PathLike) -> Path:
    """Path on this machine of what an init names: weights of this package (pretrained:NAME), another file, or a run.

    Raises:
        ValueError: no weights of that name come with pgl_ray.
    """
    init = os.fspath(init)
    if not init.startswith(PRETRAINED):
        return run_paths.network(init)
    files = {f"{PRETRAINED}{path.stem}": path for path in sorted(FOLDER.glob("*.safetensors"))}
    if init not in files:
        known = ", ".join(files) or "none; install it again"
        raise ValueError(f"init={init}: no weights of that name come with pgl_ray; there are: {known}")
    return files[init]


def _read(init: str) -> tuple[dict[str, Tensor], CheckpointMeta | None]:
    """All tensors of a file by its own keys, and what it says of itself."""
    path = locate(init)
    if path.suffix == ".safetensors":
        return _read_safetensors(init, path)
    if path.is_dir() or not path.exists():
        state = checkpoint.state_of(init)
        return state["model"], state["meta"]
    state = checkpoint.read_state(path, f"init={init}")
    if isinstance(state, dict) and isinstance(state.get("meta"), dict):
        state = checkpoint.state_of(init)
        return state["model"], state["meta"]
    tensors = state.get("state_dict", state) if isinstance(state, dict) else None
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"init={init} is no checkpoint of pgl_ray and holds no tensors by name")
    return tensors, None


def _read_safetensors(init: str, path: Path) -> tuple[dict[str, Tensor], CheckpointMeta | None]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"init={init} does not exist")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            texts = file.metadata() or {}
    except SafetensorError as error:
        mend = "; install pgl_ray again" if init.startswith(PRETRAINED) else ""
        raise ValueError(f"init={init} is damaged or no safetensors file: {error}{mend}") from None
    if not texts.get("made_by", "").startswith("pgl_ray "):
        return tensors, None
    try:
        names = {"hu_window": "hu_window", "last_trained_map": "level", "architecture": "encoder"}
        names |= {"training_scans": "data"}
        values = {ours: json.loads(texts[theirs]) for theirs, ours in names.items() if theirs in texts}
        values["encoder"] = values["encoder"]["encoder"]
        values["config"] = json.dumps(json.loads(texts.get("config", "{}")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"init={init}: its metadata are damaged: {error}") from None
    return tensors, parse(CheckpointMeta, values, f"init={init}: its metadata are")


def _for_encoder(
    init: str, file: dict[str, Tensor], meta: CheckpointMeta | None, encoder: Encoder | ResEncoder
) -> Source:
    """The encoder's tensors of a file, by its names; those of stages that were not trained are left out."""
    own, last = list(encoder.state_dict()), encoder.last
    level = last if meta is None or meta.level is None else meta.level
    encoder.stop_at(level)
    # ResEnc registers its layers twice
    named = encoder.named_parameters(remove_duplicate=False)
    frozen = [name for name, weight in named if not weight.requires_grad]
    encoder.stop_at(last)
    encoder.requires_grad_(True)
    out = ("fc.", *{f"{name.rpartition('.')[0]}." for name in frozen})  # MONAI's classifier, and untrained layers
    prefix = checkpoint.PREFIX[meta.door] if meta and meta.door else _prefix(file, own[0])
    tensors = {n: value for n, value in checkpoint.below(prefix, file).items() if not n.startswith(out)}
    left_out = [name for name in file if not name.startswith(prefix) or name.removeprefix(prefix) not in tensors]
    return Source(init, tensors, [name for name in own if not name.startswith(out)], left_out, level, meta)


def _prefix(names: Iterable[str], first: str) -> str:
    """What stands before the encoder's keys, e.g. "module." (DDP) or "encoder." (a segmentation network).

    Args:
        names: of the file.
        first: key of the encoder's stem; the blocks may have keys that end alike, but those are longer.
    """
    prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")]
    return min(prefixes, key=len, default="")
