"""What is read from disk is data: a pickle that acts when it is loaded is refused everywhere, and never acts."""

import ast
import os
import pickle
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pgl_ray import config as c
from pgl_ray import report
from pgl_ray.data.scan_files import open_volume, write_scan
from pgl_ray.data.store import read_index, write_index
from pgl_ray.train import weights

PACKAGE = Path(__file__).resolve().parents[1] / "pgl_ray"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def harm(tmp_path):
    """The folder that a bomb makes; the test fails where it does."""
    assert pickle.loads(pickle.dumps(Bomb(tmp_path / "it works"))) is None and (tmp_path / "it works").exists()
    yield tmp_path / "harm"
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bomb_in_a_checkpoint(tmp_path, harm, zipped):
    """As the newest checkpoint of a run, as best.pt, as initial weights; in torch's old format, too."""
    meta = {"door": "pretrain", "encoder": {"width": 8, "depths": [1, 1, 1, 1], "stage_strides": "early"}}
    for name in ("best.pt", "weights.pth"):
        torch.save(
            {"model": {}, "meta": meta, "more": Bomb(harm)}, tmp_path / name, _use_new_zipfile_serialization=zipped
        )
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(harm)))
    for name in ("best.pt", "plain.pt"):
        with pytest.raises(ValueError, match=r"holds more than tensors|no file that torch.save wrote"):
            weights.load_encoder(str(tmp_path / name))
    for name in ("weights.pth", "plain.pt"):
        with pytest.raises(ValueError, match=name):
            weights.read(str(tmp_path / name), None, (-1024.0, 325.0), False)


def test_a_bomb_in_a_runs_pictures(tmp_path, harm, monkeypatch):
    monkeypatch.setattr(report, "_open", lambda index: (None, {}))
    run = SimpleNamespace(path=tmp_path, record=SimpleNamespace(index="s"), name="r")
    np.savez(tmp_path / "views.npz", scan_id=np.array([Bomb(harm)], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        report.view_pairs(run, 1)
    (tmp_path / "views.npz").write_bytes(pickle.dumps(Bomb(harm)))
    with pytest.raises(ValueError, match="pickle"):
        report.view_pairs(run, 1)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.mkdir ['{harm}']", "${{oc.create:{harm}}}", "${{oc.env:PATH}}"]
)
def test_code_in_a_config(tmp_path, harm, text):
    """Tags of Python are refused; what looks like an interpolation stays a text, which no path or number is."""
    (tmp_path / "x.yaml").write_text(f"index: s\nrun: r\nmax_steps: {text.format(harm=harm)}\n")
    with pytest.raises(ValueError, match=r"x\.yaml|max_steps"):
        c.load(c.PretrainConfig, [str(tmp_path / "x.yaml")])


def test_a_bomb_in_a_store(tmp_path, harm):
    """The reader knows one kind of array; metadata that ask for Python objects and another codec are refused."""
    store = tmp_path / "store"
    write_scan(store, "a", np.zeros((8, 64, 64), np.int16), np.eye(4), split="train")
    write_index(store, {}, (-1024.0, 325.0))
    for path in store.rglob("*"):
        if path.is_file() and path.name == "0" and "c" in path.parts:
            path.write_bytes(pickle.dumps(Bomb(harm)))
    (store / "scans" / "a" / "0" / ".zarray").write_text('{"zarr_format": 2, "filters": [{"id": "pickle"}]}')
    index = read_index(str(store))
    with pytest.raises(Exception, match=r"(?i)damaged|cut off|shard|checksum"):
        open_volume(index.store, index.scans[0]).read(np.array([[0, 8], [0, 64], [0, 64]]))


CONVERTING = ("parallel.py", "one_scan.py", "whole.py")  # what hands scans to Ray tasks


@pytest.mark.slow
def test_nothing_unpickles_but_what_this_process_made():
    """pickle is imported for what a process hands to its own workers alone; every torch.load says weights_only."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                loaders = {alias.name for alias in node.names} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
                assert not loaders or path.name in {*CONVERTING, "header_cache.py", "columns.py"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "yaml.load"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("allow_pickle", "False") == "False", path
                loader = [ast.unparse(value) for value in node.args[1:]]
                assert ast.unparse(node.func) != "yaml.load" or loader == ["yaml.BaseLoader"], path  # texts alone
                assert ast.unparse(node.func) != "torch.load" or options.get("weights_only") == "True", path


@pytest.mark.cluster
def test_nobody_without_the_token_gets_into_a_cluster_of_ours(ray_cluster):
    """Neither its job port, which runs whatever it is given, nor its GCS, which listens on all interfaces."""
    import ray

    node = ray._private.worker.global_worker.node
    assert node.webui_url.startswith("127.0.0.1:")
    for path, body in (("/api/jobs/", None), ("/api/jobs/", b'{"entrypoint": "true"}'), ("/nodes", None)):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{node.webui_url}{path}", data=body, timeout=20)
    code = "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b'', None)"
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for token in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        command = [sys.executable, "-c", code, node.gcs_address]
        done = subprocess.run(command, env=env | token, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and "InvalidAuthToken" in done.stderr, done.stderr
