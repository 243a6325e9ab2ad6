"""Epochs that visit each row once, mix well, and let a reader keep few row groups in memory."""

import itertools

import numpy as np
import pytest

from data import shuffle
from data.shuffle import GroupedShuffle

SIZES = np.array([7, 10, 1, 10, 3, 9, 10, 10, 2, 8])  # 70 rows


def plan(sizes=SIZES, *, group_bytes=2**20, batch_size=8, shuffle_buffer=30):
    return GroupedShuffle.plan(
        sizes,
        group_bytes=float(group_bytes),
        batch_size=batch_size,
        shuffle_buffer=shuffle_buffer,
    )


@pytest.mark.parametrize("batch_size", [1, 7, 8, 100])
@pytest.mark.parametrize("shuffle_buffer", [1, 30, 1000])
def test_an_epoch_has_each_row_once_in_an_order_of_its_own(batch_size, shuffle_buffer):
    one = plan(batch_size=batch_size, shuffle_buffer=shuffle_buffer)
    orders = [one.order(0, 0), one.order(0, 1), one.order(1, 0)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(70))
    assert not any((a == b).all() for a, b in itertools.combinations(orders, 2))
    np.testing.assert_array_equal(one.order(0, 1), orders[1])


def test_there_are_as_many_lanes_as_memory_allows(monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_OPEN_BYTES", 100)
    many = np.full(1000, 10)
    # A buffer of 30 rows is 3 groups, and each lane has half of one more at both ends of a pool.
    assert plan(many, group_bytes=1, batch_size=200).n_lanes == (100 - 3) // 2
    assert plan(many, group_bytes=10, batch_size=200).n_lanes == 3
    assert plan(many, group_bytes=1000, batch_size=200).n_lanes == 1
    monkeypatch.undo()
    assert plan(many, group_bytes=1, batch_size=200).n_lanes == shuffle.MAX_LANES
    assert plan(many, batch_size=5).n_lanes == 5
    assert plan(np.full(2, 10), batch_size=5).n_lanes == 2


@pytest.mark.parametrize("n_readers", [1, 2, 4])
def test_a_reader_opens_a_group_about_once_an_epoch(n_readers):
    """The reader has the memory that `open_groups` asks for; every pool begins in another group."""
    sizes = np.full(600, 10)
    one = plan(sizes, batch_size=16, shuffle_buffer=800)
    assert one.n_lanes == 16 and one.pool == 50
    order = np.concatenate([one.order(0, epoch) for epoch in range(2)])
    part = 16 // n_readers
    opened = 0
    for reader in range(n_readers):
        memory: list[int] = []
        slots = np.arange(len(order)) % 16 // part == reader
        for group in order[slots] // 10:
            if group in memory:
                memory.remove(group)
            else:
                opened += 1
            memory.append(group)
            memory = memory[-one.open_groups(n_readers) :]
    # The ends of lanes and of pools fall into groups, of which some are read twice.
    assert opened < 2 * 600 * 1.15
    assert one.open_groups(1) == 16 * 7


def test_batches_mix_rows_from_all_over_the_dataset():
    """The dataset is sorted by class, as many are, and every batch has nearly all classes."""
    label = np.repeat(np.arange(10), 1000)
    order = plan(np.full(100, 100), batch_size=64, shuffle_buffer=2000).order(0, 0)
    n_classes = [len(set(batch)) for batch in label[order][: 64 * 150].reshape(-1, 64)]
    assert min(n_classes) >= 8
    # And rows that lie beside each other in the files rarely meet in a batch.
    batches = np.sort(order[: 64 * 150].reshape(-1, 64))
    assert (np.diff(batches) == 1).sum(1).mean() < 2


def test_lanes_open_their_next_groups_at_different_times():
    order = plan(np.full(640, 10), batch_size=64, shuffle_buffer=64 * 50).order(0, 0)
    seen = set()
    opened = []
    for batch in order[: 64 * 90].reshape(-1, 64) // 10:
        opened.append(len(set(batch) - seen))
        seen |= set(batch)
    assert max(opened[5:-5]) < 32
