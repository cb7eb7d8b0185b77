"""The table of vectors: a Parquet file with a row per scan, and parts of it while it grows.

A reader sees the old table or the new one. The file says of its vectors what holds for all of them: weights, maps,
state of BatchNorm.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pgl_ray
from pgl_ray.config import EmbedConfig
from pgl_ray.data.columns import parquet_table
from pgl_ray.data.durable import write_aside
from pgl_ray.judge.features import ScanEncoder

TABLE, PARTS = "embeddings.parquet", "parts"
PART = re.compile(r"\d{15,}-\d+\.parquet")  # of `write_part`
SAME = ("encoder_hash", "maps", "spacing")  # of what a table says, without which vectors cannot be compared
COLUMNS = {
    "scan_id": pa.string(),
    "source": pa.string(),
    "shape": pa.list_(pa.int64()),
    "spacing_mm": pa.list_(pa.float64()),
    "affine": pa.list_(pa.float64()),
    "scan_hash": pa.string(),
    "encoder_hash": pa.string(),
    "vector": pa.list_(pa.float32()),
    "notes": pa.list_(pa.string()),
    "picture": pa.binary(),
}


def table_bytes(rows: list[dict], facts: dict[str, Any]) -> bytes:
    """A Parquet file of rows with the keys of COLUMNS, and what holds for them in its metadata ("pgl_ray")."""
    schema = pa.schema(list(COLUMNS.items()), metadata={"pgl_ray": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue().to_pybytes()


def write_part(folder: Path, rows: list[dict], facts: dict[str, Any]) -> None:
    """Keeps rows of a table that is not whole yet; none is no part."""
    if rows:
        (folder / PARTS).mkdir(exist_ok=True)
        write_aside(folder / PARTS / f"{time.time_ns()}-{os.getpid()}.parquet", table_bytes(rows, facts))


def _parts(folder: Path) -> list[Path]:
    """The parts that `write_part` has left in a folder; other tables beside them are another's."""
    return sorted(path for path in (folder / PARTS).glob("*.parquet") if PART.fullmatch(path.name))


def read_table(path: Path) -> tuple[list[dict], dict[str, Any]]:
    """Rows of a table, their vectors as float32 arrays, and what it says of them.

    Raises:
        ValueError: damaged, or no such table.
    """
    try:
        table = parquet_table(path.read_bytes())
        facts = json.loads(table.schema.metadata[b"pgl_ray"])
        rows = table.to_pylist()
        return [row | {"vector": np.array(row["vector"], np.float32)} for row in rows], facts
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no table of embed: {' '.join(str(error).split())}") from None


def read_earlier(folder: Path, facts: dict[str, Any]) -> tuple[dict[str, dict], list[str]]:
    """Rows by scan_id of a folder's table and parts whose vectors are of the same kind, and what cannot be read."""
    earlier: dict[str, dict] = {}
    faults = []
    for path in [folder / TABLE, *_parts(folder)]:
        if not path.exists():
            continue
        try:
            rows, before = read_table(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        if same_kind(before, facts):
            earlier |= {row["scan_id"]: row for row in rows}
    return earlier, faults


def same_kind(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether vectors can be compared, by what two tables say."""
    return all(one.get(key) == other.get(key) for key in SAME)


def write_table(folder: Path, rows: list[dict], facts: dict[str, Any], asked: set[str]) -> tuple[bool, list[str]]:
    """Replaces a folder's table and removes its parts.

    Args:
        folder: of the table.
        rows: all of them.
        facts: what holds for them.
        asked: scan_ids that were asked for, failed ones among them.

    Returns:
        Whether the table before had vectors of another kind; where not, the scans of it that were not asked for now.
    """
    path, gone = folder / TABLE, []
    parts = _parts(folder)
    try:
        earlier, before = read_table(path) if path.exists() else ([], facts)
    except ValueError:
        earlier, before = [], facts
    replaced = not same_kind(before, facts)
    if not replaced:
        gone = [row["scan_id"] for row in earlier if row["scan_id"] not in asked]
    write_aside(path, table_bytes(rows, facts))
    for part in parts:
        part.unlink(missing_ok=True)
    for name in (PARTS, ".part"):  # .part is where dense maps are written before they are whole
        if not any((folder / name).glob("*")):
            shutil.rmtree(folder / name, ignore_errors=True)
    return replaced, gone


def about(config: EmbedConfig, encoder: ScanEncoder, names: tuple[str, ...], reading: str) -> dict[str, Any]:
    """What holds for all vectors of a table.

    Args:
        config: of embed.
        encoder: whose maps they are means of.
        names: of the maps.
        reading: state of BatchNorm in words.
    """
    maps, start = [], 0
    for name in names:
        level = encoder.names.index(name)
        stop = start + encoder.network.channels[level]
        stride = list(encoder.network.strides[level])
        center = list(encoder.network.centers[level])
        maps.append({"name": name, "columns": [start, stop], "stride": stride, "center": center})
        start = stop
    facts: dict[str, Any] = {"init": config.init, "encoder_hash": encoder.hash, "maps": maps, "reading": reading}
    facts |= {"hu_window": list(encoder.hu_window), "size": list(encoder.size), "spacing": config.spacing}
    facts |= {"pooled_over": "body", "made_by": f"pgl_ray {pgl_ray.__version__}"}
    return facts
