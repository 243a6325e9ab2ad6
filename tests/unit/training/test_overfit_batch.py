"""`--overfit_batch` trains on the first batch only, and evaluates on it."""

from dataclasses import replace

import nano  # noqa: F401  (its preset)
import numpy as np

from data.load import open_dataset
from data.pipeline import Pipeline


def test_every_batch_is_the_first():
    source = open_dataset("digits")
    plain = Pipeline(source, batch_size=8, seed=3)
    one = Pipeline(source, batch_size=8, seed=3, one_batch=True)
    first = plain.train_batch(0)
    later = [*one.train_batches(5, 8), one.train_batch(700), *one.eval_batches(2)]
    assert len(later) == 6
    for batch in later:
        for a, b in zip(first, batch):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.batch_rows(9), plain.batch_rows(0))
    np.testing.assert_array_equal(one.batch_labels(9), first.label)
    assert not np.array_equal(plain.train_batch(5).image, first.image)


def test_flips_do_not_change_from_step_to_step():
    source = open_dataset("digits")
    mirrored = replace(source, config=replace(source.config, flip=True))
    one = Pipeline(mirrored, batch_size=64, seed=0, one_batch=True)
    first, later = one.train_batch(0), one.train_batch(12)
    np.testing.assert_array_equal(first.image, later.image)
    unflipped = source.train.decode(one.batch_rows(0))
    n_flipped = sum(not np.array_equal(a, b) for a, b in zip(first.image, unflipped))
    assert 16 < n_flipped < 48
    np.testing.assert_array_equal(one.first_rows(3, 5).image, first.image[:5])
