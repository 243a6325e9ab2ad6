"""Moments in bfloat16: a run learns what one in float32 learns."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from train_cases import TINY

from train import Trainer


@pytest.mark.slow
def test_it_learns_as_in_float32():
    half, full = (Trainer(replace(TINY, moments=moments)) for moments in ("bf16", "fp32"))
    for trainer in (half, full):
        for batch in trainer.batches(0, 6):
            trainer.train_step(batch)
    for ours, theirs in zip(
        jax.tree.leaves(half.state.params), jax.tree.leaves(full.state.params), strict=True
    ):
        assert np.abs(ours - theirs).max() < 0.05 * full.config.learning_rate * 6
    np.testing.assert_allclose(
        half.evaluate()["eval_loss"], full.evaluate()["eval_loss"], rtol=1e-3
    )
