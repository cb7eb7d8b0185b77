"""What Python users call: the README's examples run, alignment against ramps of coordinates, one line for mistakes."""

import importlib
import inspect
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from pgl_ray import api, cli
from pgl_ray.config import CropConfig
from pgl_ray.data import scan_files, store
from pgl_ray.model.encoder import build_encoder
from pgl_ray.prior import Prior

README = Path(__file__).resolve().parents[1] / "pgl_ray" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text().partition("## From Python")[2], re.S)
AFFINE = np.array([[0, 0, -4.0, 60], [0, -4.0, 0, 20], [3.0, 0, 0, -9], [0, 0, 0, 1]])  # d, h, w -> RAS+ mm


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def body(seed, shape=(24, 110, 120)):
    rng = np.random.default_rng(seed)
    d, h, w = (np.linspace(-1, 1, n) for n in shape)
    inside = d[:, None, None] ** 2 * 0.4 + h[None, :, None] ** 2 + w[None, None, :] ** 2 < 0.64
    blobs = ndimage.gaussian_filter(rng.normal(0, 1, shape), (1, 3, 3))
    return np.where(inside, 60 + 250 * blobs / blobs.std(), -1000).clip(-1000, 900).astype(np.int16)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with what the README's examples read."""
    for number in (1, 2):
        affine = np.diag([-4.0, -4.0, 3.0, 1.0])
        nib.save(nib.Nifti1Image(body(number).transpose(2, 1, 0), affine), tmp_path / f"ct_{number}.nii.gz")
    for number in range(3):
        scan_files.write_scan(tmp_path / "stores/mine", f"s{number}", body(number), AFFINE, split="train")
    store.write_index(tmp_path / "stores/mine", {}, (-1024.0, 325.0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_three_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_readmes_examples_run(here, capsys, number):
    names = {}
    exec(compile(EXAMPLES[number], f"example {number + 1}", "exec"), names)
    said = capsys.readouterr().out
    if number == 0:
        assert "layer2 (64, 6, 14, 15) torch.Size([1, 64])" in said and "layer4 (256, 3, 7, 8)" in said
        assert names["match"].matched_mm.shape == (3,)
    elif number == 1:
        assert said.startswith("['s0', ") and names["vectors"].shape == (3, 256)
    else:
        assert names["one"].shape == names["other"].shape == (256, 2, 6, 6) and said.startswith("tensor(")


def test_the_readmes_views_go_where_the_encoder_is(here, monkeypatch):
    """Meta stands for a GPU: a network there takes no tensor of the CPU either."""
    (example,) = (text for text in EXAMPLES if "encoder.network" in text)
    load_encoder, names = api.load_encoder, {}

    def far(*args):
        encoder = load_encoder(*args)
        encoder.network.to("meta").register_forward_hook(lambda _, seen, maps: [torch.zeros(m.shape) for m in maps])
        return encoder

    monkeypatch.setattr(api, "load_encoder", far)
    exec(compile(example, "example", "exec"), names)
    assert names["encoder"].device.type == "meta" and names["one"].shape == (256, 2, 6, 6)


def test_every_name_is_documented():
    text = README.read_text()
    for name in (
        "load_encoder",
        "open_store",
        "read_scan",
        "dense_features",
        "pooled",
        "match",
        "sample_prior",
        "align",
    ):
        assert f"`{name}(" in text and callable(getattr(api, name))


@pytest.mark.parametrize("door", cli.DOORS)
def test_every_door_is_documented_as_a_call(door):
    """With its config, and names of its result that there are."""
    known, module = cli.DOORS[door], importlib.import_module(f"pgl_ray.{door.split()[0]}")
    call = f"`{door.split()[0]}.{known.run}({known.model.__name__})`"
    (line,) = [line for line in README.read_text().splitlines() if call in line and line.startswith("|")]
    result = inspect.signature(getattr(module, known.run)).return_annotation
    fields = getattr(result, "__annotations__", {})
    said = set(re.findall(r"`\.(\w+)`", line.split("|")[2]))
    assert said <= fields.keys() or not fields


@pytest.mark.parametrize("flips", [((0, 0, 0), (0, 0, 0)), ((1, 0, 1), (0, 1, 1))])
def test_aligned_features_lie_at_the_same_places(flips):
    """Features that are their cells' places in the scan: whatever two views did, they agree where none is clamped."""
    view, stride, center = (16, 48, 48), (4, 8, 8), (0.5, 0.5, 0.5)
    boxes = np.array([[[2, 20], [5, 60], [10, 70]], [[6, 24], [20, 80], [4, 60]]])
    maps, priors = [], []
    for box, flip in zip(boxes, flips):
        axes = []
        for axis in range(3):
            cells = stride[axis] * np.arange(view[axis] // stride[axis]) + center[axis]
            cells = view[axis] - cells if flip[axis] else cells
            axes.append(box[axis, 0] + cells * (box[axis, 1] - box[axis, 0]) / view[axis])
        maps.append(torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij"))))
        priors.append(Prior(box, np.array(flip, bool)))
    one, other = api.align(tuple(maps), tuple(priors), view, stride, center)
    overlap = np.array([[6, 20], [20, 60], [10, 60]])
    num = [n // s for n, s in zip(view, stride)]
    bins = [low + (np.arange(n) + 0.5) / n * (high - low) for (low, high), n in zip(overlap, num)]
    right = np.stack(np.meshgrid(*bins, indexing="ij"))
    inside = np.ones(right.shape[1:], bool)
    for values in maps:
        for axis in range(3):
            inside &= (right[axis] >= float(values[axis].min())) & (right[axis] <= float(values[axis].max()))
    assert inside.sum() > 20
    for aligned in (one, other):
        np.testing.assert_allclose(aligned.numpy()[:, inside], right[:, inside], atol=1e-3)


def test_align_refuses_crops_apart():
    priors = [Prior(np.array([[0, 8], [0, 8], [start, start + 8]]), np.zeros(3, bool)) for start in (0, 8)]
    maps = torch.zeros(2, 3, 2, 2, 2)
    with pytest.raises(ValueError, match="do not overlap"):
        api.align(tuple(maps), tuple(priors), (8, 8, 8), (4, 4, 4), (0.5, 0.5, 0.5))


def test_scans_of_a_store(here):
    mine = api.open_store("stores/mine")
    scan = api.read_scan(mine, "s1")
    assert np.array_equal(scan.voxels, body(1)) and np.array_equal(scan.affine, AFFINE)
    assert np.array_equal(api.read_scan("ct_1.nii.gz").voxels, body(1))
    with pytest.raises(ValueError, match=r"scan_id='s7' is not in .*mine, which has s0, s1, s2$"):
        api.read_scan(mine, "s7")


def test_a_place_outside_is_refused(here):
    encoder = api.load_encoder("pretrained:openkbp_small", size=(8, 32, 32))
    scan = api.read_scan("ct_1.nii.gz")
    with pytest.raises(
        ValueError, match=r"\[500, 0, 0\] mm \(RAS\+\) lies outside of the scan, which spans x -478 to 2,"
    ):
        api.match(encoder, scan, scan, [[500.0, 0, 0]])


def test_a_prior_is_a_crop_and_flips():
    prior = api.sample_prior(np.random.default_rng(0), (40, 200, 200), CropConfig())
    length = prior.box[:, 1] - prior.box[:, 0]
    assert (length >= [18, 106, 106]).all() and (length <= [22, 134, 134]).all() and prior.flip.dtype == bool


@pytest.mark.slow
def test_a_store_of_another_window_is_refused(tmp_path, here):
    """Weights that do not say their window, with one given: views of that store would be clipped otherwise."""
    plain = tmp_path / "plain.pth"
    torch.save(build_encoder().state_dict(), plain)
    index = api.open_store("stores/mine")
    with pytest.raises(ValueError, match=r"hu_window=\[-200.0, 300.0\], and the index .* has \[-1024.0, 325.0\]: give"):
        api.load_encoder(str(plain), index, hu_window=(-200.0, 300.0))
    assert api.load_encoder(str(plain), hu_window=(-200.0, 300.0)).hu_window == (-200.0, 300.0)
