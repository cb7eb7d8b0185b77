"""What every page shares: the check of widths and contrasts itself, commands, and figures in the dark."""

import base64
import re
import shlex

import pytest
from browser import CHROMIUM, faults

from pgl_ray.pages import figures, pages, plots

STYLE = (pages.HERE / "style.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be opened")
def test_the_check_sees_what_is_wrong(tmp_path):
    """Planted: a table that nothing scrolls, one cut off, a faint text; a table that scrolls is fine."""
    wide = f"<table><tr>{'<td>a wide cell of a table</td>' * 20}</tr></table>"
    body = f"<p>sound</p><div class=scroll>{wide}</div>"
    (tmp_path / "sound.html").write_text(f"<!DOCTYPE html>{STYLE}<body>{body}")
    assert faults(tmp_path / "sound.html") == []
    for name, planted, words in (
        ("wide", wide, "the page"),
        ("cut", f"<div style='overflow: hidden'>{wide}</div>", "cut off"),
        ("faint", "<p style='color: #888'>hardly seen</p>", "faint: P: hardly seen"),
        (
            "text",
            "<div style='overflow: auto'><p style='width: 200rem; max-width: none'>long</p></div>",
            "scrolls, DIV",
        ),
    ):
        (tmp_path / f"{name}.html").write_text(f"<!DOCTYPE html>{STYLE}<body>{body}{planted}")
        assert any(words in one for one in faults(tmp_path / f"{name}.html")), name


@pytest.mark.parametrize("path", ["/runs/pgl", "/runs/pgl, by place", "/runs/it's"])
def test_a_command_can_be_pasted(path):
    text = pages.command("probe", f"init={path}", "judges=[voxels,matching]")
    assert shlex.split(text) == ["python", "-m", "pgl_ray.probe", f"init={path}", "judges=[voxels,matching]"]


def test_a_figure_has_colours_for_the_dark():
    """Each colour that a figure is drawn with and that a dark page would swallow, has another there."""
    figure = plots.curves([plots.Series([1, 2], [3, 2], "#0072B2")], "loss", marks=[plots.Mark(2.5, "chance")])
    drawn = base64.b64decode(figures.to_svg(figure).partition("base64,")[2]).decode()
    svg, _, style = drawn.partition("<style>@media screen and (prefers-color-scheme: dark)")
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    seen_on_both = {plots.MARK_COLOR, "#999999"}
    assert used - seen_on_both and used - seen_on_both <= set(figures.DARK)
    assert all(f'="{what}: {color}"]' in style for color in used - seen_on_both for what in ("fill", "stroke"))
    assert drawn.endswith("</svg>") and drawn.count("</svg>") == 1


def test_levels_are_drawn_where_they_lie():
    lines = [plots.Series([1, 2], [0.5, 0.1], "#0072B2")]
    figure = plots.curves(lines, "share", (0.01, 1), True, [plots.Mark(0.02, "chance"), plots.Mark(0, "none")])
    (ax,) = figure.axes
    assert [line.get_ydata()[0] for line in ax.lines] == [0.5, 0.02]  # zero has no place on a log scale
    assert [text.get_text() for text in ax.texts] == ["chance"]
