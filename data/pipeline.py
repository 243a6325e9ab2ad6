"""Shuffled batches of an opened dataset, where a batch is a function of (seed, step).

It knows nothing of devices, floats or training, and never imports JAX.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Generator, Iterator, Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from data.batch import Batch, BatchPlan, concatenate_batches
from data.buckets import Buckets
from data.caption_cache import CaptionStore
from data.decoders import Decoders
from data.parquet import ParquetSplit
from data.row_labels import CaptionIds, ClassIds
from data.rows import Images, Source, Split
from data.shuffle import (
    CAPTION_STREAM,
    CROP_STREAM,
    BucketOrder,
    GroupedShuffle,
    sample_flips,
    sample_uniforms,
    shuffle_grouped_rows,
    shuffle_rows,
)
from runtime import workers
from runtime.errors import RunError, UserError

MAX_IN_MEMORY_BYTES = 2**30  # decoded datasets up to this size stay in memory
MAX_WORKERS = 16  # unless more are given
EVAL_LANES = 16  # row groups of a streamed split that an evaluation reads at a time
MAX_POSITIONS = 80  # arrays of positions of a bucket in an epoch that are kept

SplitName = Literal["train", "eval"]


class Pipeline:
    """The batches of one process.

    Row i of step s is row s · batch_size + i of an endless chain of epochs, each a permutation of
    the training rows: no row comes twice in an epoch, no tail is dropped, and any step can be made
    without the steps before it. A process gets a contiguous part of each global batch. The
    permutation of a streamed split reads few row groups at a time (see `GroupedShuffle`). With
    buckets, all of this holds for the rows of each (see `BucketOrder`).
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
        caption_store: CaptionStore | None = None,
        one_batch: bool = False,
        buckets: Mapping[str, Buckets] | None = None,
    ):
        """Plan the order of rows. Decode the whole dataset if it is held in memory.

        Args:
            source: the opened dataset.
            batch_size: rows of a global batch, of all processes together.
            seed: of order, flips and captions.
            process_index: of this process.
            n_processes: of the run.
            n_workers: processes that decode a dataset which is not held in memory; 0 for threads
                only, None for half of the CPUs, at most `MAX_WORKERS`.
            in_memory: None to hold datasets of at most `MAX_IN_MEMORY_BYTES` that are not streamed.
            shuffle_buffer: rows of a streamed dataset that are mixed at a time.
            caption_store: the encoded captions of a source with captions.
            one_batch: return the first batch at every step, with the same flips and captions; also
                in an evaluation.
            buckets: of the rows of both splits.

        Raises:
            UserError: `batch_size` is not a multiple of the processes, or images cannot be
                decoded; counts them. Or their crops are random, which are decoded for each batch,
                and the images are to be held in memory.
        """
        if batch_size < 1 or batch_size % n_processes:
            raise UserError(
                f"batch_size {batch_size} must be a multiple of {n_processes} processes"
            )
        self.random_crop = source.config.crop == "random"
        if self.random_crop and in_memory:
            raise UserError(
                "--crop random decodes the images of each batch anew; drop --in_memory and "
                "--cache_on_device"
            )
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.one_batch = one_batch
        self.process_index = process_index
        self.n_processes = n_processes
        n_cpus = os.cpu_count() or 1
        self.n_workers = min(MAX_WORKERS, max(1, n_cpus // 2)) if n_workers is None else n_workers
        self._buckets = buckets or {}
        self.grouped_shuffle = self._plan_streaming(shuffle_buffer)
        if in_memory is None:
            in_memory = _is_small(source) and not (self.grouped_shuffle or self.random_crop)
        self._decoders = {
            name: Decoders.of_split(
                split,
                CaptionIds(split.captions, caption_store)
                if caption_store
                else ClassIds(split.labels),
                self._buckets.get(name),
                in_memory=in_memory,
            )
            for name, split in (("train", source.train), ("eval", source.eval))
        }
        self._positions = lru_cache(maxsize=MAX_POSITIONS)(self._find_positions)

    def _plan_streaming(self, shuffle_buffer: int) -> GroupedShuffle | None:
        """Plan the order of a streamed source, and how many row groups are open at a time."""
        stream = self.source.train.data
        if not isinstance(stream, ParquetSplit):
            return None
        n_readers = self.n_processes * max(1, self.n_workers)
        # A batch of one bucket has rows of all lanes in each of its parts.
        n_sharing = n_readers if self._buckets else 1
        shuffle = _plan_grouped_shuffle(
            self.source.train, self.batch_size, shuffle_buffer, n_sharing=n_sharing
        )
        self._eval_shuffle = _plan_grouped_shuffle(self.source.eval, EVAL_LANES, EVAL_LANES)
        stream.max_open_groups = shuffle.open_groups(n_readers // n_sharing)
        return shuffle

    # --- the order of rows, their flips and labels ------------------------------------------------

    def epoch_order(self, epoch: int) -> Int64[np.ndarray, "n"]:
        """Return the training rows in the order of this epoch."""
        if self.grouped_shuffle:
            return shuffle_grouped_rows(self.grouped_shuffle, self.seed, epoch)
        return shuffle_rows(self.seed, epoch, len(self.source.train))

    def epoch_flips(self, epoch: int) -> Bool[np.ndarray, "n"]:
        """Return for each position in this epoch whether the image there is mirrored."""
        n = len(self.source.train)
        return sample_flips(self.seed, epoch, n) if self.source.config.flip else np.zeros(n, bool)

    def epoch_crops(self, epoch: int) -> Float64[np.ndarray, "n"] | None:
        """Return for each position in this epoch the place that the image there is cut out at; None
        for the middle of all.
        """
        if not self.random_crop:
            return None
        return sample_uniforms(self.seed, epoch, len(self.source.train), CROP_STREAM)

    def batch_rows(self, step: int) -> Int64[np.ndarray, "b"]:
        """Return the training rows of the global batch of `step`, which counts from 0."""
        global_rows = np.arange(self.batch_size)
        _, epochs = self._epoch_positions(step, global_rows)
        return np.concatenate([self.epoch_order(epoch)[positions] for epoch, positions in epochs])

    def batch_labels(self, step: int) -> list[int] | list[str]:
        """Return the class ids, or the captions, of the global batch of `step`."""
        _, epochs = self._epoch_positions(step, np.arange(self.batch_size))
        uniforms = self._caption_uniforms(epochs)
        return self._decoders["train"].labels.words(self.batch_rows(step), uniforms)

    def _epoch_positions(
        self, step: int, row: Int64[np.ndarray, "b"]
    ) -> tuple[int, list[tuple[int, Int64[np.ndarray, "_n"]]]]:
        """Return the bucket of a global batch, and the epochs that rows of it lie in, with their
        positions in each.
        """
        if self.one_batch:
            step = 0
        n, bucket = len(self.source.train), 0
        buckets = self._buckets.get("train")
        if buckets:
            order = BucketOrder(buckets.sizes, self.batch_size)
            bucket, step = order.find(self.seed, step)
            n = buckets.sizes[bucket]
        positions = step * self.batch_size + row
        epochs = []
        for epoch in range(positions[0] // n, positions[-1] // n + 1):
            here = positions[positions // n == epoch] % n
            epochs.append((epoch, self._positions(epoch, bucket)[here] if buckets else here))
        return bucket, epochs

    def _find_positions(self, epoch: int, bucket: int) -> Int64[np.ndarray, "n"]:
        """Return the positions in this epoch of the rows of a bucket."""
        return np.flatnonzero(self._buckets["train"].ids[self.epoch_order(epoch)] == bucket)

    def _caption_uniforms(
        self, epochs: list[tuple[int, Int64[np.ndarray, "_n"]]]
    ) -> Float64[np.ndarray, "b"]:
        n = len(self.source.train)
        uniforms = [
            sample_uniforms(self.seed, epoch, n, CAPTION_STREAM)[places] for epoch, places in epochs
        ]
        return np.concatenate(uniforms)

    def _local_rows(self, batch_size: int) -> Int64[np.ndarray, "b"]:
        """Return this process's part of a global batch."""
        return np.array_split(np.arange(batch_size), self.n_processes)[self.process_index]

    def _plan_batch(self, step: int, row: Int64[np.ndarray, "b"] | None = None) -> BatchPlan:
        """Plan the batch of `step`: this process's rows, or the given ones of the global batch."""
        if row is None:
            row = self._local_rows(self.batch_size)
        bucket, epochs = self._epoch_positions(step, row)
        rows = np.concatenate([self.epoch_order(epoch)[positions] for epoch, positions in epochs])
        flips = np.concatenate([self.epoch_flips(epoch)[positions] for epoch, positions in epochs])
        labels = self._decoders["train"].labels.choose(rows, self._caption_uniforms(epochs))
        crops = [(self.epoch_crops(epoch), positions) for epoch, positions in epochs]
        places = [crop[positions] for crop, positions in crops if crop is not None]
        place = np.concatenate(places) if places else None
        return BatchPlan(row.astype(np.int32), rows, flips, labels, place, bucket)

    # --- decoded batches --------------------------------------------------------------------------

    def train_batch(self, step: int) -> Batch:
        """Decode this process's rows of the batch of `step`; half are mirrored if the dataset
        allows it.
        """
        return self._decoders["train"](self._plan_batch(step))

    def first_rows(self, step: int, n: int) -> Batch:
        """Decode the first n rows of the global batch of `step`, in every process."""
        rows = np.arange(min(n, self.batch_size))
        return self._decoders["train"](self._plan_batch(step, rows))

    def train_batches(self, start: int, stop: int) -> Generator[Batch]:
        """Yield `train_batch` of the steps start … stop − 1, decoded ahead where that takes long.

        Close the iterator (or exhaust it) to end its worker processes.

        Raises:
            UserError: an image of the step that is due cannot be decoded.
            RunError: a worker process dies over the same rows again and again.
        """
        decoder = self._decoders["train"]
        if self.one_batch:
            yield from itertools.repeat(self.train_batch(0), stop - start)
            return
        if decoder.are_in_memory:
            yield from map(self.train_batch, range(start, stop))
            return
        n = self.batch_size // self.n_processes
        # A worker always gets the same part of a batch.
        parts = np.array_split(np.arange(n), min(n, self.n_workers or os.cpu_count() or 1))
        callers = [workers.Worker(decoder) if self.n_workers else decoder for _ in parts]
        plans = map(self._plan_batch, range(start, stop))
        calls = ([plan.take(part) for part in parts] for plan in plans)
        try:
            with contextlib.closing(workers.run_ahead(callers, calls)) as results:
                yield from map(concatenate_batches, results)
        except workers.WorkerDied as died:
            raise RunError(
                f"{died}, decoding rows of the training split: {died.call.split_row.tolist()}"
            ) from died

    def eval_batches(self, n: int, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield the same n batches on every call: a fixed mix of the evaluation rows, never
        mirrored, with the first of their captions.
        """
        if self.one_batch:
            yield from itertools.repeat(self.train_batch(0), n)
            return
        decoder = self._decoders["eval"]
        global_size = batch_size or self.batch_size
        row = self._local_rows(global_size)
        # Shuffled, because the first rows of a dataset are often all of one class.
        if self.grouped_shuffle:
            order = shuffle_grouped_rows(self._eval_shuffle, 0, 0)
        else:
            order = shuffle_rows(0, 0, len(self.source.eval))
        buckets = self._buckets.get("eval")
        ids = buckets.ids[order] if buckets else np.zeros(len(order), int)
        shares = np.cumsum(buckets.sizes if buckets else (len(order),))
        n_of_bucket = np.zeros(len(shares), int)
        not_mirrored = np.zeros(len(row), bool)
        first_captions = np.zeros(len(row))
        for step in range(n):
            # Evenly spaced in the rows of all buckets, so that each counts by its share of them.
            bucket = int(np.searchsorted(shares, (step + 0.5) / n * shares[-1], side="right"))
            i = n_of_bucket[bucket]
            n_of_bucket[bucket] += 1
            of_bucket = order[ids == bucket]
            rows = of_bucket[(i * global_size + row) % len(of_bucket)]
            labels = decoder.labels.choose(rows, first_captions)
            yield decoder(
                BatchPlan(row.astype(np.int32), rows, not_mirrored, labels, bucket=bucket)
            )

    def decode_split(self, split: SplitName) -> tuple[Images, Int32[np.ndarray, "n"]]:
        """Return all images and labels of a split without buckets in the order of its rows.

        Those of latents are moments, with the moments of the mirrored images where there are any.
        """
        (decoder,) = self._decoders[split].of_bucket
        labels = decoder.split.labels
        if decoder.decoded is not None:
            return decoder.decoded, labels
        return decoder.decode_rows(np.arange(len(labels))), labels


def _is_small(source: Source) -> bool:
    """Return whether the decoded dataset fits into `MAX_IN_MEMORY_BYTES`."""
    row = source.train.format
    row_bytes = math.prod(row.shape) * row.dtype.itemsize
    return (len(source.train) + len(source.eval)) * row_bytes <= MAX_IN_MEMORY_BYTES


def _plan_grouped_shuffle(
    split: Split, batch_size: int, shuffle_buffer: int, *, n_sharing: int = 1
) -> GroupedShuffle:
    """Plan the order of a streamed split by its row groups.

    Args:
        n_sharing: readers that each hold the groups of all lanes open.
    """
    assert isinstance(split.data, ParquetSplit)
    _, group_rows = np.unique(split.data.find_groups(split.rows), return_counts=True)
    return GroupedShuffle.plan(
        group_rows,
        group_bytes=n_sharing * float(split.data.group_bytes.mean()),
        batch_size=batch_size,
        shuffle_buffer=shuffle_buffer,
    )
