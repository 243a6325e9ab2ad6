"""A run that starts from another's weights is that model on its first step; what is new starts
fresh, what does not fit is named.
"""

from dataclasses import asdict, replace
from functools import cache

import jax
import jax.numpy as jnp
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from flax import nnx
from warm_start_cases import CONFIG, TINY, assert_same, source, weights

from datasets_config import DATASET_CONFIGS, LatentEncoding
from model import model_graphdef
from runtime.errors import UserError
from training import warm_start
from training.warm_start import StartingWeights, fit_weights, match_classes


def fit(start, config, names=(), encoding=None):
    data = replace(DATASET_CONFIGS["digits"], label_names=tuple(names), encoding=encoding)
    return fit_weights(start, config, data, lambda part: weights(config, seed=1)[part])


def predicted(config, params, label=3):
    shape = (2, config.image_size, config.image_size, config.channels)
    x = jax.random.normal(jax.random.key(2), shape)
    return np.asarray(predictor(config)(params, x, jnp.asarray([0.2, 0.9]), jnp.full(2, label)))


@cache
def predictor(config):
    return jax.jit(lambda params, *inputs: nnx.merge(model_graphdef(config), params)(*inputs))


def test_what_the_source_learned_is_learned_on_but_for_what_is_said():
    start = source(replace(CONFIG, out_channels=2), prediction="v")
    found = warm_start.with_source_flags(TINY, start)
    assert (found.objective, found.prediction, found.learned_sigma) == ("ddpm", "v", True)
    found = warm_start.with_source_flags(replace(TINY, objective="rectified_flow"), start)
    assert (found.prediction, found.learned_sigma) == (None, None)
    found = warm_start.with_source_flags(replace(TINY, model="DiT-S/2", learned_sigma=False), start)
    assert (found.model, found.patch_size, found.block) == ("DiT-S/2", None, None)
    assert found.learned_sigma is False


# --- what may differ ------------------------------------------------------------------------------


def test_the_same_model_is_left_as_it_is():
    start = source(names=list("abcdefghij"))
    params, notices = fit(start, CONFIG)
    assert_same(params, start.params)
    assert notices == ["the weights are those of there"]


@pytest.mark.parametrize("block", ["adaln_zero", "joint"])
def test_classes_of_both_keep_their_rows_and_the_null_stays_last(block):
    start = source(replace(CONFIG, block=block), names=[f"digit {i}" for i in range(10)])
    config = replace(start.config, n_classes=4)
    params, notices = fit(start, config, ["digit 7", "cat", "Digit 0, zero", "dog"])
    fresh = weights(config, seed=1)["label"]
    for name, table in params["label"].items():
        old = start.params["label"][name]
        expected = [old[7], fresh[name][1], old[0], fresh[name][3], old[10]]
        np.testing.assert_array_equal(table, expected)
    assert notices[1:] == ["of 4 classes 2 are among the 10 there: others start fresh"]
    for ours, theirs in ((0, 7), (2, 0), (4, 10)):
        found = predicted(config, params, ours)
        np.testing.assert_allclose(found, predicted(start.config, start.params, theirs), atol=1e-6)


@pytest.mark.parametrize(
    "there, here, rows",
    [
        ((["a", "b"], 2), (["b", "a", "c"], 3), [1, 0, -1]),
        ((["a, x", "b"], 2), (["A", "b, y"], 2), [0, 1]),
        ((["crane", "crane"], 2), (["crane", "crane"], 2), [0, 1]),
        ((["a", "crane", "crane"], 3), (["a, x", "crane", "crane"], 3), [0, 1, 2]),
        ((["crane", "dog", "crane"], 3), (["crane"], 1), [-1]),
        ((["crane"], 1), (["crane, bird", "crane, machine"], 2), [-1, -1]),
        ((["maillot", "maillot, tank suit"], 2), (["maillot, tank suit", "crane"], 2), [1, -1]),
        ((["maillot", "maillot, tank suit"], 2), (["maillot"], 1), [0]),
        (([], 2), (["b", "a"], 2), [0, 1]),
        (([], 2), (["b", "a", "c"], 3), [-1, -1, -1]),
        ((["a", "b"], 2), ([], 0), []),
        (([], 0), (["a"], 1), [-1]),
        (([], 0), ([], 0), []),
    ],
)
def test_classes_are_the_same_by_name(there, here, rows):
    assert match_classes(*there, *here) == rows


def test_pictures_of_another_size_have_positions_of_their_own():
    start, config = source(), replace(CONFIG, image_size=16)
    params, notices = fit(start, config)
    assert_same(params, start.params)
    assert notices[1:] == ["there are 4×4 patches, and 2×2 there: positions are computed anew"]


def test_learned_positions_are_resized():
    start = source(replace(CONFIG, position="learned", image_size=32))
    row, column = np.mgrid[:8, :8].reshape(2, -1, 1)
    start.params["position"]["table"] = np.float32(row + 10 * column) * np.ones(32, np.float32)
    params, notices = fit(start, replace(start.config, image_size=64))
    middle = params["position"]["table"].reshape(16, 16, 32)[4:12, 4:12, 0]
    # A plane stays a plane, away from its border.
    np.testing.assert_allclose(np.diff(middle, axis=0), 0.5, atol=1e-4)
    np.testing.assert_allclose(np.diff(middle, axis=1), 5, atol=1e-4)
    said = "there are 16×16 patches, and 8×8 there: the learned positions are resized"
    assert notices[1:] == [said]


def test_other_patches_start_fresh_at_both_ends_and_nowhere_else():
    start, config = source(), replace(CONFIG, patch_size=8, channels=3, out_channels=3)
    params, notices = fit(start, config)
    fresh = weights(config, seed=1)
    assert_same(params["patch"], fresh["patch"])
    assert_same(params["final"]["out"], fresh["final"]["out"])
    assert_same(params["final"]["modulation"], start.params["final"]["modulation"])
    for part in ("blocks", "time", "label"):
        assert_same(params[part], start.params[part])
    assert (
        notices[1] == "patches are 8×8×3, and 4×4×1 there: the maps from and to patches start fresh"
    )


def test_a_variance_comes_or_goes_and_the_rest_of_what_is_said_stays():
    start = source()
    wider = replace(CONFIG, out_channels=2)
    params, notices = fit(start, wider)
    said = predicted(wider, params)
    np.testing.assert_allclose(said[..., :1], predicted(CONFIG, start.params), atol=1e-6)
    assert (said[..., 1:] == 0).all()
    assert notices[1:] == ["it says 2 channels, and 1 there: the new ones start at zero"]
    back, notices = fit(replace(start, config=wider, params=params), CONFIG)
    assert_same(back, start.params)
    assert notices[1:] == ["it says 1 channels, and 2 there: the last are left out"]


def test_latents_of_another_vae_are_spoken_of():
    there = LatentEncoding(
        **dict.fromkeys(("dataset_name", "source", "precision"), ""),
        image_size=64,
        shape=(8, 8, 1),
        vae="us/vae",
        vae_hash="a",
        scaling_factor=0.5,
        shift_factor=0.0,
        mirrored=False,
        captions=False,
    )
    start = source()
    start.settings["dataset"]["encoding"] = asdict(there)
    for here, said in (
        (there, []),
        (replace(there, vae_hash="", vae="us/copy"), []),
        (
            replace(there, vae_hash="b", vae="an/other"),
            ["of an/other, times 0.5, and those of us/vae, times 0.5 there"],
        ),
        (
            replace(there, scaling_factor=0.4),
            ["of us/vae, times 0.4, and those of us/vae, times 0.5 there"],
        ),
        (None, ["it learns pictures, and latents there"]),
    ):
        notices = fit(start, CONFIG, encoding=here)[1][1:]
        assert len(notices) == len(said)
        assert all(notice.endswith(end) for notice, end in zip(notices, said))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [("width", 64), ("depth", 3), ("n_heads", 1), ("mlp", "swiglu"), ("qk_norm", True)],
)
def test_what_must_be_the_same_is_named(field, value):
    config = replace(CONFIG, **{field: value})
    was = getattr(CONFIG, field)
    with pytest.raises(UserError, match=f"there: {field} is {was} there, and {value} here"):
        fit(source(), config)


def test_captions_and_classes_are_not_the_same():
    config = replace(CONFIG, n_classes=0, text_width=8, pooled_width=8)
    with pytest.raises(UserError, match="text_width is 0 there, and 8 here"):
        fit(source(), config)


def test_a_shape_without_a_name_is_refused():
    odd = replace(CONFIG, depth=5)
    with pytest.raises(UserError, match="no preset has width 32, depth 5 and 2 heads; add one"):
        warm_start.with_source_flags(TINY, StartingWeights(odd, {}, {}, "there"))
