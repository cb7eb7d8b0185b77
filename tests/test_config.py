"""Every shipped YAML loads; every fault is named by its dotted path; the set of knobs is frozen on purpose."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from pgl_ray import config as c
from pgl_ray import shipped
from pgl_ray.data.random_numbers import uniforms
from pgl_ray.sweep import checks

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "prepare": c.PrepareConfig,
    "pretrain": c.PretrainConfig,
    "finetune": c.FinetuneConfig,
    "evaluate": c.EvaluateConfig,
    "predict": c.PredictConfig,
    "probe": c.ProbeConfig,
    "report": c.ReportConfig,
    "tune": c.TuneConfig,
    "bench": c.BenchConfig,
    "export": c.ExportConfig,
    "demo": c.DemoConfig,
}
REQUIRED = {"index": "s", "run": "r", "source": "s", "store": "s", "input": "i", "output": "o"}


def minimal(model):
    return [f"{k}={REQUIRED[k]}" for k, f in model.model_fields.items() if f.is_required()]


@pytest.mark.parametrize(
    "path",
    [p for d in ("conf", "data_prep") for p in sorted((ROOT / d).glob("*.yaml")) if p.stem != "published"],
    ids=lambda p: p.name,
)
def test_shipped_yaml_loads(path):
    """A config file is named after its door: pretrain.yaml, finetune_bcv.yaml; those of data_prep are for prepare."""
    model = c.PrepareConfig if path.parent.name == "data_prep" else MODELS[path.stem.split("_")[0]]
    values = OmegaConf.to_container(OmegaConf.load(path))
    args = [str(path)] + [a for a in minimal(model) if a.split("=")[0] not in values]
    assert isinstance(c.load(model, args), model)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_spaces_load_and_every_dotted_key_exists(path, tmp_path):
    config = c.load(c.TuneConfig, [str(path), "index=s", f"run={tmp_path}"])
    checks.check(config)


def test_the_papers_numbers_are_the_defaults():
    config = c.load(c.PretrainConfig, minimal(c.PretrainConfig))
    assert (config.epochs, config.global_batch_size, config.ema_decay, config.optim.lr) == (500, 128, 0.996, 0.2)
    assert config.views.size == (16, 96, 96) and config.views.crop_scale == (1.1, 1.4)
    assert config.encoder.depths == (3, 4, 6, 3) and config.heads.hidden == 4096 and config.heads.out == 256


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["index=a"], "run="),
        (["encodr.width=8"], "unknown key 'encodr'"),
        (["encoder.widht=8"], "unknown key 'encoder.widht'; known here: depths, kind, stage_strides, width"),
        (["epochs=many"], "epochs='many'"),
        (["views.size=[1,2]"], "views.size"),
        (["views.crop_scale=[2,1]"], "lower bound 2.0 is above upper bound 1.0"),
        (["encoder.stage_strides=middle"], "'early' or 'late'"),
        (["train.num_workers=3"], "not divisible"),
        (["missing.yaml"], "does not exist"),
        (["nonsense"], "expected a .yaml file or key=value"),
    ],
)
def test_faults_are_named(args, message):
    with pytest.raises(ValueError, match=r"[a-z]") as caught:
        c.load(c.PretrainConfig, ["index=a", *(["run=b"] if args != ["index=a"] else []), *args])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arg", ["max_steps=", "optim.lr= ", "views.size=", "split=", "labels.table=", "base_probe=", "epochs="]
)
def test_an_empty_value_is_no_default(arg):
    """As of a variable of the shell that is not set."""
    model = {"labels": c.PrepareConfig, "base_probe": c.TuneConfig}.get(
        arg.partition(".")[0].strip("="), c.PretrainConfig
    )
    with pytest.raises(ValueError, match=f"^{arg.strip()} is empty, as where a variable in it is: give a value, or"):
        c.load(model, [*minimal(model), arg])


def test_texts_that_may_be_empty_may_be_typed_so():
    config = c.load(c.PrepareConfig, ["source=a", "store=b", "recipe.prefix=", "recipe.name="])
    assert (config.recipe.prefix, config.recipe.name) == ("", "")


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        ("seed=010", 10),
        ("seed=008", 8),
        ("seed=0_10", 10),
        ("views.size=[016,096,+096]", (16, 96, 96)),
        ("seed=0x10", 16),
        ("seed=0", 0),
        ("epochs=1_000", 1000),
        ("optim.lr=01e-3", 0.001),
    ],
)
def test_numbers_are_decimal(arg, value, tmp_path):
    """Typed, and in a file, whatever YAML 1.1 makes of a leading zero."""
    key, _, written = arg.partition("=")
    (tmp_path / "a.yaml").write_text(OmegaConf.to_yaml(OmegaConf.from_dotlist([f"{key}=X"])).replace("X", written))
    for given in (arg, str(tmp_path / "a.yaml")):
        config = c.load(c.PretrainConfig, ["index=a", "run=b", given])
        for part in key.split("."):
            config = getattr(config, part)
        assert config == value


def test_numbers_inside_free_values_are_decimal():
    args = ["arms={a: {finetune.seed: 010}}", "base_finetune.seed=010", "space[pretrain.seed].choice=[010, 2]"]
    config = c.load(c.TuneConfig, ["index=s", "run=r", *args])
    assert config.arms == {"a": {"finetune.seed": 10}} and config.base_finetune == {"seed": 10}
    assert config.space == {"pretrain.seed": {"choice": [10, 2]}}


@pytest.mark.parametrize(
    "arg",
    [
        "max_steps=1:30",
        "optim.lr=1:30.5",
        "probe.every=on",
        "max_steps=yes",
        "optim.lr=True",
        "views.size=[yes,96,96]",
        "align.more_strides=[[2,on,2]]",
        "optim.lr=.inf",
        "optim.weight_decay=.nan",
        "train.timeout_s=inf",
        "views.crop_scale=[1,.inf]",
    ],
)
def test_what_is_no_number_is_none(arg, tmp_path):
    key, _, written = arg.partition("=")
    (tmp_path / "a.yaml").write_text(OmegaConf.to_yaml(OmegaConf.from_dotlist([f"{key}=X"])).replace("X", written))
    for given in (arg, str(tmp_path / "a.yaml")):
        with pytest.raises(ValueError, match=f"^{key}[=.]") as caught:
            c.load(c.PretrainConfig, ["index=a", "run=b", given])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("door", ["pretrain", "finetune", "probe", "evaluate", "tune", "demo"])
def test_a_seed_is_as_large_as_its_generators_take(door):
    most = 2**31 - 1 if door == "tune" else 2**63 - 1
    assert c.load(MODELS[door], [*minimal(MODELS[door]), f"seed={most}"]).seed == most
    if door == "tune":
        np.random.RandomState(most + 10**6)  # as of a sweep that goes on
    else:
        torch.Generator().manual_seed(most + 2)
        assert uniforms(most, np.zeros(1, int), ["a"], np.zeros(1, int), 2).shape == (1, 2)
    with pytest.raises(ValueError, match=rf"^seed={most + 1}: Input should be less than {most + 1}$"):
        c.load(MODELS[door], [*minimal(MODELS[door]), f"seed={most + 1}"])


@pytest.mark.parametrize(("door", "key"), [("pretrain", "pairs_per_scan"), ("finetune", "patches_per_scan")])
def test_an_epoch_is_no_longer_than_can_be_shuffled(door, key):
    args = minimal(MODELS[door])
    assert getattr(c.load(MODELS[door], [*args, f"{key}=1000000"]), key) == 10**6
    with pytest.raises(ValueError, match=rf"^{key}={10**19}: Input should be less than or equal to 1000000$"):
        c.load(MODELS[door], [*args, f"{key}={10**19}"])


def test_no_truth_stands_for_the_number_of_a_label():
    with pytest.raises(ValueError, match=r"^labels\.names=.*expected a number, not yes or no"):
        c.load(c.PrepareConfig, ["source=a", "store=b", "labels.names={liver: yes}"])


def test_files_then_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\noptim:\n  weight_decay: 1e-6\n")
    config = c.load(c.PretrainConfig, [str(tmp_path / "a.yaml"), "index=a", "run=b", "epochs=5"])
    assert config.epochs == 5 and config.optim.weight_decay == 1e-6
    (tmp_path / "out.yaml").write_text(c.to_yaml(config))
    assert c.load(c.PretrainConfig, [str(tmp_path / "out.yaml")]) == config


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "lr=0.5/a.yaml"])
def test_a_file_after_an_override_undoes_nothing(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("epochs: 3\nseed: 1\noptim: {lr: 0.1}\n")
    (tmp_path / "later.yaml").write_text("seed: 2\n")
    args = ["index=a", "run=b.yaml", "epochs=5", str(path), "optim.lr=0.7", str(tmp_path / "later.yaml")]
    config = c.load(c.PretrainConfig, args)
    assert (config.epochs, config.optim.lr, config.seed, Path(config.run).name) == (5, 0.7, 2, "b.yaml")


@pytest.mark.parametrize("key", ["base_probe", "arms.a/b", "unknown"])
def test_a_value_that_ends_like_a_file_is_a_value(key):
    with pytest.raises(ValueError, match=key.partition(".")[0]) as caught:
        c.load(c.TuneConfig, ["index=s", "run=r", f"{key}=missing.yaml"])
    assert "does not exist" not in str(caught.value)


@pytest.mark.parametrize("door", MODELS)
def test_every_knob_is_described(door):
    assert [key for key, _, text in c.keys(MODELS[door]) if not text] == []


def test_elastic_runs_name_both_ends():
    def train(*args):
        return c.load(c.PretrainConfig, ["index=s", "run=r", "global_batch_size=12", *args]).train

    elastic = train("train.min_workers=2", "train.max_workers=4")
    assert (elastic.min_workers, elastic.num_workers) == (2, 4)
    assert train("train.min_workers=2", "train.num_workers=4").num_workers == 4
    for args, message in (
        (("train.max_workers=4",), "goes with train.min_workers"),
        (("train.min_workers=2",), "is above the 1 of train.max_workers"),
        (("train.min_workers=1", "train.max_workers=4", "train.num_workers=3"), "give one of them"),
        (("train.min_workers=5", "train.max_workers=6"), "not divisible by train.min_workers 5"),
    ):
        with pytest.raises(ValueError, match=message):
            train(*args)


TEXTS = [
    "007",
    "1e5",
    "2_000",
    "yes",
    "no",
    "null",
    "0x1F",
    "1:30",
    "a${b",
    "{a: 1}",
    "x: y",
    "a=b",
    "#5",
    "it's",
    " b ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_on_the_command_line_is_what_was_typed(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = c.load(c.PrepareConfig, [f"source={text}", f"store={text}", f"recipe.prefix={text}"])
    assert (config.source, config.store, config.recipe.prefix) == (*[str(tmp_path / text)] * 2, text)
    if "${" not in text:
        (tmp_path / "dumped.yaml").write_text(c.to_yaml(config))
        assert c.load(c.PrepareConfig, ["dumped.yaml"]) == config


def test_lists_of_texts_and_texts_that_may_be_missing():
    config = c.load(c.PrepareConfig, ["source=a", "store=b", "series=[007, 1e5, 'x, y']", "labels.table=null"])
    assert config.series == ("007", "1e5", "x, y") and config.labels.table is None
    assert c.load(c.PrepareConfig, ["source=a", "store=b", "series=012"]).series == ("012",)
    assert c.load(c.PrepareConfig, ["source=a", "store=b", "labels={table: 012}"]).labels.table == "012"
    assert c.load(c.ReportConfig, ["run=[007,8]", "title=1.10"]).title == "1.10"
    config = c.load(c.PretrainConfig, ["index=null", "run=b", "train.compile=off", "epochs=3"])
    assert config.index.endswith("/null") and config.train.compile == "off" and config.epochs == 3


def test_texts_in_a_yaml_file_are_what_was_written(tmp_path):
    path = tmp_path / "prepare.yaml"
    path.write_text(
        "source: 007\nstore: 1e5\nseries: [012, yes]\nlabels: {table: 012}\n"
        "recipe: {name: 1.10, parts: [{images: '{id}', ids: [1_000, b], split: no, num_scans: 3}]}\n"
    )
    config = c.load(c.PrepareConfig, [str(path)])
    assert (Path(config.source).name, Path(config.store).name) == ("007", "1e5")
    assert config.series == ("012", "yes") and config.labels.table == "012" and config.recipe.name == "1.10"
    part = config.recipe.parts[0]
    assert (part.ids, part.split, part.num_scans) == (("1_000", "b"), "no", 3)


@pytest.mark.parametrize(
    "values, message", [({"source": 7}, "source=7: is read as a number"), ({"source": ""}, "empty")]
)
def test_no_number_stands_for_a_path(values, message):
    with pytest.raises(ValueError, match=message):
        c.build(c.PrepareConfig, {"store": "b", **values})


def test_what_is_longer_than_a_file_name_is_looked_for_nowhere():
    """A title or a list may be long, a path may not."""
    assert shipped.find(f"title={'x' * 300}") == f"title={'x' * 300}"
    with pytest.raises(ValueError, match=r"^source='a/x+/b': has a name longer than 255 bytes"):
        c.load(c.PrepareConfig, ["store=s", f"source=a/{'x' * 256}/b"])


@pytest.mark.parametrize("url", ["s3://", "s3:///", "gs://", "az:///scans", "s3:// /store", "://"])
@pytest.mark.parametrize(
    ("door", "key"), [(c.PrepareConfig, "store"), (c.PretrainConfig, "run"), (c.ProbeConfig, "init")]
)
def test_a_url_without_a_bucket_is_refused(door, key, url):
    values = {name: "b" for name, field in door.model_fields.items() if field.is_required()}
    with pytest.raises(
        ValueError, match=f"{key}=.*names no bucket after ://, as where a variable .* is empty"
    ) as error:
        c.build(door, {**values, key: url})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://lab", "gs://lab/a/", "az://lab//b"])
def test_a_url_with_a_bucket_stays_a_url(url):
    assert c.build(c.StoreConfig, {"store": url}).store == url.rstrip("/")
