"""data/place: folders and buckets behave alike, locks keep others out and survive their owner's kill."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zarr

from pgl_ray.config import FailedRun
from pgl_ray.data import bucket, columns, folder, place, scan_files, store
from pgl_ray.data.bucket import Bucket

AFFINE = np.diag([2.5, 0.8, 0.7, 1])


@pytest.fixture(params=["folder", "bucket"])
def where(request, tmp_path):
    """URL of a place that is empty, with a blank and letters beyond ASCII."""
    if request.param == "folder":
        return str(tmp_path / "Fälle 1")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}/Fälle 1"


def volume(seed=0, shape=(20, 90, 70)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def test_files(where):
    here = place.open_place(where)
    assert here.names("") == [] and here.names("a") == []
    here.write("a/b c/ü", [b"12", b"", b"345"])
    here.write("a/d", [])
    assert here.read("a/b c/ü") == b"12345" and here.read("a/d") == b""
    assert here.names("a") == ["b c", "d"] and here.names("") == ["a"]
    with pytest.raises(FileNotFoundError):
        here.read("a/none")
    with pytest.raises(OSError):
        here.open("a/none")
    file = here.open("a/b c/ü")
    assert file.size == 5 and list(file.ranges([(1, 2), (0, 0), (3, 9), (7, 2)])) == [b"23", b"", b"45", b""]
    here.remove("a/b c")
    here.remove("a/nothing")
    assert here.names("a") == ["d"]


def test_a_scan_is_there_whole_or_not_at_all(where):
    here = place.open_place(where)
    record = scan_files.write_scan(where, "Ä 1", volume(), AFFINE)
    assert store.read_records(where) == {"Ä 1": record}
    with pytest.raises(ZeroDivisionError), here.replaced("scans/b") as part:
        part.write("0/c/0/0/0", [b"half"])
        assert list(store.read_records(where)) == ["Ä 1"]
        raise ZeroDivisionError
    assert here.names("scans") == ["Ä 1"]
    again = scan_files.write_scan(where, "Ä 1", volume(1), AFFINE, label=np.ones((20, 90, 70), np.uint8))
    assert store.read_records(where) == {"Ä 1": again} and again.content_hash != record.content_hash
    scan_files.check_scan(where, "Ä 1")
    index = store.write_index(where, {"x": 1}, (-1024.0, 325.0), encoding="int16")
    assert store.read_index(where) == index and index.store == where
    box = np.array([(3, 17), (40, 90), (0, 66)])
    np.testing.assert_array_equal(scan_files.open_volume(where, again).read(box), volume(1)[3:17, 40:, :66])
    assert scan_files.open_label(where, again).read(box).all()


def test_zarr_reads_what_lies_in_the_bucket(s3):
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    url = f"{s3}/zarr"
    scan_files.write_scan(url, "a", volume(), AFFINE, label=np.ones((20, 90, 70), np.uint8))
    group = zarr.open_group(ObjectStore(from_url(f"{url}/scans/a", client_options={"allow_http": True})), mode="r")
    np.testing.assert_array_equal(group["0"][:], volume())
    assert group.attrs["ome"]["version"] == "0.5" and (group["labels/organs/0"][:] == 1).all()


def test_large_objects_come_in_pieces_of_one_version(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "PIECE", 1000)
    here, content = place.open_place(f"{s3}/pieces"), os.urandom(3500)
    here.write("a", [content])
    before = here.versions()
    here.copy_to("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content and here.versions() == before
    with pytest.raises(FileNotFoundError):
        here.copy_to("b", tmp_path / "b")

    import obstore

    get, served = obstore.get, []

    def replaced(*args, **options):
        served.append(options)
        if len(served) == 2:
            here.write("a", [content[::-1]])
        return get(*args, **options)

    monkeypatch.setattr(obstore, "get", replaced)
    with pytest.raises(OSError, match="recondition"):
        here.copy_to("a", tmp_path / "a")
    assert here.versions() != before


def test_damage_in_a_bucket_is_noticed(s3):
    url = f"{s3}/damage"
    record = scan_files.write_scan(url, "a", volume(), AFFINE)
    here, key = place.open_place(url), "scans/a/0/c/0/0/0"
    content = bytearray(here.read(key))
    for damaged, message in (
        (content[:-3], "cut off"),
        (content[:5000] + b"x" + content[5001:], "chunk"),
        (b"", "cut"),
    ):
        here.write(key, [bytes(damaged)])
        with pytest.raises(RuntimeError, match=message):
            scan_files.check_scan(url, "a")
    here.remove(key)
    with pytest.raises(RuntimeError, match="cannot be opened"):
        scan_files.open_volume(url, record)


def test_two_runs_at_once_the_second_is_refused(where, monkeypatch):
    monkeypatch.setattr(folder, "STRAGGLERS_S", 0.5)
    monkeypatch.setattr(bucket, "HEARTBEAT_S", 0.2)
    with place.open_place(where).locked() as token:
        with place.open_place(where).joined(token):
            began = time.monotonic()
            with pytest.raises(FailedRun, match="another prepare is writing into it"), place.open_place(where).locked():
                pass
        assert time.monotonic() - began < 5
        with pytest.raises(FailedRun, match="is over"), place.open_place(where).joined("a dead run's"):
            pass
    with place.open_place(where).locked() as again:
        assert again != token
    assert set(place.open_place(where).names("")) <= {".lock"}


HOLD = """
import sys, time
from pgl_ray.data import bucket, place
bucket.HEARTBEAT_S = 0.2
with place.open_place(sys.argv[1]).locked() as token:
    print(token, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_the_lock_of_a_killed_run_is_taken_over(where, monkeypatch):
    monkeypatch.setattr(bucket, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(bucket, "SILENCE_S", 1)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, where], stdout=subprocess.PIPE, text=True)
    token = holder.stdout.readline().strip()
    here = place.open_place(where)
    # a worker that outlives its driver is waited for, for as long as it writes
    ended = threading.Event()

    def straggle():
        with here.joined(token):
            ended.wait(1)

    straggler = threading.Thread(target=straggle)
    straggler.start()
    time.sleep(0.3)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with here.locked():
        assert isinstance(here, Bucket) or not straggler.is_alive()
        with pytest.raises(FailedRun, match="is over"), here.joined(token):
            pass
    straggler.join()


def test_wrong_places_are_one_clear_line(s3, monkeypatch):
    with pytest.raises(ValueError, match="s3://nothing-here/x: there is no such bucket: make it first"):
        place.open_place("s3://nothing-here/x").names("")
    with pytest.raises(ValueError, match="s3://nothing-here/x: there is no such bucket"):
        place.open_place("s3://nothing-here/x").read("store.json")
    with pytest.raises(ValueError, match="ftp://a/b: cannot be used as an object store"):
        place.open_place("ftp://a/b")
    with pytest.raises(ValueError, match="is not a store"):
        store.read_index(f"{s3}/empty")


def test_a_tables_bytes_are_let_go_when_it_is_read(tmp_path):
    """Threads of Arrow that hold them while Python ends abort the process, and an exit code of 2 becomes 134."""
    scan_files.write_scan(tmp_path, "a", volume(), AFFINE)
    store.write_index(tmp_path, {}, (-1024.0, 325.0))
    content = (tmp_path / "index.parquet").read_bytes()
    num_before = sys.getrefcount(content)
    for _ in range(100):
        table = columns.parquet_table(content)
        assert table.num_rows == 1
        del table
        assert sys.getrefcount(content) == num_before
