"""Stores in a bucket that answers late: the values of a folder, few requests, patience, one line where it ends."""

import os
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from far_bucket import Served

from pgl_ray.config import FailedRun, IntensityConfig, PatchConfig, ViewsConfig
from pgl_ray.data import chunks, place, render_cache, render_costs, scan_files, store, stream, wire
from pgl_ray.data.array_reader import UnreadableScan
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.patch_renderer import PatchRenderer
from pgl_ray.data.render_cache import reader_of_region, region_of

pytest.importorskip("obstore", reason="no obstore: pip install 'pgl_ray[cloud]'")

VIEWS, LATENCY_S = ViewsConfig(size=(8, 24, 16)), 0.03
IDS = tuple(f"scan {i}" for i in range(12))


def write_store(folder: Path, encoding: str = "int16") -> str:
    rng = np.random.default_rng(0)
    for i, scan_id in enumerate(IDS):
        shape = (14 + i, 150, 140 + i)
        volume = (rng.normal(0, 20, shape) + np.linspace(-800, 300, shape[1])[None, :, None]).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        label[4:8, 10:20, 10:20], label[6:10, 30:44, 20:30] = 2, 7
        options = {"label": label, "labelled": (2, 7)} if i < 5 else {}
        scan_files.write_scan(folder, scan_id, volume, np.eye(4), split="train", encoding=encoding, **options)
    store.write_index(folder, {"b": 7, "a": 2}, (-1024.0, 325.0), encoding=encoding)
    return str(folder)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with two stores."""
    folder = tmp_path_factory.mktemp("bucket")
    write_store(folder / "codes", "uint8")
    write_store(folder / "hu")
    return folder


@pytest.fixture
def far(here, monkeypatch):
    """The same folder as a bucket 30 ms away."""
    with Served(here, LATENCY_S) as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        forget()
        served.counts()
        yield served
    forget()


def forget() -> None:
    """As in a process of its own."""
    for cache in (value for module in (render_cache, chunks, wire) for value in vars(module).values()):
        if hasattr(cache, "cache_clear"):
            cache.cache_clear()


def rows_of(num: int, per_region: int = 1) -> dict[str, np.ndarray]:
    plan = stream.Plan.make(IDS, 8, num, 1, 1, 3, per_region)
    return plan.columns(0, 1)


def pairs(url, **changes) -> PairRenderer:
    return PairRenderer(str(url), IDS, 3, VIEWS, IntensityConfig(), **changes)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def table(folder: Path) -> list[dict]:
    return pq.read_table(folder / chunks.FILE).to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hu", "codes"])
@pytest.mark.parametrize("how", [{}, {"pairs_per_region": 4}, {"resize": False, "augment": False}], ids=str)
def test_views_from_far_are_those_of_a_folder(here, far, name, how):
    rows = rows_of(32, how.get("pairs_per_region", 1))
    assert_same(pairs(f"s3://far/{name}", **how)(rows), pairs(here / name, **how)(rows))


def test_patches_from_far_are_those_of_a_folder(here, far):
    rows = {name: value % 5 if name == "scan" else value for name, value in rows_of(16).items()}
    renderers = [
        PatchRenderer(url, IDS, 3, PatchConfig(size=(8, 24, 16)), IntensityConfig(), 0.5)
        for url in ("s3://far/hu", str(here / "hu"))
    ]
    assert_same(renderers[0](rows), renderers[1](rows))
    counted = far.counts()
    assert counted["HEAD"] == 2 and counted["GET"] <= 3 + 2 * 16  # index, settings, chunks; image and labels


def test_a_visit_takes_one_request_and_they_overlap(here, far):
    """These shards are smaller than what two requests cost, so each visit is one; its index is in the table."""
    render, rows = pairs("s3://far/hu"), rows_of(96)
    render(rows_of(1))
    far.counts()
    render(rows)
    counted = far.counts()
    assert counted["GET"] == 96 and counted["HEAD"] == counted["LIST"] == counted["FAILED"] == 0
    assert counted["MOST"] > 1
    per_region = replace(render, pairs_per_region=8)
    per_region(rows_of(96, 8))
    assert far.counts()["GET"] == 12  # 96 pairs of 12 regions


@pytest.mark.slow
@pytest.mark.parametrize("per_region", [1, 4])
def test_what_the_place_costs_is_measured(here, far, per_region):
    rows = rows_of(32, per_region)
    costs = render_costs.measure(pairs("s3://far/hu", pairs_per_region=per_region), rows)
    near = render_costs.measure(pairs(here / "hu", pairs_per_region=per_region), rows)
    assert costs["bytes_read"] == near["bytes_read"] and costs["crop_bytes"] == near["crop_bytes"]
    far.counts()
    wanted = pairs("s3://far/hu", pairs_per_region=per_region)
    reader_of_region.cache_clear(), region_of.cache_clear()
    wanted(rows)
    counted = far.counts()
    assert counted["GET"] == round(32 * costs["place_requests"]) and counted["BYTES"] == round(
        32 * costs["place_bytes"]
    )
    assert costs["place"] > LATENCY_S * 1000 / 32  # the bucket's sleep; an upper bound would be the machine's business


@pytest.mark.slow
def test_without_a_table_each_scan_takes_one_more(here, far, tmp_path):
    """As stores of earlier versions: the footer, once per scan and process, without asking for the shard's size."""
    old = shutil.copytree(here / "hu", here / "old", dirs_exist_ok=True)
    (old / chunks.FILE).unlink()
    rows = rows_of(96)
    got = pairs("s3://far/old")(rows)
    counted = far.counts()
    assert counted["GET"] <= 3 + 12 * 16 + 96 and counted["HEAD"] <= 2
    assert_same(got, pairs(old)(rows))
    far.counts()
    pairs("s3://far/old")(rows)
    assert far.counts()["GET"] == 96


def test_the_table_holds_what_the_footers_say(here):
    for name in ("hu", "codes"):
        rows = {(row["scan_id"], row["kind"]): row for row in table(here / name)}
        assert len(rows) == 12 + 5
        for (scan_id, kind), row in rows.items():
            path = here / name / "scans" / scan_id / {"volume": "0", "label": "labels/organs/0"}[kind] / "c/0/0/0"
            content = path.read_bytes()
            lengths = np.frombuffer(chunks.blosc.decompress(row["lengths"]), "<u4").tolist()
            ends = np.cumsum(lengths).tolist()
            footer = [number for end, length in zip(ends, lengths, strict=True) for number in (end - length, length)]
            assert row["size"] == len(content) and struct.pack(f"<{len(footer)}Q", *footer) == content[ends[-1] : -4]


def test_known_shards_are_not_opened_for_the_table(here, tmp_path, monkeypatch):
    folder = shutil.copytree(here / "hu", tmp_path / "s")
    before, opened = (folder / chunks.FILE).read_bytes(), []
    reader = chunks.ArrayReader
    monkeypatch.setattr(chunks, "ArrayReader", lambda *given: (opened.append(given), reader(*given))[1])
    index = store.write_index(folder, {"b": 7, "a": 2}, (-1024.0, 325.0))
    assert not opened and (folder / chunks.FILE).read_bytes() == before
    scan_files.write_scan(folder, "scan 3", np.zeros((9, 70, 80), np.int16), np.eye(4))
    store.write_index(folder, {"b": 7, "a": 2}, (-1024.0, 325.0))
    assert [given[1:3] for given in opened] == [("scan 3", "volume")]
    (folder / "scans/scan 3/0/c/0/0/0").unlink()  # damage is the scan's affair
    (folder / chunks.FILE).write_bytes(before[:-9])
    store.write_index(folder, {"b": 7, "a": 2}, (-1024.0, 325.0))
    assert len(table(folder)) == 15  # 12 volumes and 5 labels less scan 3's
    assert index.scans == store.read_index(here / "hu").scans


@pytest.mark.slow
@pytest.mark.parametrize("how", ["longer", "shorter", "torn", "missing"])
def test_a_table_out_of_date_costs_a_second_look(here, far, how):
    """Scans are converted again, the run is killed before it writes the table, and a training has read the index
    before; or the table is damaged."""
    new = here / f"new {how}"
    shutil.copytree(here / "hu", new)
    index = (new / "index.parquet").read_bytes()
    rng = np.random.default_rng(1)
    for scan_id in IDS[:6]:
        noise = rng.integers(-900, 900, (14 + IDS.index(scan_id), 150, 140 + IDS.index(scan_id))).astype(np.int16)
        scan_files.write_scan(new, scan_id, noise // (1 if how == "longer" else 2000), np.eye(4), split="train")
    (new / "index.parquet").write_bytes(index)
    table = new / chunks.FILE
    if how == "torn":
        table.write_bytes(table.read_bytes()[:100])
    if how == "missing":
        table.unlink()
    rows = rows_of(48)
    assert_same(pairs(f"s3://far/new {how}")(rows), pairs(new)(rows))
    assert_same(pairs(f"s3://far/new {how}", pairs_per_region=4)(rows), pairs(new, pairs_per_region=4)(rows))


@pytest.mark.slow
def test_damage_far_away_is_skipped_as_damage_here(here, far):
    bad = shutil.copytree(here / "hu", here / "bad")
    shard = bad / "scans/scan 2/0/c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    shard.write_bytes(content)
    (bad / "scans/scan 7/0/c/0/0/0").unlink()
    rows = rows_of(96)
    with pytest.raises(UnreadableScan, match=r"stored volume of scan 'scan [27]' "):
        pairs("s3://far/bad")(rows)
    got = pairs("s3://far/bad", skip=True)(rows)
    assert_same(got, pairs(bad, skip=True)(rows))
    assert {2, 7} >= set(got["missed"][got["missed"] >= 0]) and (got["missed"] >= 0).sum() > 8


@pytest.mark.slow
@pytest.mark.parametrize("started", [True, False])
def test_a_bucket_that_fails_for_a_while_is_waited_for(here, far, monkeypatch, capsys, started):
    """By processes that render, and by those that start just then."""
    monkeypatch.setattr(wire, "FIRST_PAUSE_S", 0.2)
    rows, render = rows_of(48), pairs("s3://far/hu")
    render(rows_of(1))
    if not started:
        forget()
    far.fail(503, 4)
    got, counted = render(rows), far.counts()
    assert counted["FAILED"] > (16 if started else 6)
    assert_same(got, pairs(here / "hu")(rows))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("  s3://far/hu: ") and line.endswith(
        "503 Service Unavailable: SlowDown: trying again for 180 s"
    )


@pytest.mark.slow
def test_a_bucket_that_stays_away_ends_the_run_in_one_line(far, monkeypatch):
    """It is no scan's fault, so none is skipped."""
    monkeypatch.setattr(wire, "PATIENCE_S", 1.0)
    rows, render = rows_of(48), pairs("s3://far/hu", skip=True)
    render(rows_of(1))
    far.fail(503, 600)
    with pytest.raises(FailedRun, match=r"^s3://far/hu: .*503.*: mend that, then the same command goes on from there$"):
        render(rows)


@pytest.mark.parametrize(
    "status, code",
    [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch")],
)
def test_credentials_that_expire_are_one_line_at_once(far, status, code):
    rows, render = rows_of(48), pairs("s3://far/hu", skip=True)
    render(rows_of(1))
    far.fail(status, 600, code)
    began = time.monotonic()
    with pytest.raises(FailedRun, match=rf"^s3://far/hu: no access: .*{status}.*{code}.*goes on from there$") as raised:
        render(rows)
    assert time.monotonic() - began < 5 and "\n" not in str(raised.value)
    forget()
    with pytest.raises(PermissionError, match=f"s3://far/hu: no access: .*{code}"):
        store.read_index("s3://far/hu")


def test_a_bucket_that_is_not_there_is_one_line(far):
    with pytest.raises(ValueError, match="s3://elsewhere/hu: there is no such bucket: make it first"):
        store.read_index("s3://elsewhere/hu")


def test_a_process_has_one_client_per_url_and_settings(far, monkeypatch):
    one = wire.client("s3://far/hu")
    assert wire.client("s3://far/hu") is one is place.open_place("s3://far/hu/")._store
    assert wire.client("s3://far/codes") is not one
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    assert wire.client("s3://far/hu") is not one
    assert os.environ["AWS_ENDPOINT_URL"] == far.url


def test_work_ahead_comes_in_turn_and_ends_with_its_reader():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise UnreadableScan("three")
        return item * item

    results = wire.ahead(work, range(1000))
    assert [next(results)() for _ in range(3)] == [0, 1, 4]
    with pytest.raises(UnreadableScan, match="three"):
        next(results)()
    assert next(results)() == 16
    results.close()
    assert len(begun) < 1000 and [each() for each in wire.ahead(lambda item: item, "abc")] == ["a", "b", "c"]
