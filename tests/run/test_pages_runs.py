"""A recipe of docs/extending.md that needs a trainer."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import nano  # noqa: F401  (its sizes)
import optax
import pytest
from flax import nnx
from pages import run_recipe

import generate
import model
from generate import GenerateConfig
from inference.trained_model import TrainedModel
from methods import rectified_flow, registry
from runtime.errors import UserError
from train import TrainConfig, Trainer


@pytest.mark.slow
def test_a_method_trains_samples_resumes_and_is_refused_where_it_is_not_known(
    tmp_path, monkeypatch
):
    """Of the untrained model, which says 0, Huber's loss is below half of the squares'."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    made = run_recipe("A method", rectified_flow, registry, optax=optax)
    config = TrainConfig(
        model="DiT-Nano/4", batch_size=64, n_eval_batches=1, n_steps=2, half_precision=False
    )
    robust = Trainer(replace(config, objective="robust", run_dir=tmp_path / "run"))
    small, large = (trainer.evaluate()["eval_loss"] for trainer in (robust, Trainer(config)))
    assert 0.2 * large < small < 0.5 * large

    robust.fit()
    assert robust.sample([3, 7], n_steps=2).shape == (2, 8, 8, 1)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.step == 2 and resumed.evaluate() == robust.evaluate()
    trained = TrainedModel.from_run(tmp_path / "run")
    assert trained.method == made["Robust"]()

    del registry.METHODS["robust"]
    with pytest.raises(UserError, match="trained with --objective robust, which is not known here"):
        generate.main(GenerateConfig(run=tmp_path / "run", out=tmp_path / "samples.png"))


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
