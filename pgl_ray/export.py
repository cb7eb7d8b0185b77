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

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pgl_ray
from pgl_ray.config import ExportConfig, FailedRun, PatchConfig
from pgl_ray.data.durable import check_writable, put_in_place
from pgl_ray.data.facts import disagreements
from pgl_ray.data.rendering import normalise
from pgl_ray.data.store_settings import data_sets, read_settings
from pgl_ray.data.voxel_statistics import statistics
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.segmenter import build_segmenter
from pgl_ray.train.weights import load_encoder, load_segmenter, locate

INPUT = {
    "axes": "N,1,D,H,W",
    "orientation": "SPL: D towards the head (S), H towards the back (P), W towards the patient's left (L)",
    "normalisation": "clip HU to hu_window, subtract the clipped scan's mean, divide by its standard deviation",
}
CITATION = "Xie, Y., Zhang, J., Liao, Z., Xia, Y., & Shen, C. PGL: Prior-Guided Local Self-supervised Learning for 3D "
CITATION += "Medical Image Segmentation."
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(locate(path), "pt") as file:
            raw = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if "part" not in raw or "architecture" not in raw:
        raise ValueError(f"{path} says nothing about its network: was it written by pgl_ray's export?")
    metadata = {key: decode_text(value) for key, value in raw.items()}
    network = _build(metadata["architecture"])
    network.load_state_dict(weights)
    if metadata["part"] == "encoder":
        network.stop_at(metadata["last_trained_map"])
    return network.eval(), Expected(metadata)


def decode_text(text: str) -> Any:
    """JSON where it is some, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _build(architecture: dict[str, Any]) -> nn.Module:
    encoder = build_encoder(**architecture["encoder"])
    if "num_outputs" not in architecture:
        return encoder
    return build_segmenter(encoder, architecture["num_outputs"], architecture.get("decoder", "paper"))


def run(config: ExportConfig) -> Result:
    """Writes the file aside, compares it with the network, then renames it.

    Raises:
        ValueError: no checkpoint, an unknown suffix, a part that the run or the format has not, a missing package.
        FailedRun: the file's network computes something else.
    """
    output = Path(config.output)
    writers = {".safetensors": _safetensors, ".pt2": _torch_export, ".onnx": _onnx, ".pth": _nnunet}
    if output.suffix not in writers:
        raise ValueError(f"output={config.output}: expected a name that ends in {', '.join(writers)}")
    check_writable(f"output={config.output}", output.absolute().parent)
    network, part, meta = _network(config, nnunet=output.suffix == ".pth")
    metadata = _metadata(network, part, meta)
    trained = json.loads(meta["config"])
    sized = trained.get("views") or trained.get("patch") or {}
    size = config.size or meta.get("patch_size") or sized.get("size") or PatchConfig().size
    examples = [torch.randn((n, 1, *size), generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    aside = output.with_name(f".part{os.getpid()}.{output.name}")
    try:
        with torch.no_grad():
            computed = writers[output.suffix](network, metadata, examples, aside)
            truth = [_as_list(network(x)) for x in examples]
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


def _network(config: ExportConfig, nnunet: bool) -> tuple[nn.Module, str, dict[str, Any]]:
    """The network to export, in eval mode, which part it is, and the checkpoint's meta dict."""
    encoder, meta = load_encoder(config.run)
    own = "encoder" if meta["door"] == "pretrain" or nnunet else "segmenter"
    part = own if config.part == "auto" else config.part
    if part == "segmenter" and own == "encoder":
        why = "nnU-Net takes an encoder alone" if nnunet else f"run={config.run} is a pretrain run"
        raise ValueError(f"part=segmenter: {why}: take part=encoder")
    if nnunet and not isinstance(encoder, ResEncoder):
        raise ValueError(
            f"output={config.output}: nnU-Net cannot express the bottleneck ResNet of run={config.run}: pre-train with "
            "encoder.kind=resenc, or export .safetensors"
        )
    if part == "segmenter":
        return load_segmenter(config.run)[0], part, meta
    encoder.stop_at(meta.get("level", encoder.last))  # what is behind was not trained
    return encoder.eval(), part, meta


def _metadata(network: nn.Module, part: str, meta: dict[str, Any]) -> dict[str, str]:
    """What must be known to use the weights; JSON where it is more than a text."""
    encoder = network if part == "encoder" else network.encoder
    facts = meta.get("data")
    spacing = "each scan's own, see training_scans" if facts else "not recorded"
    spacing = (facts or {}).get("resampled_mm") or meta.get("spacing_mm") or spacing
    architecture = {"encoder": encoder.settings}
    found: dict[str, Any] = {"part": part, **INPUT, "hu_window": meta["hu_window"], "spacing_mm": spacing}
    found["median_spacing_mm"] = facts["spacing_mm"][1] if facts else "not recorded"
    if part == "segmenter":
        architecture |= {"num_outputs": meta["num_outputs"], "decoder": meta.get("decoder", "paper")}
        found |= {key: meta[key] for key in ("labels", "task", "patch_size")}
    else:
        maps = [{"output_stride": stride, "center": center} for stride, center in zip(encoder.strides, encoder.centers)]
        method = meta.get("method", "pgl" if meta["door"] == "pretrain" else "fine-tuned")  # old runs were all PGL
        found |= {"maps": maps, "last_trained_map": encoder.last, "method": method}
    found |= {"architecture": architecture, "training_scans": facts or {}, "data_licence": _licence(meta)}
    found["steps"] = "not recorded" if meta["steps"] is None else meta["steps"]
    found["config"] = _without_places(json.loads(meta["config"]))
    found |= {"made_by": f"pgl_ray {pgl_ray.__version__} {meta['door']}", "pgl_ray_version": pgl_ray.__version__}
    found["format"] = "pt"
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def _licence(meta: dict[str, Any]) -> str:
    """Under what the training data were published; of runs that did not note it, as their store says today."""
    known = (meta.get("data") or {}).get("data_sets")
    store = json.loads(meta["config"]).get("index", "")
    if known is None and store and "://" not in store:
        with contextlib.suppress(ValueError, OSError):
            known = data_sets(read_settings(store))
    named = [f"{one['name'] or 'a data set without a name'}: {one['licence'] or 'not stated'}" for one in known or ()]
    return "; ".join(named) or "not stated"


def _without_places(config: Any) -> Any:
    """A config without what says something of the machine alone: folders by their last name, no cluster."""
    if not isinstance(config, dict):
        return config
    kept = {key: _without_places(value) for key, value in config.items() if key != "ray"}
    places = {key: Path(kept[key]).name for key in ("index", "run", "init") if isinstance(kept.get(key), str)}
    return kept | places


def _as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


# -- formats: each writes a file, reads it back and computes the examples with it ------------------------------------


def _safetensors(network: nn.Module, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
    from safetensors.torch import save

    weights = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    path.write_bytes(save(weights, metadata))  # with the usual permissions
    again = load(path)[0]
    return [_as_list(again(x)) for x in examples]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters tell of operators of torchvision and of their own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _program(network: nn.Module, examples: list[Tensor]) -> torch.export.ExportedProgram:
    """The network for windows of one size, any number at a time."""
    with _quiet():
        return torch.export.export(network, (examples[1],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _torch_export(network: nn.Module, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
    with _quiet():
        torch.export.save(_program(network, examples), path, extra_files={"pgl_ray.json": json.dumps(metadata)})
        again = torch.export.load(path).module()
    return [_as_list(again(x)) for x in examples]


def _onnx(network: nn.Module, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'pgl_ray[onnx]'") from None
    with _quiet():
        program = torch.onnx.export(_program(network, examples), dynamo=True, verbose=False, input_names=["volume"])
        program.model.metadata_props.update(metadata)
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [[torch.from_numpy(out) for out in session.run(None, {"volume": x.numpy()})] for x in examples]


def _nnunet(network: ResEncoder, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
    """As nnU-Net's `preprocess_like_nnssl` and `PretrainedTrainer` read it (torch.load with weights_only=True)."""
    known = {key: json.loads(metadata[key]) for key in ("training_scans", "config")}
    facts, views = known["training_scans"], known["config"].get("views", {})
    spacing = facts.get("resampled_mm")
    settings = {
        "data_identifier": "pgl_ray",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "fixed" if spacing else "noresample",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "spacing": spacing,
        "patch_size": list(views.get("size", examples[0].shape[2:])),
    }
    plan = {
        "architecture_plans": {
            "arch_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            "arch_kwargs": network.nnunet_arch(),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "pretrain_plan": {
            "dataset_name": "pgl_ray",
            "plans_name": "pgl_ray",
            "original_median_spacing_after_transp": facts["spacing_mm"][1] if facts else [1.0, 1.0, 1.0],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "experiment_planner_used": metadata["made_by"],
            "configurations": {"pgl_ray": settings},
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": list(PatchConfig().size),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }
    weights = {f"encoder.{key}": value for key, value in network.state_dict().items()}
    citations = [{"type": "Pretraining Method", "name": "PGL", "apa_citations": [CITATION]}]
    kept = {"network_weights": weights, "nnssl_adaptation_plan": plan, "citations": citations}
    torch.save({**kept, "trainer_name": "pgl_ray", "metadata": metadata}, path)
    again = build_encoder(**network.settings).eval()
    read = torch.load(path, weights_only=True)["network_weights"]
    again.load_state_dict({key.removeprefix("encoder."): value for key, value in read.items()})
    again.stop_at(network.last)
    return [_as_list(again(x)) for x in examples]


def describe(result: Result) -> str:
    """The closing line."""
    part = "encoder" if result.part == "encoder" else "segmentation network"
    checked = f"largest difference from PyTorch {result.max_difference:.2g}, outputs up to {result.largest:.3g}"
    return f"export: {part} with {result.num_parameters:,} parameters in {result.output}; read back: {checked}"
