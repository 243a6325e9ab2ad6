"""A run that starts from another's weights is that model on its first step; what is new starts
fresh, what does not fit is named.
"""

import gc
import json
from dataclasses import asdict, replace
from functools import cache

import jax
import jax.numpy as jnp
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from commands import NANO, SMALL, run
from flax import nnx
from towers import save_clip

import export
from datasets_config import DATASET_CONFIGS, LatentEncoding
from export import ExportConfig
from inference.trained_model import TrainedModel
from model import graphdef, init_params, model_config
from pretrained import transformer
from runtime import parallel
from runtime.errors import UserError
from train import Trainer
from training import warm_start
from training.config import TrainConfig
from training.warm_start import Source, fitted, kept_rows

CONFIG = model_config("DiT-Nano/4", image_size=8, channels=1, out_channels=1, n_classes=10)
TINY = TrainConfig(
    batch_size=8,
    n_steps=4,
    warmup_steps=2,
    eval_save_steps=4,
    n_eval_batches=1,
    n_sample_steps=2,
    sample_every_n=100,
)
FLAGS = {"mlp": "swiglu", "position": "learned", "rope": True, "block": "adaln"}


def weights(config, seed=0):
    """Away from their zero start, on the host."""
    fresh = init_params(config, jax.random.key(seed))
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(9), p.shape), fresh)
    return jax.device_get(moved)


def source(config=CONFIG, *, names=(), **settings):
    return Source(config, weights(config), {"dataset": {"label_names": names}} | settings, "there")


def fit(start, config, names=(), encoding=None):
    data = replace(DATASET_CONFIGS["digits"], label_names=tuple(names), encoding=encoding)
    return fitted(start, config, data, lambda part: weights(config, seed=1)[part])


def predicted(config, params, label=3):
    shape = (2, config.image_size, config.image_size, config.channels)
    x = jax.random.normal(jax.random.key(2), shape)
    return np.asarray(predictor(config)(params, x, jnp.asarray([0.2, 0.9]), jnp.full(2, label)))


@cache
def predictor(config):
    return jax.jit(lambda params, *inputs: nnx.merge(graphdef(config), params)(*inputs))


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run with flags of its own, as if it had been trained."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    trainer = Trainer(replace(TINY, model="DiT-Nano/4", run_dir=folder, **FLAGS))
    ema = weights(trainer.model_config)
    trainer.state = replace(trainer.state, ema=parallel.shard(ema, trainer.mesh))
    trainer.save()
    return folder, ema


# --- a run from another ---------------------------------------------------------------------------


def test_a_run_starts_with_the_averaged_weights_of_another_and_its_flags(trained, tmp_path, capsys):
    folder, ema = trained
    trainer = Trainer(replace(TINY, init_from=str(folder), run_dir=tmp_path / "second"))
    assert_same(jax.device_get(trainer.state.params), ema)
    assert_same(jax.device_get(trainer.state.ema), ema)
    c = trainer.config
    assert (c.model, c.mlp, c.position, c.rope, c.block) == ("DiT-Nano/4", *FLAGS.values())
    assert capsys.readouterr().out == f"--init_from: the weights are those of step 0 of {folder}\n"
    trainer.save()
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert saved["init_from"] == str(folder)


@pytest.mark.slow
def test_resuming_goes_on_and_does_not_look_at_the_source_again(trained, tmp_path):
    folder, _ = trained
    moved = tmp_path / "source"
    transformer_of(folder, moved)
    config = replace(TINY, init_from=str(moved), run_dir=tmp_path / "second")
    whole = Trainer(replace(config, run_dir=tmp_path / "whole"))
    whole.fit()
    Trainer(config).fit(2)
    for path in moved.iterdir():
        path.unlink()
    again = Trainer(TrainConfig(run_dir=tmp_path / "second", resume=True))
    assert again.step == 2 and again.model_config == whole.model_config
    assert again.model_config.time_scale == 1
    again.fit()
    assert_same(jax.device_get(again.state.params), jax.device_get(whole.state.params))
    with pytest.raises(UserError, match=r"cannot resume: init_from was .*source, not .*first"):
        Trainer(TrainConfig(run_dir=tmp_path / "second", resume=True, init_from=str(folder)))


def transformer_of(folder, out):
    """A run's weights as an export has them, with another clock."""
    of = TrainedModel.of_run(folder)
    slow = replace(of.model, time_scale=1.0)  # which no flag says
    transformer.save(out, slow, jax.device_get(of.params), of.settings)


def test_a_shard_of_weights_is_where_a_shard_must_be(trained):
    folder, ema = trained
    trainer = Trainer(replace(TINY, init_from=str(folder), fsdp=8))
    assert_same(jax.device_get(trainer.state.params), ema)
    fresh = Trainer(replace(TINY, model="DiT-Nano/4", fsdp=8, **FLAGS)).state
    for x, y in zip(jax.tree.leaves(trainer.state), jax.tree.leaves(fresh), strict=True):
        assert x.sharding == y.sharding


def test_devices_hold_no_more_than_in_training(trained, monkeypatch):
    folder, _ = trained
    copy, held = jnp.copy, []

    def n_bytes(arrays):
        return sum(x.nbytes for x in arrays)

    def copied(x):
        held.append(n_bytes(jax.live_arrays()))
        return copy(x)

    gc.collect()
    before = n_bytes(jax.live_arrays())
    monkeypatch.setattr(jnp, "copy", copied)
    trainer = Trainer(replace(TINY, init_from=str(folder)))
    assert max(held) - before < 1.05 * n_bytes(jax.tree.leaves(trainer.state))


def test_what_the_source_learned_is_learned_on_but_for_what_is_said():
    start = source(replace(CONFIG, out_channels=2), prediction="v")
    found = warm_start.filled(TINY, start)
    assert (found.objective, found.prediction, found.learned_sigma) == ("ddpm", "v", True)
    found = warm_start.filled(replace(TINY, objective="rectified_flow"), start)
    assert (found.prediction, found.learned_sigma) == (None, None)
    found = warm_start.filled(replace(TINY, model="DiT-S/2", learned_sigma=False), start)
    assert (found.model, found.patch_size, found.block) == ("DiT-S/2", None, None)
    assert found.learned_sigma is False


@pytest.mark.slow
def test_the_command_starts_from_a_run(trained, tmp_path, cache):
    folder, _ = trained
    flags = [*SMALL, "--n_steps", 2, "--init_from", folder, "--run_dir", tmp_path / "second"]
    flags = [word for word in flags if word not in ("--model", "DiT-Nano/8")]
    done = run(NANO, *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    assert f"--init_from: the weights are those of step 0 of {folder}" in done.stdout
    done = run(NANO, *flags[:-2], "--model", "DiT-Ti/2", cache=cache)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --init_from step 0 of {folder}: width is 32 there")


@pytest.mark.slow
def test_a_model_in_sd3s_form_is_trained_on_and_exported_in_it(tmp_path):
    pytest.importorskip("transformers")
    clip = save_clip(tmp_path / "clip")
    config = model_config(
        "MMDiT-Nano/8",
        image_size=8,
        channels=1,
        out_channels=1,
        n_classes=0,
        text_length=333,
        text_width=16,
        pooled_width=12,
        caption_norm=False,
        position_side=6,
        position_base=3,
    )
    params = weights(config)
    transformer.save(tmp_path / "sd3", config, params, {})
    captioned = {"caption": ("the digit {label}",), "text_towers": (clip,)}
    captioned |= {"caption_cache": tmp_path / "cache", "run_dir": tmp_path / "run"}
    trainer = Trainer(replace(TINY, init_from=str(tmp_path / "sd3"), **captioned))
    assert_same(jax.device_get(trainer.state.params), params)
    assert trainer.model_config.caption_norm is False and trainer.model_config.position_side == 6
    trainer.fit()
    export.main(ExportConfig(run=tmp_path / "run", out=tmp_path / "out"))
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["_class_name"] == "SD3Transformer2DModel"
    found = transformer.load(str(tmp_path / "out"))
    assert_same(found.params, jax.device_get(trainer.state.ema))
    assert found.config == trainer.model_config
    assert found.settings["text_towers"] == [clip]


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
    assert kept_rows(*there, *here) == rows


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
        warm_start.filled(TINY, Source(odd, {}, {}, "there"))


def test_a_source_that_is_not_there_is_named():
    with pytest.raises(UserError, match="'/no/such': it is no folder"):
        Trainer(replace(TINY, init_from="/no/such"))
