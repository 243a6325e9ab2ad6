"""Products in eight bits are those of the rounded operands, and which operands those are."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import TINY

from model import DiT, MMDiT, build_model
from networks.layers import Linear
from networks.ops import E4M3, E5M2, affine, affine_in_fp8, quantize

# Of a number rounded to nearest: half of the last bit of the significand, relative to it; below the
# smallest normal number, half of the spacing there, for a largest number scaled to at least 224 and
# 28,672, half of the format's largest.
RELATIVE = {E4M3: 2.0**-4, E5M2: 2.0**-3}
ABSOLUTE = {E4M3: 2.0**-10 / 224, E5M2: 2.0**-17 / 28_672}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rounding(x, dtype):
    """Bound the error of each number of x."""
    x = np.abs(np.asarray(x, np.float64))
    return RELATIVE[dtype] * x + ABSOLUTE[dtype] * x.max()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 447.0, 3e38])
def test_rounding_is_to_nearest_at_every_scale(dtype, size):
    x = size * jnp.tanh(normal(0, 4096) * 10.0 ** (3 * normal(1, 4096) - 3))
    eighths, scale = quantize(x, dtype)
    rounded = np.asarray(eighths, np.float64) * float(scale)
    assert np.log2(float(scale)) % 1 == 0
    assert (np.abs(rounded - np.asarray(x, np.float64)) <= rounding(x, dtype)).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_needs_no_rounding_is_exact(dtype):
    for x in (jnp.zeros(4), jnp.asarray([1.0, -0.5, 1.25, 0.0]), jnp.asarray([0.875, 2.0**-6])):
        eighths, scale = quantize(x, dtype)
        np.testing.assert_array_equal(eighths.astype(jnp.float32) * scale, x)
    assert not jnp.isfinite(quantize(jnp.asarray([1.0, jnp.nan]), dtype)[0].astype(float)).all()
    assert not jnp.isfinite(quantize(jnp.asarray([1.0, jnp.inf]), dtype)[0].astype(float)).all()


def test_values_and_gradients_are_those_of_the_rounded_operands():
    """The bound: of Σ a b, with |â − a| ≤ α and |b̂ − b| ≤ β, Σ α|b| + |a|β + αβ."""
    x, w, bias, g = normal(0, 3, 40, 24), normal(1, 24, 16), normal(2, 16), normal(3, 3, 40, 16)
    y, pull_back = jax.vjp(affine_in_fp8, x, w, bias)
    dx, dw, dbias = pull_back(g)
    exact = [np.asarray(a, np.float64) for a in (x, w, bias, g)]
    sizes = [np.abs(a) for a in exact]
    errors = [rounding(x, E4M3), rounding(w, E4M3), None, rounding(g, E5M2)]

    def check(result, pattern, i, j, offset: Any = 0.0):
        expected = np.einsum(pattern, exact[i], exact[j]) + offset
        bound = (
            np.einsum(pattern, errors[i], sizes[j])
            + np.einsum(pattern, sizes[i], errors[j])
            + np.einsum(pattern, errors[i], errors[j])
        )
        error = np.abs(np.asarray(result, np.float64) - expected)
        assert (error <= bound + 1e-5).all()
        assert error.max() > 1e-3  # in float32 it would not be

    check(y, "bni,io->bno", 0, 1, exact[2])
    check(dx, "bno,io->bni", 3, 1)
    check(dw, "bni,bno->io", 0, 3)
    np.testing.assert_allclose(dbias, exact[3].sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_other_rows_of_a_batch_change_nothing_within_the_range():
    x, w, bias = normal(0, 8, 24), normal(1, 24, 16), normal(2, 16)
    x = jnp.where(jnp.abs(x) < 2.0**-4, 0.5, x)  # else a number could become too small
    alone = affine_in_fp8(x, w, bias)
    beside = affine_in_fp8(jnp.concatenate([x, jnp.full((1, 24), 40.0)]), w, bias)[:-1]
    np.testing.assert_array_equal(alone, beside)


def maps_of(model):
    """Return the names of a model's linear maps, by whether they multiply in eight bits."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for path, module in nnx.iter_graph(model):
        if isinstance(module, Linear):
            names[module.affine is affine_in_fp8].add(".".join(map(str, path)))
    return names


@pytest.mark.parametrize(
    ("changes", "kind", "fp8"),
    [
        ({}, DiT, {"attention.qkv.linear", "attention.out", "mlp.up", "mlp.down"}),
        (
            {"block": "cross_attention", "mlp": "swiglu"},
            DiT,
            {"attention.qkv.linear", "attention.out", "mlp.gate", "mlp.up", "mlp.down"},
        ),
        ({"block": "joint"}, MMDiT, {"context.qkv.linear", "picture.out", "picture.mlp.up"}),
    ],
)
def test_maps_of_tokens_in_blocks_multiply_in_eight_bits(changes, kind, fp8):
    config = replace(TINY, **changes)
    model = build_model(replace(config, fp8=True), nnx.Rngs(0))
    names = maps_of(model)
    assert isinstance(model, kind)
    assert {f"blocks.{name}" for name in fp8} <= names[True]
    assert all(name.startswith(("blocks.", "last.")) for name in names[True])
    assert not [name for name in names[True] if "modulation" in name]
    assert {"patch", "final.out", "time.mlp.out"} <= names[False]
    assert maps_of(build_model(config, nnx.Rngs(0)))[True] == set()


def test_without_it_the_layer_is_the_old_one():
    layer = Linear(8, 4, dtype="float32", rngs=nnx.Rngs(0))
    x = normal(0, 3, 8)
    np.testing.assert_array_equal(layer(x), affine(x, layer.kernel[...], layer.bias[...]))
