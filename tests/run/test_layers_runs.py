"""Patches are undone exactly, positions are two-dimensional, attention is the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_cases import BOUNDS, assert_close, key, shapes_of_presets, value_and_gradients

import model
from networks import ops


def exact_attention(q, k, v, g):
    """softmax(q kᵀ / √width) v and the gradients of q, k and v, by the book, in float64."""
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, g.reshape(q.shape)))
    width = q.shape[-1]
    p = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(width))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(width)
    found = (p @ v, ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ g)
    y, *gradients = (x.swapaxes(1, 2) for x in found)
    return y.reshape(*y.shape[:2], -1), *gradients


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "size", {c["width"] // c["n_heads"]: s for s, c in model.SIZES.items()}.values()
)
def test_attention_and_its_gradients_are_the_plain_forms(size, dtype):
    for n, m, width in shapes_of_presets(size).attentions:
        keys = dict(zip("qkvg", jax.random.split(key, 4), strict=True))
        q = jax.random.normal(keys["q"], (1, n, 1, width)).astype(dtype)
        k, v = (jax.random.normal(keys[name], (1, m, 1, width)).astype(dtype) for name in "kv")
        g = jax.random.normal(keys["g"], (1, n, width)).astype(dtype)
        y, gradients = value_and_gradients(ops.attention, g, q, k, v)
        assert_close((y, *gradients), exact_attention(q, k, v, g), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("size", ["Ti", "XL"])
def test_affine_maps_and_their_gradients_are_the_plain_forms(size, dtype):
    rng, maps = np.random.default_rng(0), shapes_of_presets(size).maps
    assert {n_in > n_out for n_in, n_out in maps} == {True, False}  # they are computed otherwise
    for shape in maps:
        x, g = (jnp.asarray(rng.normal(size=(2, 16, n)), dtype) for n in shape)
        w, bias = (jnp.asarray(rng.normal(size=s), "float32") for s in (shape, shape[1:]))
        y, gradients = value_and_gradients(ops.affine, g, x, w, bias)
        found = (y, *gradients)
        types = [z.dtype for z in found]
        assert types == [x.dtype, x.dtype, jnp.float32, jnp.float32]
        x, w, bias, g = (np.asarray(z, np.float64) for z in (x, w, bias, g))
        dw = x.reshape(-1, shape[0]).T @ g.reshape(-1, shape[1])
        expected = x @ w + bias, g @ w.T, dw, g.sum((0, 1))
        assert_close(found, expected, BOUNDS[dtype])
