"""The images of an opened dataset by bucket: their sizes are read from the headers of all files."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from data.buckets import Buckets, assign_buckets
from data.headers import read_headers
from data.rows import Source, Split, select_rows
from runtime.image_size import ImageSize


def open_buckets(
    source: Source, shapes: Sequence[ImageSize], batch_size: int
) -> dict[str, Buckets]:
    """Assign the images of both splits to shapes, by the headers of their files. Both splits have
    the same shapes, those of the training.

    Args:
        batch_size: images that a shape must have in training; see `assign_buckets`.
    """
    train = assign_buckets(
        read_headers(source.train, of_all=True).sides, shapes, batch_size=batch_size
    )
    sides = read_headers(source.eval, of_all=True).sides
    return {"train": train, "eval": assign_buckets(sides, train.shapes, batch_size=0)}


def select_bucket(source: Source, buckets: Mapping[str, Buckets], bucket: int) -> Source:
    """Return the source with the rows of one bucket, at its shape."""
    shape = buckets["train"].shapes[bucket]
    config = dataclasses.replace(source.config, image_size=shape.written)

    def select(split: Split, ids: Int64[np.ndarray, "n"]) -> Split:
        rows = np.flatnonzero(ids == bucket)
        return dataclasses.replace(select_rows(split, rows), config=config)

    train = select(source.train, buckets["train"].ids)
    evaluation = select(source.eval, buckets["eval"].ids)
    if not len(evaluation):  # a split without rows has no file
        evaluation = select_rows(train, np.arange(0))
    return dataclasses.replace(source, config=config, train=train, eval=evaluation)
