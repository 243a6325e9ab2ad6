"""Patches are undone exactly, positions are two-dimensional, attention is the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers_cases import BOUNDS, assert_close, key

from networks import layers, ops


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_unpatchify_undoes_patchify(p):
    image = jax.random.normal(key, (2, 16, 24, 3))
    tokens = layers.patchify(image, p)
    assert tokens.shape == (2, 16 * 24 // p**2, 3 * p**2)
    assert (layers.unpatchify(tokens, p, 16 // p) == image).all()


def test_a_patch_is_a_square_of_neighbours():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert layers.patchify(image, 2)[0, 1].tolist() == [2, 3, 6, 7]


def test_attention_is_the_formula():
    q, k, v = jax.random.normal(key, (3, 2, 5, 4, 8))
    scores = np.einsum("bnhk,bmhk->bhnm", np.float64(q), np.float64(k)) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhk->bnhk", weights, np.float64(v))
    expected = expected.reshape(2, 5, 32)
    np.testing.assert_allclose(ops.attention(q, k, v), expected, atol=1e-6)


def test_a_masked_key_is_as_good_as_absent():
    q, k, v = jax.random.normal(key, (3, 2, 5, 4, 8))
    mask = jnp.asarray([[True] * 5, [True, True, False, True, False]])
    y = ops.attention(q, k, v, mask)
    np.testing.assert_allclose(y[0], ops.attention(q, k, v)[0], atol=1e-6)
    real = jnp.asarray([0, 1, 3])
    alone = ops.attention(q[1:], k[1:, real], v[1:, real])
    np.testing.assert_allclose(y[1:], alone, atol=1e-6)
    garbage = jnp.where(mask[..., None, None], k, 1e4), jnp.where(mask[..., None, None], v, -1e4)
    assert (ops.attention(q, *garbage, mask) == y).all()


def test_attention_survives_large_bfloat16_scores():
    """A softmax in bfloat16 would round 300 and 301 to the same number."""
    q = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    k = jnp.asarray([300.0, 304.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(float(ops.attention(q, k, v)[0, 0, 0]), 0.982, atol=4e-3)


def exact_gradients(function, inputs, g):
    """In float64, by JAX's own rules."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.float64(x)) for x in inputs]
        y, backward = jax.vjp(function, *wide)
        return [np.asarray(x) for x in (y, *backward(jnp.asarray(np.float64(g))))]


def test_attention_gives_no_gradient_to_masked_keys():
    q, k, v = jax.random.normal(key, (3, 2, 5, 4, 8))
    mask = jnp.asarray([[True] * 5, [True, True, False, True, False]])
    y, backward = jax.vjp(lambda q, k, v: ops.attention(q, k, v, mask), q, k, v)
    _, dk, dv = backward(jnp.ones_like(y))
    assert (dk[1, [2, 4]] == 0).all() and (dv[1, [2, 4]] == 0).all()
    _, backward = jax.vjp(ops.attention, q[:1], k[:1], v[:1])
    np.testing.assert_allclose(dv[:1], backward(jnp.ones_like(y[:1]))[2], atol=1e-6)


def test_rotary_scores_depend_on_the_two_offsets_alone():
    rows, columns = 5, 7
    q, k = jax.random.normal(key, (2, 1, 1, 2, 16))
    q, k = (
        layers.apply_rotary_positions(
            jnp.broadcast_to(x, (1, rows * columns, 2, 16)), (rows, columns)
        )
        for x in (q, k)
    )
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k).reshape(2, rows, columns, rows, columns)
    moved = scores[:, 1:, 2:, 1:, 2:]  # both tokens one row down and two columns right
    np.testing.assert_allclose(scores[:, :-1, :-2, :-1, :-2], moved, atol=1e-5)
    # A flattened grid would give (0, 1) and (1, 0) offsets that differ only by a multiple.
    assert abs(scores[0, 0, 0, 0, 1] - scores[0, 0, 0, 1, 0]) > 1e-3


def test_rotation_keeps_lengths():
    q = jax.random.normal(key, (1, 12, 2, 8))
    lengths = jnp.linalg.norm(layers.apply_rotary_positions(q, (3, 4)), axis=-1)
    np.testing.assert_allclose(lengths, jnp.linalg.norm(q, axis=-1), rtol=1e-5)


def test_tokens_before_the_grid_are_not_rotated():
    q = jax.random.normal(key, (1, 15, 2, 8))
    rotated = layers.apply_rotary_positions(q, (3, 4))
    assert (rotated[:, :3] == q[:, :3]).all()
    np.testing.assert_array_equal(rotated[:, 3:], layers.apply_rotary_positions(q[:, 3:], (3, 4)))


@pytest.mark.parametrize("rows, columns", [(4, 4), (2, 6), (16, 16)])
def test_sincos_positions_are_of_a_grid(rows, columns):
    table = layers.sincos_table(32, np.arange(float(rows)), np.arange(float(columns)))
    table = table.reshape(rows, columns, 32)
    assert (table[:, :, :16] == table[:1, :, :16]).all()  # the column's half is equal in a column
    assert (table[:, :, 16:] == table[:, :1, 16:]).all()  # the row's half in a row
    assert len(np.unique(table.reshape(-1, 32).round(6), axis=0)) == rows * columns


def test_the_cropped_table_has_one_centre_for_every_size():
    """A small image has the positions of the middle of a large one, as in SD3."""

    def table(rows, columns):
        position = layers.CroppedPosition(32, (rows, columns), rngs=nnx.Rngs(0))
        return position(jnp.zeros((1, rows * columns, 32))).reshape(rows, columns, 32)

    np.testing.assert_array_equal(table(8, 12)[2:-2, 4:-4], table(4, 4))
    # SD3's own: 192 positions, three to a unit.
    expected = layers.sincos_table(32, np.arange(94, 98) / 3, np.arange(94, 98) / 3)
    np.testing.assert_allclose(table(4, 4).reshape(16, 32), expected, atol=1e-5)


def test_time_scale_makes_t_visible():
    """Fed to sinusoids made for 0 … 1000, t in [0, 1] would hardly move them."""
    t = jnp.asarray([0.2, 0.8])
    raw, scaled = layers.time_features(t), layers.time_features(1000 * t)
    assert jnp.abs(raw[0] - raw[1]).mean() < 0.15 < 0.4 < jnp.abs(scaled[0] - scaled[1]).mean()


@pytest.mark.parametrize("norm", layers.NORMS.values())
def test_norms_are_computed_in_float32(norm):
    x = 1000 + jax.random.normal(key, (4, 256))
    exact, half = norm(x), norm(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.square(exact).mean(-1), 1, rtol=1e-3)
    reference = norm(x.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
    assert (half == reference).all()


@pytest.mark.parametrize("kind", layers.NORMS)
def test_an_affine_norm_starts_as_the_norm(kind):
    x = jax.random.normal(key, (2, 3, 16))
    norm = layers.AffineNorm(kind, 16)
    np.testing.assert_array_equal(norm(x), layers.NORMS[kind](x))
    norm.scale[...], norm.shift[...] = jnp.arange(16.0), jnp.ones(16)
    np.testing.assert_allclose(norm(x), layers.NORMS[kind](x) * jnp.arange(16.0)[None, None] + 1)


class Affine(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, x, bias):
        return x * self.weight[...].reshape(1, -1) + bias


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("unroll", [1, 4])
def test_scan_equals_a_loop_over_the_blocks(remat, unroll):
    blocks = layers.stack_blocks(lambda rngs: Affine(rngs), 4, nnx.Rngs(0))
    x, bias = jnp.ones((2, 3)), jnp.full((2, 3), 0.5)

    def loop(weight):
        y = x
        for row in weight:
            y = y * row.reshape(1, -1) + bias
        return y

    graphdef, state = nnx.split(blocks)
    weight = jax.tree.leaves(state)[0]
    assert len(np.unique(weight)) == 12  # every block drew its own
    scanned = layers.scan_blocks(blocks, x, bias, remat=remat, unroll=unroll)
    np.testing.assert_allclose(scanned, loop(weight), rtol=1e-6)
    grad = jax.grad(
        lambda s: layers.scan_blocks(
            nnx.merge(graphdef, s), x, bias, remat=remat, unroll=unroll
        ).sum()
    )(state)
    expected = jax.grad(lambda w: loop(w).sum())(weight)
    np.testing.assert_allclose(jax.tree.leaves(grad)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("taps", [(), (1,), (4,), (1, 4), (2, 3), (1, 2, 3, 4)])
def test_taps_cut_a_scan_into_pieces_of_the_stack(taps):
    blocks = layers.stack_blocks(lambda rngs: Affine(rngs), 4, nnx.Rngs(0))
    x, bias = jnp.ones((2, 3)), jnp.full((2, 3), 0.5)

    def scan(x):
        stacks = [(None, 0), (blocks, 4)]
        return layers.scan_with_taps(stacks, x, bias, taps=taps, remat=True, unroll=1)

    end, states = scan(x)
    whole = layers.scan_blocks(blocks, x, bias, remat=True, unroll=1)
    np.testing.assert_array_equal(end, whole)
    assert tuple(states) == taps
    for tap, state in states.items():
        first = layers.split_blocks(blocks, [tap])[0]
        expected = layers.scan_blocks(first, x, bias, remat=True, unroll=1)
        np.testing.assert_array_equal(state, expected)
    # Each scan hands on its last state, and no state of every block.
    scans = [e for e in jax.make_jaxpr(scan)(x).eqns if e.primitive.name == "scan"]
    lengths = np.diff([0, *taps] + [4] * (taps[-1:] != (4,))).tolist()
    assert [e.params["length"] for e in scans] == lengths
    assert all([v.aval.shape for v in e.outvars] == [(2, 3)] for e in scans)


def plain_swiglu(gate, x):
    return gate / (1 + jnp.exp(-gate)) * x


def plain_gelu(x):
    return x / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def plain_modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


POINTWISE = {
    layers.gelu: (plain_gelu, "x"),
    layers.swiglu: (plain_swiglu, "xx"),
    layers.modulate: (plain_modulate, "xvv"),
    layers.add_gated: (lambda x, gate, y: x + gate[:, None] * y, "xvx"),
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("function", POINTWISE, ids=lambda function: function.__name__)
def test_pointwise_operations_are_computed_in_float32(function, dtype):
    plain, kinds = POINTWISE[function]
    shapes = [{"x": (4, 64, 48), "v": (4, 48)}[kind] for kind in kinds]
    *inputs, g = (
        jax.random.normal(jax.random.fold_in(key, i), s)
        for i, s in enumerate([*shapes, (4, 64, 48)])
    )
    inputs = [x.astype(dtype) for x in inputs]
    g = g.astype(dtype)
    y, backward = jax.vjp(jax.jit(function), *inputs)
    assert all(x.dtype == dtype for x in (y, *backward(g)))
    assert_close((y, *backward(g)), exact_gradients(plain, inputs, g), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
def test_saved_values_keep_their_precision_and_the_rest_is_recomputed(dtype):
    """Here the argument of the product is saved, and the product is not."""
    x = jax.random.normal(key, (8, 8)).astype(dtype)

    def loss(x):
        saved = ops.save_for_backward(jnp.tanh(x))
        return (saved * saved @ saved).astype(jnp.float32).sum()

    policy = jax.checkpoint_policies.save_any_names_but_these()
    backward = jax.vjp(jax.checkpoint(loss, policy=policy), x)[1]
    residuals = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == (8, 8)]
    assert (
        sorted(leaf.dtype.itemsize for leaf in residuals) == [x.dtype.itemsize] * 2
    )  # and x itself
    again, first = (jax.grad(f)(x) for f in (jax.checkpoint(loss), loss))
    assert (again == first).all()


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_on_a_gpu_goes_through_cudnn(masked, monkeypatch):
    """Forward and backward lower to its kernels. Running them takes a GPU."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_100)
    monkeypatch.setattr(ops, "has_cudnn_attention", lambda: True)
    shape = jax.ShapeDtypeStruct((2, 64, 4, 72), jnp.bfloat16)
    mask = jnp.ones((2, 64), bool) if masked else None

    @jax.grad
    def step(q):
        return ops.attention(q, q, q, mask).astype(jnp.float32).sum()

    program = jax.jit(step).trace(shape).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@__cudnn$fmha") == 2
    exact = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
    assert "cudnn" not in jax.jit(step).trace(exact).lower(lowering_platforms=("cuda",)).as_text()


def test_linear_computes_in_half_and_keeps_its_weights():
    linear = layers.Linear(8, 4, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert linear(jnp.ones((2, 8))).dtype == jnp.bfloat16
    assert linear.kernel[...].dtype == jnp.float32
