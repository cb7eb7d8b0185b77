# %% [markdown]
# # Into MONAI
#
# The weights that `python -m pgl_ray.export run=RUN output=encoder.safetensors` writes have the keys of
# `monai.networks.nets.resnet50`, so MONAI's own class takes them; nothing below needs pgl_ray, which here makes the
# phantoms alone. Settings are taken from the environment:
#
# - `PGL_RAY_FILE`: such a file; without it the weights that come along (trained on heads and necks)
# - `PGL_RAY_CTS`: CTs and label maps in nnU-Net's folders (imagesTr, labelsTr, imagesTs, labelsTs, dataset.json);
#   without it CT phantoms with nine organs are made
# - `PGL_RAY_OUT`: where the picture is written; `PGL_RAY_TINY=1`: a few steps, to see that it runs

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from monai.networks.nets import ResNet, resnet50
from safetensors import safe_open
from torch import nn

from pgl_ray.phantom.phantom import write_phantoms
from pgl_ray.train.weights import locate

TINY = "PGL_RAY_TINY" in os.environ
OUT = Path(os.environ.get("PGL_RAY_OUT", "examples/monai_training")).absolute()
FILE = locate(os.environ.get("PGL_RAY_FILE", "pretrained:openkbp_small"))
CTS = Path(os.environ.get("PGL_RAY_CTS", OUT / "phantoms"))
OUT.mkdir(parents=True, exist_ok=True)
if "PGL_RAY_CTS" not in os.environ:
    write_phantoms(CTS, 0, 2 if TINY else 5, 1 if TINY else 3, seed=0, shape=(40, 96, 96), spacing_mm=(6.0, 3.5, 3.5))

# %% [markdown]
# ## The encoder
#
# The file says of which size it is: the paper's is a `resnet50`, a smaller one the same class with other depths. MONAI
# fixes the strides of the stages at 1,2,2,2; PGL's are 2,2,2,1 (`encoder.stage_strides`). `load_state_dict` is strict:
# a key that is missing, or one too many, is an error.

# %%
with safe_open(FILE, "pt") as file:
    metadata, weights = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
made = json.loads(metadata["architecture"])["encoder"]
options = {"spatial_dims": 3, "n_input_channels": 1, "conv1_t_size": 7, "conv1_t_stride": (1, 2, 2)}
options |= {"no_max_pool": True, "shortcut_type": "B", "feed_forward": False, "bias_downsample": False}
if (made["depths"], made["width"]) == ([3, 4, 6, 3], 64):
    encoder = resnet50(**options)
else:
    encoder = ResNet("bottleneck", made["depths"], [made["width"] * 2**stage for stage in range(4)], **options)
stages = [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]
for stage, stride in zip(stages, {"early": (2, 2, 2, 1), "late": (1, 2, 2, 2)}[made["stage_strides"]]):
    stage[0].conv2.stride = stage[0].downsample[0].stride = (stride,) * 3
loaded = encoder.load_state_dict(weights)
print(f"{type(encoder).__name__} of depths {made['depths']}: {loaded}")

# %% [markdown]
# ## A network that segments
#
# The encoder's five maps, each brought to 32 channels, summed at the finest and upsampled.


# %%
class Segmenter(nn.Module):
    def __init__(self, encoder, num_classes, width=32):
        super().__init__()
        self.stem = nn.Sequential(encoder.conv1, encoder.bn1, encoder.act)
        self.stages = nn.ModuleList([encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4])
        channels = [encoder.conv1.out_channels, *(stage[-1].conv3.out_channels for stage in self.stages)]
        self.sides = nn.ModuleList(nn.Conv3d(num, width, 1) for num in channels)
        self.head = nn.Sequential(nn.InstanceNorm3d(width), nn.ReLU(), nn.Conv3d(width, num_classes, 3, padding=1))

    def forward(self, x):
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        sides = [side(one) for side, one in zip(self.sides, maps)]
        total = sum(nn.functional.interpolate(one, maps[0].shape[2:], mode="trilinear") for one in sides)
        return nn.functional.interpolate(self.head(total), x.shape[2:], mode="trilinear")


# %% [markdown]
# ## Training, in 40 lines of MONAI
#
# Scans must come as in pre-training: axes towards head, back and left ("SPL"), HU clipped to the file's `hu_window`,
# then zero mean and unit deviation per scan; and with voxels of about the file's `median_spacing_mm` (add `Spacingd`
# where yours differ). The encoder learns at a tenth of the rate.

# %%
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.utils import set_determinism

keys, size, epochs = ["image", "label"], (16, 32, 32) if TINY else (24, 64, 64), 1 if TINY else 60
num_classes = len(json.loads((CTS / "dataset.json").read_text())["labels"])
low, high = json.loads(metadata["hu_window"])
set_determinism(0)
prepare = [mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys), mt.Orientationd(keys, "SPL", labels=None)]
prepare += [mt.ScaleIntensityRanged("image", low, high, low, high, clip=True), mt.NormalizeIntensityd("image")]
crop = mt.RandCropByPosNegLabeld(keys, "label", size, pos=4, neg=1, num_samples=4)


def cases(part):
    labels = sorted((CTS / f"labels{part}").glob("*.nii.gz"))
    images = [CTS / f"images{part}" / label.name.replace(".nii.gz", "_0000.nii.gz") for label in labels]
    return [{"image": image, "label": label} for image, label in zip(images, labels)]


train = DataLoader(CacheDataset(cases("Tr"), mt.Compose([*prepare, crop]), progress=False), batch_size=1, shuffle=True)
test = CacheDataset(cases("Ts"), mt.Compose(prepare), progress=False)
network, losses = Segmenter(encoder, num_classes), []
loss_of = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
groups = [{"params": list(encoder.parameters()), "lr": 3e-4}]
groups += [{"params": [*network.sides.parameters(), *network.head.parameters()]}]
optimizer = torch.optim.AdamW(groups, lr=3e-3)
for _ in range(epochs):
    for batch in train:
        loss = loss_of(network.train()(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
dice = DiceMetric(include_background=False)
with torch.inference_mode():
    for case in test:
        predicted = sliding_window_inference(case["image"][None], size, 4, network.eval(), overlap=0.5).argmax(1, True)
        dice(one_hot(predicted, num_classes), one_hot(case["label"][None], num_classes))
print(f"{len(losses)} steps, loss {losses[-1]:.3f}; Dice of unseen scans {dice.aggregate().item():.3f}")

# %%
row = case["image"].shape[2] // 2
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
axes[0].plot(losses)
axes[0].set(xlabel="step", ylabel="loss, lower is better")
for ax, label, title in ((axes[1], case["label"][0], "by hand"), (axes[2], predicted[0, 0], "found")):
    ax.imshow(case["image"][0, :, row], cmap="gray", vmin=0, vmax=2, origin="lower")
    organs = label[:, row].numpy()
    ax.imshow(organs, cmap="tab10", vmin=1, vmax=10, alpha=0.6 * (organs > 0), origin="lower")
    ax.set(title=title, aspect=case["image"].pixdim[0].item() / case["image"].pixdim[2].item())
    ax.set_axis_off()
figure.savefig(OUT / "monai.png", dpi=120)
