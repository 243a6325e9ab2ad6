"""The order of rows that are read a group at a time: well mixed, and a function of (seed, epoch).

Plain arithmetic; nothing here reads anything.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from data.parquet import ParquetSplit
from data.rows import Split

MAX_OPEN_BYTES = 2**30  # of groups that all readers of one batch together have in memory
MAX_LANES = 64


@dataclass(frozen=True, eq=False)
class GroupedShuffle:
    """Epochs of a set whose rows lie in groups, such as those of Parquet files.

    A batch is cut into `n_lanes` equal parts, and each part goes its own way through the set: from
    one group to another drawn at random, in pools of `pool` rows whose order is drawn too. So a
    batch mixes rows of n_lanes · pool rows in a row, from all over the set, while a process that
    has a part of each batch reads only the groups of its lanes, one after the other.
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
        """As many lanes as `OPEN_BYTES` can hold the groups of, for pools that together make up
        `shuffle_buffer` rows.
        """
        pooled = shuffle_buffer / sizes.mean()  # groups; at both ends of a pool is half of another
        room = int((MAX_OPEN_BYTES / group_bytes - pooled) / 2)
        n_lanes = max(1, min(room, MAX_LANES, batch_size, len(sizes)))
        return cls(sizes, n_lanes, math.ceil(shuffle_buffer / n_lanes), batch_size)

    def order(self, seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
        """The rows in the order of this epoch, each once. Place p is row (epoch · n + p) mod
        `batch_size` of a batch.
        """
        rng, n = np.random.default_rng((seed, epoch)), self.sizes.sum()
        groups = np.split(np.arange(n), np.cumsum(self.sizes)[:-1])
        rows = np.concatenate([groups[g] for g in rng.permutation(len(groups))])
        # One group after the other, cut into a stretch for each lane, as long as its places.
        lane = (epoch * n + np.arange(n)) % self.batch_size * self.n_lanes // self.batch_size
        places = np.argsort(lane, kind="stable")
        lane = lane[places]
        in_lane = np.arange(n) - np.searchsorted(lane, lane)
        # Lanes begin in the middle of a pool, each in another, or all would read at once.
        pool = (in_lane + lane * self.pool // self.n_lanes) // self.pool
        mixed = np.lexsort((rng.random(n), pool, lane))
        order = np.empty(n, np.int64)
        order[places] = rows[mixed]
        return order

    def open_groups(self, n_readers: int) -> int:
        """Groups that a reader of one of `n_readers` parts of each batch needs at a time."""
        lanes = min(self.n_lanes, math.ceil(self.n_lanes / n_readers) + (n_readers > 1))
        return lanes * (math.ceil(self.pool / self.sizes.mean()) + 2)


# NumPy's seeds (s, e) and (s, e, 0) are one stream, so no constant is 0.
FLIP_STREAM, CAPTION_STREAM = 1, 2


def plan_grouped_shuffle(split: Split, batch_size: int, shuffle_buffer: int) -> GroupedShuffle:
    """The order of a streamed split."""
    assert isinstance(split.data, ParquetSplit)
    group = split.data.group(split.rows)
    return GroupedShuffle.plan(
        np.unique(group, return_counts=True)[1],
        group_bytes=float(split.data.bytes.mean()),
        batch_size=batch_size,
        shuffle_buffer=shuffle_buffer,
    )


@functools.lru_cache(maxsize=4)  # an epoch, the one it runs into, the evaluation
def shuffle_rows(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """The order of the rows in one epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=3)
def shuffle_grouped_rows(lanes: GroupedShuffle, seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """The order of the rows in one epoch of a streamed set."""
    order = lanes.order(seed, epoch)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=2)
def sample_flips(seed: int, epoch: int, n: int) -> Bool[np.ndarray, "n"]:
    """For each place in an epoch, heads or tails."""
    heads = np.random.default_rng((seed, epoch, FLIP_STREAM)).random(n) < 0.5
    heads.flags.writeable = False
    return heads


@functools.lru_cache(maxsize=2)
def sample_caption_uniforms(seed: int, epoch: int, n: int) -> Float64[np.ndarray, "n"]:
    """A number in 0 … 1 for each place in an epoch: which of its captions a picture has there."""
    draws = np.random.default_rng((seed, epoch, CAPTION_STREAM)).random(n)
    draws.flags.writeable = False
    return draws
