"""The networks are the papers': sizes, zero start, and every condition is used."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from model_cases import BLOCK_VARIANTS, TEXT_VARIANTS, live, shaken, t, told, x

from model import (
    JOINT,
)


@pytest.mark.slow
def test_every_weight_of_every_design_has_a_gradient():
    """But those that read what the design leaves out: adaLN a caption's tokens, the two without it
    the pooled vector.
    """
    for name, config in (BLOCK_VARIANTS | TEXT_VARIANTS).items():
        params = nnx.to_pure_dict(nnx.split(shaken(config))[1])
        grads = jax.grad(lambda p, c=config: live(c, p)(x, t, told(c)).std())(params)
        paths = jax.tree_util.tree_leaves_with_path(grads)
        dead = {f"{path[0].key}.{path[1].key}" for path, g in paths if not jnp.abs(g).max() > 0}
        unread = {"adaln": "label.tokens", "cross": "label.pooled", "in_co": "label.pooled"}
        expected = {unread[name[:5]]} if config.text_width and config.block != JOINT else set()
        assert dead == expected, name
