"""What the files of a run are called, wherever it lies.

A run folder holds run.json (door, config, versions), config.yaml, metrics.jsonl, events.jsonl, TensorBoard events,
checkpoint_<step> folders (state.pt, and checkpoint.json with its sha256), and for fine-tuning best.pt.
"""

import json
import re
from pathlib import Path
from typing import Any

from pgl_ray.data.durable import write_aside

RECORD = "run.json"
STATE = "state.pt"
MANIFEST = "checkpoint.json"
EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
TRACKER = "tracker.json"  # under which name each tracker knows the run
BEST = "best.pt"  # of a fine-tuning, the best network so far
SCANS = "scans.jsonl"  # of evaluation/: how and of which network, then a line per scan
NAME = re.compile(r"checkpoint_(\d{8,})")  # of a checkpoint's folder


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one step."""
    write_aside(path, json.dumps(value, indent=1).encode())
