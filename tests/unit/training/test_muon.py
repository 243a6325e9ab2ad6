"""Muon orthogonalizes each map of a block apart, and moves nothing where a gradient is not
finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib._muon import orthogonalize_via_newton_schulz
from optim_cases import key
from tiny_models import CLASSES, weights

from model import BLOCKS, JOINT, init_model_params, model_config
from training import muon, optim

RATE = optax.constant_schedule(0.1)


def optimizer(rate=RATE, weight_decay=0.0, **kwargs):
    blocks = muon.muon(rate, weight_decay=weight_decay, **kwargs)
    return optim.clipped_adamw(
        rate, beta1=0.9, beta2=0.999, weight_decay=weight_decay, clip_norm=0.0, blocks=blocks
    )


def paths_and_kernels(params):
    marked = jax.tree_util.tree_leaves_with_path(params)
    is_kernel = jax.tree.leaves(optim.block_kernels(params))
    return [(path, x) for (path, x), known in zip(marked, is_kernel, strict=True) if known]


def test_singular_values_come_near_one():
    for shape in ((128, 512), (512, 128), (3, 64, 256)):
        x = jax.random.normal(key, shape)
        values = np.linalg.svd(muon.orthogonalize(x), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.2, shape


def test_each_polynomial_is_the_best_for_what_the_one_before_leaves():
    """The error of the best odd quintic has four extremes of one size and changing signs."""
    low, high = 0.005, 1.0
    for a, b, c in muon.POLYNOMIALS:
        x = np.linspace(low, high, 20001)
        error = a * x + b * x**3 + c * x**5 - 1
        inner = np.diff(np.sign(np.diff(error))).nonzero()[0] + 1
        extremes = error[[0, *inner, -1]]
        np.testing.assert_allclose(extremes * [-1, 1, -1, 1], abs(error).max(), rtol=2e-3)
        low, high = 1 + error.min(), 1 + error.max()
    assert high < 1.083 and low > 0.917


def test_it_is_the_iteration_of_optax():
    x = jax.random.normal(key, (96, 160))
    powers = muon.MARGIN ** np.array([1, 3, 5])
    polynomials = np.array(muon.POLYNOMIALS)
    polynomials[:-1] /= powers
    polynomials[0] /= powers  # the norm that optax divides by has no margin
    expected = orthogonalize_via_newton_schulz(x, jnp.asarray(polynomials))
    np.testing.assert_allclose(muon.orthogonalize(x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_matrix_that_is_nearly_of_rank_one_does_not_explode(dtype):
    """Its largest singular value is its norm: at the end of the polynomials' range."""
    keys = jax.random.split(key, 3)
    column, row = (jax.random.normal(k, (20, 128, 1)) for k in keys[:2])
    noise = jax.random.normal(keys[2], (20, 128, 128))
    for share in (0.0, 0.003, 0.03, 0.3):
        values = np.linalg.svd(
            muon.orthogonalize(column @ row.mT + share * noise, dtype), compute_uv=False
        )
        assert values[:, 0].max() < 1.12 and values[:, 0].min() > 0.85, share
    ones = np.linalg.svd(muon.orthogonalize(jnp.ones((96, 96)), dtype), compute_uv=False)
    np.testing.assert_allclose(ones[0], 1, atol=0.12)
    assert (muon.orthogonalize(jnp.zeros((8, 8)), dtype) == 0).all()


@pytest.mark.parametrize("block", [*BLOCKS])
def test_each_map_of_a_block_is_cut_out_and_put_back(block):
    captions = {} if block != "cross_attention" else {"n_classes": 0, "text_length": 4}
    name = "MMDiT-Nano/4" if block == JOINT else "DiT-Nano/4"
    fields = {"image_size": 8, "channels": 1, "out_channels": 1, "n_classes": 10, "block": block}
    config = model_config(name, **fields | captions)
    params = init_model_params(config, key)
    for path, kernel in paths_and_kernels(params):
        x = jax.random.normal(key, kernel.shape)
        parts = muon.split_maps(path, x)
        assert parts.shape[1] <= parts.shape[2]
        np.testing.assert_array_equal(muon.merge_maps(parts, kernel.shape, path), x)
        names = {p.key for p in path}
        if names & {*muon.FUSED}:
            width = kernel.shape[-2]
            assert parts.shape[1:] == (width, width)
            stack = x.reshape(-1, width, kernel.shape[-1])
            np.testing.assert_array_equal(parts[1], stack[0][:, width : 2 * width])


def random_like(tree, seed):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def test_kernels_of_blocks_take_its_steps_and_everything_else_adamws():
    params = weights(CLASSES)
    tx, plain = (
        optimizer(),
        optim.clipped_adamw(RATE, beta1=0.9, beta2=0.999, weight_decay=0.0, clip_norm=0.0),
    )
    state, plain_state = tx.init(params), plain.init(params)
    momentum = jax.tree.map(jnp.zeros_like, params)
    for step in range(2):
        grads = random_like(params, step)
        steps, state = tx.update(grads, state, params)
        plain_steps, plain_state = plain.update(grads, plain_state, params)
        momentum = jax.tree.map(lambda m, g: muon.BETA * m + g, momentum, grads)
        ahead = jax.tree.map(lambda m, g: g + muon.BETA * m, momentum, grads)
    marked = optim.block_kernels(params)
    for (path, is_kernel), ours, adamw, n in zip(
        jax.tree_util.tree_leaves_with_path(marked),
        *map(jax.tree.leaves, (steps, plain_steps, ahead)),
        strict=True,
    ):
        if not is_kernel:
            np.testing.assert_allclose(ours, adamw, rtol=1e-6, atol=1e-12)
            continue
        parts, found = muon.split_maps(path, n), muon.split_maps(path, ours)
        scale = -0.1 * 0.2 * max(parts.shape[1:]) ** 0.5
        np.testing.assert_allclose(found, scale * muon.orthogonalize(parts), atol=1e-5)


def test_weight_decay_is_that_of_adamw():
    params = weights(CLASSES)
    grads = random_like(params, 0)
    decayed, plain = (
        tx.update(grads, tx.init(params), params)[0]
        for tx in (optimizer(weight_decay=0.5), optimizer())
    )
    for (_, p), (_, a), (_, b) in zip(*map(paths_and_kernels, (params, decayed, plain))):
        np.testing.assert_allclose(a - b, -0.1 * 0.5 * p, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing():
    params = weights(CLASSES)
    tx = optimizer()
    _, state = tx.update(random_like(params, 0), tx.init(params), params)
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    steps, after = tx.update(bad, state, params, finite=jnp.asarray(False))
    moved = optax.apply_updates(params, steps)
    for new, old in zip(jax.tree.leaves((moved, after)), jax.tree.leaves((params, state))):
        np.testing.assert_array_equal(new, old)


def test_its_state_is_one_moment_a_kernel():
    params = weights(CLASSES)
    n_kernels = sum(x.size for _, x in paths_and_kernels(params))
    n_others = sum(x.size for x in jax.tree.leaves(params)) - n_kernels
    state = optimizer().init(params)
    n_numbers = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert n_numbers == n_kernels + 2 * n_others


def test_it_needs_fewer_steps_than_adamw_where_directions_differ_by_far():
    """‖A(W − X)B‖² where A and B have condition numbers of 100, in directions that no axis has."""
    bases = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 16, 16)))[0]
    left, right = (jnp.asarray(q * np.logspace(-2, 0, 16) @ q.T, jnp.float32) for q in bases)
    goal = jax.random.normal(key, (16, 16))

    def loss(p):
        return jnp.square(left @ (p["blocks"]["kernel"] - goal) @ right).sum()

    def after(blocks):
        tx = optim.clipped_adamw(
            schedule, beta1=0.9, beta2=0.999, weight_decay=0.0, clip_norm=0.0, blocks=blocks
        )

        def step(carry, _):
            p, state = carry
            steps, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, steps), state), None

        p = {"blocks": {"kernel": jnp.zeros((16, 16))}}
        (p, _), _ = jax.lax.scan(step, (p, tx.init(p)), length=300)
        return float(loss(p))

    schedule = optim.learning_rate_schedule("cosine", 0.1, warmup_steps=0, n_steps=300)
    assert after(muon.muon(schedule, weight_decay=0.0)) < after(None)
