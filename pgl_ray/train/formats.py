"""A network's file in each format that it is exported to: written, read back, and the examples computed with it."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgl_ray.config import PatchConfig
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder
from pgl_ray.model.segmenter import LightSegmenter, Segmenter, build_segmenter
from pgl_ray.train.weights import locate

CITATION = "Xie, Y., Zhang, J., Liao, Z., Xia, Y., & Shen, C. PGL: Prior-Guided Local Self-supervised Learning for 3D "
CITATION += "Medical Image Segmentation."


def decode_text(text: str) -> Any:
    """JSON where it is some, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _build(architecture: dict[str, Any]) -> Encoder | ResEncoder | Segmenter | LightSegmenter:
    encoder = build_encoder(**architecture["encoder"])
    if "num_outputs" not in architecture:
        return encoder
    return build_segmenter(encoder, architecture["num_outputs"], architecture.get("decoder", "paper"))


def as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    """The maps of an encoder, or a segmentation network's logits as a list of one."""
    return [value] if isinstance(value, Tensor) else list(value)


def write_safetensors(network: nn.Module, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
    """Weights with metadata; `load` rebuilds the network."""
    from safetensors.torch import save

    weights = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    path.write_bytes(save(weights, metadata))  # with the usual permissions
    again = load(path)[0]
    return [as_list(again(x)) for x in examples]


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


def write_program(network: nn.Module, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
    """A program of torch.export's; the metadata in its pgl_ray.json."""
    with _quiet():
        torch.export.save(_program(network, examples), path, extra_files={"pgl_ray.json": json.dumps(metadata)})
        again = torch.export.load(path).module()
    return [as_list(again(x)) for x in examples]


def write_onnx(network: nn.Module, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
    """For runtimes without torch.

    Raises:
        ValueError: a package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'pgl_ray[onnx]'") from None
    with _quiet():
        program: Any = torch.onnx.export(
            _program(network, examples), dynamo=True, verbose=False, input_names=["volume"]
        )
        program.model.metadata_props.update(metadata)
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [[torch.from_numpy(out) for out in session.run(None, {"volume": x.numpy()})] for x in examples]


def write_nnunet(network: ResEncoder, metadata: dict[str, str], examples: list[Tensor], path: Path) -> list[list]:
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
    contents = {"network_weights": weights, "nnssl_adaptation_plan": plan, "citations": citations}
    torch.save({**contents, "trainer_name": "pgl_ray", "metadata": metadata}, path)
    again = build_encoder(**network.settings).eval()
    read = torch.load(path, weights_only=True)["network_weights"]
    again.load_state_dict({key.removeprefix("encoder."): value for key, value in read.items()})
    again.stop_at(network.last)
    return [as_list(again(x)) for x in examples]


def load(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a .safetensors file, in eval mode, and the file's metadata, decoded; as `export.load`."""
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
    if isinstance(network, Encoder | ResEncoder):
        network.stop_at(metadata["last_trained_map"])
    return network.eval(), metadata
