"""nnU-Net's rules, written down anew from its source (2.8.1), on files that export writes."""

import json

import numpy as np
import pytest
import torch

from pgl_ray import export
from pgl_ray.config import ExportConfig
from pgl_ray.model.encoder import build_encoder

WINDOW = [-1024.0, 325.0]


def exported(folder, depths, width):
    """A .pth of a run with a ResEnc of random weights, and the encoder."""
    torch.manual_seed(0)
    encoder = build_encoder("resenc", depths, width)
    meta = {"door": "pretrain", "method": "pgl", "encoder": encoder.settings, "level": encoder.last}
    meta |= {"hu_window": WINDOW, "config": json.dumps({"views": {"size": [32, 64, 128]}})}
    weights = {f"online.encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": weights, "meta": meta}, folder / "run.pt")
    export.run(ExportConfig(run=str(folder / "run.pt"), output=str(folder / "encoder.pth")))
    return folder / "encoder.pth", encoder


# -- keys and shapes of nnU-Net's ResidualEncoderUNet, from the arguments in its plan ----------------------------------


def conv_block(prefix, channels, width, kernel, bias=True):
    """ConvDropoutNormReLU, whose layers have two names: their own and their place in all_modules."""
    shapes = {}
    for conv, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
        shapes[f"{prefix}.{conv}.weight"] = (width, channels, *kernel)
        if bias:
            shapes[f"{prefix}.{conv}.bias"] = (width,)
        shapes[f"{prefix}.{norm}.weight"] = shapes[f"{prefix}.{norm}.bias"] = (width,)
    return shapes


def encoder_shapes(plan):
    """Keys of ResidualEncoder: a stem, then per stage blocks of two convolutions; a block that is strided has its
    projection behind the pooling (skip.1), one that only changes channels has it first (skip.0)."""
    features, shapes = plan["features_per_stage"], {}
    shapes |= conv_block("stem.convs.0", 1, features[0], plan["kernel_sizes"][0])
    channels = features[0]
    for i in range(plan["n_stages"]):
        for j in range(plan["n_blocks_per_stage"][i]):
            block, width, kernel = f"stages.{i}.blocks.{j}", features[i], plan["kernel_sizes"][i]
            strided = j == 0 and max(plan["strides"][i]) > 1
            shapes |= conv_block(f"{block}.conv1", channels, width, kernel)
            shapes |= conv_block(f"{block}.conv2", width, width, kernel)
            if channels != width:
                shapes |= conv_block(f"{block}.skip.{int(strided)}", channels, width, (1, 1, 1), bias=False)
            channels = width
    return shapes


def decoder_shapes(plan, num_classes):
    """Of UNetDecoder: the encoder again, up-convolutions, a block behind each, and its segmentation layer."""
    features = plan["features_per_stage"]
    shapes = {f"encoder.{key}": shape for key, shape in encoder_shapes(plan).items()}
    for i, (below, skip) in enumerate(zip(features[:0:-1], features[-2::-1])):
        stride = plan["strides"][-1 - i]
        shapes |= {f"transpconvs.{i}.weight": (below, skip, *stride), f"transpconvs.{i}.bias": (skip,)}
        shapes |= conv_block(f"stages.{i}.convs.0", 2 * skip, skip, plan["kernel_sizes"][-2 - i])
        shapes |= {f"seg_layers.{i}.weight": (num_classes, skip, 1, 1, 1), f"seg_layers.{i}.bias": (num_classes,)}
    return shapes


def network_shapes(plan, num_classes=3):
    encoder = {f"encoder.{key}": shape for key, shape in encoder_shapes(plan).items()}
    return encoder | {f"decoder.{key}": shape for key, shape in decoder_shapes(plan, num_classes).items()}


@pytest.mark.parametrize(("depths", "width"), [([1, 1, 2, 1, 1], 4), ([1, 2, 1, 1, 1, 1, 1], 2)])
def test_its_pretrained_trainer_finds_every_encoder_key(tmp_path, depths, width):
    """PretrainedTrainer.load_pretrained_weights: the stem's and the stages' tensors by prefix, each set complete."""
    file, encoder = exported(tmp_path, depths, width)
    saved = torch.load(file, weights_only=True)
    plan, weights = saved["nnssl_adaptation_plan"], saved["network_weights"]
    wanted = network_shapes(plan["architecture_plans"]["arch_kwargs"])
    assert plan["key_to_stem"] not in weights  # else it takes the stem for a part of the encoder
    for theirs, ours in (("encoder.stem", plan["key_to_stem"]), ("encoder.stages", plan["key_to_encoder"])):
        inside = {key.replace(theirs, ""): shape for key, shape in wanted.items() if key.startswith(theirs)}
        given = {key.replace(ours, ""): tuple(one.shape) for key, one in weights.items() if key.startswith(ours)}
        assert given == inside and len(inside) > 5
    for key, value in encoder.state_dict().items():
        assert torch.equal(weights[f"encoder.{key}"], value)
    # layers that have two names must agree, since the last one loaded wins
    for key, value in weights.items():
        if ".conv." in key:
            assert torch.equal(value, weights[key.replace(".conv.", ".all_modules.0.")])
    # of several input channels it repeats the weights under these names
    assert all(f"{name}.weight" in weights for name in plan["keys_to_in_proj"])
    assert {"citations", "nnssl_adaptation_plan", "network_weights"} <= saved.keys()


def test_the_plan_it_makes_survives_its_json(tmp_path):
    """preprocess_like_nnssl: keys it reads, and what it writes into a plans file."""
    saved = torch.load(exported(tmp_path, [1, 1, 1], 2)[0], weights_only=True)
    plan = saved["nnssl_adaptation_plan"]
    for key in ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe", "pretrain_num_input_channels"):
        assert key in plan
    (settings,) = plan["pretrain_plan"]["configurations"].values()
    assert settings["spacing"] is None  # so `-am like_pretrained` falls back to the data set's own
    assert json.loads(json.dumps(plan)) == plan and all("name" in one for one in saved["citations"])
    halves = [int(np.prod(axis)) for axis in zip(*plan["architecture_plans"]["arch_kwargs"]["strides"])]
    assert all(size % step == 0 for size, step in zip(plan["recommended_downstream_patchsize"], halves))


def test_its_plain_way_refuses_a_bare_encoder(tmp_path):
    """nnUNetv2_train -pretrained_weights: every key but those of seg_layers must be there, of the same shape."""
    saved = torch.load(exported(tmp_path, [1, 1, 1], 2)[0], weights_only=True)
    plan, weights = saved["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"], saved["network_weights"]
    missing = [key for key in network_shapes(plan) if ".seg_layers." not in key and key not in weights]
    assert missing and all(key.startswith("decoder.") for key in missing)
