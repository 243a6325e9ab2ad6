"""Labels of a split's rows as batches hold them: class ids, or one of the captions of each row."""

import copy

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

from data.batch import EncodedCaption
from data.caption_cache import CaptionStore


class ClassIds:
    """The class id of each row."""

    def __init__(self, labels: Int32[np.ndarray, "n"]):
        self.labels = labels

    def choose(
        self, rows: Int64[np.ndarray, "b"], uniforms: Float64[np.ndarray, "b"]
    ) -> Int32[np.ndarray, "b"]:
        """Return the class ids of these rows, whatever the uniforms: a row has one class."""
        return self.labels[rows]

    def words(
        self, rows: Int64[np.ndarray, "b"], uniforms: Float64[np.ndarray, "b"]
    ) -> list[int] | list[str]:
        """Return the same as a person would write them."""
        return self.labels[rows].tolist()

    def encode(self, ids: Int32[np.ndarray, "b"]) -> Int32[np.ndarray, "b"]:
        """Return class ids as a model takes them."""
        return ids

    def without_rows(self) -> "ClassIds":
        """Return a copy that can only encode, to be pickled for workers."""
        return ClassIds(self.labels[:0])


class CaptionIds:
    """Ids, in a `CaptionStore`, of the captions of each row.

    A number in [0, 1) chooses one caption of a row: the first for 0, all equally likely.
    """

    def __init__(self, captions: list[tuple[str, ...]], store: CaptionStore):
        self.captions = captions
        self.store = store
        self.counts = np.array([len(row_captions) for row_captions in captions])
        self.starts = np.cumsum(self.counts) - self.counts
        self.ids = store.caption_ids(
            [caption for row_captions in captions for caption in row_captions]
        )

    def choose(
        self, rows: Int64[np.ndarray, "b"], uniforms: Float64[np.ndarray, "b"]
    ) -> Int64[np.ndarray, "b"]:
        """Choose one caption of each row, and return their ids."""
        return self.ids[self.starts[rows] + (uniforms * self.counts[rows]).astype(np.int64)]

    def words(
        self, rows: Int64[np.ndarray, "b"], uniforms: Float64[np.ndarray, "b"]
    ) -> list[int] | list[str]:
        """Choose one caption of each row."""
        choices = [self.captions[row] for row in rows]
        return [captions[int(u * len(captions))] for captions, u in zip(choices, uniforms)]

    def encode(self, ids: Int[np.ndarray, "b"]) -> EncodedCaption:
        """Return the embeddings of these captions."""
        return self.store(ids)

    def without_rows(self) -> "CaptionIds":
        """Return a copy that can only encode and knows no text, to be pickled for workers."""
        copied = copy.copy(self)
        copied.captions = []
        copied.counts = copied.starts = copied.ids = self.ids[:0]
        copied.store = self.store.without_texts()
        return copied
