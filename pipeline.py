"""From an opened data set to shuffled uint8 batches, where a batch is a function of (seed, step).

It knows nothing of devices, floats or training, and never imports JAX: Grain, which does, is only
imported to stream a set that is too large to hold.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt8

from captions import CaptionStore
from errors import UserError
from sources import Source, Split, open_source
from text import Caption

__all__ = ["Batch", "Pipeline", "Source", "open_source"]

HELD_BYTES = 2**30  # decoded pictures up to this size stay in memory
# NumPy's seeds (s, e) and (s, e, 0) are one stream, so no constant is 0.
FLIPS, CAPTIONS = 1, 2


class Batch(NamedTuple):
    """One process's rows of a global batch; `row` is the index there, not in the data set.

    A label is the id of a class or, where the model is told in words, an encoded caption.
    """

    row: Int32[Any, "b"]
    image: UInt8[Any, "b h w c"]
    label: Int32[Any, "b"] | Caption


class Pipeline:
    """The batches of one process.

    Row i of step s is row s · batch_size + i of an endless chain of epochs, each a permutation of
    the training rows: no row comes twice in an epoch, no tail is dropped, and any step can be had
    without the steps before it. A process gets a contiguous part of each global batch.
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
        encoded: CaptionStore | None = None,
    ):
        """Decodes the whole set when it is held.

        Args:
            batch_size: of all processes together.
            n_workers: processes that decode a set which is not held; 0 for threads only, None for
                half of the CPUs, at most 16.
            in_memory: None to hold sets of at most `HELD_BYTES`.
            encoded: of a source with captions.
        """
        if batch_size < 1 or batch_size % n_processes:
            raise UserError(
                f"batch_size {batch_size} must be a multiple of {n_processes} processes"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.process_index, self.n_processes = process_index, n_processes
        n_cpus = os.cpu_count() or 1
        self.n_workers = min(16, max(1, n_cpus // 2)) if n_workers is None else n_workers
        if in_memory is None:
            c = source.config
            n_rows = len(source.train) + len(source.eval)
            in_memory = n_rows * c.image_size**2 * c.channels <= HELD_BYTES
        splits = {"train": source.train, "eval": source.eval} if in_memory else {}
        self._held = {name: _all_images(split) for name, split in splits.items()}
        self.encoded = encoded
        if encoded:
            both = {"train": source.train, "eval": source.eval}
            self._captions = {name: CaptionIds(s.captions, encoded) for name, s in both.items()}
            # The texts are done with: worker processes get a copy of all that is held here.
            bare = {name: replace(split, captions=[]) for name, split in both.items()}
            self.source = replace(source, **bare)

    def rows(self, step: int) -> Int64[np.ndarray, "b"]:
        """The training rows of the global batch of `step`, which counts from 0."""
        n = len(self.source.train)
        rows = [permutation(self.seed, epoch, n)[places] for epoch, places in self._epochs(step)]
        return np.concatenate(rows)

    def _epochs(self, step: int) -> Iterator[tuple[int, Int64[np.ndarray, "n"]]]:
        """The epochs that a global batch lies in, with its places in each."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        n = len(self.source.train)
        for epoch in range(positions[0] // n, positions[-1] // n + 1):
            yield epoch, positions[positions // n == epoch] % n

    def train_batch(self, step: int) -> Batch:
        """This process's rows of the batch of `step`, half of it mirrored if the set allows."""
        batch = self._batch("train", self.rows(step), self._draws(step))
        if self.source.config.flip:
            flips = np.random.default_rng((self.seed, step, FLIPS)).random(self.batch_size) < 0.5
            mine = flips[batch.row]
            batch.image[mine] = batch.image[mine, :, ::-1]
        return batch

    def train_batches(self, start: int, stop: int) -> Generator[Batch]:
        """`train_batch` of the steps start … stop − 1, decoded ahead of time where that takes long.

        Close the iterator (or exhaust it) to end its worker processes.
        """
        if self._held:
            yield from map(self.train_batch, range(start, stop))
            return
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only an absl app parses
        n_threads = 2 if self.n_workers else os.cpu_count() or 1
        threads = grain.ReadOptions(num_threads=n_threads, prefetch_buffer_size=n_threads)
        workers = grain.MultiprocessingOptions(num_workers=self.n_workers, per_worker_buffer_size=2)
        # By pipes: shared memory leaks on an early close, and containers often have only 64 MB.
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        steps = grain.MapDataset.range(start, stop).map(self.train_batch).to_iter_dataset(threads)
        steps = grain.experimental.WithOptionsIterDataset(steps, pipes)
        stream = iter(steps.mp_prefetch(workers, _start_worker))
        with contextlib.closing(stream):
            yield from stream

    def eval_batches(self, n: int, batch_size: int | None = None) -> Iterator[Batch]:
        """The same n batches on every call: a fixed mix of the evaluation rows, never mirrored,
        with the first of their captions.
        """
        size = batch_size or self.batch_size
        # Shuffled, because the first rows of a set are often all of one class.
        order = permutation(0, 0, len(self.source.eval))
        for first in range(0, n * size, size):
            rows = order[(first + np.arange(size)) % len(order)]
            yield self._batch("eval", rows, np.zeros(size))

    def images(self, split: str) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, "n"]]:
        """All pictures and labels of "train" or "eval", in the order of the rows."""
        labels = getattr(self.source, split).labels
        return self._images(split, np.arange(len(labels))), labels

    def _draws(self, step: int) -> Float64[np.ndarray, "n"]:
        """Which of its captions each row of a global batch has."""
        if not self.encoded:
            return np.zeros(self.batch_size)
        n = len(self.source.train)
        draws = [uniforms(self.seed, epoch, n)[places] for epoch, places in self._epochs(step)]
        return np.concatenate(draws)

    def _batch(
        self, split: str, rows: Int64[np.ndarray, "n"], draws: Float64[np.ndarray, "n"]
    ) -> Batch:
        parts = np.split(np.arange(len(rows), dtype=np.int32), self.n_processes)
        row = parts[self.process_index]
        if self.encoded:
            label = self.encoded(self._captions[split].pick(rows[row], draws[row]))
        else:
            label = getattr(self.source, split).labels[rows[row]]
        return Batch(row, self._images(split, rows[row]), label)

    def _images(self, split: str, indices: Int64[np.ndarray, "b"]) -> UInt8[np.ndarray, "b h w c"]:
        if self._held:
            return self._held[split][indices]
        return getattr(self.source, split).images(indices)


@functools.lru_cache(maxsize=4)  # an epoch, the one it runs into, the evaluation
def permutation(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """The order of the rows in one epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=2)
def uniforms(seed: int, epoch: int, n: int) -> Float64[np.ndarray, "n"]:
    """A number in 0 … 1 for each place in an epoch: which of its captions a picture has there."""
    draws = np.random.default_rng((seed, epoch, CAPTIONS)).random(n)
    draws.flags.writeable = False
    return draws


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


def _all_images(split: Split) -> UInt8[np.ndarray, "n h w c"]:
    """Every picture of the split, by threads: Pillow decodes without the interpreter's lock."""
    c = split.config
    decoded = np.empty((len(split), c.image_size, c.image_size, c.channels), np.uint8)

    def fill(rows: Int64[np.ndarray, "b"]) -> None:
        decoded[rows] = split.images(rows)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, np.array_split(np.arange(len(split)), len(split) // 256 + 1)):
            pass  # an error comes out here, and ends the pool
    return decoded


def _start_worker(index: int, count: int) -> None:
    """A worker leaves Ctrl-C to its parent and ends when the parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
