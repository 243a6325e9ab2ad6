"""A run in eight bits, moments in bfloat16, resumes bit for bit and does not depend on devices."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from train_cases import TINY, assert_same

from runtime.errors import UserError
from train import Trainer
from training.config import TrainConfig

FP8 = replace(TINY, half_precision="fp8", moments="bf16", n_steps=6, eval_save_steps=3, log_every=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = Trainer(replace(FP8, run_dir=tmp_path_factory.mktemp("fp8") / "run"))
    trainer.fit()
    return trainer


@pytest.mark.slow
def test_it_resumes_bit_for_bit_in_the_precision_it_began_with(whole, tmp_path, capsys):
    half = Trainer(replace(FP8, run_dir=tmp_path / "run"))
    half.fit(3)
    assert "in fp8" in (out := capsys.readouterr().out) and "no units for fp8" in out
    resume = TrainConfig(run_dir=tmp_path / "run", resume=True)
    for name, value, was in (("half_precision", "bf16", "fp8"), ("moments", "fp32", "bf16")):
        with pytest.raises(UserError, match=f"{name} was {was}, not {value}"):
            Trainer(replace(resume, **{name: value}))
    resumed = Trainer.from_run(tmp_path / "run")
    moments = optax.tree.get(resumed.state.opt_state, "nu")
    assert {x.dtype.name for x in jax.tree.leaves(moments)} == {"bfloat16"}
    assert resumed.model_config.fp8 and resumed.model_config.dtype == "bfloat16"
    resumed.fit()
    assert_same(resumed.state, whole.state)


@pytest.mark.slow
def test_it_is_evaluated_and_sampled_in_bfloat16(whole):
    """In eight bits the largest number of a batch would touch all of its samples."""
    both = whole.sample([3, 7], n_steps=2)
    np.testing.assert_array_equal(both[:1], whole.sample([3], n_steps=2))
    plain = Trainer(replace(FP8, half_precision="bf16", run_dir=None))
    plain.state = whole.state
    assert whole.evaluate() == plain.evaluate()
