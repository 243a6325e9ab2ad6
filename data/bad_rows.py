"""Rows of a dataset that cannot be decoded: found in one pass, left out, and recorded with a run.

A row is bad if training could not decode it: an empty cell, a missing or truncated file, a file
that is no image. Rows that are left out are gone before an order of rows is made, so that the order
stays a function of (seed, step).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from data.rows import BadRow, Source, Split, select_rows
from runtime.errors import UserError
from runtime.files import atomic_file

RECORD_FILE = "bad_rows.json"  # in a run's folder
NEW_BAD_ROW = f"to look for bad rows again, delete {RECORD_FILE} in the run's folder"
ROWS_PER_TASK = 16  # that a thread decodes at a time

BadRows = Mapping[str, Sequence[BadRow]]  # of the splits "train" and "eval"


def find_bad_rows(split: Split) -> list[BadRow]:
    """Decode every row of a split in threads, with a progress bar if that takes long.

    Returns the bad ones, in the order of the rows.
    """

    def check(rows: Int64[np.ndarray, "b"]) -> list[BadRow]:
        return split.decode_readable(rows).bad

    tasks = np.array_split(np.arange(len(split)), len(split) // ROWS_PER_TASK + 1)
    with ThreadPoolExecutor() as pool:
        try:
            found = pool.map(check, tasks)
            title = f"checking {split.name}"
            bar = tqdm(
                found,
                title,
                len(tasks),
                leave=False,
                delay=2,
                unit=" rows",
                unit_scale=ROWS_PER_TASK,
            )
            return [bad for bad_rows in bar for bad in bad_rows]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else Ctrl-C waits for all rows
            raise


def leave_out(source: Source, bad_rows: BadRows) -> Source:
    """Return the source without its bad rows, which it then knows.

    Raises:
        UserError: a split has no other rows.
    """
    splits = {"train": source.train, "eval": source.eval}
    for name, bad in bad_rows.items():
        split = splits[name]
        good = ~np.isin(split.rows, [row.row for row in bad])
        if not good.any():
            raise UserError(f"no row can be read; the first is {split.describe(bad[0])}")
        split = select_rows(split, np.flatnonzero(good)) if bad else split
        splits[name] = dataclasses.replace(split, advice=NEW_BAD_ROW)
    return dataclasses.replace(source, **splits, bad_rows=bad_rows)


def require_few_bad_rows(source: Source, bad_rows: BadRows, at_most: float) -> None:
    """Refuse to leave out too many training rows.

    Args:
        at_most: a share of the training rows.

    Raises:
        UserError: they are more.
    """
    bad, n = bad_rows["train"], len(source.train)
    if len(bad) > at_most * n:
        raise UserError(
            f"{len(bad)} of {n} training rows are bad, more than --bad_rows_at_most {at_most:g}; "
            f"the first: {source.train.describe(bad[0])}",
            how="`python -m data.check` lists all",
        )


# --- the record -----------------------------------------------------------------------------------


def to_json(source: Source) -> str:
    """Serialise the rows that were left out of a source."""
    assert source.bad_rows is not None
    record = {
        name: {
            "split": split.name,
            "n_rows": len(split) + len(source.bad_rows[name]),
            "bad_rows": [bad._asdict() for bad in source.bad_rows[name]],
        }
        for name, split in (("train", source.train), ("eval", source.eval))
    }
    return json.dumps(record, indent=1)


def from_json(text: str, source: Source) -> BadRows:
    """Invert `to_json`, for the source with all its rows.

    Raises:
        UserError: the text is damaged, or of a dataset with another number of rows.
    """
    splits = {"train": source.train, "eval": source.eval}
    try:
        record = json.loads(text)
        n_rows = {name: int(record[name]["n_rows"]) for name in splits}
        bad_rows = {name: [BadRow(**bad) for bad in record[name]["bad_rows"]] for name in splits}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the run's {RECORD_FILE} is damaged ({error})", how="delete it to check all rows again"
        ) from None
    for name, split in splits.items():
        if n_rows[name] != len(split):
            raise UserError(
                f"cannot resume: split '{split.name}' of {source.config.name} had {n_rows[name]} "
                f"rows, now it has {len(split)}"
            )
    return bad_rows


def read_record(folder: Path) -> str:
    """Read the record in a run's folder, for `from_json`; "" if there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / RECORD_FILE
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def write_record(folder: Path, source: Source) -> None:
    """Write the rows that were left out of a source to a run's folder."""
    with atomic_file(folder / RECORD_FILE) as file:
        file.write(to_json(source).encode() + b"\n")


def summary(source: Source) -> str:
    """Count the rows that were left out, in a line with its newline; "" for none."""
    n_bad = {name: len(bad) for name, bad in (source.bad_rows or {}).items()}
    if not any(n_bad.values()):
        return ""
    return (
        f"bad rows left out: {n_bad['train']} to train on, {n_bad['eval']} to evaluate with; "
        f"{RECORD_FILE} names them\n"
    )
