"""What was said of scans as they were converted: STORE/notes.jsonl, a line per note.

A line holds scan_id, source (the file), reason (the note) and shown (false: a matter of course, as structures that
nobody asked for).
"""

import json
from typing import Any

from pgl_ray.data.place import Place

NOTES_FILE = "notes.jsonl"


def read_notes(place: Place) -> list[dict[str, Any]]:
    """The notes of a store; none where there are none, or the file is damaged."""
    try:
        lines = [json.loads(line) for line in place.read(NOTES_FILE).splitlines()]
    except (FileNotFoundError, ValueError):
        return []
    return [line for line in lines if isinstance(line, dict) and line.keys() >= {"scan_id", "reason", "shown"}]


def keep_notes(place: Place, new: dict[str, list[dict[str, Any]]]) -> None:
    """Adds new notes to those of the scans that were converted before and are still there.

    Args:
        new: scan_id -> notes of those that were converted now.
    """
    earlier, stored = read_notes(place), set(place.names("scans"))
    lines = [line for line in earlier if line["scan_id"] in stored and line["scan_id"] not in new]
    lines += [{"scan_id": scan_id, **line} for scan_id, scan_notes in new.items() for line in scan_notes]
    if lines or earlier:
        content = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["scan_id"]))
        place.write(NOTES_FILE, [content.encode()])
