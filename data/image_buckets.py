"""The images of an opened dataset by bucket: their sizes are read from the headers of all files."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from data.buckets import Buckets, assign_buckets
from data.headers import read_headers
from data.rows import Source, Split, select_rows
from runtime.image_size import ImageSize

Sides = Mapping[str, Int32[np.ndarray, "_n 2"]]  # of "train" and "eval"


def read_sides(source: Source) -> Sides:
    """Read height and width of the images of both splits from the headers of their files."""
    splits = {"train": source.train, "eval": source.eval}
    return {name: read_headers(split, of_all=True).sides for name, split in splits.items()}


def open_buckets(sides: Sides, shapes: Sequence[ImageSize], batch_size: int) -> dict[str, Buckets]:
    """Assign the images of both splits to shapes. Both have the same, those of the training.

    Args:
        batch_size: images that a shape must have in training; see `assign_buckets`.
    """
    train = assign_buckets(sides["train"], shapes, batch_size=batch_size)
    evaluation = assign_buckets(sides["eval"], train.shapes, batch_size=0)
    return {"train": train, "eval": evaluation}


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
