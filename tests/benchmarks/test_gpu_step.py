"""gpu_step.py runs from end to end where there is no GPU; its figures mean nothing there."""

import json
import sys

import gpu_doors
import gpu_step
import pytest

from pgl_ray import config as c


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    wanted = ["--device", "cpu", "--tiny", "--batches", "2", "--strides", "early", "--repeats", "2"]
    monkeypatch.setattr(gpu_step, "WAYS", {"eager": None, "broken": {"backend": "no such compiler"}})
    wanted += ["--ways", "eager", "broken"]
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *wanted, "--out", str(out)])
    gpu_step.main()
    results = json.loads(out.read_text())
    [row] = results["steps"]
    assert set(row["parts_ms"]) == set(gpu_step.PARTS) and row["step_ms"] == pytest.approx(
        sum(row["parts_ms"].values()), 0.5
    )
    assert row["pairs_per_s"] == pytest.approx(2000 / row["step_ms"]) and row["tflops"] > 0
    assert results["checks"]["views, device against CPU"] < 1e-4
    by_hand = {name: value for name, value in results["checks"].items() if "by hand" in name}
    assert len(by_hand) == 2 and all(1e-6 < value < 0.3 for value in by_hand.values())
    eager, by_place, broken, _ = results["ways"]
    assert by_place["loss"] == "by place" and by_place["step_ms"] > 0 and by_place["uncompiled"] is None
    assert eager["pairs_per_s"] == pytest.approx(2000 / eager["step_ms"]) and 0 < eager["host_ms"] <= eager["step_ms"]
    assert 0 < eager["last_loss"] < 8 and eager["update_norm"] > 0 and "no such compiler" in broken["failed"]
    times = [row["ms"] for row in results["profile"]["top"]]
    assert (
        len(times) == 20
        and times == sorted(times, reverse=True)
        and any("conv" in r["name"] for r in results["profile"]["top"])
    )
    assert len(results["segmentation"]) == 3 and "paper's 904,000 pairs" in capsys.readouterr().out


def test_only_one_section_and_what_does_not_fit(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise gpu_step.torch.OutOfMemoryError("no memory")

    out = tmp_path / "new/figures.json"
    wanted = ["--device", "cpu", "--tiny", "--batches", "2", "--only", "steps", "--repeats", "2", "--out", str(out)]
    monkeypatch.setattr(gpu_step, "step_row", full)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *wanted])
    gpu_step.main()
    results, text = json.loads(out.read_text()), capsys.readouterr().out
    assert results["steps"] == [{"strides": s, "batch": 2, "fits": False} for s in ("early", "late")]
    assert "ways" not in text and "does not fit" in text and "no step was timed" in text


def test_a_missing_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(gpu_step.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_step.main()


def test_every_doors_command_is_one_that_the_door_takes(tmp_path, monkeypatch, capsys):
    """Through each door's config; that a door that fails fails the whole, and is named, with a door that is none."""
    commands = gpu_doors.commands("a/store", tmp_path, "cuda", ["one.nii.gz", "two.nii.gz"])
    configs = [c.load(getattr(c, f"{door.capitalize()}Config"), words) for door, *words in commands.values()]
    assert {type(config).__name__ for config in configs} >= {"ProbeConfig", "PredictConfig", "MatchConfig"}
    monkeypatch.setattr(sys, "argv", ["gpu_doors.py", "a/store", str(tmp_path), "--only", "probe"])
    monkeypatch.setattr(gpu_doors, "commands", lambda *args: {"probe": ["no_such_door"], "byol": ["none"]})
    with pytest.raises(SystemExit, match="True"):
        gpu_doors.main()
    text = capsys.readouterr().out
    assert "failed: probe" in text and "No module named pgl_ray.no_such_door" in text and "byol" not in text
