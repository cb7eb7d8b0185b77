"""Figures as files: the style that all share, and what a page holds of them.

Functions that draw return matplotlib Figures, built without pyplot; `to_png` and `to_svg` turn one into a data URI.
"""

import base64
import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.hashsalt": "pgl_ray",
    "figure.constrained_layout.use": True,
}
style = matplotlib.rc_context(STYLE)


@style
def to_bytes(figure: Figure, kind: str, **options: Any) -> bytes:
    """The figure as a file of `kind`, png or svg."""
    sink = io.BytesIO()
    figure.savefig(sink, format=kind, **options)
    return sink.getvalue()


def to_png(figure: Figure, dpi: int = 150) -> str:
    """The figure as a PNG's data URI."""
    return data_uri(to_bytes(figure, "png", dpi=dpi), "image/png")


DARK = {"#ffffff": "#16181c", "#000000": "#e2e2e2", "#333333": "#cccccc", "#555555": "#b0b5bb", "#eeeeee": "#2b3037"}
DARK["#0072b2"] = "#3a9ad9"  # of lines; style.html has the same for the legends beside them
IN_THE_DARK = "<style>@media screen and (prefers-color-scheme: dark) {{ svg {{ fill: {} }} {} }}</style></svg>".format(
    DARK["#000000"],  # text that is black, which matplotlib does not say
    " ".join(
        f'[style*="{what}: {bright}"] {{ {what}: {dark} !important }}'
        for bright, dark in DARK.items()
        for what in ("fill", "stroke")
    ),
)


def to_svg(figure: Figure) -> str:
    """With a second set of colours, which browsers take where the page is dark."""
    drawn = to_bytes(figure, "svg", metadata={"Date": None}).rstrip()
    return data_uri(drawn.removesuffix(b"</svg>") + IN_THE_DARK.encode(), "image/svg+xml")


def data_uri(content: bytes, mime: str) -> str:
    """A file's content as a data URI, which a page holds within itself."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
