"""`--overfit_batch` trains on the first batch alone, and is evaluated on it."""

import json
from dataclasses import replace

import nano  # noqa: F401  (its preset)
import numpy as np
import pytest
from test_train import TINY, assert_same

import images
from errors import UserError
from pipeline import Pipeline
from sources import open_source
from train import Trainer

ONE = replace(TINY, model="DiT-Nano/4", overfit_batch=True)


def test_every_batch_is_the_first():
    source = open_source("digits")
    of = {"batch_size": 8, "seed": 3}
    plain, one = Pipeline(source, **of), Pipeline(source, **of, one_batch=True)
    first = plain.train_batch(0)
    later = [*one.train_batches(5, 8), one.train_batch(700), *one.eval_batches(2)]
    assert len(later) == 6
    for batch in later:
        for a, b in zip(first, batch):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.rows(9), plain.rows(0))
    assert one.labels(9) == first.label.tolist()
    assert not np.array_equal(plain.train_batch(5).image, first.image)


def test_flips_do_not_change_from_step_to_step(monkeypatch):
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
def test_the_model_learns_the_batch_and_draws_it(tmp_path, capsys):
    """Far below what any run on all pictures can reach; samples are the batch's pictures."""
    how = {"n_steps": 400, "batch_size": 8, "learning_rate": 5e-3, "ema_decay": 0.95}
    how |= {"n_sample_steps": 20, "eval_save_steps": 400, "log_every": 50, "cfg_scale": 1.0}
    trainer = Trainer(replace(ONE, **how, run_dir=tmp_path / "run"))
    trainer.fit()
    assert "digits: the first 8 of 1437 training pictures" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert lines[-2]["loss"] < 0.2 and lines[-1]["eval_loss"] < 0.2
    batch = trainer.data.train_batch(0)
    drawn = images.to_uint8(trainer.sample(batch.label.tolist()))
    real = batch.image.astype(int)
    same_class = batch.label[:, None] == batch.label
    apart = np.abs(drawn.astype(int)[:, None] - real).mean(axis=(2, 3, 4))
    nearest = np.where(same_class, apart, np.inf).min(axis=1)
    print(nearest, lines[-2]["loss"], lines[-1])
    assert np.median(nearest) < 12  # of 255 grey values
    assert (tmp_path / "run" / "samples" / "batch.png").exists()


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
