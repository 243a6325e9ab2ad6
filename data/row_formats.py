"""Formats of a decoded row: an image in bytes, or the moments of a latent."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Num

from datasets_config import DatasetConfig, LatentEncoding

Rows = Num[np.ndarray, "b h w _"]  # one view of a latent, or two side by side


@dataclass(frozen=True)
class PixelRows:
    """uint8 images. Their mirror images are made when they are needed."""

    shape: tuple[int, int, int]
    dtype = np.dtype(np.uint8)

    def split_views(self, rows: Rows) -> tuple[Rows, Rows | None]:
        """Split rows into images and their mirror images, if rows hold both."""
        return rows, None

    def mirror(self, rows: Rows, where: Bool[np.ndarray, "b"]) -> Rows:
        """Mirror some rows, in place if possible."""
        if where.any():
            rows[where] = rows[where, :, ::-1]
        return rows


@dataclass(frozen=True)
class LatentRows:
    """float16 means and log-variances, and those of the mirror image where it was encoded too."""

    encoding: LatentEncoding
    dtype = np.dtype(np.float16)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.encoding.moments_shape

    def split_views(self, rows: Rows) -> tuple[Rows, Rows | None]:
        if not self.encoding.mirrored:
            return rows, None
        original, mirrored = np.split(rows, 2, axis=-1)
        return original, mirrored

    def mirror(self, rows: Rows, where: Bool[np.ndarray, "b"]) -> Rows:
        original, mirrored = self.split_views(rows)
        if mirrored is None:  # then no row is to be mirrored
            return original
        return np.where(where[:, None, None, None], mirrored, original)


def row_format(config: DatasetConfig) -> PixelRows | LatentRows:
    """The format of the rows of a dataset."""
    if config.encoding:
        return LatentRows(config.encoding)
    return PixelRows((*config.size.sides, config.channels))
