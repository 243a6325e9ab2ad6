"""From an opened dataset to shuffled uint8 batches, where a batch is a function of (seed, step).

It knows nothing of devices, floats or training, and never imports JAX.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from data.batch import Batch, BatchPlan, concatenate_batches
from data.caption_cache import CaptionStore
from data.load import open_dataset
from data.parquet import ParquetSplit
from data.rows import Images, Source, Split
from data.shuffle import sample_flips, shuffle_grouped_rows, plan_grouped_shuffle, shuffle_rows, sample_caption_uniforms
from runtime import workers
from runtime.errors import RunError, UserError

__all__ = ["Batch", "Pipeline", "Source", "open_source"]

MAX_IN_MEMORY_BYTES = 2**30  # decoded pictures up to this size stay in memory
EVAL_LANES = 16  # row groups of a streamed set that an evaluation reads at a time


@dataclass(frozen=True, eq=False)
class Decoder:
    """A draw's batch. A pickled one holds what is needed for that and neither pictures nor texts:
    it reads the dataset's files.
    """

    split: Split
    encoded: CaptionStore | None
    held: Images | None = None  # all of the split

    def __call__(self, draw: BatchPlan) -> Batch:
        image, mirrored = self.images(draw.source), draw.mirrored
        encoding = self.split.config.encoding
        if encoding and encoding.mirrored:  # a row holds both views
            as_is, other = np.split(image, 2, axis=-1)
            image = np.where(mirrored[:, None, None, None], other, as_is)
        elif mirrored.any():
            image[mirrored] = image[mirrored, :, ::-1]
        return Batch(draw.row, image, self.encoded(draw.label) if self.encoded else draw.label)

    def images(self, rows: Int64[np.ndarray, "b"]) -> Images:
        return self.split.images(rows) if self.held is None else self.held[rows]

    def __getstate__(self) -> dict[str, Any]:
        bare = replace(self.split, labels=self.split.labels[:0], captions=[])
        return {"split": bare, "encoded": self.encoded and self.encoded.nameless(), "held": None}


class Pipeline:
    """The batches of one process.

    Row i of step s is row s · batch_size + i of an endless chain of epochs, each a permutation of
    the training rows: no row comes twice in an epoch, no tail is dropped, and any step can be had
    without the steps before it. A process gets a contiguous part of each global batch. Of a
    streamed set, the permutation is one that reads few row groups at a time (see `Lanes`).
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        n_processes: int = 1,
        n_workers: int | None = None,
        in_memory: bool | None = None,
        shuffle_buffer: int = 10_000,
        encoded: CaptionStore | None = None,
        one_batch: bool = False,
    ):
        """Decodes the whole set when it is held.

        Args:
            batch_size: of all processes together.
            n_workers: processes that decode a set which is not held; 0 for threads only, None for
                half of the CPUs, at most 16.
            in_memory: None to hold sets of at most `HELD_BYTES` that are not streamed.
            shuffle_buffer: rows of a streamed set that are mixed at a time.
            encoded: of a source with captions.
            one_batch: let the batch of every step be the first, flips and captions and all; also
                in an evaluation.
        """
        if batch_size < 1 or batch_size % n_processes:
            raise UserError(
                f"batch_size {batch_size} must be a multiple of {n_processes} processes"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.one_batch = one_batch
        self.process_index, self.n_processes = process_index, n_processes
        n_cpus = os.cpu_count() or 1
        self.n_workers = min(16, max(1, n_cpus // 2)) if n_workers is None else n_workers
        self.lanes, stream = None, source.train.data
        if isinstance(stream, ParquetSplit):
            self.lanes = plan_grouped_shuffle(source.train, batch_size, shuffle_buffer)
            self._eval_lanes = plan_grouped_shuffle(source.eval, EVAL_LANES, EVAL_LANES)
            stream.capacity = self.lanes.open_groups(n_processes * max(1, self.n_workers))
        if in_memory is None:
            shape, dtype = source.train.picture
            row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
            n_rows = len(source.train) + len(source.eval)
            in_memory = n_rows * row_bytes <= MAX_IN_MEMORY_BYTES and not self.lanes
        self.encoded = encoded
        splits = {"train": source.train, "eval": source.eval}
        self._decoders = {
            name: Decoder(split, encoded, _all_images(split) if in_memory else None)
            for name, split in splits.items()
        }
        if encoded:
            self._captions = {name: CaptionIds(s.captions, encoded) for name, s in splits.items()}

    # --- what is drawn ----------------------------------------------------------------------------

    def order(self, epoch: int) -> Int64[np.ndarray, "n"]:
        """The training rows in the order of this epoch."""
        if self.lanes:
            return shuffle_grouped_rows(self.lanes, self.seed, epoch)
        return shuffle_rows(self.seed, epoch, len(self.source.train))

    def flips(self, epoch: int) -> Bool[np.ndarray, "n"]:
        """For each place in this epoch, whether the picture there is mirrored."""
        n = len(self.source.train)
        return sample_flips(self.seed, epoch, n) if self.source.config.flip else np.zeros(n, bool)

    def rows(self, step: int) -> Int64[np.ndarray, "b"]:
        """The training rows of the global batch of `step`, which counts from 0."""
        whole = np.arange(self.batch_size)
        rows = [self.order(epoch)[places] for epoch, places in self._epochs(step, whole)]
        return np.concatenate(rows)

    def _epochs(
        self, step: int, row: Int64[np.ndarray, "b"]
    ) -> Iterator[tuple[int, Int64[np.ndarray, "n"]]]:
        """The epochs that rows of a global batch lie in, with their places in each."""
        n, step = len(self.source.train), 0 if self.one_batch else step
        positions = step * self.batch_size + row
        for epoch in range(positions[0] // n, positions[-1] // n + 1):
            yield epoch, positions[positions // n == epoch] % n

    def _mine(self, batch_size: int) -> Int64[np.ndarray, "b"]:
        """This process's part of a global batch."""
        return np.array_split(np.arange(batch_size), self.n_processes)[self.process_index]

    def labels(self, step: int) -> list[int] | list[str]:
        """What the rows of the global batch of `step` are told: ids of classes, or captions."""
        train, n, rows = self.source.train, len(self.source.train), self.rows(step)
        if not self.encoded:
            return train.labels[rows].tolist()
        epochs = self._epochs(step, np.arange(self.batch_size))
        draws = np.concatenate([sample_caption_uniforms(self.seed, epoch, n)[places] for epoch, places in epochs])
        several = [train.captions[row] for row in rows]
        return [captions[int(u * len(captions))] for captions, u in zip(several, draws)]

    def _draw(self, step: int, row: Int64[np.ndarray, "b"] | None = None) -> BatchPlan:
        """This process's rows of the batch of `step`, or these ones."""
        row, n = self._mine(self.batch_size) if row is None else row, len(self.source.train)
        epochs = list(self._epochs(step, row))
        rows = np.concatenate([self.order(epoch)[places] for epoch, places in epochs])
        mirrored = np.concatenate([self.flips(epoch)[places] for epoch, places in epochs])
        draws = np.zeros(len(row))
        if self.encoded:
            parts = [sample_caption_uniforms(self.seed, epoch, n)[places] for epoch, places in epochs]
            draws = np.concatenate(parts)
        return BatchPlan(row.astype(np.int32), rows, mirrored, self._labels("train", rows, draws))

    def _labels(self, split: str, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        if self.encoded:
            return self._captions[split].pick(rows, draws)
        return getattr(self.source, split).labels[rows]

    # --- and decoded ------------------------------------------------------------------------------

    def train_batch(self, step: int) -> Batch:
        """This process's rows of the batch of `step`, half of it mirrored if the set allows."""
        return self._decoders["train"](self._draw(step))

    def first_rows(self, step: int, n: int) -> Batch:
        """The first n of the global batch of `step`, in every process."""
        return self._decoders["train"](self._draw(step, np.arange(min(n, self.batch_size))))

    def train_batches(self, start: int, stop: int) -> Generator[Batch]:
        """`train_batch` of the steps start … stop − 1, decoded ahead of time where that takes long.

        Close the iterator (or exhaust it) to end its worker processes.

        Raises:
            UserError: a picture of the step that is due cannot be decoded.
            RunError: a worker process dies over the same rows again and again.
        """
        decoder = self._decoders["train"]
        if self.one_batch:
            yield from itertools.repeat(self.train_batch(0), stop - start)
            return
        if decoder.held is not None:
            yield from map(self.train_batch, range(start, stop))
            return
        n = self.batch_size // self.n_processes
        # A worker always gets the same part of a batch.
        parts = np.array_split(np.arange(n), min(n, self.n_workers or os.cpu_count() or 1))
        callers = [workers.Worker(decoder) if self.n_workers else decoder for _ in parts]
        draws = map(self._draw, range(start, stop))
        calls = ([BatchPlan(*(x[part] for x in draw)) for part in parts] for draw in draws)
        try:
            with contextlib.closing(workers.run_ahead(callers, calls)) as answers:
                yield from map(concatenate_batches, answers)
        except workers.WorkerDied as died:
            raise RunError(
                f"{died}, decoding rows of the training split: {died.call.source.tolist()}"
            ) from died

    def eval_batches(self, n: int, batch_size: int | None = None) -> Iterator[Batch]:
        """The same n batches on every call: a fixed mix of the evaluation rows, never mirrored,
        with the first of their captions.
        """
        if self.one_batch:
            yield from itertools.repeat(self.train_batch(0), n)
            return
        size = batch_size or self.batch_size
        row, decoder = self._mine(size), self._decoders["eval"]
        # Shuffled, because the first rows of a set are often all of one class.
        n_rows = len(self.source.eval)
        order = shuffle_grouped_rows(self._eval_lanes, 0, 0) if self.lanes else shuffle_rows(0, 0, n_rows)
        nothing = np.zeros(len(row))
        for first in range(0, n * size, size):
            rows = order[(first + row) % len(order)]
            labels = self._labels("eval", rows, nothing)
            yield decoder(BatchPlan(row.astype(np.int32), rows, nothing.astype(bool), labels))

    def images(self, split: str) -> tuple[Images, Int32[np.ndarray, "n"]]:
        """All pictures and labels of "train" or "eval", in the order of the rows. Those of latents
        are moments, with those of the mirrored pictures where there are any.
        """
        decoder, labels = self._decoders[split], getattr(self.source, split).labels
        if decoder.held is not None:
            return decoder.held, labels
        return decoder.images(np.arange(len(labels))), labels


class CaptionIds:
    """Where the captions of each row of a split are among the encoded ones."""

    def __init__(self, captions: list[tuple[str, ...]], encoded: CaptionStore):
        self.counts = np.array([len(several) for several in captions])
        self.starts = np.cumsum(self.counts) - self.counts
        self.ids = encoded.ids([caption for several in captions for caption in several])

    def pick(
        self, rows: Int64[np.ndarray, "b"], draws: Float64[np.ndarray, "b"]
    ) -> Int64[np.ndarray, "b"]:
        """One caption of each row: the first for a draw of 0, any other as likely."""
        return self.ids[self.starts[rows] + (draws * self.counts[rows]).astype(np.int64)]


def _all_images(split: Split) -> Images:
    """Every picture of the split, by threads: Pillow decodes without the interpreter's lock."""
    shape, dtype = split.picture
    decoded = np.empty((len(split), *shape), dtype)

    def fill(rows: Int64[np.ndarray, "b"]) -> None:
        decoded[rows] = split.images(rows)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, np.array_split(np.arange(len(split)), len(split) // 256 + 1)):
            pass  # an error comes out here, and ends the pool
    decoded.flags.writeable = False  # it is handed out
    return decoded
