"""Tables beside images, such as `metadata.csv` or `labels.jsonl`, joined to the images they name.

The column that names the images may be called anything and hold paths, names or names without a
suffix: it is the one whose values name most of the images.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.errors import UserError, some_of

STANDARD_NAMES = re.compile(r"metadata\.(csv|tsv|jsonl)")
FILE_COLUMN = re.compile(r"file|image|img|path|name|^id$|_id$", re.IGNORECASE)
HAS_SUFFIX = re.compile(r".\.[A-Za-z]{3,4}$")
INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.0+)?")
DELIMITERS = ",\t;|"

Line = dict[str, Any]


@dataclass(frozen=True)
class Tables:
    """Lines of all tables by the image that they name.

    Args:
        files: the tables that were joined.
        lines: of each image that is there.
        missing: lines of images that are not there, by the path that they should have.
    """

    files: list[str]
    lines: dict[str, list[Line]]
    missing: dict[str, list[Line]]

    def columns(self, paths: Sequence[str]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Return the tables' columns for these images, null where no line names one, with the
        features that `datasets` stores them by.

        A column is a list where any image has several lines with different values in it.
        """
        known = self.lines | self.missing
        columns: dict[str, list[Any]] = {}
        features: dict[str, Any] = {}
        for name in self.names():
            values = {path: _distinct(lines, name) for path, lines in known.items()}
            kind = _kind(value for found in values.values() for value in found)
            is_list = any(len(found) > 1 for found in values.values())
            cells = [[_convert(v, kind) for v in values.get(path, ())] for path in paths]
            columns[name] = cells if is_list else [cell[0] if cell else None for cell in cells]
            features[name] = _feature(kind, is_list)
        return columns, features

    def names(self) -> list[str]:
        """List the columns of all tables."""
        known = self.lines | self.missing
        return list(dict.fromkeys(n for lines in known.values() for line in lines for n in line))


def read_tables(
    root: Path, tables: Sequence[str], images: Sequence[str], taken: Sequence[str] = ()
) -> Tables:
    """Join the tables of an image folder, and a `metadata` file one folder up, to its images.

    Args:
        root: the folder, below which `tables` and `images` are relative paths.
        taken: names of columns that the folder has itself; a table's "text" is then "table.text".

    Raises:
        UserError: a table cannot be read, or a `metadata` file names none of the images.
    """
    root_name = root.resolve().name
    above = [
        os.path.join("..", name)
        for suffix in ("csv", "tsv", "jsonl")
        for name in (f"metadata.{suffix}", f"{root_name}.{suffix}")
        if (root / ".." / name).is_file()
    ]
    joined = Tables([], defaultdict(list), defaultdict(list))
    if not tables and not above:
        return joined
    index = _index_by_tail(images)
    for table in (*tables, *above):
        lines = _read(root / table)
        folder = str(PurePosixPath(table).parent)
        column = _find_file_column(lines, index, folder)
        if column is None:
            if lines and STANDARD_NAMES.fullmatch(os.path.basename(table)) and table not in above:
                raise UserError(
                    f"'{root / table}' has no column that names images of its folder (columns: "
                    f"{some_of(lines[0])})"
                )
            continue
        if _find(column, index, folder):
            raise UserError(
                f"the first line of '{root / table}' names an image, and no columns",
                how="write a line such as file_name,text above it",
            )
        joined.files.append(table)
        lines = [
            {f"table.{key}" if key in taken and key != column else key: line[key] for key in line}
            for line in lines
        ]
        _join_lines(joined, lines, column, index, folder, root_name)
    return joined


def _join_lines(
    joined: Tables,
    lines: Sequence[Line],
    column: str,
    index: dict[str, str | None],
    folder: str,
    root_name: str,
) -> None:
    """Add the lines of a table to the images that they name.

    An image may lie elsewhere than its line says, but not if another line names it in full. A table
    above the root may also be of folders beside the root: their lines are left out.
    """
    is_above = folder == ".."
    prefix = f"{root_name}/" if is_above else ""
    names = [str(line.get(column) or "") for line in lines]
    paths = [_find(name, index, folder) for name in names]
    in_full = {p for name, p in zip(names, paths) if p and _names_in_full(name, prefix + p)}
    for line, name, path in zip(lines, names, paths):
        rest = {key: value for key, value in line.items() if key != column}
        folders = _parts(name)[:-1]
        is_beside = is_above and bool(folders) and root_name not in folders
        if path in in_full and not _names_in_full(name, f"{prefix}{path}"):
            path = None
        if path is not None and not (in_full and is_beside):
            joined.lines[path].append(rest)
        elif name and not is_beside:
            joined.missing[os.path.normpath(os.path.join(folder, name))].append(rest)


# --- which column names the images ----------------------------------------------------------------


def _index_by_tail(images: Sequence[str]) -> dict[str, str | None]:
    """Map each ending of a path, with and without suffix, to the path; None if several end so."""
    index: dict[str, str | None] = {}
    for path in images:
        parts = path.split("/")
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            for ending in (tail, os.path.splitext(tail)[0]):
                for key in {ending, ending.casefold()}:
                    index[key] = path if index.get(key, path) == path else None
    for path in images:
        index[path] = path
    return index


def _find(name: str, index: dict[str, str | None], folder: str = ".") -> str | None:
    """Find the image that a cell names, from its table's folder or by the end of its path."""
    parts = _parts(name)
    beside = os.path.normpath(os.path.join(folder, *parts)) if parts else ""
    if found := index.get(beside):
        return found
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        for key in (tail, tail.casefold()):  # Windows and Macs know no case
            if key in index:
                return index[key]
    return None


def _names_in_full(name: str, path: str) -> bool:
    """Return whether a cell agrees with an image's path in all folders that both have."""
    *folders, file = _parts(name.casefold())
    *own_folders, own_file = path.casefold().split("/")
    n = min(len(folders), len(own_folders))
    is_same_place = folders[len(folders) - n :] == own_folders[len(own_folders) - n :]
    return is_same_place and file in (own_file, os.path.splitext(own_file)[0])


def _parts(name: str) -> list[str]:
    """Split a path of any system into folders and a file."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _find_file_column(
    lines: Sequence[Line], index: dict[str, str | None], folder: str
) -> str | None:
    """Find the column that names most different images; None if the table is about something
    else. A column of classes 0 and 1 may name `0.png` and `1.png`, again and again.
    """
    names = dict.fromkeys(name for line in lines for name in line)
    values = {
        name: [line[name] for line in lines if isinstance(line.get(name), str | int)]
        for name in names
    }
    file_like = [
        name
        for name in names
        if 2 * sum(bool(HAS_SUFFIX.search(str(value))) for value in values[name]) >= len(lines)
    ]
    best, most = None, 0
    for name in sorted(file_like or names, key=lambda name: not FILE_COLUMN.search(name)):
        found = [path for value in values[name] if (path := _find(str(value), index, folder))]
        if len(set(found)) > most and (name in file_like or 2 * len(found) >= len(lines)):
            best, most = name, len(set(found))
    return best


# --- reading --------------------------------------------------------------------------------------


def _read(path: Path) -> list[Line]:
    """Read the lines of a table: of a CSV file as strings, null where a cell is empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                return [
                    _flatten(_parse(path, i, text))
                    for i, text in enumerate(file, 1)
                    if text.strip()
                ]
            header = file.readline()
            file.seek(0)
            delimiter = max(DELIMITERS, key=header.count)
            rows = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, restkey="")
            return [
                {key.strip(): value.strip() or None for key, value in row.items() if key and value}
                | {key.strip(): None for key, value in row.items() if key and not value}
                for row in rows
            ]
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' cannot be read ({error})", how="save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"'{path}' cannot be read ({error})") from error


def _parse(path: Path, line: int, text: str) -> Line:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}', line {line}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}', line {line}: not a JSON object")
    return value


def _flatten(line: Line, prefix: str = "") -> Line:
    """Give the members of nested objects names such as "json.caption"."""
    flat: Line = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# --- values ---------------------------------------------------------------------------------------


def _distinct(lines: Iterable[Line], name: str) -> list[Any]:
    """List the different values of one image in a column."""
    values: list[Any] = []
    for line in lines:
        found = line.get(name)
        for value in found if isinstance(found, list) else [found]:
            if value is not None and value not in values:
                values.append(value)
    return values


def _kind(values: Iterable[Any]) -> type:
    """Return the narrowest of bool, int, float and str that holds all values."""
    kinds: set[type] = set()
    for value in values:
        if isinstance(value, str) and INTEGER.fullmatch(value):
            kinds.add(int)
        elif isinstance(value, str) and _is_number(value):
            kinds.add(float)
        elif isinstance(value, bool | int | float):
            kinds.add(type(value))
        else:
            return str
    if not kinds:
        return str
    if len(kinds) == 1:
        return kinds.pop()
    return str if bool in kinds else float


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not text.strip("-").startswith("0") or "." in text  # 007 is a name


def _convert(value: Any, kind: type) -> Any:
    if kind is int:
        return int(float(value)) if isinstance(value, str) and "." in value else int(value)
    if kind is str and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return kind(value)


def _feature(kind: type, is_list: bool) -> Any:
    from datasets import List, Value

    value = Value({bool: "bool", int: "int64", float: "float64", str: "string"}[kind])
    return List(value) if is_list else value
