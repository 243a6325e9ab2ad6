"""A run started from existing weights computes what they compute. New parts start fresh, and what
cannot be fitted is named.
"""

import gc
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import nano  # noqa: F401  (its sizes)
import pytest
from tiny_text_encoders import save_clip
from warm_start_cases import (
    FLAGS,
    TINY,
    assert_same,
    trained,  # noqa: F401
    weights,
)

import export
from export import ExportConfig
from inference.trained_model import TrainedModel
from model import model_config
from pretrained import transformer
from runtime.errors import UserError
from train import Trainer
from training.config import TrainConfig


def test_a_run_starts_with_the_averaged_weights_and_flags_of_its_source(trained, tmp_path, capsys):
    folder, ema = trained
    trainer = Trainer(replace(TINY, init_from=str(folder), run_dir=tmp_path / "second"))
    assert_same(jax.device_get(trainer.state.params), ema)
    assert_same(jax.device_get(trainer.state.ema), ema)
    c = trainer.config
    assert (c.model, c.mlp, c.position, c.rope, c.block) == ("DiT-Nano/4", *FLAGS.values())
    assert (
        capsys.readouterr().out == f"--init_from: starting from the weights of step 0 of {folder}\n"
    )
    trainer.save()
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert saved["init_from"] == str(folder)


@pytest.mark.slow
def test_resuming_does_not_read_the_source_again(trained, tmp_path):
    folder, _ = trained
    moved = tmp_path / "source"
    save_with_time_scale_1(folder, moved)
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


def save_with_time_scale_1(folder, out):
    """Export a run's weights with another time scale, which no flag sets."""
    trained = TrainedModel.from_run(folder)
    slow = replace(trained.model, time_scale=1.0)
    transformer.save_transformer(out, slow, jax.device_get(trained.params), trained.settings)


def test_starting_weights_are_sharded_as_fresh_ones(trained):
    folder, ema = trained
    trainer = Trainer(replace(TINY, init_from=str(folder), fsdp=8))
    assert_same(jax.device_get(trainer.state.params), ema)
    fresh = Trainer(replace(TINY, model="DiT-Nano/4", fsdp=8, **FLAGS)).state
    for x, y in zip(jax.tree.leaves(trainer.state), jax.tree.leaves(fresh), strict=True):
        assert x.sharding == y.sharding


def test_devices_hold_no_more_than_while_training(trained, monkeypatch):
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


@pytest.mark.slow
def test_a_model_in_sd3s_format_is_trained_and_exported_in_it(tmp_path):
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
    transformer.save_transformer(tmp_path / "sd3", config, params, {})
    captioned = {"caption": ("the digit {label}",), "text_towers": (clip,)}
    captioned |= {"caption_cache": tmp_path / "cache", "run_dir": tmp_path / "run"}
    trainer = Trainer(replace(TINY, init_from=str(tmp_path / "sd3"), **captioned))
    assert_same(jax.device_get(trainer.state.params), params)
    assert trainer.model_config.caption_norm is False and trainer.model_config.position_side == 6
    trainer.fit()
    export.main(ExportConfig(run=tmp_path / "run", out=tmp_path / "out"))
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["_class_name"] == "SD3Transformer2DModel"
    found = transformer.load_transformer(str(tmp_path / "out"))
    assert_same(found.params, jax.device_get(trainer.state.ema))
    assert found.config == trainer.model_config
    assert found.settings["text_towers"] == [clip]


def test_a_missing_source_is_named():
    with pytest.raises(UserError, match="--init_from /no/such: there is no such run or file"):
        Trainer(replace(TINY, init_from="/no/such"))
