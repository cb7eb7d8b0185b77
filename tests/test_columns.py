"""The index by columns: of 100,000 scans, against pyarrow's own rows; small, quick, and never a mixture of two."""

import contextlib
import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import many_scans
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pgl_ray import inspect
from pgl_ray.config import InspectConfig
from pgl_ray.data import columns, facts, store
from pgl_ray.data.columns import Names
from pgl_ray.data.durable import write_aside
from pgl_ray.data.scan_record import ScanRecord

NUM = 100_000


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return many_scans.write_index(tmp_path_factory.mktemp("many") / "store", many_scans.random_shapes(NUM))


def as_read(row: dict) -> dict:
    """A row of pyarrow's as the record has it, by nothing but the schema."""
    texts = {name: json.loads(row[name]) for name in ("label_boxes", "label_voxels")}
    boxes = {int(value): tuple(box) for value, box in texts["label_boxes"].items()}
    voxels = {int(value): num for value, num in texts["label_voxels"].items()}
    row = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return row | {"label_boxes": boxes, "label_voxels": voxels}


@pytest.mark.slow
def test_rows_of_a_large_index_are_those_in_the_file(many):
    index, table = store.read_index(many), pq.read_table(many / "index.parquet")
    assert len(index.scans) == len(index.by_id) == NUM
    for row in (0, 1, 31, 32, 1023, 1024, 77_777, NUM - 1):
        (expected,) = map(as_read, table.slice(row, 1).to_pylist())
        record = index.scans[row]
        assert dataclasses.asdict(record) == expected
        assert index.by_id[expected["scan_id"]] == record == ScanRecord(**expected)
        for name, value in expected.items():
            assert type(getattr(record, name)) is type(value), name
    assert index.scans[-1].scan_id == index.scans[NUM - 1].scan_id == f"imagesTr__case_{NUM - 1:07}"
    assert [scan.scan_id for scan in index.scans[3:9:2]] == [f"imagesTr__case_000000{i}" for i in (3, 5, 7)]
    for wrong in ("imagesTr__case_", "", "zzz", "imagesTr__case_0000000x"):
        assert wrong not in index.by_id
    with pytest.raises(IndexError):
        index.scans[NUM]
    ids = table["scan_id"].take(pa.array([5, 99_999, 5, 64])).to_pylist()
    shapes = table["shape"].take(pa.array([5, 99_999, 5, 64])).to_pylist()
    assert index.numbers("shape", ids).tolist() == shapes
    assert index.column("mean_hu").tolist() == table["mean_hu"].to_pylist()
    assert [scan.split for scan in index.scans] == table["split"].to_pylist()


READY = """
import sys, time, numpy as np, pyarrow.parquet
from pathlib import Path
from pgl_ray.config import IntensityConfig, ViewsConfig
from pgl_ray.data import stream
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.render_cache import index_of
def rss():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line).split()[1])
def ready(ids):
    plan = stream.Plan.make(ids, 1, 128, 1, None, 0)
    renderer = PairRenderer(sys.argv[1], plan.scan_ids, 0, ViewsConfig(), IntensityConfig(), pairs_per_region=1)
    drawn = renderer.draw(plan.columns(0, 1))
    for scan_id in drawn.scan_ids:
        index_of(sys.argv[1]).by_id[scan_id].array_metadata
before, began = rss(), time.process_time()
ready([f"imagesTr__case_{i:07}" for i in range(int(sys.argv[2]))])
print(time.process_time() - began, (rss() - before) / 1024)
"""


@pytest.mark.slow
def test_a_rendering_process_is_small_and_ready_at_once(many):
    """CPU seconds and MiB over the imports: all that a renderer needs of 128 scans of 100,000."""
    done = subprocess.run([sys.executable, "-c", READY, str(many), str(NUM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, mebibytes = map(float, done.stdout.split())
    assert seconds < 1 and mebibytes < 60, done.stdout


@pytest.mark.slow
def test_the_page_of_a_large_store_stays_small(tmp_path):
    """1,000 scans of 5,000 on the page, all of them in the CSV, the figures of all of them in the sums."""
    num, shapes = 5000, many_scans.random_shapes(5000)
    config = InspectConfig(store=str(many_scans.write_index(tmp_path, shapes)), num_pictures=0)
    text, lines = Path(inspect.run(config)).read_text(), (tmp_path / "inspect.csv").read_text().splitlines()
    assert text.count("<tr id=") <= 1000 and f"{num} (1000 test, 4000 train)" in text and len(lines) == num + 1
    listed = [[int(cell) for cell in line.split(",")[2:5]] for line in lines[1:]]
    np.testing.assert_array_equal(listed, shapes)
    assert f"{shapes.prod(1).sum():,}" in text and f"{np.median(shapes[:, 0]):.4g}</td>" in text


@pytest.mark.slow
def test_figures_of_training_scans_are_made_of_columns(many):
    index = store.read_index(many)
    ids = [f"imagesTr__case_{i:07}" for i in range(0, NUM, 2)]
    recorded = facts.training_facts(index, ids)
    spacing = np.array(pq.read_table(many / "index.parquet", columns=["spacing_mm"])["spacing_mm"].to_pylist())[::2]
    assert recorded["num_scans"] == NUM // 2
    np.testing.assert_allclose(
        recorded["spacing_mm"], [spacing.min(0), np.median(spacing, 0), spacing.max(0)], atol=1e-4
    )
    assert len(index.labelled("test")) == NUM // 5


@pytest.mark.parametrize("longest", [0, 40, 3000, 70_000])
def test_texts_come_back_however_they_arrive(longest):
    """In parts of any size, with gaps, asked for in any order."""
    rng = np.random.default_rng(longest)
    texts = [None if rng.random() < 0.2 else "ä" * rng.integers(0, longest + 1) for _ in range(157)]
    cuts = np.sort(rng.integers(0, 158, 9))
    column = columns._Texts(part.tolist() for part in np.split(np.array(texts, object), cuts))
    assert len(column) == 157
    for row in (*range(157), *rng.integers(0, 157, 300).tolist()):
        assert column[row] == texts[row]


# -- few scans --------------------------------------------------------------------------------------------------------


def few(folder: Path, num: int = 5, seed: int = 0) -> store.Index:
    many_scans.write_index(folder, many_scans.random_shapes(num, seed), seed)
    return store.read_index(folder)


def test_columns_of_two_indexes_are_never_mixed(tmp_path):
    """Replaced in one step, as prepare does, the old one is read on; written over in place, it is refused."""
    index, shapes = few(tmp_path), many_scans.random_shapes(5)
    other = few(tmp_path / "other", seed=1)
    expected = index.scans[1].mean_hu
    write_aside(tmp_path / "index.parquet", (tmp_path / "other/index.parquet").read_bytes())
    assert index.scans[2].shape == tuple(shapes[2]) and index.scans[1].mean_hu == expected
    assert store.read_index(tmp_path).scans == other.scans
    index = few(tmp_path)
    (tmp_path / "index.parquet").write_bytes((tmp_path / "other/index.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"index\.parquet of .* (was written anew|is damaged)"):
        _ = [dataclasses.asdict(scan) for scan in index.scans]


def test_rows_out_of_order_are_refused(tmp_path):
    few(tmp_path)
    table = pq.read_table(tmp_path / "index.parquet")
    for rows in ([0, 2, 1, 3, 4], [0, 1, 1, 2, 3]):
        pq.write_table(table.take(pa.array(rows)), tmp_path / "index.parquet", write_page_checksum=True)
        with pytest.raises(
            ValueError, match=r"is damaged \(its rows are out of order\): python -m pgl_ray.prepare repair"
        ):
            store.read_index(tmp_path)


@pytest.mark.parametrize("at", [0, 15, 1022, 1023, 1024, 2048])
def test_names_out_of_order_are_seen_wherever_they_are(at):
    texts = [f"{i:06}" for i in range(2050)]
    for wrong in (texts[at], "", texts[at + 1] + "x"):  # twice, too early, too late
        changed = [*texts[: at + 1], wrong, *texts[at + 2 :]]
        in_order = all(a < b for a, b in itertools.pairwise(changed))
        with contextlib.nullcontext() if in_order else pytest.raises(ValueError, match="out of order"):
            Names(changed).in_order()


@pytest.mark.parametrize("group", [1, 3, 10])
def test_row_groups_of_any_size_are_read_alike(tmp_path, group):
    """Lists of one length and of several, texts with gaps: as pyarrow has them."""
    few(tmp_path)
    table = pq.read_table(tmp_path / "index.parquet")
    uneven = pa.array([[1], [], [2, 3, 13], [4], []], pa.list_(pa.int64()))
    gaps = pa.array(["a" * 90_000, None, "ü", None, ""], pa.string())
    for name, column in (("labelled", uneven), ("label_metadata", gaps)):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    pq.write_table(table, tmp_path / "index.parquet", row_group_size=group, write_page_checksum=True)
    records = [dataclasses.asdict(scan) for scan in store.read_index(tmp_path).scans]
    assert records == list(map(as_read, table.to_pylist()))


def test_records_travel_without_their_index(tmp_path):
    index = few(tmp_path)
    again = pickle.loads(pickle.dumps(index))
    assert again == index and isinstance(again.scans, tuple)
    assert pickle.loads(pickle.dumps(index.scans[3])) == index.scans[3]
    assert len(pickle.dumps(index.scans[3])) < 6000
    assert dataclasses.replace(index.scans[3], split="x").split == "x"
    with pytest.raises(AttributeError, match="no 'splitt'"):
        _ = index.scans[3].splitt


@pytest.mark.parametrize("texts", [(), ("a",), ("b", "a", "b"), ("ä\n'", "", "x" * 300), tuple("0123456789" * 9)])
def test_names_are_like_a_tuple_of_them(texts):
    names = Names(texts)
    assert names == texts and texts == names and tuple(names) == texts and len(names) == len(texts)
    assert repr(names) == repr(texts) and hash(names) == hash(texts) and Names(list(texts)) == names
    assert names != (*texts, "more") and [names[i] for i in range(len(texts))] == list(texts)
    assert tuple(names[1:]) == texts[1:] and names[1:] == texts[1:]
    buffers = []
    again = pickle.loads(pickle.dumps(names, 5, buffer_callback=buffers.append), buffers=buffers)
    assert again == names
    for text in set(texts):
        assert names.index(text) == texts.index(text)


@pytest.mark.parametrize("num", [1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 3000])
def test_a_name_is_looked_up_where_it_stands(num):
    texts = sorted(f"{i * 7 % 10007}é" for i in range(num))
    names = Names(texts).in_order()
    assert [names.place(text) for text in texts] == list(range(num))
    for wrong in ("", "5", "zz", texts[0] + "x"):
        with pytest.raises(KeyError):
            names.place(wrong)
