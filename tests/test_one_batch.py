"""`--overfit_batch` trains on the first batch alone, and is evaluated on it."""

import json
from dataclasses import replace
from typing import Any

import nano  # noqa: F401  (its preset)
import numpy as np
import pytest
from commands import NANO, run
from PIL import Image
from test_train import TINY, assert_same, metrics

from data.load import open_source
from data.pipeline import Pipeline
from runtime.errors import UserError
from train import Trainer


def grey(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"), int)


ONE = replace(TINY, overfit_batch=True)


def test_every_batch_is_the_first():
    source = open_source("digits")
    of: Any = {"batch_size": 8, "seed": 3}
    plain, one = Pipeline(source, **of), Pipeline(source, **of, one_batch=True)
    first = plain.train_batch(0)
    later = [*one.train_batches(5, 8), one.train_batch(700), *one.eval_batches(2)]
    assert len(later) == 6
    for batch in later:
        for a, b in zip(first, batch):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.rows(9), plain.rows(0))
    np.testing.assert_array_equal(one.labels(9), first.label)
    assert not np.array_equal(plain.train_batch(5).image, first.image)


def test_flips_do_not_change_from_step_to_step():
    source = open_source("digits")
    mirrored = replace(source, config=replace(source.config, flip=True))
    one = Pipeline(mirrored, batch_size=64, seed=0, one_batch=True)
    first, later = one.train_batch(0), one.train_batch(12)
    np.testing.assert_array_equal(first.image, later.image)
    as_is = source.train.images(one.rows(0))
    n_flipped = sum(not np.array_equal(a, b) for a, b in zip(first.image, as_is))
    assert 16 < n_flipped < 48
    np.testing.assert_array_equal(one.first_rows(3, 5).image, first.image[:5])


@pytest.mark.slow
def test_the_model_learns_the_batch_and_draws_it(tmp_path, cache):
    """A loss far below the third or so that is left of runs on all digits, and samples that are the
    pictures of the batch.
    """
    flags = ["--model", "DiT-Nano/4", "--batch_size", 8, "--learning_rate", 1e-2, "--cfg_scale", 1]
    flags += ["--ema_decay", 0.95, "--n_sample_steps", 20, "--n_steps", 1000, "--log_every", 100]
    flags += ["--sample_every_n", 1000, "--eval_save_steps", 1000, "--run_dir", tmp_path / "run"]
    done = run(NANO, "--overfit_batch", *flags, cache=cache, fast_compile=False)
    assert done.returncode == 0, done.stderr
    assert "digits: the first 8 of 1437 training pictures" in done.stdout
    *_, trained, evaluated = metrics(tmp_path / "run")
    assert trained["loss"] < 0.15 and evaluated["eval_loss"] < 0.1
    batch, drawn = (
        grey(tmp_path / "run" / "samples" / f"{name}.png") for name in ("batch", "final")
    )
    assert batch.shape == drawn.shape and batch.std() > 50
    assert np.abs(batch - drawn).mean() < 14  # of 255; other digits are more than 30 apart


@pytest.mark.slow
def test_a_run_on_one_batch_goes_on_as_one(tmp_path, capsys):
    whole = Trainer(replace(ONE, run_dir=tmp_path / "whole"))
    whole.fit()
    assert json.loads((tmp_path / "whole/config.json").read_text())["overfit_batch"] is True
    Trainer(replace(ONE, run_dir=tmp_path / "run")).fit(7)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.step == 7 and resumed.config.overfit_batch
    resumed.fit()
    assert_same(resumed.state, whole.state)
    other = replace(ONE, run_dir=tmp_path / "run", resume=True, overfit_batch=False)
    with pytest.raises(UserError, match="overfit_batch was True, not False"):
        Trainer(other)


def test_one_batch_needs_no_cache():
    with pytest.raises(UserError, match="needs no --cache_on_device"):
        Trainer(replace(ONE, cache_on_device=True))
