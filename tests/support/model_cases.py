"""Inputs and helpers shared by the tests of model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.batch import EncodedCaption
from model import (
    BLOCKS,
    JOINT,
    ModelConfig,
    init_model_params,
    model_graphdef,
)

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
BLOCK_VARIANTS = {block: replace(TINY, block=block) for block in (*BLOCKS, JOINT)}
TEXT = {"n_classes": 0, "text_length": 6, "text_width": 10, "pooled_width": 7}
TEXT_VARIANTS = {
    f"{block}, captions": replace(TINY, block=block, **TEXT) for block in BLOCK_VARIANTS
}
x = jax.random.normal(key, (4, 8, 8, 3))
t = jnp.asarray([0.1, 0.4, 0.6, 0.9])
label = jnp.asarray([0, 2, 4, 5])
lengths = np.array([6, 3, 1, 0])  # the last is the null caption
rng = np.random.default_rng(0)
mask = np.arange(6) < lengths[:, None]
caption = EncodedCaption(
    jnp.asarray(rng.normal(size=(4, 6, 10)) * mask[..., None], jnp.float16),
    jnp.asarray(mask),
    jnp.asarray(rng.normal(size=(4, 7)) * (lengths[:, None] > 0), jnp.float16),
)


def labels_for(config):
    """Four labels: class ids or captions, depending on the model."""
    return caption if config.text_width else label


def build_with_params(config, params=None):
    return nnx.merge(
        model_graphdef(config), init_model_params(config, key) if params is None else params
    )


def random_weights(config):
    """Random weights, away from their zero start, so that everything has an effect."""
    rng = np.random.default_rng(1)

    def weight(path, p):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, p.shape), p.dtype)

    shapes = jax.eval_shape(lambda: init_model_params(config, key))
    return jax.tree_util.tree_map_with_path(weight, shapes)


def with_random_weights(config):
    """A model with `random_weights`."""
    return build_with_params(config, random_weights(config))


VARIANTS = {
    **BLOCK_VARIANTS,
    **TEXT_VARIANTS,
    "rope": replace(TINY, rope=True, position="none"),
    "learned": replace(TINY, position="learned"),
    "cropped": replace(TINY, position="cropped"),
    "centred": replace(TINY, position="centred", position_side=32, position_base=8),
    "qk_norm": replace(TINY, qk_norm=True),
    "swiglu": replace(TINY, mlp="swiglu"),
    "rms": replace(TINY, norm="rms"),
    "remat": replace(TINY, remat=True),
    "unrolled": replace(TINY, unroll=2),
    "bfloat16": replace(TINY, dtype="bfloat16"),
    "in_context, rope": replace(TINY, block="in_context", rope=True),
    "joint, SD3": replace(TINY, block="joint", qk_norm=True, position="cropped", remat=True),
    "joint, rope": replace(TINY, block="joint", rope=True, position="none", unroll=4),
    "joint, bfloat16": replace(TINY, block="joint", dtype="bfloat16", **TEXT),
    "joint, SD3.5": replace(
        TINY, block="joint", depth=4, n_dual=2, qk_norm=True, caption_norm=False, **TEXT
    ),
    "joint, all dual": replace(TINY, block="joint", n_dual=1, rope=True, position="none"),
}
