"""Decoding of the rows of a planned batch, in this process or in a worker's.

The plan is `data.pipeline`'s; how an image or a latent is decoded is `data.rows`'.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from data.batch import Batch, BatchPlan
from data.buckets import Buckets
from data.row_labels import CaptionIds, ClassIds
from data.rows import BadRow, Images, Split

ROWS_PER_TASK = 256  # that a thread decodes of a split that is held in memory


@dataclass(frozen=True, eq=False)
class Decoder:
    """A function from a batch's plan to the batch.

    A pickled one goes to a worker process: it reads the dataset's files there, so it takes neither
    decoded images nor texts with it.
    """

    split: Split
    labels: ClassIds | CaptionIds
    decoded: Images | None = None  # the whole split, if it is held in memory
    held: Int64[np.ndarray, "m"] | None = None  # or the ascending rows that `decoded` has

    def __call__(self, plan: BatchPlan) -> Batch:
        image = self.decode_rows(plan.split_row, plan.place)
        image = self.split.format.mirror(image, plan.mirrored)
        return Batch(plan.row, image, self.labels.encode(plan.label))

    def decode_rows(
        self, rows: Int64[np.ndarray, "b"], places: Float64[np.ndarray, "b"] | None = None
    ) -> Images:
        """Decode these rows of the split, or copy them out of memory.

        Args:
            places: the part of each image that is cut out, if it is not held in memory.
        """
        if self.decoded is None:
            return self.split.decode(rows, places)
        return self.decoded[rows if self.held is None else np.searchsorted(self.held, rows)]

    def __getstate__(self) -> dict[str, Any]:
        return {
            "split": self.split.images_only(),
            "labels": self.labels.without_rows(),
            "decoded": None,
            "held": None,
        }


class Decoders(NamedTuple):
    """A function from a batch's plan to the batch, by its bucket."""

    of_bucket: tuple[Decoder, ...]

    @classmethod
    def of_split(
        cls,
        split: Split,
        labels: ClassIds | CaptionIds,
        buckets: Buckets | None,
        *,
        in_memory: bool,
    ) -> "Decoders":
        """Make the decoders of a split, and decode it if it is to be held in memory."""
        if not buckets:
            return cls((Decoder(split, labels, _decode_all(split) if in_memory else None),))
        decoders = []
        for bucket, shape in enumerate(buckets.shapes):
            config = split.config
            if encoding := config.encoding:
                encoding = replace(encoding, shape=(*shape.sides, encoding.shape[-1]))
            config = replace(config, image_size=shape.written, encoding=encoding)
            rows = np.flatnonzero(buckets.ids == bucket)
            shaped = replace(split, config=config)
            decoded = _decode_all(shaped, rows) if in_memory else None
            decoders.append(Decoder(shaped, labels, decoded, rows))
        return cls(tuple(decoders))

    @property
    def labels(self) -> ClassIds | CaptionIds:
        """Labels of the rows of all buckets."""
        return self.of_bucket[0].labels

    @property
    def are_in_memory(self) -> bool:
        """True if all images were decoded when the split was opened."""
        return self.of_bucket[0].decoded is not None

    def __call__(self, plan: BatchPlan) -> Batch:
        return self.of_bucket[plan.bucket](plan)


def _decode_all(split: Split, rows: Int64[np.ndarray, "n"] | None = None) -> Images:
    """Decode the whole split, or some rows of it, in threads: Pillow decodes without the
    interpreter's lock.

    Raises:
        BadRowError: some rows cannot be decoded; it counts them all.
    """
    if rows is None:
        rows = np.arange(len(split))
    decoded = np.empty((len(rows), *split.format.shape), split.format.dtype)

    def fill(places: Int64[np.ndarray, "b"]) -> list[BadRow]:
        readable = split.decode_readable(rows[places])
        if not readable.bad:
            decoded[places] = readable.images
        return readable.bad

    tasks = np.array_split(np.arange(len(rows)), len(rows) // ROWS_PER_TASK + 1)
    with ThreadPoolExecutor() as pool:
        bad = [row for bad_rows in pool.map(fill, tasks) for row in bad_rows]
    if bad:
        raise split.error_of(bad)
    decoded.flags.writeable = False  # callers share it
    return decoded
