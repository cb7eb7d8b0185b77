"""data/store and data/shard against zarr-python and numpy; damaged files; index."""

import errno
import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from pgl_ray.data import scan_files, shard, store, store_settings
from pgl_ray.data.voxel_statistics import HISTOGRAM_HU

SHAPES = [(13, 70, 131), (1, 1, 1), (8, 64, 64), (16, 128, 64), (9, 65, 3), (40, 20, 30)]
AFFINE = np.array([[0, 0, -0.7, 10], [0, -0.8, 0, 20], [2.5, 0, 0, 30], [0, 0, 0, 1]])


def make_volume(shape, seed=0):
    return np.random.default_rng(seed).integers(-1100, 1500, shape).astype(np.int16)


def make_label(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 4, shape).astype(dtype)


def tree(folder):
    """Relative path -> content of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# -- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [{}, {"scale_factor": 5.3, "add_offset": -1024.0}, {"source": 'Fälle "1"'}])
@pytest.mark.parametrize("dtype, compression", [(np.int16, "lz4"), (np.uint8, "none"), (np.uint16, "lz4")])
def test_metadata_is_what_zarr_writes(dtype, compression, attributes):
    for shape, chunk in itertools.product(SHAPES, [(8, 64, 64), (4, 16, 24)]):
        written = {}
        lz4 = zarr.codecs.BloscCodec(cname="lz4", clevel=shard.LEVEL, shuffle="shuffle")
        zarr.create_array(
            written,
            shape=shape,
            dtype=dtype,
            chunks=chunk,
            shards=tuple(math.ceil(size / step) * step for size, step in zip(shape, chunk)),
            compressors=[*([lz4] if compression == "lz4" else []), zarr.codecs.Crc32cCodec()],
            fill_value=0,
            dimension_names=["z", "y", "x"],
            attributes=attributes,
        )
        text = shard.array_metadata(shape, np.dtype(dtype), chunk, attributes, compression)
        assert text.encode() == written["zarr.json"].to_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [(8, 64, 64), (4, 16, 24)])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_boxes_equal_zarrs(tmp_path, shape, chunk):
    volume, label = make_volume(shape), make_label(shape, np.uint16)
    record = scan_files.write_scan(tmp_path, "a", volume, AFFINE, label=label, chunk=chunk)
    rng = np.random.default_rng(1)
    for reader, path in [
        (scan_files.open_volume(tmp_path, record), "0"),
        (scan_files.open_label(tmp_path, record), "labels/organs/0"),
    ]:
        array = zarr.open_array(tmp_path / "scans/a" / path, mode="r")
        np.testing.assert_array_equal(array[:], volume if path == "0" else label)
        for _ in range(40):
            corners = np.sort([rng.integers(0, size + 1, 2) for size in shape], axis=1)
            expected = array[tuple(slice(*corner) for corner in corners)]
            voxels = reader.read(corners)
            assert voxels.dtype == expected.dtype and voxels.flags.c_contiguous
            np.testing.assert_array_equal(voxels, expected)
        boxes = [np.sort([rng.integers(0, size + 1, 2) for size in shape], axis=1) for _ in range(5)]
        for box, voxels in zip(boxes, reader.read_boxes(boxes), strict=True):
            np.testing.assert_array_equal(voxels, array[tuple(slice(*corner) for corner in box)])
        out = np.full([s + 2 for s in shape], 99, array.dtype)
        reader.read(np.array([(0, s) for s in shape]), out=out[1:-1, 1:-1, 1:-1])
        np.testing.assert_array_equal(out, np.pad(array[:], 1, constant_values=99))


def test_one_shard_with_the_stated_codecs_and_ome_attributes(tmp_path):
    scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE, label=make_label(SHAPES[0]))
    assert sorted(name for name in tree(tmp_path) if "/c/" in name) == [
        "scans/a/0/c/0/0/0",
        "scans/a/labels/organs/0/c/0/0/0",
    ]
    group = zarr.open_group(tmp_path / "scans/a", mode="r")
    assert group["0"].chunks == (8, 64, 64) and group["0"].shards == (16, 128, 192)
    assert [type(c).__name__ for c in group["0"].compressors] == ["BloscCodec", "Crc32cCodec"]
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5" and [axis["name"] for axis in ome["multiscales"][0]["axes"]] == ["z", "y", "x"]
    level = ome["multiscales"][0]["datasets"][0]
    assert level == {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [2.5, 0.8, 0.7]}]}
    assert group["labels"].attrs["ome"]["labels"] == ["organs"]
    assert group["labels/organs"].attrs["ome"]["multiscales"][0]["datasets"][0]["path"] == "0"


def test_chunks_that_were_never_written_are_filled(tmp_path):
    sparse = np.zeros(SHAPES[0], np.int16)
    record = scan_files.write_scan(tmp_path, "a", sparse, AFFINE)
    assert (scan_files.open_volume(tmp_path, record).chunk_index != shard.MISSING).all()  # ours are all written
    sparse[3, 66, 5] = 7
    array = zarr.open_array(tmp_path / "scans/a/0", mode="r+")
    array[:] = sparse  # opened again, zarr leaves out chunks of the fill value
    reader = scan_files.open_volume(tmp_path, record)
    assert (reader.chunk_index == shard.MISSING).all(-1).sum() == 11
    np.testing.assert_array_equal(reader.read(np.array([(0, s) for s in SHAPES[0]])), sparse)


@pytest.mark.parametrize("box", [[(-1, 3), (0, 5), (0, 5)], [(0, 3), (0, 71), (0, 5)], [(0, 3), (5, 4), (0, 5)]])
def test_a_box_beyond_the_array_is_refused(tmp_path, box):
    reader = scan_files.open_volume(tmp_path, scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE))
    with pytest.raises(ValueError, match=r"reaches beyond the volume of a, shape \(13, 70, 131\)"):
        reader.read(np.array(box))


def test_every_flipped_byte_is_noticed(tmp_path):
    volume = make_volume(SHAPES[0])
    record = scan_files.write_scan(tmp_path, "scan_7", volume, AFFINE)
    path = tmp_path / "scans/scan_7/0/c/0/0/0"
    whole, content = np.array([(0, s) for s in volume.shape]), path.read_bytes()
    rng = np.random.default_rng(0)
    footer = range(len(content) - 12 * 16 - 4, len(content))
    for place in itertools.chain(rng.integers(0, footer.start, 60), footer):
        broken = bytearray(content)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with pytest.raises(RuntimeError, match=r"volume of scan 'scan_7' .*chunk.*repair store="):
            scan_files.open_volume(tmp_path, record).read(whole)


def test_a_damaged_chunk_is_named_and_the_others_can_be_read(tmp_path):
    volume = make_volume(SHAPES[0])
    record = scan_files.write_scan(tmp_path, "a", volume, AFFINE)
    path = tmp_path / "scans/a/0/c/0/0/0"
    offset = int(scan_files.open_volume(tmp_path, record).chunk_index[1, 0, 2, 0])
    content = bytearray(path.read_bytes())
    content[offset + 100] ^= 4
    path.write_bytes(content)
    reader = scan_files.open_volume(tmp_path, record)
    np.testing.assert_array_equal(reader.read(np.array([(0, 8), (0, 70), (0, 131)])), volume[:8])
    with pytest.raises(RuntimeError, match=r"chunk \(1, 0, 2\)"):
        reader.read(np.array([(0, 9), (0, 1), (0, 131)]))


@pytest.mark.parametrize("left", [0, 3, 100, 0.5, -1, -200])
def test_a_cut_shard_is_noticed(tmp_path, left):
    record = scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE)
    path = tmp_path / "scans/a/0/c/0/0/0"
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(RuntimeError, match="cut off or damaged"):
        scan_files.open_volume(tmp_path, record)
    path.unlink()
    with pytest.raises(RuntimeError, match="'a' cannot be opened"):
        scan_files.open_volume(tmp_path, record)


# -- records ----------------------------------------------------------------------------------------------------------


def test_record_equals_numpys_answers(tmp_path):
    volume = np.full((6, 30, 40), -1000, np.int16)
    volume[1:5, 4:20, 7:33] = make_volume((4, 16, 26))
    volume[1, 4, 7] = volume[4, 19, 32] = 100
    label = np.zeros(volume.shape, np.uint16)
    label[2:4, 5:9, 6:10] = 300
    label[5, 29, 0] = 2
    record = scan_files.write_scan(
        tmp_path, "a", volume, AFFINE, label=label, labelled=(300, 2, 5), split="test", hu_window=(-160, 240)
    )
    clipped = volume.astype(np.float64).clip(-160, 240)
    assert record.mean_hu == pytest.approx(clipped.mean(), rel=1e-12)
    assert record.std_hu == pytest.approx(clipped.std(), rel=1e-12)
    assert record.foreground_box == (1, 5, 4, 20, 7, 33)
    assert record.label_boxes == {2: (5, 6, 29, 30, 0, 1), 300: (2, 4, 5, 9, 6, 10)}
    assert record.label_voxels == {2: 1, 300: 32}
    assert record.labelled == (2, 5, 300)
    assert record.spacing_mm == pytest.approx((2.5, 0.8, 0.7)) and record.affine == tuple(AFFINE.ravel())
    assert record.content_hash == hashlib.sha256(volume.tobytes()).hexdigest()
    assert store.read_records(tmp_path) == {"a": record}


def test_foreground_begins_above_minus_500_and_air_is_its_own(tmp_path):
    volume = np.full((2, 3, 4), -1000, np.int16)
    volume[0, 0, 0] = -500
    record = scan_files.write_scan(tmp_path, "a", volume, AFFINE)
    assert record.foreground_box == (0, 2, 0, 3, 0, 4)
    volume[1, 2, 3] = -499
    assert scan_files.write_scan(tmp_path, "b", volume, AFFINE).foreground_box == (1, 2, 2, 3, 3, 4)
    assert record.label_metadata is None and record.label_boxes == {} and record.labelled == ()


def test_index_comes_back_and_does_not_depend_on_the_order(tmp_path):
    scans = {"b": None, "a": make_label(SHAPES[0]), "c": make_label(SHAPES[0], seed=1)}
    for name, order in (("one", "abc"), ("two", "cab")):
        for scan_id in order:
            scan_files.write_scan(
                tmp_path / name,
                scan_id,
                make_volume(SHAPES[0]),
                AFFINE,
                label=scans[scan_id],
                split="train",
                labelled=(1,),
            )
        written = store.write_index(tmp_path / name, {"x": 3, "y": 1, "z": 2}, (-1024.0, 325.0))
        index = store.read_index(tmp_path / name)
        assert index == written and index.store == str(tmp_path / name)
        assert [scan.scan_id for scan in index.scans] == ["a", "b", "c"]
        assert [scan.scan_id for scan in index.labelled("train")] == ["a", "c"] and not index.labelled("test")
        assert list(index.label_values) == [1, 2, 3]
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_scan_that_annotates_nothing_counts_as_unlabelled(tmp_path):
    label = np.ones(SHAPES[0], np.uint8)
    for scan_id, labelled in (("a", (1,)), ("b", ()), ("c", (1, 2))):
        options = {"label": label, "labelled": labelled, "split": "test" if scan_id == "b" else "train"}
        scan_files.write_scan(tmp_path, scan_id, make_volume(SHAPES[0]), AFFINE, **options)
    store.write_index(tmp_path, {"x": 1, "y": 2}, (-1024.0, 325.0))
    index = store.read_index(tmp_path)
    assert [scan.scan_id for scan in index.labelled("train")] == ["a", "c"]
    assert index.labelled("test") == [] and index.labelled_splits == ["train"]


def test_updated_record_is_in_the_index(tmp_path):
    record = scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE)
    store.update_record(tmp_path, replace(record, split="test"))
    assert store.write_index(tmp_path, {}, (0, 1)).scans == (replace(record, split="test"),)
    assert zarr.open_group(tmp_path / "scans/a", mode="r").attrs["ome"]["version"] == "0.5"


def test_a_failed_write_leaves_the_old_scan_and_nothing_else(tmp_path, monkeypatch):
    record = scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE)
    before = tree(tmp_path)

    def full(array, chunk, compression):
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(scan_files, "encode_shard", full)
        scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0], seed=1), AFFINE)
    assert tree(tmp_path) == before and not list((tmp_path / ".part").iterdir())
    again = scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0], seed=1), AFFINE)
    assert again.content_hash != record.content_hash and not list((tmp_path / ".part").iterdir())


def test_what_is_not_a_whole_store_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="is not a store"):
        store.read_index(tmp_path / "none")
    store_settings.write_settings(tmp_path, {}, (0, 1))
    with pytest.raises(ValueError, match="run prepare to its end"):
        store.read_index(tmp_path)
    store.write_index(tmp_path, {}, (0, 1))
    with pytest.raises(ValueError, match="holds no scan"):
        store.read_index(tmp_path)
    settings = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(settings | {"format": 1}))
    with pytest.raises(
        ValueError,
        match=f"format 1, this version reads {store_settings.FORMAT}: prepare the same folders into a new one",
    ):
        store.read_index(tmp_path)


@pytest.mark.parametrize("change", [{"hu_window": [0, 1, 2]}, {"hu_window": 5}, {"spacing_mm": [1.0, 2.0]}])
def test_settings_of_another_shape_are_damage(tmp_path, change):
    scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE)
    store.write_index(tmp_path, {}, (0, 1))
    settings = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=r"store.json of .* is damaged: delete it"):
        store.read_index(tmp_path)


def test_a_label_map_that_is_not_there_is_named(tmp_path):
    record = scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE)
    for door in (scan_files.open_label, scan_files.open_source_label):
        with pytest.raises(ValueError, match=r"^scan 'a' of .* has no label map"):
            door(tmp_path, record)


def test_a_record_that_is_cut_off_does_not_count(tmp_path):
    scan_files.write_scan(tmp_path, "a", make_volume(SHAPES[0]), AFFINE)
    scan_files.write_scan(tmp_path, "b", make_volume(SHAPES[0]), AFFINE)
    path = tmp_path / "scans/a/zarr.json"
    path.write_bytes(path.read_bytes()[:200])
    assert list(store.read_records(tmp_path)) == ["b"]


@pytest.mark.parametrize(
    "volume, label",
    [
        (make_volume((4, 4, 4)).astype(np.float32), None),
        (make_volume((4, 4)), None),
        (make_volume((4, 4, 4)), make_label((4, 4, 5))),
        (make_volume((4, 4, 4)), make_label((4, 4, 4), np.int16)),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, volume, label):
    with pytest.raises(ValueError, match="expected"):
        scan_files.write_scan(tmp_path, "a", volume, AFFINE, label=label)
    assert not list(tmp_path.iterdir())


def test_an_uncompressed_store_is_the_same_but_for_its_bytes(tmp_path):
    """zarr-python reads it, boxes are the same, a flipped byte is named."""
    volume, label = make_volume((20, 70, 66)), make_label((20, 70, 66))
    packed = scan_files.write_scan(tmp_path / "lz4", "a", volume, AFFINE, label=label)
    plain = scan_files.write_scan(tmp_path / "none", "a", volume, AFFINE, label=label, compression="none")
    assert plain.content_hash == packed.content_hash
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "none/scans/a/0", mode="r")[:], volume)
    shard = tmp_path / "none/scans/a/0/c/0/0/0"
    chunks = 3 * 2 * 2
    assert shard.stat().st_size == chunks * (8 * 64 * 64 * 2 + 4) + chunks * 16 + 4
    for box in ([(0, 20), (0, 70), (0, 66)], [(3, 9), (60, 70), (1, 66)], [(19, 20), (0, 1), (64, 65)]):
        voxels = scan_files.open_volume(tmp_path / "none", plain).read(np.array(box))
        np.testing.assert_array_equal(voxels, volume[tuple(slice(*bounds) for bounds in box)])
    scan_files.check_scan(tmp_path / "none", "a")
    raw = bytearray(shard.read_bytes())
    raw[5 * (8 * 64 * 64 * 2 + 4) + 77] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(RuntimeError, match=r"scan 'a' is damaged in chunk \(1, 0, 1\)"):
        scan_files.open_volume(tmp_path / "none", plain).read(np.array([(0, s) for s in volume.shape]))


# -- 8-bit codes ------------------------------------------------------------------------------------------------------


def test_eight_bit_codes_cost_what_the_record_says(tmp_path):
    volume, window = make_volume((20, 70, 66)), (-1000.0, 275.0)
    record = scan_files.write_scan(tmp_path, "a", volume, AFFINE, encoding="uint8", hu_window=window)
    array = zarr.open_array(tmp_path / "scans/a/0", mode="r")
    assert array.dtype == np.uint8 and dict(array.attrs) == {"scale_factor": 5.0, "add_offset": -1000.0}
    voxels = scan_files.open_volume(tmp_path, record).read(np.array([(0, s) for s in volume.shape]))
    np.testing.assert_array_equal(voxels, np.rint(array[:] * 5.0 - 1000).astype(np.int16))
    clipped, inside = volume.clip(*window), (volume >= window[0]) & (volume <= window[1])
    errors = (voxels - clipped).astype(np.float64)
    assert np.abs(errors).max() <= 2.5 + 0.5
    assert record.encoding_rms_hu == pytest.approx(np.sqrt((errors[inside] ** 2).mean()))
    assert record.clipped_share == pytest.approx(1 - inside.mean())
    assert (record.mean_hu, record.std_hu) == pytest.approx((voxels.mean(), voxels.std()))
    scan_files.check_scan(tmp_path, "a")
    whole = scan_files.write_scan(tmp_path, "b", volume, AFFINE)
    assert (whole.encoding_rms_hu, whole.clipped_share) == (0, 0)


@pytest.mark.parametrize("window", [(-1000.0, 275.0), (-100.0, 300.0), (0.0, 80.0)])
def test_what_a_human_looks_at_is_of_the_scan_not_of_its_codes(tmp_path, window):
    volume = make_volume((9, 40, 30))
    records = [
        scan_files.write_scan(tmp_path, name, volume, AFFINE, encoding=name, hu_window=window)
        for name in ("int16", "uint8")
    ]
    one, other = ((r.histogram, r.foreground_share, r.border_share, r.foreground_box) for r in records)
    assert one == other


# -- statistics of the voxels -----------------------------------------------------------------------------------------


def test_histogram_and_shares_equal_numpys(tmp_path):
    volume = make_volume((9, 40, 30))
    record = scan_files.write_scan(tmp_path, "a", volume, AFFINE)
    expected = np.histogram(volume, [-(2**15), *HISTOGRAM_HU, 2**15])[0]
    assert record.histogram == tuple(expected) and sum(record.histogram) == volume.size
    body = volume > -500
    faces = np.concatenate([body[:, [0, -1]].ravel(), body[:, :, [0, -1]].ravel()])
    assert (record.foreground_share, record.border_share) == pytest.approx((body.mean(), faces.mean()))


# -- damage -----------------------------------------------------------------------------------------------------------


def test_whatever_byte_of_a_scan_flips_is_noticed(tmp_path):
    volume, label = make_volume((9, 65, 33)), make_label((9, 65, 33))
    scan_files.write_scan(tmp_path, "a", volume, AFFINE, label=label, labelled=(1, 2))
    scan_files.check_scan(tmp_path, "a")
    rng = np.random.default_rng(0)
    files = [path for path in (tmp_path / "scans/a").rglob("*") if path.is_file()]
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        for place in rng.integers(0, len(content), 25):
            broken = bytearray(content)
            broken[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(broken)
            with pytest.raises((ValueError, RuntimeError)):
                scan_files.check_scan(tmp_path, "a")
        path.unlink()
        with pytest.raises((ValueError, RuntimeError), match=r"is missing|cannot be opened"):
            scan_files.check_scan(tmp_path, "a")
        path.write_bytes(content)
    scan_files.check_scan(tmp_path, "a")
    (tmp_path / "scans/a").rename(tmp_path / "scans/b")
    with pytest.raises(ValueError, match="that of scan 'a'"):
        scan_files.check_scan(tmp_path, "b")


@pytest.mark.slow
def test_a_flipped_byte_of_the_index_is_one_clear_line(tmp_path):
    for scan_id in "abc":
        scan_files.write_scan(tmp_path, scan_id, make_volume((4, 20, 20)), AFFINE)
    index = store.write_index(tmp_path, {}, (0.0, 1.0))
    path, noticed = tmp_path / "index.parquet", 0
    content = path.read_bytes()
    for place in range(5, len(content), 101):
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            assert store.read_index(tmp_path) == index  # a byte that nobody reads, such as a page's statistics
        except ValueError as error:
            noticed += 1
            assert "is damaged" in str(error) and "prepare repair store=" in str(error) and "\n" not in str(error)
    assert noticed > 30
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store.json of .* is damaged: delete it"):
        store.read_index(tmp_path)


def test_a_scan_is_a_valid_ome_zarr_image(tmp_path):
    yaozarrs = pytest.importorskip("yaozarrs")
    scan_files.write_scan(tmp_path, "a", make_volume((9, 65, 33)), AFFINE, label=make_label((9, 65, 33)))
    for path in ("scans/a", "scans/a/labels", "scans/a/labels/organs"):
        yaozarrs.validate_zarr_store(str(tmp_path / path))
    image = yaozarrs.open_group(str(tmp_path / "scans/a")).ome_metadata().multiscales[0]
    assert [(axis.name, axis.type, axis.unit) for axis in image.axes] == [(n, "space", "millimeter") for n in "zyx"]
    assert image.datasets[0].coordinateTransformations[0].scale == pytest.approx([2.5, 0.8, 0.7])


def test_more_organs_than_class_indices_hold_are_refused():
    values = tuple(range(1, 512, 2))
    assert store.class_lookup(values[:255])[values[254]] == 255
    with pytest.raises(ValueError, match=r"256 organs: .* room for 255"):
        store.class_lookup(values)
