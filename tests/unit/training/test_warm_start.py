"""A run started from existing weights computes what they compute. New parts start fresh, and what
cannot be fitted is named.
"""

from dataclasses import asdict, replace
from functools import cache
from typing import Any

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

DDPM_V = {"objective": "ddpm", "prediction": "v", "learned_sigma": True}


def fit(start, config, names=(), encoding=None):
    data = replace(DATASET_CONFIGS["digits"], label_names=tuple(names), encoding=encoding)
    return fit_weights(start, config, data, lambda part: weights(config, seed=1)[part])


def predicted(config, params, label=3):
    x = jax.random.normal(jax.random.key(2), (2, *config.image_shape))
    return np.asarray(predictor(config)(params, x, jnp.asarray([0.2, 0.9]), jnp.full(2, label)))


@cache
def predictor(config):
    return jax.jit(lambda params, *inputs: nnx.merge(model_graphdef(config), params)(*inputs))


def test_weights_that_are_not_finite_are_refused_by_name(monkeypatch):
    broken = source()
    broken.params["time"] = jax.tree.map(lambda p: p * np.nan, broken.params["time"])
    monkeypatch.setattr(warm_start, "_load_weights", lambda path: broken)
    with pytest.raises(UserError, match=r"--init_from runs/x: .* a source hold NaN or infinity"):
        warm_start.load_starting_weights("runs/x")


def test_the_objective_is_the_sources_unless_given():
    start = source(replace(CONFIG, out_channels=2), **DDPM_V)
    found = warm_start.with_source_flags(TINY, start)
    assert (found.objective, found.prediction, found.learned_sigma) == ("ddpm", "v", True)
    found = warm_start.with_source_flags(replace(TINY, objective="rectified_flow"), start)
    assert (found.prediction, found.learned_sigma) == (None, None)
    found = warm_start.with_source_flags(replace(TINY, model="DiT-S/2", learned_sigma=False), start)
    assert (found.model, found.patch_size, found.block) == ("DiT-S/2", None, None)
    assert found.learned_sigma is False


@pytest.mark.parametrize(
    "theirs, ours, notice",
    [
        (0, 1, "the head after block 1 starts fresh"),
        (1, 0, "its inner head is left out"),
        (1, 1, None),
    ],
)
def test_an_inner_head_is_kept_dropped_or_starts_fresh(theirs, ours, notice):
    start = source(replace(CONFIG, inner_head=theirs))
    config = replace(CONFIG, inner_head=ours)
    params, notices = fit(start, config)
    assert notices[1:] == ([notice] if notice else [])
    expected = {name: start.params[name] for name in params if name != "inner"}
    if ours:
        expected["inner"] = start.params["inner"] if theirs else weights(config, seed=1)["inner"]
    assert_same(params, expected)


# --- differences that are fitted ------------------------------------------------------------------


def test_the_weights_of_the_same_model_are_unchanged():
    start = source(names=list("abcdefghij"))
    params, notices = fit(start, CONFIG)
    assert_same(params, start.params)
    assert notices == ["starting from the weights of a source"]


@pytest.mark.parametrize("block", ["adaln_zero", "joint"])
def test_shared_classes_keep_their_embeddings_and_the_null_label_stays_last(block):
    start = source(replace(CONFIG, block=block), names=[f"digit {i}" for i in range(10)])
    config = replace(start.config, n_classes=4)
    params, notices = fit(start, config, ["digit 7", "cat", "Digit 0, zero", "dog"])
    fresh = weights(config, seed=1)["label"]
    for name, table in params["label"].items():
        old = start.params["label"][name]
        expected = [old[7], fresh[name][1], old[0], fresh[name][3], old[10]]
        np.testing.assert_array_equal(table, expected)
    assert notices[1:] == ["2 of 4 classes are among the source's 10; the others start fresh"]
    for ours, theirs in ((0, 7), (2, 0), (4, 10)):
        found = predicted(config, params, ours)
        np.testing.assert_allclose(found, predicted(start.config, start.params, theirs), atol=1e-6)


@pytest.mark.parametrize("n_classes", [10, 4])
def test_a_null_label_that_was_never_trained_starts_fresh(n_classes):
    start = source(CONFIG, label_dropout=0.0)
    config = replace(CONFIG, n_classes=n_classes)
    params, notices = fit(start, config)
    fresh = weights(config, seed=1)["label"]["table"]
    np.testing.assert_array_equal(params["label"]["table"][-1], fresh[-1])
    if n_classes == 10:
        assert_same(params["label"]["table"][:-1], start.params["label"]["table"][:-1])
    assert notices[-1] == "the source has no trained null label: it starts fresh"
    assert len(notices) == (2 if n_classes == 10 else 3)


@pytest.mark.parametrize(
    "source_names, names, rows",
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
def test_classes_are_matched_by_name(source_names, names, rows):
    assert match_classes(*source_names, *names) == rows


def test_positions_are_recomputed_for_another_image_size():
    start, config = source(), replace(CONFIG, image_size="16x8")
    params, notices = fit(start, config)
    assert_same(params, start.params)
    assert notices[1:] == ["patches are 4×2, not 2×2: positions are recomputed"]


def test_learned_positions_are_resized():
    start = source(replace(CONFIG, position="learned", image_size=32))
    row, column = np.mgrid[:8, :8].reshape(2, -1, 1)
    start.params["position"]["table"] = np.float32(row + 10 * column) * np.ones(32, np.float32)
    params, notices = fit(start, replace(start.config, image_size="64x32"))
    middle = params["position"]["table"].reshape(16, 8, 32)[4:12, 2:6, 0]
    # A plane stays a plane, away from its border.
    np.testing.assert_allclose(np.diff(middle, axis=0), 0.5, atol=1e-4)
    np.testing.assert_allclose(np.diff(middle, axis=1), 10, atol=1e-4)
    assert notices[1:] == ["patches are 16×8, not 8×8: the learned positions are resized"]


def test_other_patches_change_only_the_patch_embedding_and_the_output_layer():
    start, config = source(), replace(CONFIG, patch_size=8, channels=3, out_channels=3)
    params, notices = fit(start, config)
    fresh = weights(config, seed=1)
    assert_same(params["patch"], fresh["patch"])
    assert_same(params["final"]["out"], fresh["final"]["out"])
    assert_same(params["final"]["modulation"], start.params["final"]["modulation"])
    for part in ("blocks", "time", "label"):
        assert_same(params[part], start.params[part])
    expected = "patches are 8×8×3, not 4×4×1: the patch embedding and the output layer start fresh"
    assert notices[1] == expected


def test_adding_or_dropping_a_learned_variance_keeps_the_other_outputs():
    start = source()
    wider = replace(CONFIG, out_channels=2)
    params, notices = fit(start, wider)
    output = predicted(wider, params)
    np.testing.assert_allclose(output[..., :1], predicted(CONFIG, start.params), atol=1e-6)
    assert (output[..., 1:] == 0).all()
    assert notices[1:] == ["output channels are 2, not 1: the new ones start at zero"]
    back, notices = fit(replace(start, config=wider, params=params), CONFIG)
    assert_same(back, start.params)
    assert notices[1:] == ["output channels are 1, not 2: the last are dropped"]


def test_latents_of_another_vae_are_reported():
    theirs = LatentEncoding(
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
    start.settings["dataset"]["encoding"] = asdict(theirs)
    for ours, endings in (
        (theirs, []),
        (replace(theirs, vae_hash="", vae="us/copy"), []),
        (
            replace(theirs, vae_hash="b", vae="an/other"),
            ["of an/other, scaled by 0.5; the source on latents of us/vae, scaled by 0.5"],
        ),
        (
            replace(theirs, scaling_factor=0.4),
            ["of us/vae, scaled by 0.4; the source on latents of us/vae, scaled by 0.5"],
        ),
        (None, ["this run trains on images; the source on latents of us/vae, scaled by 0.5"]),
    ):
        notices = fit(start, CONFIG, encoding=ours)[1][1:]
        assert len(notices) == len(endings)
        assert all(notice.endswith(end) for notice, end in zip(notices, endings))


def test_the_times_of_sd3_are_shifted_in_training_and_sampling():
    sd3: Any = {"objective": "rectified_flow", "sample_shift": 3.0, "full_width": 24}
    found = warm_start.with_source_flags(TINY, source(**sd3))
    assert (found.time_shift, found.sample_shift) == (3.0, 3.0)
    found = warm_start.with_source_flags(replace(TINY, time_shift=1.0), source(**sd3))
    assert (found.time_shift, found.sample_shift) == (1.0, 3.0)
    found = warm_start.with_source_flags(TINY, source(**sd3 | {"full_width": None}))
    assert (found.time_shift, found.sample_shift) == (None, None)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [("width", 64), ("depth", 3), ("n_heads", 1), ("mlp", "swiglu"), ("qk_norm", True)],
)
def test_a_field_that_must_match_is_named(field, value):
    config = replace(CONFIG, **{field: value})
    was = getattr(CONFIG, field)
    with pytest.raises(UserError, match=f"its {field} is {was}, this run's is {value}"):
        fit(source(), config)


def test_captions_do_not_replace_classes():
    config = replace(CONFIG, n_classes=0, text_width=8, pooled_width=8)
    with pytest.raises(UserError, match="its text_width is 0, this run's is 8"):
        fit(source(), config)


def test_a_shape_without_a_preset_is_rejected():
    odd = replace(CONFIG, depth=5)
    with pytest.raises(UserError, match="no preset has width 32, depth 5 and 2 heads; add one"):
        warm_start.with_source_flags(TINY, StartingWeights(odd, {}, {}, "a source", "a source"))
