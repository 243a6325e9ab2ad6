"""Auxiliary losses are added to the method's, reported beside it, and train the right blocks."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_COMPILE
from flax import nnx
from model_cases import TINY, build_with_params, key, with_random_weights

from methods.ddpm import DDPM
from methods.rectified_flow import RectifiedFlow
from model import JOINT
from runtime.errors import UserError
from training.auxiliary import mean_cosine, with_auxiliary

CONFIG = replace(TINY, depth=4, inner_head=2)
NEUTRAL = {"inner_weight": 0.0, "layer_sync": (), "sync_weight": 0.2}


def batch(config=CONFIG):
    shape = (4, *config.image_shape)
    image = jax.random.randint(key, shape, 0, 256).astype(jnp.uint8)
    return SimpleNamespace(row=jnp.arange(4), image=image, label=jnp.arange(4))


def gradients(config, loss, **options):
    """The loss with auxiliary ones, its metrics, and its gradient."""
    params = nnx.to_pure_dict(nnx.split(with_random_weights(config))[1])
    total = with_auxiliary(loss, **NEUTRAL | options)

    @partial(jax.jit, compiler_options=AS_USERS_COMPILE)
    def run(params):
        return jax.value_and_grad(
            lambda p: total(build_with_params(config, p), batch(config), key), has_aux=True
        )(params)

    (value, metrics), grads = run(params)
    return value, metrics, grads


def test_without_weights_the_loss_is_the_methods_own():
    loss = RectifiedFlow().loss
    assert with_auxiliary(loss, **NEUTRAL) is loss
    assert with_auxiliary(loss, **NEUTRAL | {"layer_sync": (1, 2), "sync_weight": 0.0}) is loss


@pytest.mark.parametrize(
    "method, config",
    [
        (RectifiedFlow(), CONFIG),
        (RectifiedFlow(prediction="x0"), replace(CONFIG, block=JOINT)),
        (DDPM(learned_sigma=True), replace(CONFIG, out_channels=2 * CONFIG.channels)),
    ],
    ids=["flow", "clean image, joint", "ddpm"],
)
def test_the_inner_heads_loss_is_the_methods_with_its_prediction(method, config):
    value, metrics, _ = gradients(config, method.loss, inner_weight=0.5)
    plain = gradients(config, method.loss)[0]
    np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-6)
    np.testing.assert_allclose(value, plain + 0.5 * metrics["inner_loss"], rtol=1e-6)
    # A network that returns the inner head's prediction alone has that loss.
    model = with_random_weights(config)

    def inner_alone(x, t, label):
        return model(x, t, label, inner=True).inner

    inner_alone.config = config
    alone, _ = jax.jit(lambda: method.loss(inner_alone, batch(config), key))()
    np.testing.assert_allclose(metrics["inner_loss"], alone, rtol=1e-5)


def test_the_inner_heads_loss_trains_the_blocks_below_it_alone():
    with_inner = gradients(CONFIG, RectifiedFlow().loss, inner_weight=1e6)[2]
    plain = gradients(CONFIG, RectifiedFlow().loss)[2]
    for a, b in zip(
        jax.tree.leaves(with_inner["blocks"]), jax.tree.leaves(plain["blocks"]), strict=True
    ):
        np.testing.assert_allclose(a[2:], b[2:], rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
        assert (jnp.abs(a[:2] - b[:2]).reshape(2, -1).max(1) > 0).all()
    assert jnp.abs(with_inner["inner"]["out"]["kernel"]).max() > 0
    assert (plain["inner"]["out"]["kernel"] == 0).all()


def test_layer_sync_adds_minus_the_cosine_and_trains_the_blocks_before_the_first_alone():
    config = replace(CONFIG, inner_head=0)
    flat = lambda model, batch, key: (0.0 * model(*inputs(batch)).mean(), {})  # noqa: E731
    value, metrics, grads = gradients(config, flat, layer_sync=(1, 3), sync_weight=0.3)
    np.testing.assert_allclose(value, -0.3 * metrics["layer_similarity"], rtol=1e-6)
    for g in jax.tree.leaves(grads["blocks"]):
        assert jnp.abs(g[0]).max() > 0 and (g[1:] == 0).all()
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads["final"]))


def inputs(batch):
    return jnp.float32(batch.image) / 255, jnp.full(4, 0.4), batch.label


def test_the_cosine_is_that_of_each_token():
    a = jnp.asarray([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    b = jnp.asarray([[[5.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(mean_cosine(a, b), (1 + 0 + 2**-0.5) / 3, rtol=1e-6)
    assert mean_cosine(jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))) == 0
    assert jnp.isfinite(jax.grad(mean_cosine)(jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3)))).all()


def test_a_loss_that_calls_the_network_twice_is_refused():
    def twice(model, batch, key):
        return (model(*inputs(batch)) + model(*inputs(batch))).mean(), {}

    with pytest.raises(UserError, match="need a method whose loss calls the network once"):
        gradients(CONFIG, twice, inner_weight=0.5)
