"""A recipe of docs/extending.md that needs a trainer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from pages import run_recipe

import model
import train
from methods import rectified_flow
from training import config as training_config


@pytest.mark.slow
def test_a_trainer_asks_itself_for_its_objective(tmp_path):
    """Of the untrained model, which says 0, Huber's loss is below half of the squares'."""
    robust = run_recipe("An objective", rectified_flow, Trainer=train.Trainer, optax=optax)[
        "Robust"
    ]
    config = training_config.TrainConfig(model="DiT-Ti/4", batch_size=64, n_eval_batches=1)
    small, large = (kind(config).evaluate()["eval_loss"] for kind in (robust, train.Trainer))
    assert 0.2 * large < small < 0.5 * large


def test_a_block_is_chosen_by_its_name_and_sees_its_condition(monkeypatch):
    monkeypatch.setattr(model, "BLOCKS", dict(model.BLOCKS))
    before = set(model.BLOCKS)
    run_recipe("A block", model)
    (added,) = set(model.BLOCKS) - before
    shape: dict[str, Any] = {
        "width": 16,
        "depth": 2,
        "n_heads": 2,
        "patch_size": 4,
        "image_size": 8,
    }
    config = model.ModelConfig(**shape, channels=1, out_channels=1, n_classes=3, block=added)
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.full(2, 0.5)
    params = model.init_model_params(config, jax.random.key(1))

    @jax.jit
    def predict(params, label):
        return nnx.merge(model.model_graphdef(config), params)(x, t, jnp.full(2, label))

    assert not predict(params, 0).any()  # the identity, as the block it is made from
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    assert jnp.abs(predict(params, 0) - predict(params, 1)).max() > 1e-3
