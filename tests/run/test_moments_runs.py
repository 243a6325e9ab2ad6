"""Moments in bfloat16: a run resumes bit for bit, and learns what one in float32 learns."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from train_cases import TINY, assert_same

from runtime.errors import UserError
from train import Trainer
from training.config import TrainConfig


@pytest.mark.slow
def test_it_resumes_bit_for_bit_and_learns_as_in_float32(tmp_path):
    config = replace(TINY, moments="bf16", n_steps=6, eval_save_steps=3)
    whole = Trainer(replace(config, run_dir=tmp_path / "whole"))
    whole.fit()
    Trainer(replace(config, run_dir=tmp_path / "run")).fit(3)
    with pytest.raises(UserError, match="moments was bf16, not fp32"):
        Trainer(TrainConfig(run_dir=tmp_path / "run", resume=True, moments="fp32"))
    resumed = Trainer.from_run(tmp_path / "run")
    moments = optax.tree.get(resumed.state.opt_state, "nu")
    assert {x.dtype.name for x in jax.tree.leaves(moments)} == {"bfloat16"}
    resumed.fit()
    assert_same(resumed.state, whole.state)

    full = Trainer(replace(TINY, n_steps=6, eval_save_steps=3, run_dir=tmp_path / "full"))
    full.fit()
    for ours, theirs in zip(
        jax.tree.leaves(whole.state.params), jax.tree.leaves(full.state.params), strict=True
    ):
        assert np.abs(ours - theirs).max() < 0.05 * full.config.learning_rate * 6
    np.testing.assert_allclose(
        whole.evaluate()["eval_loss"], full.evaluate()["eval_loss"], rtol=1e-3
    )
