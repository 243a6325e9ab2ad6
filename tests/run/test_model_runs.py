"""The networks are the papers': sizes, zero start, and every condition is used."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from model_cases import (
    BLOCK_VARIANTS,
    TEXT_VARIANTS,
    VARIANTS,
    caption,
    key,
    label,
    labels_for,
    random_weights,
    t,
    x,
)

from data.batch import EncodedCaption
from model import (
    JOINT,
    init_model_params,
    model_graphdef,
)


@cache
def program(config):
    """The network as one function of its weights and inputs, compiled once for all tests."""
    graphdef = model_graphdef(config)
    return jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))


@cache
def initial(config):
    """The weights that training starts with."""
    return jax.jit(lambda: init_model_params(config, key))()


@pytest.mark.slow
def test_every_weight_of_every_design_has_a_gradient():
    """Except those of unused inputs: adaLN ignores a caption's tokens, the two designs without it
    ignore the pooled vector.
    """
    for name, config in (BLOCK_VARIANTS | TEXT_VARIANTS).items():
        inputs = x, t, labels_for(config)
        gradient = jax.jit(jax.grad(lambda p, c=config, i=inputs: program(c)(p, *i).std()))
        grads = gradient(random_weights(config))
        paths = jax.tree_util.tree_leaves_with_path(grads)
        dead = {f"{path[0].key}.{path[1].key}" for path, g in paths if not jnp.abs(g).max() > 0}
        unread = {"adaln": "label.tokens", "cross": "label.pooled", "in_co": "label.pooled"}
        expected = {unread[name[:5]]} if config.text_width and config.block != JOINT else set()
        assert dead == expected, name


def changed(labels):
    """The same with another first row, and with its rows in reverse."""
    first = EncodedCaption(*(v.at[0].set(v[1]) for v in caption)) if labels is caption else None
    return first or label.at[0].set(1), jax.tree.map(lambda v: v[::-1], labels)


# Initialising and training are compiled for each: variations of the designs are marked slow.
each_variant = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name in BLOCK_VARIANTS else pytest.mark.slow)
        for name, config in VARIANTS.items()
    ],
)


@each_variant
def test_the_untrained_model_is_zero(config):
    assert (program(config)(initial(config), x, t, labels_for(config)) == 0).all()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_input_matters_and_rows_do_not_mix(config):
    predict, labels = partial(program(config), random_weights(config)), labels_for(config)
    y = predict(x, t, labels)
    assert y.dtype == jnp.float32
    others = [
        (x.at[0].add(1), t, labels),
        (x, t.at[0].add(0.3), labels),
        (x, t, changed(labels)[0]),
    ]
    for other in others:
        moved = predict(*other)
        assert jnp.abs(moved - y)[0].max() > 1e-3
        assert (moved[1:] == y[1:]).all()


@each_variant
def test_one_step_of_training_makes_the_condition_matter(config):
    """Every design starts independent of t and label; a few updates must change that."""
    params, target = initial(config), jax.random.normal(jax.random.key(2), x.shape)
    tx = optax.adam(1e-2)
    opt, labels = tx.init(params), labels_for(config)

    @jax.jit
    def step(params, opt):
        grads = jax.grad(
            lambda p: jnp.square(
                program(config)(p, x, t, labels) - target * t.reshape(-1, 1, 1, 1)
            ).mean()
        )(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    for _ in range(3):
        params, opt = step(params, opt)
    predict = partial(program(config), params)
    y = predict(x, t, labels)
    assert jnp.abs(y - predict(x, t, changed(labels)[1])).max() > 1e-5
    assert jnp.abs(y - predict(x, t[::-1], labels)).max() > 1e-5


@pytest.mark.parametrize("name", ["cross_attention", "in_context", "joint"])
def test_every_token_of_a_caption_matters(name):
    config = TEXT_VARIANTS[f"{name}, captions"]
    predict = partial(program(config), random_weights(config))
    y = predict(x, t, caption)
    for i in range(6):
        moved = predict(x, t, caption._replace(tokens=caption.tokens.at[0, i].multiply(-1)))
        assert jnp.abs(moved - y)[0].max() > 1e-4
