"""The networks are the papers': sizes, zero start, and every condition is used."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_cases import (
    BLOCK_VARIANTS,
    TEXT,
    TEXT_VARIANTS,
    TINY,
    build_with_params,
    caption,
    key,
    label,
    labels_for,
    t,
    with_random_weights,
    x,
)

from data.batch import EncodedCaption
from model import (
    JOINT,
    MODELS,
    Condition,
    Streams,
    init_model_params,
    model_config,
)
from runtime.errors import UserError

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
SHAPES = (4, 16, 32), (4, 6, 32), (4, 32)  # image tokens, label tokens, label vector


def first_block(model):
    """The first of a model's blocks."""
    first = (model.config.n_dual and model.dual_blocks) or model.blocks
    return nnx.merge(*jax.tree.map(lambda w: w[0], nnx.split(first)))


@each_variant
def test_the_untrained_model_is_zero(config):
    assert (build_with_params(config)(x, t, labels_for(config)) == 0).all()


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


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_input_matters_and_rows_do_not_mix(config):
    model, labels = with_random_weights(config), labels_for(config)
    y = model(x, t, labels)
    assert y.dtype == jnp.float32
    others = [
        (x.at[0].add(1), t, labels),
        (x, t.at[0].add(0.3), labels),
        (x, t, changed(labels)[0]),
    ]
    for other in others:
        moved = model(*other)
        assert jnp.abs(moved - y)[0].max() > 1e-3
        assert (moved[1:] == y[1:]).all()


@each_variant
def test_one_step_of_training_makes_the_condition_matter(config):
    """Every design starts independent of t and label; a few updates must change that."""
    params, target = init_model_params(config, key), jax.random.normal(jax.random.key(2), x.shape)
    tx = optax.adam(1e-2)
    opt, labels = tx.init(params), labels_for(config)

    @jax.jit
    def step(params, opt):
        grads = jax.grad(
            lambda p: jnp.square(
                build_with_params(config, p)(x, t, labels) - target * t.reshape(-1, 1, 1, 1)
            ).mean()
        )(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    for _ in range(3):
        params, opt = step(params, opt)
    model = build_with_params(config, params)
    y = model(x, t, labels)
    assert jnp.abs(y - model(x, t, changed(labels)[1])).max() > 1e-5
    assert jnp.abs(y - model(x, t[::-1], labels)).max() > 1e-5


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


@pytest.mark.parametrize("name", ["cross_attention", "in_context", "joint"])
def test_every_token_of_a_caption_matters(name):
    model = with_random_weights(TEXT_VARIANTS[f"{name}, captions"])
    y = model(x, t, caption)
    for i in range(6):
        moved = model(x, t, caption._replace(tokens=caption.tokens.at[0, i].multiply(-1)))
        assert jnp.abs(moved - y)[0].max() > 1e-4


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
    p = int(name.split("/")[1])
    assert config.patch_size == p and config.grid == (32 // p, 32 // p)
    params = jax.eval_shape(lambda: init_model_params(config, key))
    assert params["patch"]["kernel"].shape == (p * p * 4, config.width)
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
        ("MMDiT-S/2", {"block": "joined"}, "unknown block 'joined'; did you mean 'joint'"),
        ("DiT-S/2", {"block": "adalnzero"}, "unknown block 'adalnzero'; did you mean 'adaln_zero'"),
        ("DiT-S/2", {"mlp": "relu"}, "unknown mlp 'relu'"),
        ("DiT-S/2", {"n_dual": 1}, "n_dual 1: only joint blocks have a second attention"),
        ("MMDiT-S/2", {"n_dual": 12}, "n_dual 12: .* and never the last of the 12"),
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
