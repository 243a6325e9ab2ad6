"""Inputs and helpers shared by the tests of layers."""

from functools import cache, partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model
from data.batch import EncodedCaption
from networks import layers, ops

key = jax.random.key(0)


BOUNDS = {"float32": 1e-6, "bfloat16": 5e-3}


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, g, *inputs):
    y, backward = jax.vjp(function, *inputs)
    return y, backward(g)


def assert_close(found, expected, bound):
    """Norms of differences, relative to those of the arrays."""
    for x, y in zip(found, expected, strict=True):
        assert np.linalg.norm(np.float64(x) - y) <= bound * np.linalg.norm(y)


class Shapes(NamedTuple):
    maps: list  # (inputs, outputs)
    attentions: list  # (queries, keys, width of a head)


@cache
def shapes_of_presets(size):
    """Shapes of every linear map and attention in the presets of a size with the usual and the
    largest patches, with all blocks, with class labels or captions, on the 32×32×4 latents of a
    256×256 image.
    """
    maps, attentions = set(), set()
    affine, attention = ops.affine, ops.attention

    def recording_affine(x, w, bias):
        maps.add(w.shape)
        return affine(x, w, bias)

    def recording_attention(q, k, v, mask=None):
        attentions.add((q.shape[1], k.shape[1], q.shape[-1]))
        return attention(q, k, v, mask)

    x, t = jnp.ones((1, 32, 32, 4)), jnp.ones(1)
    caption = EncodedCaption(
        tokens=jnp.ones((1, 77, 768)), pooled=jnp.ones((1, 768)), mask=jnp.ones((1, 77), bool)
    )
    captioned = {"n_classes": 0, "text_length": 77, "text_width": 768, "pooled_width": 768}
    conditionings = [(jnp.ones(1, jnp.int32), {"n_classes": 10}), (caption, captioned)]
    names = [f"DiT-{size}/{p}" for p in (2, 8)]
    networks = [(name, {"block": block}) for name in names for block in model.BLOCKS]
    networks += [(f"MM{name}", {}) for name in names]
    image = {"image_size": 32, "channels": 4, "out_channels": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "affine", recording_affine)
        for module in (layers, model):
            patch.setattr(module, "attention", recording_attention)
        for (name, block), (label, fields) in product(networks, conditionings):
            config = model.model_config(name, **image, **block, **fields)
            nnx.eval_shape(
                partial(lambda c, y: model.build_model(c, nnx.Rngs(0))(x, t, y), config, label)
            )
    return Shapes(sorted(maps), sorted(attentions))
