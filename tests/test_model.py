"""The networks are the papers': sizes, zero start, and every condition is used."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from errors import UserError
from model import MODELS, ModelConfig, graphdef, init_params, model_config

key = jax.random.key(0)
TINY = ModelConfig(
    width=32,
    depth=2,
    n_heads=2,
    patch_size=2,
    image_size=8,
    channels=3,
    out_channels=3,
    n_classes=5,
)
VARIANTS = {
    "plain": TINY,
    "rope": replace(TINY, rope=True, position="none"),
    "learned": replace(TINY, position="learned"),
    "qk_norm": replace(TINY, qk_norm=True),
    "swiglu": replace(TINY, mlp="swiglu"),
    "rms": replace(TINY, norm="rms"),
    "remat": replace(TINY, remat=True),
    "unrolled": replace(TINY, unroll=2),
    "bfloat16": replace(TINY, dtype="bfloat16"),
}
x = jax.random.normal(key, (4, 8, 8, 3))
t = jnp.asarray([0.1, 0.4, 0.6, 0.9])
label = jnp.asarray([0, 2, 4, 5])


def live(config, params=None):
    return nnx.merge(graphdef(config), init_params(config, key) if params is None else params)


def shaken(config):
    """Weights away from their zero start, so that everything has an effect."""
    params = init_params(config, key)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return live(config, jax.tree.unflatten(treedef, leaves))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_untrained_model_is_zero_and_its_blocks_the_identity(config):
    model = live(config)
    assert (model(x, t, label) == 0).all()
    tokens = jax.random.normal(key, (4, 16, 32)).astype(config.dtype)
    cond = jax.random.normal(key, (4, 32)).astype(config.dtype)
    first = nnx.merge(*jax.tree.map(lambda w: w[0], nnx.split(model.blocks)))
    assert (first(tokens, cond) == tokens).all()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_input_matters_and_rows_do_not_mix(config):
    model = shaken(config)
    y = model(x, t, label)
    assert y.dtype == jnp.float32
    for changed in (model(x.at[0].add(1), t, label), model(x, t.at[0].add(0.3), label)):
        assert jnp.abs(changed - y)[0].max() > 1e-3
        assert (changed[1:] == y[1:]).all()
    relabelled = model(x, t, label.at[0].set(1))
    assert jnp.abs(relabelled - y)[0].max() > 1e-3
    assert (relabelled[1:] == y[1:]).all()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_one_step_of_training_makes_the_condition_matter(config):
    """adaLN-Zero starts deaf to t and label; two updates must change that."""
    params, target = init_params(config, key), jax.random.normal(jax.random.key(2), x.shape)
    tx = optax.adam(1e-2)
    opt = tx.init(params)

    @jax.jit
    def step(params, opt):
        grads = jax.grad(
            lambda p: jnp.square(
                live(config, p)(x, t, label) - target * t.reshape(-1, 1, 1, 1)
            ).mean()
        )(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    for _ in range(3):
        params, opt = step(params, opt)
    model = live(config, params)
    assert jnp.abs(model(x, t, label) - model(x, t, label[::-1])).max() > 1e-5
    assert jnp.abs(model(x, t, label) - model(x, t[::-1], label)).max() > 1e-5


def test_unrolling_and_recomputing_change_nothing():
    y = shaken(TINY)(x, t, label)
    for config in (VARIANTS["remat"], VARIANTS["unrolled"]):
        np.testing.assert_allclose(shaken(config)(x, t, label), y, rtol=1e-5, atol=1e-5)


def test_positions_tell_tokens_apart():
    """Without any position the model is blind to where a patch lies; with one it is not."""

    def moves(config):
        model = shaken(config)
        rolled = model(jnp.roll(x, 2, axis=1), t, label)
        return float(jnp.abs(jnp.roll(rolled, -2, axis=1) - model(x, t, label)).max())

    assert moves(replace(TINY, position="none")) < 1e-4
    for name in ("plain", "learned", "rope"):
        assert moves(VARIANTS[name]) > 1e-2


def count(config):
    return sum(p.size for p in jax.tree.leaves(jax.eval_shape(lambda: init_params(config, key))))


def of_the_paper(name):
    return model_config(name, image_size=32, channels=4, out_channels=8, n_classes=1000)


@pytest.mark.parametrize(
    "name, millions",
    [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675), ("DiT-S/8", 33)],
)
def test_parameter_counts_are_the_papers(name, millions):
    """Peebles & Xie 2023, table 4."""
    assert round(count(of_the_paper(name)) / 1e6) == millions


def test_the_largest_model_has_the_published_number_of_parameters():
    """675,129,632 with the authors' fixed table of 256 × 1152 positions."""
    assert count(of_the_paper("DiT-XL/2")) + 256 * 1152 == 675_129_632


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_builds_with_its_own_patch(name):
    config = of_the_paper(name)
    p = int(name.split("/")[1])
    assert config.patch_size == p and config.grid == (32 // p, 32 // p)
    params = jax.eval_shape(lambda: init_params(config, key))
    assert params["patch"]["kernel"].shape == (p * p * 4, config.width)
    out = jax.eval_shape(
        lambda p: live(config, p)(jnp.zeros((1, 32, 32, 4)), t[:1], label[:1]), params
    )
    assert out.shape == (1, 32, 32, 8)


@pytest.mark.parametrize("n_classes", [0, 1, 10, 1000])
def test_the_null_class_is_the_last_row(n_classes):
    params = init_params(replace(TINY, n_classes=n_classes), key)
    assert params["label"]["table"].shape == (n_classes + 1, 32)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("DiT-S/3", {}, "unknown model 'DiT-S/3'; did you mean"),
        ("DiT-S/8", {"image_size": 12}, "image_size 12 is not divisible by patch_size 8"),
        ("DiT-S/2", {"block": "adaln0"}, "unknown block 'adaln0'; did you mean 'adaln_zero'"),
        ("DiT-S/2", {"mlp": "relu"}, "unknown mlp 'relu'"),
    ],
)
def test_what_does_not_exist_is_named(name, fields, message):
    given = {"image_size": 32, "channels": 4, "out_channels": 4, "n_classes": 10} | fields
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        model_config(name, **given)
