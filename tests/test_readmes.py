"""The READMEs: every command in them parses, every link leads somewhere, none is longer than a newcomer reads."""

import re
import shlex
from pathlib import Path

import pytest

from pgl_ray import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")] if ".venv" not in path.parts)
PAGES = [path for path in PAGES if not {"demo", "runs", "build"} & set(path.relative_to(ROOT).parts)]
MOST_BYTES = 12_000
PARTS_OF_PREPARE = {"verify", "repair"}


def model_of(door: str, args: list[str]) -> type[config.Section]:
    """The config class of a door."""
    if door == "prepare" and args[:1] and args[0] in PARTS_OF_PREPARE:
        return config.StoreConfig
    return getattr(config, "".join(word.title() for word in door.split("_")) + "Config")


def commands(text: str) -> list[tuple[str, bool]]:
    """Calls of a door, continuation lines joined; those of code blocks are whole, those of code spans may leave out."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)
    whole = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    spelled = [*((line, True) for line in whole), *((" ".join(span.split()), False) for span in spans)]
    return [(line, is_whole) for line, is_whole in spelled if re.search(r"python -m pgl_ray\.[a-z]", line)]


CALLS = [(path, *call) for path in PAGES for call in commands(path.read_text())]


@pytest.mark.parametrize(
    ("path", "line", "is_whole"), CALLS, ids=[f"{path.relative_to(ROOT)}-{i}" for i, (path, *_) in enumerate(CALLS)]
)
def test_commands_parse(path, line, is_whole, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
    assert not set("[]{}*") & set(bare), "zsh looks for files of that name: quote it"
    place, door = next((i, word.removeprefix("pgl_ray.")) for i, word in enumerate(words) if "pgl_ray." in word)
    assert (ROOT / f"pgl_ray/{door.replace('.', '/')}.py").is_file()
    if door.startswith("examples."):  # which read the environment alone
        assert words[place + 1 :] == []
        return
    args = [re.sub(r"=\.\.\.$", "=x", word) for word in words[place + 1 :] if word not in ("&", "...")]
    model = model_of(door, args)
    args = [word for word in args if word not in PARTS_OF_PREPARE and not word.startswith("runs/")]  # a sweep's best
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    left_out = required - {word.split("=")[0] for word in args}
    config.load(model, args + ([] if is_whole else [f"{name}=x" for name in sorted(left_out)]))


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{path}: {link}"


@pytest.mark.parametrize("path", [p for p in PAGES if p.name == "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_readmes_are_short(path):
    assert len(path.read_bytes()) <= MOST_BYTES
