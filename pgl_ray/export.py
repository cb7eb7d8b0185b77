"""python -m pgl_ray.export run=RUN output=FILE [a.b=c ...]: a run's weights for use elsewhere, by the file's suffix.

    .safetensors   weights: of the paper's encoder they have the keys of monai's resnet50 (bottleneck, shortcut B, no
                   max-pool), so `load_state_dict` finds every key; `load` rebuilds the network
    .pt2           torch.export: runs without pgl_ray and MONAI
    .onnx          runs without torch
    .pth           nnU-Net: an encoder of kind=resenc with the plan that its pre-trained trainer reads

Every file says what the network expects as input, and is read back and compared with the network before it is kept.
"""

if __name__ == "__main__":  # before torch is imported, which help and refusals can do without
    from pgl_ray import cli

    cli.main("export")

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pgl_ray
from pgl_ray.config import ExportConfig, FailedRun, PatchConfig
from pgl_ray.data.durable import check_writable_file, put_in_place
from pgl_ray.data.facts import disagreements
from pgl_ray.data.rendering import normalise
from pgl_ray.data.voxel_statistics import statistics
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.train import formats
from pgl_ray.train.records import CheckpointMeta
from pgl_ray.train.weights import load_encoder, load_segmenter

INPUT = {
    "axes": "N,1,D,H,W",
    "orientation": "SPL: D towards the head (S), H towards the back (P), W towards the patient's left (L)",
    "normalisation": "clip HU to hu_window, subtract the clipped scan's mean, divide by its standard deviation",
}
TOLERANCE = 1e-4  # of an exported network's outputs, as a share of the largest


@dataclass(frozen=True)
class Result:
    """What was written.

    Attributes:
        output: the file.
        part: "encoder" or "segmenter".
        num_parameters: of it.
        max_difference: largest absolute difference of the read-back network's outputs from PyTorch's.
        largest: largest absolute output.
    """

    output: str
    part: str
    num_parameters: int
    max_difference: float
    largest: float


@dataclass(frozen=True)
class Expected:
    """What an exported network expects.

    Attributes:
        metadata: of the file, decoded.
    """

    metadata: dict[str, Any]

    def prepare(self, voxels: np.ndarray, affine: np.ndarray) -> Tensor:
        """HU as the network's input; warns (UserWarning) where the scan is unlike those of the training.

        Args:
            voxels: [D, H, W], HU.
            affine: [4, 4], voxel index (d, h, w, 1) -> RAS+ mm, as `pgl_ray.files.ct.read_scan` gives it.

        Returns:
            float32 [1, 1, D, H, W].

        Raises:
            ValueError: not one 3D volume, or voxels that are not finite.
        """
        voxels = np.asarray(voxels)
        if voxels.ndim != 3 or not np.isfinite(voxels).all():
            raise ValueError(f"voxels of shape {voxels.shape}: expected one 3D volume (D, H, W) of finite HU")
        whole = np.rint(np.clip(voxels, -32768, 32767)).astype(np.int16)
        window, facts = self.metadata["hu_window"], self.metadata.get("training_scans")
        for text in disagreements(facts, window, whole, affine) if facts else []:
            warnings.warn(f"unlike the scans that the network was trained on: {text}", stacklevel=2)
        return torch.from_numpy(normalise(voxels, window, *statistics(whole, window)))[None, None]


def load(path: str | Path) -> tuple[nn.Module, Expected]:
    """Rebuilds the network of a .safetensors file that `export` wrote.

    Args:
        path: of the file, or pretrained:NAME for weights that come with pgl_ray.

    Returns:
        The encoder (its maps up to the last one that was trained, finest first) or the segmentation network (logits),
        in eval mode, and what it expects.

    Raises:
        ValueError: missing, damaged, or not written by pgl_ray.
    """
    network, metadata = formats.load(path)
    return network, Expected(metadata)


def run(config: ExportConfig) -> Result:
    """Writes the file aside, compares it with the network, then renames it.

    Raises:
        ValueError: no checkpoint, an unknown suffix, a part that the run or the format has not, a missing package.
        FailedRun: the file's network computes something else.
    """
    output = Path(config.output)
    writers = {".safetensors": formats.write_safetensors, ".pt2": formats.write_program}
    writers |= {".onnx": formats.write_onnx, ".pth": formats.write_nnunet}
    if output.suffix not in writers:
        raise ValueError(f"output={config.output}: expected a name that ends in {', '.join(writers)}")
    check_writable_file(f"output={config.output}", output)
    network, part, meta = _network(config, nnunet=output.suffix == ".pth")
    metadata = _metadata(network, part, meta)
    trained = json.loads(meta.config)
    sized = trained.get("views") or trained.get("patch") or {}
    size = config.size or meta.patch_size or sized.get("size") or PatchConfig().size
    examples = [torch.randn((n, 1, *size), generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    aside = output.with_name(f".part{os.getpid()}.{output.name}")
    try:
        with torch.no_grad():
            computed = writers[output.suffix](network, metadata, examples, aside)
            truth = [formats.as_list(network(x)) for x in examples]
        differences = [float((a - b).abs().max()) for pair in zip(computed, truth) for a, b in zip(*pair, strict=True)]
        difference, largest = np.max(differences), np.max([float(value.abs().max()) for row in truth for value in row])
        if not np.isfinite(largest):
            raise FailedRun(f"run={config.run}: its network's values are not finite, so it is of no use")
        if not difference <= TOLERANCE * largest:  # nor where it is NaN
            raise FailedRun(f"{output.name} computes something else: {difference:.3g} of at most {largest:.3g}")
        put_in_place(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    return Result(str(output), part, sum(p.numel() for p in network.parameters()), float(difference), float(largest))


def _network(config: ExportConfig, nnunet: bool) -> tuple[nn.Module, str, CheckpointMeta]:
    """The network to export, in eval mode, which part it is, and what the checkpoint says of it."""
    encoder, meta = load_encoder(config.run)
    trained_part = "encoder" if meta.door == "pretrain" or nnunet else "segmenter"
    part = trained_part if config.part == "auto" else config.part
    if part == "segmenter" and trained_part == "encoder":
        why = "nnU-Net takes an encoder alone" if nnunet else f"run={config.run} is a pretrain run"
        raise ValueError(f"part=segmenter: {why}: take part=encoder")
    if nnunet and not isinstance(encoder, ResEncoder):
        raise ValueError(
            f"output={config.output}: nnU-Net cannot express the bottleneck ResNet of run={config.run}: pre-train with "
            "encoder.kind=resenc, or export .safetensors"
        )
    if part == "segmenter":
        return load_segmenter(config.run)[0], part, meta
    encoder.stop_at(encoder.last if meta.level is None else meta.level)  # what is behind was not trained
    return encoder.eval(), part, meta


def _metadata(network: nn.Module, part: str, meta: CheckpointMeta) -> dict[str, str]:
    """What must be known to use the weights; JSON where it is more than a text."""
    encoder = network if part == "encoder" else network.encoder
    facts = meta.data
    spacing = "each scan's own, see training_scans" if facts else "not recorded"
    spacing = facts.get("resampled_mm") or meta.spacing_mm or spacing
    architecture = {"encoder": encoder.settings}
    entries: dict[str, Any] = {"part": part, **INPUT, "hu_window": meta.hu_window, "spacing_mm": spacing}
    entries["median_spacing_mm"] = facts["spacing_mm"][1] if facts else "not recorded"
    if part == "segmenter":
        architecture |= {"num_outputs": meta.num_outputs, "decoder": meta.decoder}
        entries |= meta.model_dump(include={"labels", "task", "patch_size"})
    else:
        maps = [{"output_stride": stride, "center": center} for stride, center in zip(encoder.strides, encoder.centers)]
        method = meta.method or "fine-tuned"
        entries |= {"maps": maps, "last_trained_map": encoder.last, "method": method}
    entries |= {"architecture": architecture, "training_scans": facts, "data_licence": _licence(facts)}
    entries["steps"] = "not recorded" if meta.steps is None else meta.steps
    entries["config"] = _without_places(json.loads(meta.config))
    entries |= {"made_by": f"pgl_ray {pgl_ray.__version__} {meta.door}", "pgl_ray_version": pgl_ray.__version__}
    entries["format"] = "pt"
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}


def _licence(facts: dict[str, Any]) -> str:
    """Under what the training data were published."""
    known = facts.get("data_sets") or ()
    named = [f"{one['name'] or 'a data set without a name'}: {one['licence'] or 'not stated'}" for one in known]
    return "; ".join(named) or "not stated"


def _without_places(config: Any) -> Any:
    """A config without what says something only of the machine: folders by their last name, no cluster."""
    if not isinstance(config, dict):
        return config
    settings = {key: _without_places(value) for key, value in config.items() if key != "ray"}
    places = {key: Path(settings[key]).name for key in ("index", "run", "init") if isinstance(settings.get(key), str)}
    return settings | places


def describe(result: Result) -> str:
    """The closing line."""
    part = "encoder" if result.part == "encoder" else "segmentation network"
    checked = f"largest difference from PyTorch {result.max_difference:.2g}, outputs up to {result.largest:.3g}"
    return f"export: {part} with {result.num_parameters:,} parameters in {result.output}; read back: {checked}"
