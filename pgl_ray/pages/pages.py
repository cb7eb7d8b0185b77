"""What every page is made with: the templates beside this file, and the answers at the top of a page."""

import math
import shlex
from pathlib import Path
from typing import NamedTuple

import jinja2

HERE = Path(__file__).parent
YES, NO, OPEN = "Yes", "No", "Can't tell"  # verdicts; a page has others, too


class Line(NamedTuple):
    """One sentence that answers a question.

    Attributes:
        verdict: its first words: yes, no, can't tell, or what else answers the question.
        text: the figures behind it; no full stop at its end.
        of: the run or arm that it is of, where a page has several.
    """

    verdict: str
    text: str
    of: str = ""


class Answer(NamedTuple):
    """A question and what the page's own figures say to it."""

    question: str
    lines: list[Line]


def render(template: str, **content: object) -> str:
    """A page from a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


def command(door: str, *args: str) -> str:
    """A command to type, its arguments quoted where a shell needs it."""
    return shlex.join(["python", "-m", f"pgl_ray.{door}", *args])


def plural(num: int, word: str) -> str:
    """A number with its word."""
    return f"{num:,} {word}" if num == 1 else f"{num:,} {word}s"


def percent(*shares: float) -> str:
    """Shares from 0 to 1, the sign after the last; two figures that count, of the largest."""
    largest = 100 * max(shares)
    digits = min(2, max(0, 1 - math.floor(math.log10(largest)))) if largest > 0 else 0
    return " to ".join(f"{100 * share:.{digits}f}" for share in shares) + " %"
