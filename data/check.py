"""List the images of a dataset that cannot be decoded, all in one pass.

    python -m data.check FOLDER                       # of images, Parquet files or save_to_disk
    python -m data.check cifar10 --data_dir COPY      # any name that --dataset_name takes

One line for each bad file, with the reason, and a count at the end. The exit status is 1 if there
are any. `data.bad_rows` finds them; `train.py --bad_rows skip` trains without them.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from data.bad_rows import find_bad_rows
from data.load import open_dataset
from data.rows import BadRow
from datasets_config import DATASET_CONFIGS
from runtime import cli
from runtime.flags import Derived, flag, required


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """List the images of a dataset that cannot be decoded, all in one pass."""

    dataset_name: str = required(
        "a folder, or what train.py takes; the flag's name may be left out"
    )
    data_dir: Path | None = flag(None, "local copy of the dataset")
    image_column: str | None = flag(None, "column of the images")
    streaming: bool = flag(False, "read Parquet files where they lie")
    train_split: str | None = flag(Derived("train"), "split to train on")
    eval_split: str | None = flag(
        Derived("the dataset's"), "split to evaluate on; none for the training split alone"
    )


def parse_words(words: Sequence[str]) -> CheckConfig:
    """Parse the command line, where the dataset may come first without its flag.

    Raises:
        UserError: see `cli.parse_flags`.
    """
    is_named = bool(words) and not words[0].startswith("-")
    return cli.parse_flags(CheckConfig, ["--dataset_name", *words] if is_named else words)


def resolve_name(name: str) -> str:
    """Return the name of a dataset, which may be given as the path of a folder."""
    is_path = Path(name).expanduser().is_dir() or name.startswith((".", "/", "~"))
    return f"folder:{name}" if is_path and name not in DATASET_CONFIGS else name


def describe_rows(split: str, bad_rows: Sequence[BadRow]) -> Iterator[str]:
    """Describe bad rows, one in a line, or consecutive rows without a file that share a reason."""

    def key(numbered: tuple[int, BadRow]) -> tuple[str, str, int]:
        place, bad = numbered
        return bad.file, bad.problem, bad.row - place

    for (file, problem, _), group in groupby(enumerate(bad_rows), key):
        rows = [bad.row for _, bad in group]
        numbers = f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]}–{rows[-1]}"
        place = f"split '{split}', {numbers}"
        if file:  # the name of a file that a Parquet file holds is no path
            place = file if os.path.isabs(file) else f"{file} ({place})"
        yield f"{place}: {problem}"


def main(words: Sequence[str] | None = None) -> None:
    """Check the splits that training uses."""
    config = parse_words(sys.argv[1:] if words is None else words)
    source = open_dataset(
        resolve_name(config.dataset_name),
        data_dir=config.data_dir,
        image_column=config.image_column,
        conditioning="none",
        streaming=config.streaming,
        train_split=config.train_split,
        eval_split=config.eval_split,
        # Given, so that a dataset opens of which no image can be read.
        image_size=8,
        channels=3,
    )
    n_bad = n_rows = 0
    for split in source.full_splits().values():
        bad_rows = find_bad_rows(split)
        for line in describe_rows(split.name, bad_rows):
            print(line)
        n_bad += len(bad_rows)
        n_rows += len(split)
    print(f"{n_bad} of {n_rows} rows are bad")
    sys.exit(1 if n_bad else 0)


if __name__ == "__main__":
    cli.run_command(main)
