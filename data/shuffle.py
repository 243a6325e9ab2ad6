"""The order of training rows, flips, captions and crops in an epoch: functions of (seed, epoch).

Plain arithmetic on row numbers; nothing here reads or decodes anything.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

MAX_OPEN_BYTES = 2**30  # of row groups that all readers of one batch together hold in memory
MAX_LANES = 64

# Third number of the NumPy seed (seed, epoch, …). It is never 0: (s, e) and (s, e, 0) are one
# stream, and (s, e) is the stream of the permutation.
FLIP_STREAM = 1
CAPTION_STREAM = 2
CROP_STREAM = 3
BUCKET_STREAM = 4


@functools.lru_cache(maxsize=4)  # an epoch, the one it runs into, the evaluation
def shuffle_rows(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """Permute rows 0 … n − 1 for one epoch. The array is cached and read-only."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=2)
def sample_flips(seed: int, epoch: int, n: int) -> Bool[np.ndarray, "n"]:
    """Toss a fair coin for each position of an epoch. The array is cached and read-only."""
    flips = np.random.default_rng((seed, epoch, FLIP_STREAM)).random(n) < 0.5
    flips.flags.writeable = False
    return flips


@functools.lru_cache(maxsize=4)
def sample_uniforms(seed: int, epoch: int, n: int, stream: int) -> Float64[np.ndarray, "n"]:
    """Sample a number in [0, 1) for each position of an epoch, which chooses among the captions of
    the row there, or where its image is cropped. The array is cached and read-only.

    Args:
        stream: `CAPTION_STREAM` or `CROP_STREAM`.
    """
    uniforms = np.random.default_rng((seed, epoch, stream)).random(n)
    uniforms.flags.writeable = False
    return uniforms


@dataclass(frozen=True)
class BucketOrder:
    """The bucket of each batch, where all rows of a batch are of one.

    The rows of a bucket are an endless chain of its epochs, cut into batches: what an epoch leaves
    over begins the next one's first batch, so that no row is dropped and each comes once in every
    epoch of its bucket. The batches that begin in epoch e of their bucket, those of all buckets in
    random order, are epoch e of the dataset.

    Args:
        sizes: rows of each bucket.
    """

    sizes: tuple[int, ...]
    batch_size: int

    def batches_before(self, epoch: int) -> Int64[np.ndarray, "buckets"]:
        """Count the batches of each bucket that begin before an epoch."""
        return -(-epoch * np.array(self.sizes, np.int64) // self.batch_size)

    def find(self, seed: int, step: int) -> tuple[int, int]:
        """Return the bucket of the batch of `step`, and its number among those of this bucket."""
        # Rounding up gives earlier epochs more batches than their rows: never too early an epoch.
        epoch = step * self.batch_size // sum(self.sizes)
        while self.batches_before(epoch).sum() > step:
            epoch -= 1
        before = self.batches_before(epoch)
        buckets = shuffle_buckets(self, seed, epoch)
        offset = step - before.sum()
        bucket = int(buckets[offset])
        return bucket, int(before[bucket] + (buckets[:offset] == bucket).sum())


@functools.lru_cache(maxsize=4)
def shuffle_buckets(order: BucketOrder, seed: int, epoch: int) -> Int64[np.ndarray, "batches"]:
    """Return the bucket of each batch of an epoch. The array is cached and read-only."""
    n_batches = order.batches_before(epoch + 1) - order.batches_before(epoch)
    buckets = np.repeat(np.arange(len(order.sizes)), n_batches)
    buckets = np.random.default_rng((seed, epoch, BUCKET_STREAM)).permutation(buckets)
    buckets.flags.writeable = False
    return buckets


@dataclass(frozen=True, eq=False)
class GroupedShuffle:
    """A shuffle of rows that lie in groups, such as those of Parquet files, with few groups open.

    A batch is cut into `n_lanes` equal parts. Each lane reads its own random sequence of groups,
    and mixes the rows within pools of `pool` consecutive rows. A batch therefore mixes rows of
    n_lanes · pool rows from all over the dataset, while a process that has a part of each batch
    reads only the groups of its lanes, one after the other.
    """

    sizes: Int64[np.ndarray, "groups"]  # rows of each group
    n_lanes: int
    pool: int
    batch_size: int

    @classmethod
    def plan(
        cls,
        sizes: Int64[np.ndarray, "groups"],
        *,
        group_bytes: float,
        batch_size: int,
        shuffle_buffer: int,
    ) -> "GroupedShuffle":
        """Choose as many lanes as have room for their groups in `MAX_OPEN_BYTES`.

        Args:
            sizes: rows of each group.
            group_bytes: mean size of a group.
            batch_size: rows of a global batch.
            shuffle_buffer: rows of the pools of all lanes together.
        """
        # In groups. A pool has half a group more at either end.
        pooled_groups = shuffle_buffer / sizes.mean()
        room = int((MAX_OPEN_BYTES / group_bytes - pooled_groups) / 2)
        n_lanes = max(1, min(room, MAX_LANES, batch_size, len(sizes)))
        return cls(sizes, n_lanes, math.ceil(shuffle_buffer / n_lanes), batch_size)

    def order(self, seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
        """Order the rows for this epoch, each once.

        Position p of the epoch is row (epoch · n + p) mod `batch_size` of a batch.
        """
        rng = np.random.default_rng((seed, epoch))
        n = self.sizes.sum()
        groups = np.split(np.arange(n), np.cumsum(self.sizes)[:-1])
        rows = np.concatenate([groups[group] for group in rng.permutation(len(groups))])
        # The groups in a row are cut into one stretch for each lane, as long as its positions.
        lane = (epoch * n + np.arange(n)) % self.batch_size * self.n_lanes // self.batch_size
        positions = np.argsort(lane, kind="stable")
        lane = lane[positions]
        index_in_lane = np.arange(n) - np.searchsorted(lane, lane)
        # Lanes begin at different points of a pool, or all would read a new group at once.
        pool = (index_in_lane + lane * self.pool // self.n_lanes) // self.pool
        mixed = np.lexsort((rng.random(n), pool, lane))
        order = np.empty(n, np.int64)
        order[positions] = rows[mixed]
        return order

    def open_groups(self, n_readers: int) -> int:
        """Count the groups that a reader of one of `n_readers` parts of each batch holds open."""
        lanes_per_reader = math.ceil(self.n_lanes / n_readers)
        if n_readers > 1:  # a reader's part may begin in the middle of a lane
            lanes_per_reader += 1
        groups_per_lane = math.ceil(self.pool / self.sizes.mean()) + 2
        return min(self.n_lanes, lanes_per_reader) * groups_per_lane


@functools.lru_cache(maxsize=3)
def shuffle_grouped_rows(shuffle: GroupedShuffle, seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """Order the rows of a streamed split for one epoch. The array is cached and read-only."""
    order = shuffle.order(seed, epoch)
    order.flags.writeable = False
    return order
