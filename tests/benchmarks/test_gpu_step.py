"""gpu_step.py runs from end to end where there is no GPU; its figures mean nothing there."""

import json
import sys

import gpu_step
import pytest


def test_the_script_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    wanted = ["--device", "cpu", "--tiny", "--batches", "2", "--strides", "early", "--compile", "off", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *wanted, "--out", str(out)])
    gpu_step.main()
    found = json.loads(out.read_text())
    [row] = found["steps"]
    assert set(row["parts_ms"]) == set(gpu_step.PARTS) and row["step_ms"] == pytest.approx(
        sum(row["parts_ms"].values()), 0.5
    )
    assert row["pairs_per_s"] == pytest.approx(2000 / row["step_ms"]) and row["tflops"] > 0
    assert found["checks"]["views, device against CPU"] < 1e-4
    assert found["checks"]["loss, bfloat16 against float32"] < 0.05
    assert found["checks"]["gradient, compiled bfloat16 against bfloat16"] == 0  # nothing is compiled here
    assert len(found["segmentation"]) == 3 and "paper's 904,000 pairs" in capsys.readouterr().out


def test_a_missing_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(gpu_step.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_step.main()
