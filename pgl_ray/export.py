"""python -m pgl_ray.export run=RUN output=FILE.safetensors: a run's weights for use elsewhere.

A pre-training run gives its encoder, whose keys are those of monai's resnet50 (bottleneck, shortcut B, no max-pool), so
`load_state_dict` finds every key; a fine-tuning run gives the whole segmentation network. The file's metadata say what
the network expects as input.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pgl_ray
from pgl_ray.config import ExportConfig, command
from pgl_ray.train import checkpoint

INPUT = {
    "axes": "N,1,D,H,W",
    "orientation": "D towards the head, H towards the back, W towards the patient's left (S, P, L)",
    "normalisation": "clip HU to hu_window, subtract the clipped scan's mean, divide by its standard deviation",
}


@dataclass(frozen=True)
class Result:
    """What was written."""

    output: str
    door: str
    num_parameters: int


def run(config: ExportConfig) -> Result:
    """Writes the file aside, then renames it.

    Raises:
        ValueError: no checkpoint, a wrong suffix, or safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("safetensors is not installed: pip install 'pgl_ray[export]'") from None
    if not config.output.endswith(".safetensors"):
        raise ValueError(f"output={config.output}: expected a name that ends in .safetensors")
    encoder, meta = checkpoint.load_encoder(config.run)
    model = encoder if meta["door"] == "pretrain" else checkpoint.load_segmenter(config.run)[0]
    kept = ("encoder", "level", "hu_window", "labels", "task", "num_outputs", "patch_size")
    metadata = INPUT | {key: json.dumps(meta[key]) for key in kept if key in meta}
    metadata |= {"format": "pt", "made_by": f"pgl_ray {pgl_ray.__version__} {meta['door']}", "config": meta["config"]}
    output = Path(config.output)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.part{os.getpid()}")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, aside, metadata)
    aside.replace(output)
    return Result(str(output), meta["door"], sum(p.numel() for p in model.parameters()))


def describe(result: Result) -> str:
    """The closing line."""
    part = "encoder" if result.door == "pretrain" else "segmentation network"
    return f"export: {part} with {result.num_parameters:,} parameters in {result.output}"


def main() -> None:
    command("export", ExportConfig, run, describe)


if __name__ == "__main__":
    main()
