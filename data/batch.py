"""A batch of training rows, its plan before anything is decoded, and encoded captions.

NumPy arrays on the host; JAX arrays once a batch has been placed on devices. Nothing here reads or
decodes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int32, Int64, Shaped, UInt8


class EncodedCaption(NamedTuple):
    """Text embeddings of a batch of captions, padded to one length."""

    tokens: Shaped[Any, "b m e"]  # zeros after the end of a caption
    mask: Bool[Any, "b m"]  # True where there is a token
    pooled: Shaped[Any, "b p"]


class Batch(NamedTuple):
    """One process's rows of a global batch.

    An image is uint8 pixels, or the float16 moments of a latent: mean and log-variance. A label is
    a class id or, for a model conditioned on text, an encoded caption.
    """

    row: Int32[Any, "b"]  # index in the global batch, not in the dataset
    image: UInt8[Any, "b h w c"] | Float16[Any, "b h w k"]
    label: Int32[Any, "b"] | EncodedCaption


class BatchPlan(NamedTuple):
    """The rows, flips, labels, crops and bucket of a batch, before anything is decoded."""

    row: Int32[np.ndarray, "b"]  # index in the global batch
    split_row: Int64[np.ndarray, "b"]  # row of the split
    mirrored: Bool[np.ndarray, "b"]
    label: Int32[np.ndarray, "b"] | Int64[np.ndarray, "b"]  # id of a class or of a caption
    place: Float64[np.ndarray, "b"] | None = None  # of the part that is cut out; None: the middle
    bucket: int = 0

    def take(self, part: Int64[np.ndarray, "p"]) -> "BatchPlan":
        """Return a part of the rows."""
        return BatchPlan(
            row=self.row[part],
            split_row=self.split_row[part],
            mirrored=self.mirrored[part],
            label=self.label[part],
            place=None if self.place is None else self.place[part],
            bucket=self.bucket,
        )


def concatenate_batches(batches: Sequence[Any]) -> Any:
    """Concatenate batches along the rows, leaf by leaf."""
    first = batches[0]
    if isinstance(first, tuple):
        leaves = map(concatenate_batches, zip(*batches))
        return type(first)(*leaves)  # pyright: ignore[reportCallIssue]
    return np.concatenate(batches)
