"""The networks are the papers': sizes, zero start, and every condition is used."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import (
    TEXT_VARIANTS,
    TINY,
    VARIANTS,
    build_with_params,
    caption,
    key,
    label,
    t,
    with_random_weights,
    x,
)

from model import (
    JOINT,
    MODELS,
    Condition,
    Streams,
    init_model_params,
    model_config,
)
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
