"""Rows of an opened dataset: images that can be decoded, with their labels or captions.

Opening and checking a dataset is `data.load`'s; the order of rows and the making of batches are
`data.shuffle`'s and `data.pipeline`'s.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Int32, Int64, UInt8

from data import images, latents
from data.arrow import ArrowSplit
from data.parquet import ParquetSplit
from data.row_formats import LatentRows, PixelRows, row_format
from datasets_config import DatasetConfig
from runtime.errors import UserError

Images = UInt8[np.ndarray, "b h w c"] | Float16[np.ndarray, "b h w k"]


class DecodedRows(NamedTuple):
    """The rows of a batch that could be decoded, and the problem of each one that could not.

    `problems` is keyed by the row of the data, not of the split.
    """

    rows: Int64[np.ndarray, "b"]
    images: UInt8[np.ndarray, "b h w c"]
    problems: dict[int, str]


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of one split, with undecoded images and checked labels or captions."""

    config: DatasetConfig
    name: str
    data: ArrowSplit | ParquetSplit  # the images of all rows of the data
    rows: Int64[np.ndarray, "n"]  # rows of the data that belong to this split
    labels: Int32[np.ndarray, "labels"]  # of each row
    captions: list[tuple[str, ...]]  # of each row; empty for a dataset without captions

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def format(self) -> PixelRows | LatentRows:
        """The format of a decoded row."""
        return row_format(self.config)

    def images_only(self) -> "Split":
        """Return the same rows without labels and captions, to be pickled for worker processes."""
        return dataclasses.replace(self, labels=self.labels[:0], captions=[])

    def decode(self, indices: Int64[np.ndarray, "b"]) -> Images:
        """Decode these rows of the split; rows of latents are moments.

        Raises:
            UserError: an image cannot be decoded. The message names dataset, split, row and column.
        """
        rows = self.rows[indices].tolist()
        if self.config.encoding:
            cells = [(cell or {})["bytes"] for cell in self.data.read_cells(rows)]
            return latents.unpack_moments(cells, self.config.encoding)
        size = self.config.image_size
        channels = self.config.channels
        decoded = np.empty((len(indices), size, size, channels), np.uint8)
        for i, cell in enumerate(self.data.read_cells(rows)):
            try:
                decoded[i] = images.decode_image(image_bytes(cell), channels=channels, size=size)
            except UserError as error:
                column = self.config.image_column
                raise cell_error(self.config, self.name, rows[i], column, str(error)) from error
        return decoded

    def decode_readable(self, indices: Int64[np.ndarray, "b"]) -> DecodedRows:
        """Decode those of these rows that can be decoded."""
        try:
            return DecodedRows(indices, self.decode(indices), {})
        except UserError:  # it names the first bad row only: find all of them, one at a time
            good: list[int] = []
            problems: dict[int, str] = {}
            for position, index in enumerate(indices):
                try:
                    self.decode(indices[position : position + 1])
                    good.append(position)
                except UserError as error:
                    problems[int(self.rows[index])] = str(error)
            return DecodedRows(indices[good], self.decode(indices[good]), problems)


@dataclass(frozen=True, eq=False)
class Source:
    """An opened dataset. Every field of `config` is set: columns, classes and sizes are the
    data's. `notices` tell what there is, and what was left out.
    """

    config: DatasetConfig
    train: Split
    eval: Split
    notices: tuple[str, ...] = ()

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
    except OSError as error:
        raise UserError(f"the file cannot be read ({error})") from error


def cell_error(config: DatasetConfig, split: str, row: int, column: str, problem: str) -> UserError:
    """Make the error of one cell, which names dataset, split, row and column."""
    return UserError(
        f"dataset '{config.name}', split '{split}', row {row}, column '{column}': {problem}"
    )
