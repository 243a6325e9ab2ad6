"""The networks are the papers': sizes, zero start, and every condition is used."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from model_cases import (
    BLOCK_VARIANTS,
    TEXT_VARIANTS,
    build_with_params,
    labels_for,
    t,
    with_random_weights,
    x,
)

from model import (
    JOINT,
)


@pytest.mark.slow
def test_every_weight_of_every_design_has_a_gradient():
    """Except those of unused inputs: adaLN ignores a caption's tokens, the two designs without it
    ignore the pooled vector.
    """
    for name, config in (BLOCK_VARIANTS | TEXT_VARIANTS).items():
        params = nnx.to_pure_dict(nnx.split(with_random_weights(config))[1])
        grads = jax.grad(lambda p, c=config: build_with_params(c, p)(x, t, labels_for(c)).std())(
            params
        )
        paths = jax.tree_util.tree_leaves_with_path(grads)
        dead = {f"{path[0].key}.{path[1].key}" for path, g in paths if not jnp.abs(g).max() > 0}
        unread = {"adaln": "label.tokens", "cross": "label.pooled", "in_co": "label.pooled"}
        expected = {unread[name[:5]]} if config.text_width and config.block != JOINT else set()
        assert dead == expected, name
