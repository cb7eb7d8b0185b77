"""embed: what is pooled and where features lie, against loops and hand arithmetic; what is done twice; wrong use."""

import io
import os
import re
from dataclasses import replace
from itertools import product

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from browser import CHROMIUM, faults
from matplotlib.image import imread
from scipy import ndimage

from pgl_ray import api, cli, embed, export
from pgl_ray.config import EmbedConfig, FailedRun, build
from pgl_ray.data import scan_files, store
from pgl_ray.files.ct import Scan
from pgl_ray.judge import embedding, features
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.pages import embed_page

INIT = "pretrained:openkbp_small"
SHAPE, SPACING = (12, 40, 48), (3.0, 4.0, 4.5)
AFFINE = np.array([[0.1, 0, -4.5, 60], [0, -4.0, 0.2, 20], [3.0, 0, 0, -9], [0, 0, 0, 1]])  # d, h, w -> RAS+ mm


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def body(seed: int, shape=SHAPE) -> np.ndarray:
    """int16 [D, H, W]: a body with a hole and blobs of its own in air."""
    rng = np.random.default_rng(seed)
    d, h, w = (np.linspace(-1, 1, n) for n in shape)
    radius = np.sqrt(d[:, None, None] ** 2 * 0.4 + h[None, :, None] ** 2 + w[None, None, :] ** 2)
    blobs = ndimage.gaussian_filter(rng.normal(0, 1, shape), (1, 2, 2))
    return np.where(radius < 0.8, 60 + 900 * blobs, -1000).clip(-1000, 900).astype(np.int16)


def scan_of(voxels: np.ndarray) -> Scan:
    return Scan(voxels, AFFINE, tuple(np.linalg.norm(AFFINE[:3, :3], axis=0)), "SPL", 0.0, 0)


@pytest.fixture
def cts(tmp_path):
    folder = tmp_path / "cts"
    folder.mkdir()
    for number in range(4):
        write(folder / f"s{number}.nii.gz", number)
    return folder


def write(path, seed, shape=SHAPE):
    affine = np.diag([-4.5, -4.0, 3.0, 1.0])
    affine[:3, 3] = (60, 20, -9)
    nib.save(nib.Nifti1Image(body(seed, shape).transpose(2, 1, 0), affine), path)


@pytest.fixture
def index(tmp_path):
    affine = np.array([[0, 0, -4.5, 60], [0, -4.0, 0, 20], [3.0, 0, 0, -9], [0, 0, 0, 1]])
    for number in range(4):
        scan_files.write_scan(tmp_path / "store", f"s{number}", body(number), affine, split="train")
    store.write_index(tmp_path / "store", {}, (-1024.0, 325.0))
    return tmp_path / "store"


def config(output, **values):
    return build(EmbedConfig, {"init": INIT, "output": str(output), "size": (8, 32, 32)} | values)


def table(output) -> dict[str, dict]:
    rows = pq.read_table(output / "embeddings.parquet").to_pylist()
    return {row["scan_id"]: row for row in rows}


# -- features and their places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("layer1", "layer4"), ("stem",)])
def test_maps_know_their_place(names):
    encoder = api.load_encoder(INIT, size=(8, 32, 32))
    maps = api.dense_features(encoder, scan_of(body(0)), names)
    assert [one.name for one in maps] == list(names or ("layer4",))
    for one in maps:
        shape = one.values.shape[1:]
        assert (
            tuple(shape) == tuple(-(-n // s) for n, s in zip(SHAPE, one.stride)) and one.values.dtype == torch.float16
        )
        for cell in ((0, 0, 0), tuple(n - 1 for n in shape)):
            # an edge coordinate u lies half a voxel beyond voxel index u - 0.5
            voxel = [s * j + c - 0.5 for s, j, c in zip(one.stride, cell, one.center)]
            place = (AFFINE @ [*voxel, 1])[:3]
            np.testing.assert_allclose((one.affine @ [*cell, 1])[:3], place, atol=1e-9)
            features = one.at(place[None])[0].numpy()
            np.testing.assert_allclose(features, one.values[(slice(None), *cell)].float().numpy(), atol=1e-4)


def test_features_between_cells_are_interpolated():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 5, 6))).half()
    stride, center = (2, 4, 4), (0.5, 0.5, 1.25)
    one = features.FeatureMap("x", values, stride, center, features.map_affine(AFFINE, stride, center))
    rng = np.random.default_rng(1)
    places = (AFFINE @ np.vstack([rng.uniform(-3, 20, (3, 50)), np.ones(50)]))[:3].T
    cells = (np.linalg.inv(one.affine) @ np.vstack([places.T, np.ones(50)]))[:3]
    right = [ndimage.map_coordinates(part, cells, order=1, mode="nearest") for part in values.double().numpy()]
    np.testing.assert_allclose(one.at(places).numpy(), np.array(right).T, atol=1e-4)


def test_pooling_is_the_mean_over_the_body():
    voxels = body(3)
    voxels[4:6, 18:21, 20:24] = -900  # a small air space counts as body
    scan, rng = scan_of(voxels), np.random.default_rng(0)
    strides, centers = [(2, 4, 4), (8, 16, 16)], [(0.5,) * 3, (0.5, 0.5, 2.25)]
    maps = []
    for stride, center in zip(strides, centers):
        values = torch.from_numpy(rng.normal(size=(3, *(-(-n // s) for n, s in zip(SHAPE, stride))))).half()
        maps.append(features.FeatureMap("x", values, stride, center, AFFINE))
    # about 4 mm: every voxel of D, H and W, for 3, 4 and 4.5 mm
    solid = ndimage.binary_closing(np.pad(voxels > -500, 1, mode="edge"))[1:-1, 1:-1, 1:-1] | (voxels > -500)
    assert solid[4, 19, 22]
    right = []
    for one in maps:
        total, num = np.zeros(3), 0
        for voxel in product(*map(range, SHAPE)):
            if solid[voxel]:
                cell = []
                for axis in range(3):
                    away = [
                        (abs(voxel[axis] + 0.5 - (one.stride[axis] * j + one.center[axis])), -j)
                        for j in range(one.values.shape[axis + 1])
                    ]
                    cell.append(-min(away)[1])  # of two equally near ones the later
                total += one.values[(slice(None), *cell)].double().numpy()
                num += 1
        right.append(total / num)
    np.testing.assert_allclose(features.pooled(scan, maps), np.concatenate(right), atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_pooling_of_a_thin_scan_is_over_its_body(depth):
    """One or two slices of 1 mm under points every 4 mm: what is not body counts nothing."""
    voxels = np.full((depth, 16, 20), -1000, np.int16)
    voxels[:, 4:8, 10:20] = 0
    scan = replace(scan_of(voxels), spacing_mm=(1.0, 4.0, 4.0))
    values = torch.arange(4 * 5).view(1, 1, 4, 5).half()  # cells of 4 x 4 voxels, centred on them
    one = features.FeatureMap("x", values, (4, 4, 4), (2.0, 2.0, 2.0), AFFINE)
    cells = values[0, 0, 1].double()
    right = (2 * cells[2] + 4 * cells[3] + 4 * cells[4]) / 10
    np.testing.assert_allclose(features.pooled(scan, [one]), right.numpy(), rtol=1e-6)


def test_pooling_takes_all_where_nothing_is_body():
    scan = scan_of(np.full(SHAPE, -1000, np.int16))
    values = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).half()
    one = features.FeatureMap("x", values, (4, 10, 10), (0.5,) * 3, AFFINE)
    np.testing.assert_allclose(features.pooled(scan, [one]), values.double().mean((1, 2, 3)).numpy(), rtol=1e-6)


def test_a_resenc_has_stages():
    encoder = features.ScanEncoder("x", ResEncoder((1, 1, 1, 1, 1), 4), (-1000, 400), {}, (8, 32, 32))
    assert encoder.names == ("stage1", "stage2", "stage3", "stage4", "stage5") and encoder.reading == "none"
    (one,) = encoder.dense(scan_of(body(0)), ["stage3"])
    assert (
        one.stride == encoder.network.strides[2] and encoder.reestimated(torch.zeros(1, 1, 8, 32, 32)).reading == "none"
    )


def test_the_hash_changes_with_weights_and_statistics(index):
    plain, again = (api.load_encoder(INIT, size=(8, 32, 32)) for _ in range(2))
    estimated = api.load_encoder(INIT, api.open_store(str(index)), size=(8, 32, 32))
    assert plain.hash == again.hash != estimated.hash and estimated.reading == "reestimated"
    assert plain.with_statistics(estimated.statistics()).hash == estimated.hash
    with torch.no_grad():
        next(again.network.parameters()).view(-1)[0] += 1e-3
    assert again.hash != plain.hash


# -- the door ---------------------------------------------------------------------------------------------------------


def test_rows_say_what_a_scan_is(tmp_path, cts, capsys):
    result = embed.run(config(tmp_path / "o", input=str(cts), maps=["layer3", "layer4"], dense=True))
    rows = table(tmp_path / "o")
    assert list(rows) == ["s0", "s1", "s2", "s3"] and result.num_features == 128 + 256
    encoder = api.load_encoder(INIT, size=(8, 32, 32))
    for name, row in rows.items():
        scan = api.read_scan(str(cts / f"{name}.nii.gz"))
        maps = api.dense_features(encoder, scan, ["layer3", "layer4"])
        np.testing.assert_allclose(row["vector"], api.pooled(scan, maps), rtol=1e-6)
        assert row["source"] == str(cts / f"{name}.nii.gz") and row["shape"] == list(SHAPE)
        np.testing.assert_allclose(row["spacing_mm"], SPACING, rtol=1e-6)
        assert row["encoder_hash"] == encoder.hash and row["picture"][:4] == b"\x89PNG"
        group = zarr.open_group(tmp_path / f"o/dense/{name}.zarr", mode="r")
        assert group.metadata.zarr_format == 3 and group.attrs["pgl_ray"]["scan_shape"] == list(SHAPE)
        for one in maps:
            array = group[one.name]
            assert np.array_equal(array[:], one.values.numpy()) and array.metadata.dimension_names == (
                "c",
                "d",
                "h",
                "w",
            )
            assert array.attrs["stride"] == list(one.stride) and array.attrs["center"] == list(one.center)
            image = nib.load(cts / f"{name}.nii.gz")  # its axes run towards L, P, S: w, h, d
            voxel = [s * 1 + c - 0.5 for s, c in zip(one.stride, one.center)]
            place = (image.affine @ [voxel[2], voxel[1], voxel[0], 1])[:3]
            np.testing.assert_allclose((np.array(array.attrs["affine"]) @ [1, 1, 1, 1])[:3], place, atol=1e-5)
    said = capsys.readouterr().out
    assert "4 scans; maps layer3, layer4; BatchNorm as trained" in said
    assert embed.describe(result).startswith("embed: 4 scans, 384 features each in ")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["dense", "embed.html", "embeddings.parquet"]


def counted(monkeypatch) -> list[str]:
    """Names of the scans that are embedded from now on."""
    done, theirs = [], embedding.Embedder.row

    def row(self, scan):
        done.append(scan.scan_id)
        return theirs(self, scan)

    monkeypatch.setattr(embedding.Embedder, "row", row)
    return done


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(tmp_path, cts, monkeypatch, capsys):
    given = {"input": str(cts)}
    embed.run(config(tmp_path / "o", **given))
    before, done = table(tmp_path / "o"), counted(monkeypatch)
    assert embed.run(config(tmp_path / "o", **given)).num_finished_before == 4 and done == []
    write(cts / "s2.nii.gz", 9)
    write(cts / "s9.nii.gz", 10)
    embed.run(config(tmp_path / "o", **given))
    after = table(tmp_path / "o")
    assert done == ["s2", "s9"] and before["s1"] == after["s1"] and before["s2"]["vector"] != after["s2"]["vector"]
    embed.run(config(tmp_path / "o", **given, dense=True))
    assert done[2:] == ["s0", "s1", "s2", "s3", "s9"]
    (tmp_path / "o/dense/s1.zarr/zarr.json").unlink()
    embed.run(config(tmp_path / "o", **given, dense=True))
    assert done[7:] == ["s1"]
    capsys.readouterr()
    embed.run(config(tmp_path / "o", **given, maps=["layer2"]))
    said = "of another encoder, window (size=), maps or spacing: it is replaced"
    assert len(done) == 13 and said in capsys.readouterr().out
    (cts / "s9.nii.gz").unlink()
    embed.run(config(tmp_path / "o", **given, maps=["layer2"]))
    said = capsys.readouterr().out
    assert "no longer in the table, for they are not asked for: s9" in said and "s9.zarr" in said and len(done) == 13


@pytest.mark.slow
def test_an_interrupted_call_goes_on(tmp_path, cts, monkeypatch):
    whole = tmp_path / "whole"
    embed.run(config(whole, input=str(cts)))
    theirs, done = embedding.Embedder.row, []

    def row(self, scan):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(scan.scan_id)
        return theirs(self, scan)

    monkeypatch.setattr(embed, "EVERY_S", -1.0)  # a part per scan
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding.Embedder, "row", row)
        embed.run(config(tmp_path / "o", input=str(cts)))
    assert len(list((tmp_path / "o/parts").iterdir())) == 2 and not (tmp_path / "o/embeddings.parquet").exists()
    damaged = sorted((tmp_path / "o/parts").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:200])
    done = counted(monkeypatch)
    embed.run(config(tmp_path / "o", input=str(cts)))
    assert done == ["s0", "s2", "s3"] and table(tmp_path / "o") == table(whole)
    assert not (tmp_path / "o/parts").exists()


@pytest.mark.slow
def test_statistics_stay_where_the_store_grows(tmp_path, index, monkeypatch, capsys):
    embed.run(config(tmp_path / "o", index=str(index)))
    before, done = table(tmp_path / "o"), counted(monkeypatch)
    assert "BatchNorm re-estimated on 64 views of" in capsys.readouterr().out
    affine = np.array(store.read_index(index).scans[0].affine).reshape(4, 4)
    scan_files.write_scan(index, "t", body(17), affine, split="train")
    store.write_index(index, {}, (-1024.0, 325.0))
    embed.run(config(tmp_path / "o", index=str(index)))
    after = table(tmp_path / "o")
    assert done == ["t"] and {name: after[name] for name in before} == before
    (tmp_path / "o/preparation.npz").write_bytes(b"damaged")
    embed.run(config(tmp_path / "o", index=str(index)))
    assert sorted(done[1:]) == ["s0", "s1", "s2", "s3", "t"]


@pytest.mark.slow
def test_files_are_prepared_as_a_store_says(tmp_path, cts, index):
    embed.run(config(tmp_path / "both", index=str(index), input=str(cts)))
    embed.run(config(tmp_path / "store", index=str(index)))
    files, stored = table(tmp_path / "both"), table(tmp_path / "store")
    for name, row in files.items():
        np.testing.assert_allclose(row["vector"], stored[name]["vector"], rtol=1e-5)


@pytest.mark.slow
def test_a_bad_file_does_not_stop_the_others(tmp_path, cts, capsys):
    (cts / "bad.nii.gz").write_bytes(b"no image")
    (cts / "gone.nii.gz").symlink_to(cts / "nowhere.nii.gz")
    with pytest.raises(
        FailedRun, match=r"2 of 6 scans failed: bad, gone.nii.gz; the others are in .*embeddings.parquet"
    ):
        embed.run(config(tmp_path / "o", input=str(cts)))
    said = capsys.readouterr().out
    assert (
        "embed: 2 left out:\nembed:   bad: " in said
        and f"\nembed:   {cts}/gone.nii.gz: " in said
        and list(table(tmp_path / "o"))
        == [
            "s0",
            "s1",
            "s2",
            "s3",
        ]
    )
    for path in cts.glob("s*.nii.gz"):
        path.unlink()
    with pytest.raises(FailedRun, match="2 of 2 scans failed"):
        embed.run(config(tmp_path / "none", input=str(cts)))
    assert "embed: 2 left out:\nembed:   bad: " in capsys.readouterr().out


def test_bad_files_of_one_name_are_counted_and_named_each(tmp_path, cts, capsys):
    """A scan per patient's folder, all called alike, as data sets have it."""
    for number in range(4):
        (cts / f"p{number}").mkdir()
        (cts / f"s{number}.nii.gz").rename(cts / f"p{number}/ct.nii.gz")
    bad = [cts / f"p{number}/gone.nii.gz" for number in range(3)]
    for path in bad:
        path.symlink_to(cts / "nowhere.nii.gz")
    with pytest.raises(FailedRun, match=r"3 of 7 scans failed: gone.nii.gz, gone.nii.gz, gone.nii.gz; the others are"):
        embed.run(config(tmp_path / "o", input=str(cts)))
    said = capsys.readouterr().out
    assert "embed: 3 left out:\n" in said and all(f"\nembed:   {path}: a link to" in said for path in bad)
    assert len(table(tmp_path / "o")) == 4


def test_a_label_map_among_cts_is_left_out(tmp_path, cts, capsys):
    label = (body(0) > 0).astype(np.int16).transpose(2, 1, 0)
    nib.save(nib.Nifti1Image(label, np.diag([-4.5, -4.0, 3.0, 1.0])), cts / "mask.nii.gz")
    assert embed.run(config(tmp_path / "o", input=str(cts))).num_scans == 4
    said = capsys.readouterr().out
    assert re.search(r"embed: 1 file not used:\nembed:   1: .*a label map or mask, no CT.*: mask$", said, re.M)
    assert "mask" not in table(tmp_path / "o")
    with pytest.raises(ValueError, match=r"input=.*mask.nii.gz: .*a label map or mask, no CT"):
        embed.run(config(tmp_path / "one", input=str(cts / "mask.nii.gz")))


@pytest.mark.slow
def test_other_spacing_is_said_once_and_resampled_on_request(tmp_path, cts, capsys):
    for path in cts.iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([0.4, 0.4, 0.4, 1])), path)
    embed.run(config(tmp_path / "own", input=str(cts)))
    said = capsys.readouterr().out
    assert (
        said.count("its voxels are") == 1 and "note: 4 of 4 scans, s0 for one: its voxels are 1.2 x 1.6 x 1.8" in said
    )
    embed.run(config(tmp_path / "weights", input=str(cts), spacing="weights", dense=True))
    assert "its voxels are" not in capsys.readouterr().out
    row = table(tmp_path / "weights")["s1"]
    np.testing.assert_allclose(row["spacing_mm"], (1.2, 1.6, 1.8), rtol=1e-6)  # the scan's own
    said = zarr.open_group(tmp_path / "weights/dense/s1.zarr", mode="r").attrs["pgl_ray"]
    np.testing.assert_allclose(said["spacing_mm"], (2.5, 4.488, 4.488), rtol=1e-5)


@pytest.mark.slow
def test_statistics_are_of_views_that_are_resampled_too(tmp_path, index, capsys):
    """Those of the scans' own voxel size are not taken for others."""
    embed.run(config(tmp_path / "o", index=str(index)))
    embed.run(config(tmp_path / "o", index=str(index), spacing="weights"))
    assert "kept in" not in capsys.readouterr().out
    given = {"size": (8, 32, 32), "spacing": "weights"}
    encoder = api.load_encoder(INIT, api.open_store(str(index)), **given)
    stored = np.load(tmp_path / "o" / "preparation.npz")
    for name, values in encoder.statistics().items():
        np.testing.assert_array_equal(stored[name], values)
    embed.run(config(tmp_path / "o", index=str(index), spacing="weights"))
    assert "kept in preparation.npz" in capsys.readouterr().out


@pytest.mark.slow
def test_maps_of_another_voxel_size_are_made_anew(tmp_path, cts, capsys):
    """The table of the one, then of the other without maps, then with them."""
    embed.run(config(tmp_path / "o", input=str(cts), dense=True))
    embed.run(config(tmp_path / "o", input=str(cts), spacing="weights"))
    said = "dense holds maps of another encoder, scan or voxel size than the table, which dense=true makes anew: s0"
    assert said in capsys.readouterr().out
    embed.run(config(tmp_path / "o", input=str(cts), spacing="weights", dense=True))
    assert "dense holds" not in capsys.readouterr().out
    for name in ("s0", "s1", "s2", "s3"):
        made = zarr.open_group(tmp_path / f"o/dense/{name}.zarr", mode="r").attrs["pgl_ray"]
        np.testing.assert_allclose(made["spacing_mm"], (2.5, 4.488, 4.488), rtol=1e-5)


def test_an_encoder_is_what_export_wrote():
    network, expected = export.load(INIT)
    encoder = api.load_encoder(INIT)
    assert encoder.spacing_mm == tuple(expected.metadata["median_spacing_mm"])
    assert encoder.hu_window == tuple(expected.metadata["hu_window"])
    ours, theirs = encoder.network.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


WRONG = [
    ([], "index=... or input=... is required"),
    (["input={tmp}/nowhere"], "does not exist"),
    (["input={tmp}/none"], "no volume in it"),
    (["input={tmp}/notes.txt"], "not a supported format"),
    (["input={cts}", "init=random"], "init=random has learnt nothing"),
    (["input={cts}", "init=pretrained:nothing"], "there are: pretrained:openkbp_small"),
    (["input={cts}", "maps=[layer7]"], "has no 'layer7'"),
    (["input={cts}", "init={tmp}/plain.pth"], "give hu_window=[low,high]"),
    (["index={tmp}"], "is not a store"),
    (["index={other}"], "was trained with hu_window=[-1024.0, 325.0], the index has [-500.0, 500.0]"),
    (["input={cts}", "output={tmp}/notes.txt/x"], "output="),
    (["input={cts}", "workers=0"], "workers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("args", "message"), WRONG, ids=[f"{k}-{m[:24]}" for k, (_, m) in enumerate(WRONG)])
def test_wrong_use_is_one_line(tmp_path, cts, capsys, args, message):
    from pgl_ray.model.resnet import Encoder

    (tmp_path / "none").mkdir()
    (tmp_path / "notes.txt").write_text("nothing of use\n")
    scan_files.write_scan(tmp_path / "other", "s", body(0), AFFINE)
    store.write_index(tmp_path / "other", {}, (-500.0, 500.0))
    if any("plain" in arg for arg in args):
        torch.save(Encoder().state_dict(), tmp_path / "plain.pth")
    given = {"init": INIT, "output": f"{tmp_path}/o"}
    given |= dict(arg.format(tmp=tmp_path, cts=cts, other=tmp_path / "other").split("=", 1) for arg in args)
    with pytest.raises(SystemExit) as stop:
        cli.call("embed", [f"{key}={value}" for key, value in given.items()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err and err.startswith("pgl_ray.embed: "), err


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_needs_nothing_else(tmp_path, cts):
    (cts / "s1.nii.gz").rename(cts / "a<b>&c.nii.gz")
    embed.run(config(tmp_path / "o", input=str(cts)))
    text = (tmp_path / "o/embed.html").read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!data:|#)', text) and "http" not in text and "a&lt;b&gt;&amp;c" in text
    assert text.count('class="near"') == 4 and text.count("<circle") == 4 and "a<b>" not in text
    assert text.count("url(data:image/png;base64,") == 4 and text.count("<img") == 1
    assert not CHROMIUM or faults(tmp_path / "o/embed.html") == []
    embed.run(config(tmp_path / "o", input=str(cts), pictures=1))
    text = (tmp_path / "o/embed.html").read_text()
    assert text.count('class="near"') == 1 and "3 more scans are in the table alone" in text


@pytest.mark.parametrize(("shape", "scale"), [((1, 40, 48), 0.25), ((3, 5, 4), 1.0), (SHAPE, None)])
def test_thin_and_blank_scans_have_a_row(tmp_path, shape, scale):
    voxels = np.full(shape, -1000, np.int16) if scale is None else body(0, shape)
    affine = np.diag([-4.5, -4.0, 3.0, 1.0]) @ np.diag([*[scale or 1.0] * 3, 1])
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine), tmp_path / "s.nii.gz")
    embed.run(config(tmp_path / "o", input=str(tmp_path / "s.nii.gz"), dense=True))
    assert np.isfinite(table(tmp_path / "o")["s"]["vector"]).all() and (tmp_path / "o/embed.html").exists()


def test_one_scan_has_a_page_too(tmp_path, cts):
    embed.run(config(tmp_path / "o", input=str(cts / "s0.nii.gz")))
    assert "1 scan as features" in (tmp_path / "o/embed.html").read_text() and list(table(tmp_path / "o")) == ["s0"]


def test_the_answers_name_the_alike_and_the_lone():
    vectors = np.array([[1, 0.1], [1, 0.0], [0.9, -0.5], [-1, 0.3]])
    rows = [{"scan_id": name, "notes": []} for name in "abcd"]
    alike, spread, known, following = embed_page.answers(rows, vectors, (0.5, 0.2), True)
    cosine = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in vectors] for x in vectors]
    nearest = [max(cosine[k][j] for j in range(4) if j != k) for k in range(4)]
    assert alike.lines[0] == ("Most alike", f"a and b, cosine {max(nearest):.2f}", "")
    assert alike.lines[1].text.startswith("d, whose nearest is") and f"{min(nearest):.2f}" in alike.lines[1].text
    assert spread.lines[0].verdict == "70 %" and known.lines[0].verdict == "Yes"
    assert following.lines[0].verdict == "Look for doubles"  # a and b, cosine 0.995
    rows[1]["notes"] = ["its voxels are large."]
    known = embed_page.answers(rows, vectors, (0.5, 0.2), True)[2]
    assert known.lines[0] == ("Not all", "1 of 4 scans with a note, the first b: its voxels are large", "")
    for num in (1, 2):
        few = embed_page.answers(rows[:num], vectors[:num], (1.0, 0.0), True)
        assert few[1].lines[0].verdict == few[0].lines[0].verdict == "Can't tell" and len(few[0].lines) == 1
    unknown = "the weights do not say what scans they were trained on"
    for number, text in ((1, f"{unknown}; {known.lines[0].text}"), (0, unknown)):  # a note may be of the file itself
        rows[1]["notes"] = rows[1]["notes"][:number]
        assert embed_page.answers(rows, vectors, (0.5, 0.2), False)[2].lines[0] == ("Can't tell", text, "")


@pytest.mark.parametrize(("num", "same"), [(2, True), (2, False), (3, True), (5, True)])
def test_doubles_are_named_however_few_scans_there_are(num, same):
    """Two different scans, standardised, are each other's opposites: nothing to say of them."""
    vectors = np.tile(np.arange(8.0), (num, 1)) + (0 if same else np.random.default_rng(0).normal(size=(num, 8)))
    rows = [{"scan_id": f"s{k}", "notes": []} for k in range(num)]
    alike, _, _, following = embed_page.answers(rows, embed_page.standardised(vectors), (1.0, 0.0), True)
    assert (following.lines[0].verdict == "Look for doubles") == same
    assert alike.lines[0].verdict == ("All alike" if same else "Can't tell") and "cosine" not in alike.lines[0].text


@pytest.mark.slow
def test_the_page_of_weights_without_metadata_is_open(tmp_path, cts):
    from pgl_ray.model.resnet import Encoder

    torch.save(Encoder().state_dict(), tmp_path / "plain.pth")
    for init, known in ((str(tmp_path / "plain.pth"), False), (INIT, True)):
        embed.run(config(tmp_path / "o", input=str(cts), init=init, hu_window=(-1024.0, 325.0)))
        text = (tmp_path / "o/embed.html").read_text()
        assert ("the weights do not say what scans they were trained on" in text) != known


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (1.0, 2.0, 2.0), (12.0, 1.0, 1.0)])
def test_both_slices_of_a_thumbnail_have_one_scale(spacing):
    """A cube in mm is as large in the axial slice as in the coronal one."""
    voxels = np.full((40, 60, 60), -1000, np.int16)
    cube = [round(24 / size) for size in spacing]
    voxels[4 : 4 + cube[0], 10 : 10 + cube[1], 10 : 10 + cube[2]] = 250
    panel = imread(
        io.BytesIO(embedding.picture(Scan(voxels, np.diag([*spacing, 1.0]), spacing, "RAS", 0.0, 0))), format="png"
    )
    axial, coronal = np.split(panel, 2, 1)
    assert axial.shape[0] == embedding.PICTURE_PX
    sizes = [np.ptp(np.argwhere(part > 0.5), axis=0) + 1 for part in (axial, coronal)]
    np.testing.assert_allclose(*sizes, atol=2)


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (1, 5), (3, 1)])
def test_the_map_is_the_principal_components(shape):
    vectors = embed_page.standardised(np.random.default_rng(0).normal(3, 2, shape))
    places, shares = embed_page.components(vectors)
    left, values, _ = np.linalg.svd(vectors, full_matrices=False)
    right = np.zeros((shape[0], 2))
    for k in range(min(2, len(values))):
        right[:, k] = left[:, k] * values[k]
    np.testing.assert_allclose(np.abs(places), np.abs(right), atol=1e-6)
    assert sum(shares) <= 1 + 1e-9
    if shape[0] > 1:
        assert shares[0] == pytest.approx(values[0] ** 2 / (values**2).sum())


def test_neighbours_equal_nested_loops():
    vectors = np.random.default_rng(0).normal(size=(9, 5))
    vectors[4] = 0
    for number, others in embed_page.neighbours(vectors, [0, 3, 8]):
        cosines = []
        for other in range(9):
            if other != number:
                length = np.linalg.norm(vectors[number]) * np.linalg.norm(vectors[other])
                cosines.append((-(vectors[number] @ vectors[other]) / length if length else 0.0, other))
        right = sorted(cosines)[: embed_page.NUM_NEIGHBOURS]
        assert [other for other, _ in others] == [other for _, other in right]
        np.testing.assert_allclose([one for _, one in others], [-one for one, _ in right], atol=1e-12)


def test_constant_features_say_nothing():
    vectors = np.array([[1.0, 5, 2], [3, 5, 2], [8, 5, 2]])
    unit = embed_page.standardised(vectors)
    assert not unit[:, 1:].any() and abs(unit[:, 0].std() - 1) < 1e-12


# -- Ray --------------------------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_processes_give_the_same_vectors(ray_cluster, tmp_path, cts, capsys):
    embed.run(config(tmp_path / "one", input=str(cts), workers=1))
    (cts / "bad.nii.gz").write_bytes(b"no image")
    with pytest.raises(FailedRun, match="1 of 5 scans failed: bad"):
        embed.run(config(tmp_path / "two", input=str(cts), workers=2, dense=True))
    one, two = table(tmp_path / "one"), table(tmp_path / "two")
    assert list(one) == list(two)
    for name, row in one.items():
        np.testing.assert_allclose(row["vector"], two[name]["vector"], rtol=1e-5, atol=1e-6)
        assert (tmp_path / f"two/dense/{name}.zarr/layer4/zarr.json").exists()


@pytest.mark.cluster
def test_a_process_that_dies_costs_only_its_scan(ray_cluster, tmp_path, cts, monkeypatch):
    driver, theirs = os.getpid(), embedding.Embedder.row

    def row(self, scan):
        if scan.scan_id == "s1" and os.getpid() != driver:
            os._exit(1)
        return theirs(self, scan)

    class Deadly(embedding.Embedder):
        pass

    Deadly.row = row
    monkeypatch.setattr(embed, "Embedder", Deadly)
    with pytest.raises(FailedRun, match="1 of 4 scans failed: s1"):
        embed.run(config(tmp_path / "o", input=str(cts), workers=2))
    assert list(table(tmp_path / "o")) == ["s0", "s2", "s3"]
