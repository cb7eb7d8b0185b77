"""The user's table of splits and annotated organs (labels.table), as spreadsheets and scripts write it."""

import csv
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgl_ray.files import ct
from pgl_ray.files.identity import JOIN, series_mark
from pgl_ray.files.source import Fault, Source, counted, some

ID_COLUMNS = (
    "scan_id",
    "scan",
    "id",
    "case_id",
    "case",
    "image_id",
    "image",
    "patient_id",
    "patient",
    "subject",
    "name",
)
DELIMITERS = (",", ";", "\t")
SPLITS = ("train", "val", "validation", "test")  # whose capitals do not matter
NEAR_SPLITS = {  # what people write instead, which no door looks for
    **dict.fromkeys(("training", "trn", "tr"), "train"),
    **dict.fromkeys(("valid", "validating", "vl"), "validation"),
    **dict.fromkeys(("testing", "tst", "ts"), "test"),
}
NEAR_COLUMNS = {  # without blanks, _ and -
    **dict.fromkeys(("subset", "set", "partition", "fold", "splits", "datasplit"), "split"),
    **dict.fromkeys(("organs", "annotatedorgans"), "labelled_organs"),
}


class Table(NamedTuple):
    """A table whose rows are known to belong to scans.

    Attributes:
        columns: names in lower case.
        rows: scan_id -> column -> text.
        unused: ids of rows that fit no scan.
        loose: path -> scan_id of rows that fit a scan by the file name alone.
        id_column: where the ids stand.
    """

    columns: tuple[str, ...]
    rows: dict[str, dict[str, str]]
    unused: list[str]
    loose: dict[str, str]
    id_column: str


def with_table(scans: list[Source], path: Path, names: dict[str, int]) -> tuple[list[Source], list[Fault], list[Fault]]:
    """Gives scans the splits and annotated organs of a table.

    Args:
        names: organ name -> label value.

    Returns:
        The scans; labelled ones that cannot be used, because the table names organs and not theirs; what else is to be
        said of the table.

    Raises:
        ValueError: not a table, columns or splits that it may mean otherwise, no row fits a scan, several rows or scans
            for one id, an organ without a name, a labelled scan that would get no split, or one of a test folder that
            would be trained on.
    """
    table, where = _read(path, scans), f"labels.table={path}"
    updated, faults, notes = [], [], []
    for scan in scans:
        row = table.rows.get(scan.scan_id)
        if row is None and scan.label and "labelled_organs" in table.columns:
            faults.append(Fault(scan.image, f"has a label map but no row {scan.scan_id!r} in {path.name}"))
            continue
        if row and "split" in table.columns:
            split = _split(row["split"], f"{where}: {scan.scan_id}")
            if scan.split == "test" and split in ("train", "val", "validation"):
                raise ValueError(f"{where}: puts {scan.scan_id!r}, of a folder of test scans, into {split!r}: mend it")
            scan = replace(scan, split=split)
        if row and "labelled_organs" in table.columns:
            organs = _organs(row["labelled_organs"], names, f"{where}: {scan.scan_id}")
            gone = [one for one in organs if scan.masks and names[one] not in dict(scan.masks).values()]
            if gone:  # a mask that is not there says nothing of its organ, whatever the table says
                notes.append(Fault(scan.image, f"{path.name} lists {some(gone)}, of which it has no mask: unlabelled"))
                organs = [one for one in organs if one not in gone]
            scan = replace(scan, labelled=tuple(sorted(names[organ] for organ in organs)))
        updated.append(scan)
    unused = f"; rows that fit no scan: {some(table.unused)}" if table.unused else ""
    labelled = [scan for scan in updated if scan.label and scan.labelled != ()]
    lost = [scan.scan_id for scan in labelled if scan.scan_id not in table.rows or not scan.split]
    if lost and "split" in table.columns:
        raise ValueError(f"{where}: gives no split to {_count(lost, 'labelled scan')}{unused}: mend the table")
    without = [scan.scan_id for scan in updated if scan.scan_id not in table.rows]
    if without:
        notes.append(Fault(str(path), f"has no row for {_count(without, 'scan')}, which are used without"))
    if table.unused:
        notes.append(Fault(str(path), f"has {_count(table.unused, 'row')} of no scan that is here"))
    if table.loose:
        pairs = some([f"{cell} -> {scan_id}" for cell, scan_id in sorted(table.loose.items())])
        what = f"{counted(len(table.loose), 'row')} by the file name alone, the folders are others"
        notes.append(Fault(str(path), f"fits {what} ({pairs})"))
    if table.id_column not in (*ID_COLUMNS, table.columns[0]):
        notes.append(Fault(str(path), f"its column {table.id_column!r} is taken for the scans' ids"))
    return updated, faults, notes


def _count(names: list[str], what: str) -> str:
    return f"{counted(len(names), what)} ({some(sorted(names))})"


def _split(text: str, where: str) -> str:
    """The split of a cell; ValueError where it is a word that only looks like one."""
    words = re.sub(r"[\s_-]*(set|split)$", "", text.lower())
    if words in SPLITS and words == text.lower():
        return words
    if meant := NEAR_SPLITS.get(words) or (words if words in SPLITS else ""):
        raise ValueError(f"{where}: split {text!r}: is {meant!r} meant? Then write that")
    return text


def _cells(path: Path) -> tuple[tuple[str, ...], list[list[str]]]:
    """The names of a table's columns and its rows, which have a cell for each.

    Raises:
        ValueError: nothing to be read, or a row with more cells.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            if stated := re.fullmatch(r'"?sep=([^\w" \r\n])"?\s*', first, re.IGNORECASE):  # a spreadsheet's own line
                delimiter = stated[1]
            else:
                file.seek(0)
                delimiter = max(DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one), [])))
            lines = [
                [cell.strip() for cell in row] for row in csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            ]
    except FileNotFoundError:
        near = Path(path.name).absolute()
        mend = f"give labels.table={near}, which is there" if near.is_file() else "or give an absolute one"
        raise ValueError(
            f"labels.table={path} is not there: a path is looked for from the source's folder on; {mend}"
        ) from None
    except OSError as error:
        raise ValueError(f"labels.table={path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels.table={path}: cannot be read ({error}): save it as CSV in UTF-8") from None
    lines = [row for row in lines if any(row)]
    if not lines:
        raise ValueError(f"labels.table={path}: is empty")
    width = max(number for number, name in enumerate(lines[0], 1) if name)
    for row in lines:
        if any(row[width:]):
            raise ValueError(
                f"labels.table={path}: row {delimiter.join(row)!r} has more cells than the {width} columns "
                f"{delimiter.join(lines[0][:width])!r}: quote a cell that has {delimiter!r} in it, or separate organs "
                f"by blanks or {'|' if delimiter == ';' else ';'}"
            )
    return tuple(map(_column, lines[0][:width])), [[*row, *[""] * width][:width] for row in lines[1:]]


def _column(name: str) -> str:
    short = re.sub(r"[\s_-]", "", name.lower())
    return "labelled_organs" if short in ("labelledorgans", "labeledorgans") else name.lower()


def _check_columns(path: Path, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """Refuses columns that one cannot tell the meaning of.

    Raises:
        ValueError: two of one name, one that is probably meant to be another, or none that says anything.
    """
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"labels.table={path}: two columns are called {twice[0]!r}: keep one of them")
    for number, name in enumerate(columns):
        words = {row[number].lower() for row in rows} - {""}
        meant = NEAR_COLUMNS.get(re.sub(r"[\s_-]", "", name), "split" if words and words <= {*SPLITS} else name)
        if meant not in columns:
            raise ValueError(f"labels.table={path}: column {name!r}: is {meant} meant? Then call it so, else remove it")
    if not {"split", "labelled_organs"} & {*columns}:
        raise ValueError(
            f"labels.table={path}: none of its columns is split or labelled_organs, its first row is "
            f"{', '.join(columns)!r}: name the columns in it"
        )


def _read(path: Path, scans: list[Source]) -> Table:
    columns, cells = _cells(path)
    _check_columns(path, columns, cells)
    rows = [dict(zip(columns, row)) for row in cells]
    known = _names(scans)
    scan_ids = {name: _scans_of([row[name] for row in rows], known) for name in columns}
    by_name = [name for name in ID_COLUMNS if name in columns]
    id_column = max([*by_name, *columns], key=lambda name: sum(one is not None for one, _ in scan_ids[name]))
    by_id, unused, loose = {}, [], {}
    for row, (scan_id, by_file_name) in zip(rows, scan_ids[id_column]):
        if by_file_name:
            loose[row[id_column]] = scan_id
        if scan_id is None:
            unused.append(row[id_column])
        elif scan_id in by_id and by_id[scan_id] != row:
            raise ValueError(f"labels.table={path}: two rows for {scan_id!r}, which differ: keep one of them")
        else:
            by_id[scan_id] = row
    if not by_id and scans:
        row_ids, scan_ids = some(unused) or "none", some(sorted(scan.scan_id for scan in scans))
        raise ValueError(f"labels.table={path}: no row fits a scan: its ids are {row_ids}, the scans' are {scan_ids}")
    return Table(columns, by_id, unused, loose, id_column)


class _Names(NamedTuple):
    """What a row may call a scan -> scan_id, and the names that several scans have."""

    scan_ids: dict[str, str]
    shared: set[str]


def _names(scans: list[Source]) -> _Names:
    keys: dict[str, set[str]] = {}
    for scan in scans:
        path = Path(scan.image)
        bare = _bare(path.name)
        aliases = [path.name, *([] if scan.slices else [bare, bare.removesuffix("_0000"), path.parent.name])]
        aliases += [scan.scan_id.rpartition(JOIN)[0]] if series_mark(scan.scan_id) else []  # nobody types the mark
        for name in {path.name, bare}:  # with one folder, two, ...
            aliases += ["/".join([*path.parts[k:-1], name]) for k in range(1, len(path.parts) - 1)]
        for key in [*aliases, scan.scan_id]:
            keys.setdefault(_plain(key), set()).add(scan.scan_id)
    unique = {key: next(iter(ids)) for key, ids in keys.items() if len(ids) == 1}
    shared = {key for key, ids in keys.items() if len(ids) > 1}
    return _Names(unique | {_plain(scan.scan_id): scan.scan_id for scan in scans}, shared)


def _scans_of(cells: list[str], names: _Names) -> list[tuple[str | None, bool]]:
    """The scan that each cell of a column means, and whether it says so by its file name alone while its folders are
    others: where no two scans have that name, and no two cells."""
    files = Counter(_plain(_bare(_parts(cell)[-1])) for cell in {*cells})
    fits = []
    for cell in cells:
        scan_id = _scan_of(cell, names)
        by_file = _scan_by_file(cell, names, files) if scan_id is None else None
        fits.append((scan_id or by_file, by_file is not None and len(_parts(cell)) > 1))
    return fits


def _parts(cell: str) -> list[str]:
    return cell.replace("\\", "/").strip("/").split("/")


def _scan_of(cell: str, names: _Names) -> str | None:
    """The scan that a cell means by its id, with or without suffix, or its path or the end of that."""
    parts = _parts(cell)
    last, tails = _bare(parts[-1]), [parts[k:-1] for k in range(len(parts) - 1)]
    whole = [
        cell,
        *("/".join([*tail, name]) for tail in tails for name in (parts[-1], last)),
        "__".join([*parts[:-1], last]),
    ]
    return next((names.scan_ids[_plain(name)] for name in whole if _plain(name) in names.scan_ids), None)


def _scan_by_file(cell: str, names: _Names, files: Counter[str]) -> str | None:
    """The scan that a cell means by its file name; of a path elsewhere where only one scan and one cell have that."""
    *folders, file = _parts(cell)
    last = _bare(file)
    if folders and files[_plain(last)] > 1:
        return None
    for name in (last, last.removesuffix("_0000"), file):
        if (scan_id := names.scan_ids.get(_plain(name))) is not None and not (folders and _plain(name) in names.shared):
            return scan_id
    return None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _bare(name: str) -> str:
    return ct.bare_name(Path(name)) if name.lower().endswith(ct.SUFFIXES) else name


def _organs(text: str, names: dict[str, int], where: str) -> list[str]:
    """The organs of a cell, separated by ; | or , or else by blanks, though names may have blanks.

    Raises:
        ValueError: an organ that has no value.
    """
    known = {name.casefold(): name for name in names}
    organs = []
    for part in re.split(r"[;|,]", text.strip(" []")):
        words = part.strip(" '\"").split()
        while words:
            for end in range(len(words), 0, -1):
                if name := known.get(" ".join(words[:end]).strip("'\"").casefold()):
                    break
            else:
                raise ValueError(f"{where}: organ {words[0]!r} is none of {list(names)}")
            organs.append(name)
            words = words[end:]
    return organs
