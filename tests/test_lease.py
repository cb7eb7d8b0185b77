"""The lock in a bucket: of many who want it one gets it, and who lost it writes nothing more."""

import os
import threading
import time

import pytest
from far_bucket import Served

from pgl_ray import config as c
from pgl_ray.checkup import doctor_places, doctor_storage
from pgl_ray.checkup.doctor_places import Sight
from pgl_ray.config import FailedRun
from pgl_ray.data import lease
from pgl_ray.data.bucket import Bucket
from pgl_ray.train import runs

obstore = pytest.importorskip("obstore", reason="no obstore: pip install 'pgl_ray[cloud]'")

DEAD = b"process 1 on gone, 0123"


class HeldError(Exception):
    """Of a lock that another has."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("locks"), 0.005) as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        yield served


@pytest.fixture
def bucket(server, request) -> Bucket:
    """An empty prefix."""
    return Bucket(f"s3://far/{abs(hash(request.node.name))}")


def put(bucket: Bucket, content: bytes) -> None:
    obstore.put(bucket._store, ".lock", content, use_multipart=False)


def wish(bucket: Bucket, silence_s: float = 0.5, ask=None) -> lease.Lease:
    return lease.Lease(ask or bucket.ask, ".lock", beat_s=0.1, silence_s=silence_s)


def take(one: lease.Lease) -> lease.Lease:
    one.take(HeldError, lambda owner: None)
    return one


@pytest.mark.slow
@pytest.mark.parametrize("there", [DEAD, lease.LEAVING, None], ids=["dead", "left", "none"])
def test_of_many_waiters_one_gets_the_lock(bucket, there):
    """Of a killed holder above all: they see it silent at the same moment."""
    for _ in range(1 if there is None else 4):
        if there is not None:
            put(bucket, there)
        got, refused = crowd(bucket, 24)
        assert got == 1 and len(refused) == 23
        assert {text.split(" on ")[0] for text in refused} <= {f"process {os.getpid()}"}
        assert bucket.names("") == []


def crowd(bucket: Bucket, num: int) -> tuple[int, list[str]]:
    """So many want the lock at the same moment: how many got it, and which error the others got."""
    got, refused, start = [], [], threading.Barrier(num)

    def want() -> None:
        one = wish(bucket)
        start.wait()
        try:
            take(one)
        except HeldError as error:
            refused.append(str(error))
            return
        got.append(one)
        with one.hold():  # until all the others have their error
            until = time.monotonic() + 10
            while len(got) + len(refused) < num and time.monotonic() < until:
                time.sleep(0.02)

    threads = [threading.Thread(target=want) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(got), refused


def test_a_silent_lock_is_not_taken_before_its_time(bucket):
    put(bucket, DEAD)
    began, owners = time.monotonic(), []
    wish(bucket, 0.6).take(HeldError, owners.append)
    assert 0.6 <= time.monotonic() - began < 3 and owners == ["process 1 on gone"]


def test_a_lock_that_is_left_is_waited_for(bucket):
    put(bucket, DEAD)

    def leave():
        time.sleep(0.3)
        put(bucket, lease.LEAVING)
        time.sleep(0.3)
        obstore.delete(bucket._store, ".lock")

    thread = threading.Thread(target=leave)
    thread.start()
    take(wish(bucket, silence_s=60))
    thread.join()


def test_a_lock_that_somebody_removes_is_made_again(bucket):
    one = take(wish(bucket))
    obstore.delete(bucket._store, ".lock")
    assert one.beat() and bucket.read(".lock") and one.beat()
    obstore.delete(bucket._store, ".lock")
    take(wish(bucket))
    assert not one.beat()


def test_a_living_holder_keeps_the_lock(bucket):
    with take(wish(bucket)).hold():
        for _ in range(3):
            with pytest.raises(HeldError, match="process"):
                take(wish(bucket))


def test_who_lost_the_lock_never_touches_it_again(bucket):
    one = take(wish(bucket, silence_s=9))
    with one.hold():
        assert one.beat()
        put(bucket, DEAD)  # while this process was stopped, say
        assert not one.beat() and not one.beat()
        time.sleep(0.4)
    assert bucket.read(".lock") == DEAD


def test_an_answer_that_does_not_arrive_is_no_loss(bucket):
    """The store has written what was asked, and the connection breaks."""
    broken = threading.Event()

    def ask(function, *args, **options):
        done = bucket.ask(function, *args, **options)
        if broken.is_set() and function.__name__ == "put":
            broken.clear()
            raise OSError("connection reset")
        return done

    one = wish(bucket, ask=ask)
    broken.set()
    with pytest.raises(OSError, match="reset"):
        take(one)
    take(one)  # finds its own
    broken.set()
    with pytest.raises(OSError, match="reset"):
        one.beat()
    assert one.beat() and one.beat()
    take(wish(bucket, silence_s=0.2))
    assert not one.beat()


def test_a_place_whose_lock_is_gone_is_not_joined(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "write", lambda self, key, parts: self.ask(_small, key, b"".join(parts)))
    monkeypatch.setattr(Bucket, "remove", lambda self, key: None)
    with bucket.locked() as token:
        with bucket.joined(token):
            pass
        put(bucket, DEAD)
        with pytest.raises(FailedRun, match=r"the run that writes into s3://far/.* is over"), bucket.joined(token):
            pass
    assert bucket.read(".lock") == DEAD


def _small(store, key, content):
    obstore.put(store, key, content, use_multipart=False)


# -- stores without conditional puts -----------------------------------------------------------------------------------


@pytest.fixture
def conditions(server):
    yield server.take_conditions
    server.take_conditions("kept")


@pytest.mark.parametrize(
    ("how", "said"), [("501", "answers 501, Not Implemented, to cond"), ("ignored", "does not keep to cond")]
)
def test_the_doctor_finds_a_store_without_conditions(bucket, conditions, how, said):
    """Which takes, gives and removes an object all the same."""
    mark = doctor_places.leave_mark(bucket.url)
    assert "fault" not in doctor_places.look_at_run(mark)
    conditions(how)
    [line] = doctor_storage.place("run", bucket.url, [Sight("here", **doctor_places.look_at_run(mark))])
    assert (
        line.state == "wrong"
        and said in line.text
        and line.mend == "take a bucket with conditional writes, or a folder"
    )
    doctor_places.remove_mark(mark)
    assert bucket.names("") == []


@pytest.mark.slow
def test_a_run_without_conditions_is_refused_before_it_writes(bucket, conditions, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    conditions("501")
    config = c.load(c.PretrainConfig, ["index=s", f"run={bucket.url}"])
    with pytest.raises(ValueError, match=f"^{bucket.url}: the store answers 501.*: take a bucket .*, or a folder$"):
        runs.open_run(config, "pretrain", {"plan": "p"})
    assert bucket.names("") == []
    conditions("kept")
    assert runs.open_run(config, "pretrain", {"plan": "p"}) == bucket.url
    assert bucket.names("") == ["config.yaml", "run.json"]
