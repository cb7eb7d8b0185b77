"""A terminal for commands: what they write to it, and what then stands on its screen."""

import os
import pty
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def in_terminal(command: list[str], code: int = 0, columns: int = 80, rows: int = 24) -> str:
    """What a command that ends with this exit code writes to a terminal; without columns and rows, one that does not
    know its size."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", str(columns), "rows", str(rows)], stdin=theirs, check=True)
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}  # they would count
    env = {**known, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as run:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            parts.append(part)
        assert run.wait() == code
    os.close(ours)
    return b"".join(parts).decode()


def screen(written: str) -> list[str]:
    """Lines that stand there in the end; knows carriage return, line feed, up, and erase to the end of a line."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", written, re.S):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[K":
            rows[row] = rows[row][:column]
        else:
            assert len(part) == 1, part
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows if line.strip()]
