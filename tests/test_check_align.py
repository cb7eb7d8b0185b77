"""check_align: exact for the right geometry, exit 1 for a wrong one, and what it leaves behind."""

import json

import numpy as np
import pytest

from pgl_ray import check_align
from pgl_ray.config import CheckAlignConfig, FailedRun, PretrainConfig, load
from pgl_ray.data import scan_files, store
from pgl_ray.pages import tables

SMALL = ["views.size=[16,48,32]", "encoder.depths=[1,1,2,1]", "num_pairs=64"]


def check(tmp_path, *args):
    return check_align.run(load(CheckAlignConfig, [*SMALL, f"output={tmp_path}/out", *args]))


def a_run(tmp_path, *args):
    """The folder of a pre-training, as far as its config goes; without a store."""
    small = ["index=s", "run=r", "align.output_stride=[4,8,8]", "encoder.depths=[1,1,1,1]"]
    values = json.loads(load(PretrainConfig, [*small, *args]).model_dump_json()) | {"index": None}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"door": "pretrain", "config": values}))
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [[], ["encoder.stage_strides=late"], ["align.output_stride=[4,8,8]"], ["align.flip=false", "align.crop=false"]],
)
def test_the_aligner_is_exact_for_its_geometry(args, tmp_path):
    result = check(tmp_path, *args)
    facts = json.loads((tmp_path / "out" / "check_align.json").read_text())
    assert facts["passed"] and (tmp_path / "out" / "check_align.png").stat().st_size > 10_000
    field, cell = (facts["conventions"][name] for name in check_align.CONVENTIONS)
    assert max(field["voxels"]["max_not_clamped"]) < 0.01
    assert all(0 <= share < 1 for share in field["clamped_share"])
    if args[0:1] == ["align.flip=false"]:  # one crop, no flips: both views look at the same places anyway
        assert max(cell["voxels"]["max"]) < 0.01
    else:
        assert min(cell["voxels"]["mean"]) > 5 * max(field["voxels"]["mean_not_clamped"]) + 0.5
    assert "the aligner is right" in check_align.describe(result)


@pytest.mark.slow
def test_wrong_priors_fail(tmp_path, capsys):
    with pytest.raises(FailedRun, match=r"exceeds what the geometry allows by \d+.*align.wrong_priors=True"):
        check(tmp_path, "align.wrong_priors=true")
    assert "centers=receptive_field *" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_centre_fails(tmp_path, monkeypatch):
    """An encoder whose layers centre their cells half a voxel off what the aligner believes."""
    right = check_align.feature_geometry

    def wrong(*args):
        level, geometry = right(*args)
        return level, geometry._replace(center=tuple(c + 0.5 for c in geometry.center))

    monkeypatch.setattr(check_align, "feature_geometry", wrong)
    with pytest.raises(FailedRun, match="exceeds"):
        check(tmp_path)


@pytest.mark.slow
def test_nothing_to_check_is_no_pass(tmp_path):
    with pytest.raises(FailedRun, match=r"nothing could be checked: .*views.size=\(8, 48, 32\)"):
        check(tmp_path, "views.size=[8,48,32]")


@pytest.mark.slow
def test_of_a_store_only_the_drawn_scans_are_opened(tmp_path, monkeypatch):
    """A hundred thousand open files are more than a process may have."""
    rng, opened = np.random.default_rng(0), []
    for i in range(30):
        volume = rng.integers(-900, 300, (20, 60, 44)).astype(np.int16)
        scan_files.write_scan(tmp_path / "s", f"s{i:02}", volume, np.diag([2.0, 1.0, 1.0, 1.0]), split="train")
    store.write_index(tmp_path / "s", {}, (-1024.0, 325.0))
    real = scan_files.open_volume
    monkeypatch.setattr(scan_files, "open_volume", lambda *args: opened.append(args[1].scan_id) or real(*args))
    facts = check(tmp_path, f"index={tmp_path}/s").facts
    assert facts["passed"] and len(opened) == facts["num_pairs"] == 64 and len(set(opened)) > 20


@pytest.mark.slow
def test_typed_settings_override_a_runs_config(tmp_path):
    run = [f"run={a_run(tmp_path, 'views.size=[16,32,48]')}", "num_pairs=64"]
    facts = check_align.run(load(CheckAlignConfig, run)).facts
    assert (facts["view_size"], facts["output_stride"]) == ([16, 32, 48], [4, 8, 8])
    assert (tmp_path / "run" / "check_align.png").is_file()
    other = [*run, "align.output_stride=[8,16,16]", f"output={tmp_path}/other"]
    facts = check_align.run(load(CheckAlignConfig, other)).facts
    assert (facts["view_size"], facts["output_stride"]) == ([16, 32, 48], [8, 16, 16])


@pytest.mark.parametrize(
    "typed, is_the_runs",
    [
        (["seed=5", "num_pairs=65"], True),
        (["align.output_stride=[4,8,8]"], True),
        (["align.output_stride=[8,16,16]"], False),
        (["encoder.stage_strides=late", "seed=5"], False),
    ],
)
@pytest.mark.slow
def test_what_a_run_did_not_do_is_no_check_of_it(tmp_path, monkeypatch, typed, is_the_runs):
    """The run's own table stays; what is typed beside it goes to `output`, and either says what it is of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_align, "_draw_picture", lambda *_: None)
    run = a_run(tmp_path, "views.size=[16,32,32]")
    (run / "check_align.json").write_text("the run's")
    result = check_align.run(load(CheckAlignConfig, [f"run={run}", "num_pairs=64", *typed]))
    table = (run if is_the_runs else tmp_path / "check_align") / "check_align.json"
    assert json.loads(table.read_text()) == result.facts and str(table.parent) in check_align.describe(result)
    assert is_the_runs or (run / "check_align.json").read_text() == "the run's"
    stride = "/".join(map(str, result.facts["output_stride"]))
    assert f"views 16x32x32, output stride {stride})." in tables.alignment(result.facts)["verdict"]


@pytest.mark.slow
def test_other_strides_are_possible_and_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(check_align, "_draw_picture", lambda *_: None)
    with pytest.raises(ValueError, match=r"^align\.more_strides: \[3, 5, 7\]: a resnet encoder .* take one of them$"):
        check(tmp_path, "align.output_stride=[4,8,8]", "align.more_strides=[[2,4,4],[3,5,7]]")
    result = check(tmp_path, "align.output_stride=[4,8,8]", "align.more_strides=[[2,4,4],[8,16,16]]")
    line = check_align.describe(result).splitlines()[-1]
    assert all(
        f"stride {other} of align.more_strides was not looked at" in line for other in ("[2, 4, 4]", "[8, 16, 16]")
    )
    assert "Stride 2/4/4 was not looked at. Stride 8/16/16 was" in tables.alignment(result.facts)["verdict"]


def test_a_file_of_a_pre_training_is_read_for_what_counts_here(tmp_path):
    """Also a sweep's; what is typed must be one of the door's own keys."""
    mine = "views: {size: [16, 32, 48]}\nalign: {output_stride: [4, 8, 8]}\nseed: 3\n"
    theirs = "optim: {lr: 1.5}\nmax_steps: 9\nheads: {hidden: 8}\nmethod: pgl\n"
    (tmp_path / "own.yaml").write_text(mine)
    (tmp_path / "pretrain.yaml").write_text(mine + theirs)
    inner = "".join(f"  {line}\n" for line in mine.splitlines())
    (tmp_path / "best.yaml").write_text(f"pretrain:\n{inner}finetune: {{seed: 4}}\n")
    expected = load(CheckAlignConfig, [str(tmp_path / "own.yaml")])
    assert (expected.views.size, expected.align.output_stride, expected.seed) == ((16, 32, 48), (4, 8, 8), 3)
    for name in ("pretrain.yaml", "best.yaml"):
        assert load(CheckAlignConfig, [str(tmp_path / name)]) == expected
    (tmp_path / "typo.yaml").write_text(mine + "optin: {lr: 1.5}\n")
    refused = {str(tmp_path / "typo.yaml"): "unknown key 'optin'", "optim.lr=1.5": "unknown key 'optim'"}
    for arg, message in refused.items():
        with pytest.raises(ValueError, match=message):
            load(CheckAlignConfig, [arg])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no pre-training run"):
        check(tmp_path, f"run={tmp_path}")
