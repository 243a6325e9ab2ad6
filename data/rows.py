"""data.rows."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Int32, Int64, UInt8

from data import images, latents
from data.parquet import ParquetSplit
from datasets_config import DatasetConfig
from runtime.errors import UserError

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    pass
from data.arrow import ArrowSplit

Images = UInt8[np.ndarray, "b h w c"] | Float16[np.ndarray, "b h w k"]


class DecodedRows(NamedTuple):
    """Pictures of those rows of a split that have any, and of each other row of the data what is
    wrong with it.
    """

    rows: Int64[np.ndarray, "b"]
    images: UInt8[np.ndarray, "b h w c"]
    problems: dict[int, str]


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of one split, with undecoded pictures and checked labels or captions."""

    config: DatasetConfig
    name: str
    data: ArrowSplit | ParquetSplit  # the pictures of all rows
    rows: Int64[np.ndarray, "n"]  # those that belong here
    labels: Int32[np.ndarray, "n"]
    captions: list[tuple[str, ...]]  # those of each picture; empty where there are none

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def picture(self) -> tuple[tuple[int, int, int], Any]:
        """Shape and type of what `images` has for a row."""
        c = self.config
        if c.encoding:
            return c.encoding.moments_shape, np.float16
        return (c.image_size, c.image_size, c.channels), np.uint8

    def images(self, indices: Int64[np.ndarray, "b"]) -> Images:
        """Decodes these rows of the split; a `UserError` names the dataset, row and column. Of
        latents, they are moments.
        """
        rows = self.rows[indices].tolist()
        if self.config.encoding:
            cells = [cell["bytes"] for cell in self.data.cells(rows)]
            return latents.unpack_moments(cells, self.config.encoding)
        size, channels = self.config.image_size, self.config.channels
        decoded = np.empty((len(indices), size, size, channels), np.uint8)
        for i, cell in enumerate(self.data.cells(rows)):
            try:
                decoded[i] = images.decode_image(image_bytes(cell), channels=channels, size=size)
            except UserError as error:
                column = self.config.image_column
                raise cell_error(self.config, self.name, rows[i], column, str(error)) from error
        return decoded

    def readable(self, indices: Int64[np.ndarray, "b"]) -> DecodedRows:
        """Decodes those of these rows that can be."""
        try:
            return DecodedRows(indices, self.images(indices), {})
        except UserError:  # not said which others there are
            good, problems = [], {}
            for place, index in enumerate(indices):
                try:
                    self.images(indices[place : place + 1])
                    good.append(place)
                except UserError as error:
                    problems[int(self.rows[index])] = str(error)
            return DecodedRows(indices[good], self.images(indices[good]), problems)


@dataclass(frozen=True, eq=False)
class Source:
    """An opened dataset. `config` has no holes: its columns, classes and sizes are the data's."""

    config: DatasetConfig
    train: Split
    eval: Split

    def whole(self) -> dict[str, Split]:
        """The splits with all of their rows: what was held back of the training rows is put back
        in its place.
        """
        train, held_out = self.train, self.eval
        if train.name != held_out.name:
            return {"train": train, held_out.name: held_out}
        rows = np.concatenate([train.rows, held_out.rows])
        order = np.argsort(rows)
        labels = np.concatenate([train.labels, held_out.labels])[order]
        captions = train.captions + held_out.captions
        captions = [captions[i] for i in order] if captions else []
        both = dataclasses.replace(train, rows=rows[order], labels=labels, captions=captions)
        return {"train": both}


def image_bytes(cell: Mapping[str, Any] | None) -> bytes:
    """The file of an undecoded picture, which an image folder keeps on disk."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UserError("the cell is empty")
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise UserError(f"the file cannot be read ({error})") from error


def cell_error(config: DatasetConfig, split: str, row: int, column: str, problem: str) -> UserError:
    return UserError(
        f"dataset '{config.name}', split '{split}', row {row}, column '{column}': {problem}"
    )
