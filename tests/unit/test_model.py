"""The networks are the papers': sizes, zero start, and every condition is used."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_COMPILE
from flax import nnx
from model_cases import (
    TEXT_VARIANTS,
    TINY,
    VARIANTS,
    build_with_params,
    caption,
    key,
    label,
    labels_for,
    random_weights,
    t,
    with_random_weights,
    x,
)

from model import (
    JOINT,
    MODELS,
    Condition,
    Streams,
    add_time,
    init_model_params,
    model_config,
)
from networks.layers import patchify, unpatchify
from runtime.errors import UserError

SHAPES = (4, 16, 32), (4, 6, 32), (4, 32)  # image tokens, label tokens, label vector


def first_block(model):
    """The first of a model's blocks."""
    first = (model.config.n_dual and model.dual_blocks) or model.blocks
    return nnx.merge(*jax.tree.map(lambda w: w[0], nnx.split(first)))


@pytest.mark.parametrize(
    "name", ["adaln_zero", "adaln_zero, captions", "joint", "joint, captions", "joint, SD3.5"]
)
def test_blocks_with_gates_start_as_the_identity(name):
    model, c = build_with_params(VARIANTS[name]), VARIANTS[name]
    image, tokens, vector = (jax.random.normal(key, shape) for shape in SHAPES)
    cond = Condition(vector, tokens, jnp.ones((4, 6), bool))
    streams = Streams(image, tokens) if c.block == JOINT else image
    before = jax.tree.leaves(streams)
    after = jax.tree.leaves(first_block(model)(streams, cond))
    for a, b in zip(before, after, strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("name", [*TEXT_VARIANTS, "joint, bfloat16"])
def test_padding_is_hidden_exactly(name):
    model = with_random_weights(VARIANTS[name])
    y = model(x, t, caption)
    garbage = jnp.where(caption.mask[..., None], caption.tokens, 99)
    assert (model(x, t, caption._replace(tokens=garbage)) == y).all()
    longer = caption._replace(
        tokens=jnp.pad(caption.tokens, ((0, 0), (0, 5), (0, 0))),
        mask=jnp.pad(caption.mask, ((0, 0), (0, 5))),
    )
    np.testing.assert_allclose(model(x, t, longer), y, atol=0.1 if "bfloat16" in name else 1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_streams_swap_symmetrically(qk_norm):
    """A joint block is symmetric: streams exchanged with their weights come out exchanged."""
    block = first_block(with_random_weights(replace(TINY, block=JOINT, qk_norm=qk_norm)))
    image, tokens, vector = (jax.random.normal(key, shape) for shape in SHAPES)
    cond = Condition(vector, tokens, None)
    y = block(Streams(image, tokens), cond)
    block.picture, block.context = block.context, block.picture
    swapped = block(Streams(tokens, image), cond)
    np.testing.assert_allclose(swapped.context, y.image, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(swapped.image, y.context, rtol=1e-4, atol=1e-4)
    assert jnp.abs(block(Streams(image, tokens), cond).image - y.image).max() > 1e-2


def test_unrolling_and_recomputing_change_nothing():
    y = with_random_weights(TINY)(x, t, label)
    for config in (VARIANTS["remat"], VARIANTS["unrolled"]):
        np.testing.assert_allclose(
            with_random_weights(config)(x, t, label), y, rtol=1e-5, atol=1e-5
        )


def test_positions_tell_tokens_apart():
    """Without positions the model is equivariant to shifts; with positions it is not."""

    def moves(config):
        model = with_random_weights(config)
        rolled = model(jnp.roll(x, 2, axis=1), t, label)
        return float(jnp.abs(jnp.roll(rolled, -2, axis=1) - model(x, t, label)).max())

    for block in ("adaln_zero", "in_context", JOINT):
        assert moves(replace(TINY, block=block, position="none")) < 1e-4
    for name in (
        "adaln_zero",
        "learned",
        "rope",
        "cropped",
        "centred",
        "in_context, rope",
        "joint, rope",
    ):
        assert moves(VARIANTS[name]) > 1e-2


def transpose_weights(params, c):
    """Weights that do to a transposed image what these do to the image: patches are transposed, and
    the halves of the channels that encode rows and columns change places.
    """

    def swap(axis, n):
        return lambda x: jnp.concatenate(
            [jnp.roll(part, part.shape[axis] // 2, axis) for part in jnp.split(x, n, axis)], axis
        )

    def transpose_patches(x, axis):
        x = jnp.moveaxis(x, axis, -1)
        pixels = x.reshape(*x.shape[:-1], c.patch_size, c.patch_size, c.channels)
        return jnp.moveaxis(pixels.swapaxes(-3, -2).reshape(x.shape), -1, axis)

    def rotate_alike(x):  # queries and keys: pairs of channels lie in two halves of a head
        *qk, v = jnp.split(x, 3, -1)
        return jnp.concatenate([*(swap(-1, 2 * c.n_heads)(part) for part in qk), v], -1)

    changes = {
        ("patch", "kernel"): (lambda x: transpose_patches(x, 0), swap(-1, 1)),
        ("patch", "bias"): (swap(-1, 1),),
        ("modulation", "kernel"): (swap(-1, 6),),
        ("modulation", "bias"): (swap(-1, 6),),
        ("linear", "kernel"): (swap(-2, 1), rotate_alike),
        ("linear", "bias"): (rotate_alike,),
        ("attention", "out", "kernel"): (swap(-1, 1),),
        ("attention", "out", "bias"): (swap(-1, 1),),
        ("up", "kernel"): (swap(-2, 1),),
        ("down", "kernel"): (swap(-1, 1),),
        ("down", "bias"): (swap(-1, 1),),
        ("final", "modulation", "kernel"): (swap(-1, 2),),
        ("final", "modulation", "bias"): (swap(-1, 2),),
        ("final", "out", "kernel"): (swap(-2, 1), lambda x: transpose_patches(x, -1)),
        ("final", "out", "bias"): (lambda x: transpose_patches(x, -1),),
    }

    def change(path, x):
        names = tuple(part.key for part in path)
        matching = [known for known in changes if names[-len(known) :] == known]
        for function in changes[max(matching, key=len)] if matching else ():
            x = function(x)
        return x

    return jax.tree_util.tree_map_with_path(change, params)


@pytest.mark.parametrize("position", ["sincos", "cropped", "centred"])
def test_a_transposed_image_gives_the_transposed_prediction(position):
    """With weights that treat rows as others treat columns: no axis is mistaken for the other."""
    tall = replace(TINY, position=position, rope=True, image_size="12x8")
    params = random_weights(tall)
    image = jax.random.normal(key, (4, 12, 8, 3))
    y = build_with_params(tall, params)(image, t, label)
    wide = replace(tall, image_size="8x12")
    transposed = build_with_params(wide, transpose_weights(params, tall))
    turned = transposed(image.swapaxes(1, 2), t, label)
    np.testing.assert_allclose(turned.swapaxes(1, 2), y, rtol=1e-4, atol=1e-4)


# --- taps -----------------------------------------------------------------------------------------

TAPPED = {
    "adaln_zero": replace(TINY, depth=4),
    "in_context": replace(VARIANTS["in_context, captions"], depth=4),
    "joint": replace(VARIANTS["joint, rope"], depth=4, unroll=1),
    "joint, SD3.5": VARIANTS["joint, SD3.5"],
    "bfloat16": replace(TINY, depth=4, dtype="bfloat16"),
}


def run_block_by_block(model, x, t, label):
    """The image's tokens after each block, by a loop that knows neither scans nor taps."""
    c, cond, joint = model.config, model.label(label), model.config.block == JOINT
    image = model.position(model.patch(patchify(x, c.patch_size)))
    n = image.shape[1]
    if joint:
        cond = cond._replace(vector=model.time(t) + cond.vector)
        state = Streams(image, cond.tokens)
    else:
        cond = add_time(model.time(t), cond)
        state = image
        if c.block == "in_context":
            state = jnp.concatenate([cond.tokens, image], axis=1)
    stacks = [(model.dual_blocks, c.n_dual), (model.blocks, 3 - c.n_dual)] if joint else []
    for stack, depth in stacks or [(model.blocks, 4)]:
        for i in range(depth):
            block = nnx.merge(*jax.tree.map(lambda w, i=i: w[i], nnx.split(stack)))
            state = block(state, cond)
            yield state.image if joint else state[:, -n:]
    if joint:
        yield model.last(state, cond)


@pytest.mark.parametrize("config", TAPPED.values(), ids=TAPPED)
def test_taps_are_the_states_after_so_many_blocks_beside_the_same_prediction(config):
    model, label = with_random_weights(config), labels_for(config)
    call = jax.jit(model, static_argnames="taps", compiler_options=AS_USERS_COMPILE)
    plain, expected = call(x, t, label), list(run_block_by_block(model, x, t, label))
    for taps in [(1, 3), (4,)]:
        y, hidden = call(x, t, label, taps=taps)
        assert (y == plain).all()
        for k, state in zip(taps, hidden, strict=True):
            # The compiled body of a scan rounds otherwise than operations one by one.
            error = jnp.abs(jnp.float32(state) - expected[k - 1]).max()
            assert error < (0.02 if config.dtype == "bfloat16" else 1e-5) * jnp.abs(state).max()
            assert state.dtype == config.dtype


def gradient_by_a_tap(config):
    params = nnx.to_pure_dict(nnx.split(with_random_weights(config))[1])

    @partial(jax.jit, compiler_options=AS_USERS_COMPILE)
    def gradient(params):
        def loss(params):
            model = build_with_params(config, params)
            return jnp.sin(model(x, t, labels_for(config), taps=(3,))[1][0]).mean()

        return jax.grad(loss)(params)

    return gradient(params)


def test_a_tap_has_a_gradient_by_the_blocks_before_it_alone():
    grads = gradient_by_a_tap(TAPPED["adaln_zero"])
    for g in jax.tree.leaves(grads["blocks"]):
        assert (jnp.abs(g[:3]).reshape(3, -1).max(1) > 0).all() and (g[3:] == 0).all()
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads["final"]))
    assert jnp.abs(grads["patch"]["kernel"]).max() > 0
    recomputed = gradient_by_a_tap(replace(TAPPED["adaln_zero"], remat=True))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("name", ["adaln_zero", "joint"])
def test_taps_that_are_no_ascending_blocks_are_refused(name):
    model = with_random_weights(TAPPED[name])
    for taps in [(0,), (5,), (-1,), (2, 2), (3, 1)]:
        with pytest.raises(UserError, match=f"^taps {', '.join(map(str, taps))}: .* in 1 … 4"):
            model(x, t, label, taps=taps)


# --- the inner head -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", TAPPED.values(), ids=TAPPED)
def test_an_inner_head_reads_the_tokens_at_its_place_and_leaves_the_prediction(config):
    with_head, label = with_random_weights(replace(config, inner_head=2)), labels_for(config)
    call = jax.jit(with_head, static_argnames="inner", compiler_options=AS_USERS_COMPILE)
    final, inner = call(x, t, label, inner=True)
    assert (final == call(x, t, label)).all()
    # The head at the end, given the tokens of block 2, predicts what the inner head does.
    *_, at_2 = [state for state, _ in zip(run_block_by_block(with_head, x, t, label), range(2))]
    cond = with_head.label(label)
    if config.block == JOINT:
        cond = cond._replace(vector=with_head.time(t) + cond.vector)
    else:
        cond = add_time(with_head.time(t), cond)
    patches = with_head.inner(at_2, cond)
    expected = unpatchify(patches, config.patch_size, config.grid[0])
    error = jnp.abs(inner - expected).max()
    assert error < (0.03 if config.dtype == "bfloat16" else 1e-5) * jnp.abs(expected).max()
    assert jnp.abs(inner - final).max() > 1e-2


def test_an_inner_head_changes_no_other_weight():
    config = replace(TINY, depth=4)
    plain = init_model_params(config, key)
    with_head = init_model_params(replace(config, inner_head=1), key)
    assert set(with_head) == {*plain, "inner"}
    for a, b in zip(
        jax.tree.leaves(plain),
        jax.tree.leaves({name: with_head[name] for name in plain}),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert (with_head["inner"]["out"]["kernel"] == 0).all()


def test_an_inner_head_beyond_half_of_the_blocks_is_refused():
    for place in (-1, 3):
        with pytest.raises(UserError, match=f"inner_head {place}: of 4 blocks .* 1 to 2"):
            replace(TINY, depth=4, inner_head=place)


# --- sizes ----------------------------------------------------------------------------------------


def count_params(config):
    return sum(
        p.size for p in jax.tree.leaves(jax.eval_shape(lambda: init_model_params(config, key)))
    )


def paper_config(name):
    return model_config(name, image_size=32, channels=4, out_channels=8, n_classes=1000)


@pytest.mark.parametrize(
    "block, millions",
    [("in_context", 449), ("cross_attention", 598), ("adaln", 600), ("adaln_zero", 675)],
)
def test_parameter_counts_of_the_designs_are_the_papers(block, millions):
    """DiT-XL/2, Peebles & Xie 2023, table 4."""
    assert round(count_params(replace(paper_config("DiT-XL/2"), block=block)) / 1e6) == millions


@pytest.mark.parametrize(
    "name, millions",
    [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675), ("DiT-S/8", 33)],
)
def test_parameter_counts_are_the_papers(name, millions):
    """Peebles & Xie 2023, table 4."""
    assert round(count_params(paper_config(name)) / 1e6) == millions


def test_the_largest_model_has_the_published_number_of_parameters():
    """675,129,632 with the authors' fixed table of 256 × 1152 positions."""
    assert count_params(paper_config("DiT-XL/2")) + 256 * 1152 == 675_129_632


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_builds_with_its_own_patch(name):
    config = paper_config(name)
    p = int(name.partition("/")[2] or 2)
    assert config.patch_size == p and config.grid == (32 // p, 32 // p)
    params = jax.eval_shape(lambda: init_model_params(config, key))
    n_between = config.bottleneck or config.width
    assert jax.tree.leaves(params["patch"])[-1].shape[-1] == config.width
    assert (p * p * 4, n_between) in {x.shape for x in jax.tree.leaves(params["patch"])}
    out = jax.eval_shape(
        lambda p: build_with_params(config, p)(jnp.zeros((1, 32, 32, 4)), t[:1], label[:1]), params
    )
    assert out.shape == (1, 32, 32, 8)


@pytest.mark.parametrize("n_classes", [0, 1, 10, 1000])
def test_the_null_class_is_the_last_row(n_classes):
    params = init_model_params(replace(TINY, n_classes=n_classes), key)
    assert params["label"]["table"].shape == (n_classes + 1, 32)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("DiT-S/3", {}, "unknown model 'DiT-S/3'; did you mean"),
        ("DiT-S/8", {"image_size": 12}, "image_size 12 is not divisible by patch_size 8"),
        ("DiT-S/8", {"image_size": "16x12"}, "image_size 16x12 is not divisible by patch_size 8"),
        ("DiT-S/8", {"image_size": "16x"}, "image_size '16x': must be a number of pixels such as"),
        ("MMDiT-S/2", {"block": "joined"}, "unknown block 'joined'; did you mean 'joint'"),
        ("DiT-S/2", {"block": "adalnzero"}, "unknown block 'adalnzero'; did you mean 'adaln_zero'"),
        ("DiT-S/2", {"mlp": "relu"}, "unknown mlp 'relu'"),
        ("DiT-S/2", {"n_dual": 1}, "n_dual 1: only joint blocks have a second attention"),
        ("MMDiT-S/2", {"n_dual": 12}, "n_dual 12: .* and never the last of the 12"),
        ("DiT-S/2", {"n_heads": 5}, "width 384 is not divisible by 5 heads$"),
        ("DiT-S/2", {"n_heads": 0}, "n_heads 0: must be at least 1$"),
        ("DiT-S/2", {"patch_size": 0}, "patch_size 0: must be at least 1$"),
        ("DiT-S/2", {"width": 6, "n_heads": 2}, "width 6: must be divisible by 4 for position sin"),
        (
            "DiT-S/2",
            {"n_heads": 64, "rope": True},
            "a head has 6 channels, which must be divisible by 4 for rotary positions",
        ),
        (
            "DiT-S/2",
            {"text_width": 8},
            "n_classes 10 and text_width 8: .* class labels or captions",
        ),
    ],
)
def test_unknown_names_and_conflicting_fields_are_refused(name, fields, message):
    all_fields = {"image_size": 32, "channels": 4, "out_channels": 4, "n_classes": 10} | fields
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        model_config(name, **all_fields)
