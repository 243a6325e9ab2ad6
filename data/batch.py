"""data.batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Int32, Int64, Shaped, UInt8


class EncodedCaption(NamedTuple):
    """Embeddings of a batch, padded to one length: NumPy's here, JAX's inside a model."""

    tokens: Shaped[Any, "b m e"]  # zeros beyond a caption's end
    mask: Bool[Any, "b m"]  # True where there is a token
    pooled: Shaped[Any, "b p"]


class Batch(NamedTuple):
    """One process's rows of a global batch; `row` is the index there, not in the dataset.

    An image is bytes, or the moments of a latent: mean and log-variance. A label is the id of a
    class or, where the model is told in words, an encoded caption.
    """

    row: Int32[Any, "b"]
    image: UInt8[Any, "b h w c"] | Float16[Any, "b h w k"]
    label: Int32[Any, "b"] | EncodedCaption


class BatchPlan(NamedTuple):
    """What a batch will be, before anything is decoded."""

    row: Int32[np.ndarray, "b"]  # the index in the global batch
    source: Int64[np.ndarray, "b"]  # the row of the split
    mirrored: Bool[np.ndarray, "b"]
    label: Int32[np.ndarray, "b"] | Int64[np.ndarray, "b"]  # the id of a class or of a caption


def concatenate_batches(parts: Sequence[Any]) -> Any:
    """Batches one after another as one, leaf by leaf."""
    if isinstance(parts[0], tuple):
        return type(parts[0])(*map(concatenate_batches, zip(*parts)))  # pyright: ignore[reportCallIssue]
    return np.concatenate(parts)
