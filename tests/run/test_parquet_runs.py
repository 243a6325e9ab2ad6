"""Parquet files read where they lie: the same rows as `datasets` finds, whatever the order."""

import pytest
from parquet_cases import (
    batches_equal,
    folder,  # noqa: F401
    make_pipeline,
    open_both,
)


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_a_streamed_batch_is_a_function_of_seed_and_step(folder, n_workers):
    whole = [make_pipeline(open_both(folder)[1]).train_batch(step) for step in range(12)]
    again = make_pipeline(open_both(folder)[1], n_workers=n_workers)
    batches = list(again.train_batches(5, 12))
    assert len(batches) == 7 and all(batches_equal(a, b) for a, b in zip(whole[5:], batches))
