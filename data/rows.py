"""Rows of an opened dataset: images that can be decoded, with their labels or captions.

Opening and checking a dataset is `data.load`'s; the order of rows and the making of batches are
`data.shuffle`'s and `data.pipeline`'s.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Float64, Int32, Int64, Num, UInt8

from data import images, latents
from data.arrow import ArrowSplit
from data.buckets import Buckets
from data.parquet import ParquetSplit, UnreachableError
from data.row_formats import LatentRows, PixelRows, row_format
from datasets_config import DatasetConfig
from runtime.errors import UserError

FIND_BAD_ROWS = "`python -m data.check` lists all, --bad_rows skip trains without them"
MAX_NAME = 40  # characters of a dataset's or a file's name in an error line
Images = UInt8[np.ndarray, "b h w c"] | Float16[np.ndarray, "b h w k"]


class BadRowError(UserError):
    """A row cannot be decoded. The message names dataset, split and row, and the file if any."""


class BadRow(NamedTuple):
    """A row that cannot be decoded, numbered in the data and not in the split."""

    row: int
    file: str  # "" where the row names none
    problem: str


class DecodedRows(NamedTuple):
    """The rows of a batch that could be decoded, and those that could not."""

    rows: Int64[np.ndarray, "b"]
    images: Images
    bad: list[BadRow]


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of one split, with undecoded images and checked labels or captions."""

    config: DatasetConfig
    name: str
    data: ArrowSplit | ParquetSplit  # the images of all rows of the data
    rows: Int64[np.ndarray, "n"]  # rows of the data that belong to this split
    labels: Int32[np.ndarray, "labels"]  # of each row
    captions: list[tuple[str, ...]]  # of each row; empty for a dataset without captions
    advice: str = FIND_BAD_ROWS  # what to do about a row that cannot be decoded

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def format(self) -> PixelRows | LatentRows:
        """The format of a decoded row."""
        return row_format(self.config)

    def images_only(self) -> "Split":
        """Return the same rows without labels and captions, to be pickled for worker processes."""
        return dataclasses.replace(self, labels=self.labels[:0], captions=[])

    def decode(
        self, indices: Int64[np.ndarray, "b"], places: Float64[np.ndarray, "b"] | None = None
    ) -> Images:
        """Decode these rows of the split; rows of latents are moments.

        Args:
            places: in [0, 1), the part of each image that is cut out; None for the middle.

        Raises:
            BadRowError: a row cannot be decoded.
        """
        decoded = self.decode_readable(indices, places)
        if decoded.bad:
            raise self.error_of(decoded.bad)
        return decoded.images

    def decode_readable(
        self, indices: Int64[np.ndarray, "b"], places: Float64[np.ndarray, "b"] | None = None
    ) -> DecodedRows:
        """Decode those of these rows that can be decoded.

        Args:
            places: as of `decode`.

        Raises:
            UnreachableError: the files are out of reach, which is no fault of the rows.
        """
        rows = self.rows[indices].tolist()
        decoded = np.empty((len(rows), *self.format.shape), self.format.dtype)
        good: list[int] = []
        bad: list[BadRow] = []
        for i, cell in enumerate(self.read_cells(rows)):
            try:
                decoded[i] = self._decode_cell(cell, None if places is None else places[i])
                good.append(i)
            except UserError as error:
                bad.append(BadRow(rows[i], file_name(cell), str(error)))
        if not bad:
            return DecodedRows(indices, decoded, bad)
        return DecodedRows(indices[good], decoded[good], bad)

    def error_of(self, bad: Sequence[BadRow]) -> BadRowError:
        """Make the error of rows that cannot be decoded. It names the first and counts the rest."""
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return BadRowError(f"{self.describe(bad[0])}{others}; {self.advice}")

    def describe(self, bad: BadRow) -> str:
        """Describe a row that cannot be decoded in one line."""
        name = _keep_end(self.config.name, MAX_NAME)
        file = f"file '{self._short_name(bad.file)}', " if bad.file else ""
        place = f"{file}row {bad.row}, column '{self.config.image_column}'"
        return f"dataset '{name}', split '{self.name}', {place}: {bad.problem}"

    def _short_name(self, file: str) -> str:
        """Return a file's path within the folder of the dataset, at most `MAX_NAME` characters."""
        folder = os.path.expanduser(self.config.path)
        if self.config.name.startswith("folder:") and os.path.isabs(file):
            within = os.path.relpath(file, folder)
            file = file if within.startswith("..") else within
        return _keep_end(file, MAX_NAME)

    def read_cells(self, rows: list[int]) -> list[Mapping[str, Any] | UserError | None]:
        """Read these rows of the data; an error stands for each that lies in a damaged file."""
        try:
            return list(self.data.read_cells(rows))
        except UnreachableError:
            raise
        except UserError as error:
            if len(rows) == 1:
                return [error]
            return [self.read_cells([row])[0] for row in rows]

    def _decode_cell(
        self, cell: Mapping[str, Any] | UserError | None, place: float | None
    ) -> Num[np.ndarray, "h w _"]:
        if isinstance(cell, UserError):
            raise cell
        content = image_bytes(cell)
        c = self.config
        if c.encoding:
            return latents.unpack_moments([content], c.encoding)[0]
        letterbox = c.crop == "letterbox"
        return images.decode_image(
            content, channels=c.channels, size=c.size, place=place, letterbox=letterbox
        )


@dataclass(frozen=True, eq=False)
class Source:
    """An opened dataset. Every field of `config` is set: columns, classes and sizes are the
    data's. `notices` tell what there is, and what was left out.

    `bad_rows` are those that were left out of each split, "train" and "eval"; None if the rows were
    not looked through. `buckets` are those of the rows of each split, of latents of several shapes.
    """

    config: DatasetConfig
    train: Split
    eval: Split
    notices: tuple[str, ...] = ()
    bad_rows: Mapping[str, Sequence[BadRow]] | None = None
    buckets: Mapping[str, Buckets] | None = None

    @property
    def n_train_rows(self) -> int:
        """Number of training rows, with those that were left out."""
        return len(self.train) + len((self.bad_rows or {}).get("train", ()))

    def full_splits(self) -> dict[str, Split]:
        """Return the splits of the data by name, each with all of its rows.

        Rows that were held out of the training split are put back in their places.
        """
        if self.train.name != self.eval.name:
            return {"train": self.train, self.eval.name: self.eval}
        rows = np.concatenate([self.train.rows, self.eval.rows])
        order = np.argsort(rows)
        labels = np.concatenate([self.train.labels, self.eval.labels])[order]
        captions = self.train.captions + self.eval.captions
        captions = [captions[i] for i in order] if captions else []
        joined = dataclasses.replace(self.train, rows=rows[order], labels=labels, captions=captions)
        return {"train": joined}


def select_rows(split: Split, indices: Int64[np.ndarray, "n"]) -> Split:
    """Return the split with these of its rows only."""
    captions = [split.captions[i] for i in indices] if split.captions else []
    return dataclasses.replace(
        split, rows=split.rows[indices], labels=split.labels[indices], captions=captions
    )


def image_bytes(cell: Mapping[str, Any] | None) -> bytes:
    """Return the file of an undecoded image, reading it from disk for an image folder.

    Raises:
        UserError: the cell is empty or its file cannot be read.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UserError("the cell is empty")
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the file cannot be read ({reason})") from error


def file_name(cell: Mapping[str, Any] | UserError | None) -> str:
    """Return the name of the file that a cell holds or refers to; "" if it has none."""
    return "" if cell is None or isinstance(cell, UserError) else cell["path"] or ""


def _keep_end(text: str, n: int) -> str:
    """Shorten a text to its last n characters."""
    return text if len(text) <= n else f"…{text[1 - n :]}"


def cell_error(config: DatasetConfig, split: str, row: int, column: str, problem: str) -> UserError:
    """Make the error of one cell, which names dataset, split, row and column."""
    return UserError(
        f"dataset '{config.name}', split '{split}', row {row}, column '{column}': {problem}"
    )
