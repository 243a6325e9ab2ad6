"""A run leaves what it promises, resumes bit for bit, and fails with one line."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import nano  # noqa: F401  (its preset)
import numpy as np
import pytest
from hub_copies import make_copy
from PIL import Image, ImageSequence
from tiny_text_encoders import save_clip
from train_cases import (
    TINY,
    assert_same,
    break_weights,
    metrics,
    whole,  # noqa: F401
)

import export
import generate
from datasets_config import DATASET_CONFIGS
from inference import grids
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime import parallel
from runtime.checkpoint import Checkpoints, DiskFullError
from runtime.errors import RunError, UserError
from train import Trainer
from training import display, optim
from training.config import TrainConfig
from training.prepare import prepare


def test_a_run_leaves_what_it_promises(whole, capsys):
    folder = whole.run_dir
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [5, 6, 10, 12, 12]
    for line in (lines[0], lines[2], lines[3]):
        assert {"loss", "grad_norm", "param_norm", "update_norm", "learning_rate"} < set(line)
        assert len(line["loss_by_t"]) == 10
    assert set(lines[1]) == set(lines[4]) == {"step", "eval_loss"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"6", "12"}
    config = json.loads((folder / "config.json").read_text())
    assert config["batch_size"] == 8 and config["learning_rate"] == 3e-3
    assert config["model_config"]["patch_size"] == 8
    assert config["dataset"]["label_names"] == [str(i) for i in range(10)]
    with Image.open(folder / "samples" / "trajectory.gif") as gif:
        assert len(list(ImageSequence.Iterator(gif))) == 3  # the states of two solver steps
    assert {path.name for path in (folder / "figures").iterdir()} == {"curves.png", "progress.gif"}
    with Image.open(folder / "samples" / "final.png") as grid:
        assert min(grid.size) > 256  # large enough for a person to see


def test_a_run_whose_samples_are_not_finite_fails_when_it_is_trained(tmp_path, capsys):
    trainer = Trainer(replace(TINY, n_steps=2, sample_every_n=1, run_dir=tmp_path / "run"))
    broken = jax.tree.map(lambda x: x * np.nan, trainer.state.ema)
    trainer.state = replace(trainer.state, ema=broken)
    with pytest.raises(RunError, match=r"step 2: samples/final\.png is not saved: sample 0 "):
        trainer.fit()
    printed = capsys.readouterr().out
    assert "step 1: samples/0000001.png is not saved: sample 0 " in printed
    assert not list(tmp_path.glob("run/samples/*"))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    with pytest.raises(UserError, match=r"run, step 2: sample 0 .* its weights are not finite"):
        generate.main(generate.GenerateConfig(run=tmp_path / "run", out=tmp_path / "a.png", n=3))
    assert not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_the_loss_is_the_mean_since_the_last_line(whole, tmp_path):
    """Not the last step's: with one line per step, five lines average to one of five steps."""
    each = Trainer(
        replace(TINY, log_every=1, n_steps=5, schedule="constant", run_dir=tmp_path / "a")
    )
    five = Trainer(
        replace(TINY, log_every=5, n_steps=5, schedule="constant", run_dir=tmp_path / "b")
    )
    losses = []
    for batch in each.data.train_batches(0, 5):
        losses.append(each.train_step(batch).window["loss"].item())
        window = five.train_step(batch).window
    np.testing.assert_allclose(window["loss"] / window["steps"], np.mean(losses), rtol=1e-6)


def test_interrupted_and_resumed_is_uninterrupted(whole, tmp_path, monkeypatch, capsys):
    """At a step that is no multiple of anything: the signal of a cluster, then a new process."""
    broken = Trainer(replace(TINY, run_dir=tmp_path / "run"))
    steps = iter(range(1, 100))
    honest_step = Trainer.train_step

    def step(self, batch):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(SystemExit) as exit:
        broken.fit()
    assert exit.value.code == 143
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["4"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.step == 4
    resumed.fit()
    assert_same(resumed.state, whole.state)
    assert metrics(tmp_path / "run") == metrics(whole.run_dir)


@pytest.mark.slow
def test_a_streamed_run_of_wide_images_resumes_bit_for_bit(whole, tmp_path, capsys):
    config = replace(
        TINY, streaming=True, shuffle_buffer=100, n_workers=0, image_size="8x16", patch_size=4
    )
    streamed = Trainer(replace(config, run_dir=tmp_path / "whole"))
    streamed.fit()
    Trainer(replace(config, run_dir=tmp_path / "run")).fit(7)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.step == 7 and resumed.data.grouped_shuffle
    resumed.fit()
    assert_same(resumed.state, streamed.state)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["image_size"] == saved["model_config"]["image_size"] == "8x16"
    assert resumed.sample([3], n_steps=1).shape == (1, 8, 16, 1)
    # Its batches differ from those of a dataset that is shuffled as a whole.
    assert not np.array_equal(streamed.data.batch_rows(0), whole.data.batch_rows(0))


def break_steps(trainer, *positions):
    """Make the loss NaN on the batches at these positions in the order of all batches."""
    honest_step = trainer.update

    def step(state, batch, key):
        if trainer.position not in positions:
            return honest_step(state, batch, key)
        nan = jax.tree.map(lambda x: x * np.nan, state.params)
        saved = jax.tree.map(np.asarray, state)
        new, report = honest_step(replace(state, params=nan), batch, key)
        weights = {name: getattr(saved, name) for name in ("params", "ema", "opt_state")}
        return parallel.replicate(replace(new, **weights), trainer.mesh), report

    trainer.update = step


def test_a_bad_step_changes_nothing_but_the_counts(tmp_path):
    trainer = Trainer(replace(TINY, run_dir=tmp_path / "run"))
    batch = next(trainer.data.train_batches(0, 1))
    trainer.train_step(batch)
    good = jax.tree.map(jax.numpy.copy, trainer.state.params)
    table = trainer.state.params["label"]["table"] * np.nan
    broken = trainer.state.params | {"label": {"table": table}}
    trainer.state = replace(trainer.state, params=broken)
    before = jax.device_get(trainer.state)
    report = jax.device_get(trainer.train_step(batch))
    after = jax.device_get(trainer.state)
    assert (report.bad_steps, report.skipped) == (1, 1)
    assert (after.step, after.position) == (2, 2)
    for name in ("params", "ema", "opt_state", "window"):
        assert_same(getattr(after, name), getattr(before, name))
    trainer.state = replace(trainer.state, params=good)
    report = jax.device_get(trainer.train_step(batch))
    assert (report.bad_steps, report.skipped) == (0, 1)


def test_bad_steps_roll_a_run_back_to_its_checkpoint_and_skip_their_batches(tmp_path, capsys):
    config = replace(TINY, nan_patience=2, run_dir=tmp_path / "run")
    trainer = Trainer(config)
    break_steps(trainer, 7, 8, 9)
    trainer.fit()
    assert (trainer.step, trainer.position) == (12, 12 + 3)  # from step 6 on, with batch 9
    out = capsys.readouterr().out
    assert "not finite at step 9 (2 in a row): rolling back to step 6" in out
    assert [line["step"] for line in metrics(tmp_path / "run")] == [5, 6, 10, 12, 12]

    plain = Trainer(replace(config, run_dir=tmp_path / "plain"))
    break_steps(plain, 9)
    for batch in plain.data.train_batches(0, 6):
        plain.train_step(batch)
    plain.position, plain.state = 9, replace(plain.state, position=plain.state.position + 3)
    for batch in plain.data.train_batches(9, 15):
        plain.train_step(batch)
    assert_same(trainer.state.params, plain.state.params)
    assert_same(trainer.state.opt_state, plain.state.opt_state)


def test_a_loss_that_stays_non_finite_ends_the_run_after_three_rollbacks(tmp_path, capsys):
    trainer = Trainer(replace(TINY, nan_patience=2, n_steps=60, run_dir=tmp_path / "run"))
    trainer.fit(6)
    break_steps(trainer, *range(6, 60))
    with pytest.raises(
        RunError, match=r"not finite at step 8, after 3 rollbacks.* step 6; .* rows"
    ):
        trainer.fit()
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"6"}
    assert capsys.readouterr().out.count("rolling back to step 6") == 3


def test_without_a_checkpoint_a_run_rolls_back_to_its_start(tmp_path, capsys):
    trainer = Trainer(replace(TINY, nan_patience=1, n_steps=4, run_dir=tmp_path / "run"))
    break_steps(trainer, 1)
    trainer.fit()
    assert (trainer.step, trainer.position) == (4, 6)
    assert "rolling back to step 0" in capsys.readouterr().out


def test_a_checkpoint_that_fails_while_training_continues_is_reported_under_its_own_step(
    tmp_path, capsys, monkeypatch
):
    """And the next one is saved."""
    failures = iter([DiskFullError("no space left")])
    honest_wait = Checkpoints.wait

    def wait(self):
        honest_wait(self)
        if self.latest_step() == 6:
            for failure in failures:
                raise failure

    monkeypatch.setattr(Checkpoints, "wait", wait)
    trainer = Trainer(replace(TINY, run_dir=tmp_path / "run"))
    trainer.fit()
    assert "step 6 is not saved, training continues: no space left" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"6", "12"}


def test_every_evaluation_uses_the_same_times_and_noise(whole):
    assert whole.evaluate() == whole.evaluate()


def test_samples_come_from_the_averaged_weights(whole):
    averaged, raw = whole.sample([3, "7"]), whole.sample([3, 7], ema=False)
    assert averaged.shape == (2, 8, 8, 1) and averaged.dtype == np.float32
    assert np.abs(averaged - raw).max() > 1e-3
    np.testing.assert_array_equal(averaged, whole.sample([3, 7]))
    assert whole.sample([1], trajectory=True).shape == (3, 1, 8, 8, 1)


@pytest.mark.slow
def test_the_live_model_survives_training(whole):
    model = whole.model()
    batch = next(whole.data.train_batches(0, 1))
    before = whole.state, whole.step
    trainer = Trainer.from_run(whole.run_dir)
    live = trainer.model()
    trainer.train_step(batch)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    t, label = jax.numpy.full(8, 0.5), jax.numpy.arange(8)
    np.testing.assert_allclose(live(x, t, label), model(x, t, label), atol=1e-6)
    assert before == (whole.state, whole.step)


@pytest.mark.slow
def test_half_precision_keeps_its_weights_in_float32():
    losses = {}
    for precision, dtype in ((False, "float32"), (True, "bfloat16"), ("fp16", "float16")):
        trainer = Trainer(replace(TINY, half_precision=precision))
        assert trainer.model_config.dtype == dtype
        batch = next(trainer.data.train_batches(0, 1))
        for _ in range(3):
            losses[dtype] = trainer.train_step(batch).window["loss"]
        assert {x.dtype for x in jax.tree.leaves(trainer.state.params)} == {np.dtype("float32")}
    full_loss = losses.pop("float32")
    for half_loss in losses.values():
        assert half_loss.dtype == np.float32 and half_loss != full_loss
        np.testing.assert_allclose(half_loss, full_loss, rtol=2e-2)


def fp16(tmp_path, scale, **changes):
    config = replace(TINY, half_precision="fp16", run_dir=tmp_path / "run", **changes)
    trainer = Trainer(config)
    loss_scale = optim.LossScale(jax.numpy.float32(scale), jax.numpy.int32(0))
    trainer.state = replace(trainer.state, loss_scale=loss_scale)
    return trainer


def test_too_large_a_loss_scale_is_no_bad_step_and_is_halved(tmp_path):
    """The first gradient in float16 overflows at 2⁴⁰, and no longer a few halvings later. A loss
    that is not finite is a bad step.
    """
    trainer = fp16(tmp_path, 2.0**40)
    (batch,) = trainer.data.train_batches(0, 1)
    before = jax.device_get(trainer.state)
    report = jax.device_get(trainer.train_step(batch))
    after = jax.device_get(trainer.state)
    assert (report.bad_steps, report.skipped, report.loss_scale) == (0, 1, 2.0**40)
    assert after.loss_scale.scale == 2.0**39
    assert_same(after.params, before.params)
    while report.skipped == after.step:
        report = jax.device_get(trainer.train_step(batch))
        after = jax.device_get(trainer.state)
    assert report.bad_steps == 0 and 4 < report.skipped < 30
    assert np.isfinite(report.window["grad_norm"])
    break_weights(trainer)
    assert jax.device_get(trainer.train_step(batch)).bad_steps == 1


@pytest.mark.slow
def test_a_run_in_float16_records_its_loss_scale_and_resumes_bit_for_bit(tmp_path, capsys):
    trainer = fp16(tmp_path, 2.0**30)
    trainer.fit(6)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.model_config.dtype == "float16"
    assert_same(resumed.state, trainer.state)
    resumed.fit()
    trainer.fit()
    assert_same(resumed.state, trainer.state)
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert all(line["loss_scale"] < 2**30 for line in lines)


@pytest.mark.slow
def test_microbatches_train_like_the_whole_batch():
    records = []
    for n in (1, 4):
        trainer = Trainer(replace(TINY, batch_size=32, accumulate_steps=n, log_every=1))
        steps = [jax.device_get(trainer.train_step(batch)) for batch in trainer.batches(0, 12)]
        found = [[step.window[name] for step in steps] for name in ("loss", "grad_norm")]
        records.append([*found, trainer.evaluate()["eval_loss"]])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), *records)


@pytest.mark.slow
def test_fsdp_trains_like_replicas(tmp_path):
    """And its checkpoint opens without FSDP."""
    reports = []
    for fsdp in (1, 4):
        config = replace(TINY, fsdp=fsdp, run_dir=tmp_path / str(fsdp), n_steps=3)
        trainer = Trainer(config)
        for batch in trainer.data.train_batches(0, 3):
            report = trainer.train_step(batch)
        reports.append(jax.device_get(report.window))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *reports)
    trainer.save()
    opened = Trainer(TrainConfig(run_dir=tmp_path / "4", resume=True, fsdp=1))
    assert_same(opened.state, trainer.state)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset_name": "cifar"}, "unknown dataset 'cifar'; did you mean 'cifar10'"),
        ({"model": "DiT-M/2"}, "unknown model 'DiT-M/2'"),
        ({"block": "adaln-zero"}, "unknown block 'adaln-zero'; did you mean 'adaln_zero'"),
        ({"patch_size": 3}, "image_size 8 is not divisible by patch_size 3"),
        ({"batch_size": 12}, "--batch_size 12 is not divisible by the 8 devices"),
        (
            {"accumulate_steps": 2},
            "--batch_size 8 is not divisible by the 8 devices × 2 microbatches",
        ),
        ({"nan_patience": 0}, "--nan_patience 0: must be above 0"),
        ({"fsdp": 3}, "--fsdp 3 does not divide the 8 devices"),
        ({"learning_rate": 0.0}, "--learning_rate 0.0: must be above 0"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"solver": "rk4"}, "unknown solver 'rk4'"),
        ({"data_dir": Path("/nowhere")}, "/nowhere"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Trainer(replace(TINY, run_dir=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(whole):
    with pytest.raises(UserError, match="already exists; continue it with --resume"):
        Trainer(replace(TINY, run_dir=whole.run_dir))


def test_a_resume_that_disagrees_names_the_fields(whole):
    with pytest.raises(
        UserError, match=r"batch_size was 8, not 16; learning_rate was 0\.003, not 0\.1"
    ):
        Trainer(TrainConfig(run_dir=whole.run_dir, resume=True, batch_size=16, learning_rate=0.1))


def test_a_resume_on_no_device_is_refused(whole):
    with pytest.raises(UserError, match="--fsdp 0: must be above 0"):
        Trainer(TrainConfig(run_dir=whole.run_dir, resume=True, fsdp=0))


def test_a_resume_on_other_data_is_refused(whole, tmp_path):
    other = make_copy("digits", tmp_path / "data", n=16)
    with pytest.raises(UserError, match="digits had 1437 training rows, now it has 16"):
        Trainer(TrainConfig(run_dir=whole.run_dir, resume=True, data_dir=other))


@pytest.mark.slow
def test_a_set_without_classes_trains_and_draws(tmp_path, capsys):
    trainer = Trainer(replace(TINY, label_column="", n_steps=2, run_dir=tmp_path / "run"))
    trainer.fit()
    assert trainer.model_config.n_classes == 0
    assert trainer.sample([0, 0]).shape == (2, 8, 8, 1)
    generate.main(generate.GenerateConfig(run=tmp_path / "run", n=2, out=tmp_path / "a.png"))


def test_guidance_of_an_unconditional_model_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"--cfg_scale 2\.0: .* cannot be guided"):
        Trainer(replace(TINY, conditioning="none", cfg_scale=2.0))
    trainer = Trainer(replace(TINY, conditioning="none", run_dir=tmp_path / "run"))
    assert trainer.config.cfg_scale == 1.0 and trainer.sample([0, 0]).shape == (2, 8, 8, 1)
    with pytest.raises(UserError, match=r"cfg_scale 2\.0: an unconditional model cannot be guided"):
        trainer.sample([0], cfg_scale=2)


def test_a_run_that_drops_no_labels_is_sampled_and_exported_without_guidance(tmp_path, capsys):
    run = tmp_path / "run"
    config = replace(TINY, model="DiT-Nano/4", label_dropout=0.0, run_dir=run)
    trainer = Trainer(config)
    assert trainer.config.cfg_scale == 1 and trainer.sample([3]).shape == (1, 8, 8, 1)
    with pytest.raises(UserError, match="has no null label to guide by"):
        trainer.sample([3], cfg_scale=2)
    trainer.save()
    # Of a version that took the dataset's scale all the same.
    saved = json.loads((run / "config.json").read_text())
    assert saved.pop("null_is_trained") is False
    (run / "config.json").write_text(json.dumps(saved | {"cfg_scale": 1.5}))
    resumed = prepare(TrainConfig(run_dir=run, resume=True), parallel.devices())
    assert resumed.config.cfg_scale == 1
    export.main(export.ExportConfig(run=run, out=tmp_path / "out"))
    assert "sample it without guidance" in (tmp_path / "out/README.md").read_text()
    exported = TrainedModel.from_pretrained(str(tmp_path / "out"))
    assert exported.plan(SamplingOverrides()).cfg_scale == 1
    with pytest.raises(UserError, match="has no null label to guide by"):
        exported.plan(SamplingOverrides(cfg_scale=2.0))
    # Weights with a null label keep it.
    (run / "config.json").write_text(json.dumps(saved | {"label_dropout": 0.1}))
    started = replace(config, init_from=str(run), run_dir=tmp_path / "new")
    prepared = prepare(started, parallel.devices())
    assert prepared.null_is_trained and prepared.config.cfg_scale != 1


# --- runs on captions -----------------------------------------------------------------------------

TEMPLATES = ("a drawing of {label}", "number {label} in ink", "")


@pytest.fixture(scope="module")
def on_captions(tmp_path_factory) -> Trainer:
    """A run on captions, one of them the null, whose text encoder is gone."""
    folder = tmp_path_factory.mktemp("captions")
    trainer = Trainer(
        replace(
            TINY,
            model="MMDiT-Nano/8",
            caption=TEMPLATES,
            text_towers=(save_clip(folder / "clip"),),
            caption_cache=folder / "cache",
            run_dir=folder / "run",
        )
    )
    trainer.fit()
    shutil.move(folder / "clip", folder / "gone")
    return trainer


@pytest.mark.slow
def test_a_run_on_captions_resumes_without_its_text_encoder(on_captions, tmp_path, capsys):
    half = tmp_path / "half"
    config = replace(on_captions.config, run_dir=half)
    shutil.copytree(on_captions.run_dir, half)
    shutil.rmtree(half / "checkpoints/12")
    resumed = Trainer(TrainConfig(run_dir=half, resume=True))
    assert resumed.step == 6 and resumed.config.caption == config.caption == TEMPLATES
    resumed.fit()
    assert_same(resumed.state, on_captions.state)


@pytest.mark.slow
def test_captions_are_not_encoded_by_another_text_encoder(on_captions, tmp_path):
    """The cache is gone, and in the text encoder's place lies another."""
    half = tmp_path / "half"
    shutil.copytree(on_captions.run_dir, half)
    clip = save_clip(Path(on_captions.config.text_towers[0]), seed=1)
    try:
        with pytest.raises(UserError, match="is not the one that was trained with"):
            Trainer(TrainConfig(run_dir=half, resume=True, caption_cache=tmp_path / "empty"))
        assert not (tmp_path / "empty").exists()
    finally:
        shutil.rmtree(clip)


@pytest.mark.slow
def test_a_prompt_is_encoded_by_the_text_encoder_of_the_training(on_captions, tmp_path, capsys):
    seen = on_captions.sample(["a drawing of 3", "number 7 in ink"])
    assert np.abs(seen[0] - seen[1]).max() > 0
    assert on_captions.sample("a drawing of 3").shape == (1, 8, 8, 1)
    with pytest.raises(UserError, match="no captions to sample"):
        on_captions.sample([])
    with pytest.raises(UserError, match="cannot load the text encoder"):
        on_captions.sample(["never said"])
    clip = Path(on_captions.config.text_towers[0])
    other = save_clip(clip, seed=1)
    with pytest.raises(UserError, match="is not the one that was trained with"):
        on_captions.sample(["never said"])
    shutil.rmtree(other)
    shutil.copytree(clip.with_name("gone"), clip)
    try:
        run_dir, out = on_captions.run_dir, tmp_path / "a.npz"
        how = generate.GenerateConfig(run=run_dir, n=4, out=out)
        prompts = ("never said, before", "number 7 in ink")
        generate.main(replace(how, prompts=prompts))
        with np.load(out) as arrays:
            assert arrays["arr_1"].tolist() == [0, 0, 1, 1]
            drawn = arrays["arr_0"]
        # The embedding that was trained on and the one made for a prompt are one.
        cached = on_captions.sample(["", "", "number 7 in ink", "number 7 in ink"])[2:]
        assert np.abs(drawn[2:].astype(int) - grids.to_uint8(cached)).max() <= 1
        guided = {"prompts": prompts, "cfg_scale": 2.0}
        for negative, same in (("", True), ("a drawing of 3", False)):
            generate.main(replace(how, negative_prompt=negative, **guided))
            generate.main(replace(how, out=tmp_path / "b.npz", **guided))
            with np.load(out) as a, np.load(tmp_path / "b.npz") as b:
                assert (a["arr_0"] == b["arr_0"]).all() == same
        with pytest.raises(UserError, match="--labels are of classes"):
            generate.main(replace(how, labels=("7",), negative_prompt="a seven"))
        generate.main(replace(how, denoise=(0.5,), n=2, out=tmp_path / "sheet.png"))
        with pytest.raises(UserError, match="longer than the text encoder takes: 'word word"):
            generate.main(replace(how, prompts=("word " * 40,)))
        moved = (str(clip.with_name("gone")),)
        generate.main(replace(how, prompts=prompts, text_towers=moved))
        for wrong in ({"labels": ("7",)}, {}):
            with pytest.raises(UserError, match="name them by --prompts"):
                generate.main(replace(how, **wrong))
    finally:
        shutil.rmtree(clip)


def test_a_prompt_for_a_model_of_classes_is_refused(whole):
    how = generate.GenerateConfig(run=whole.run_dir, prompts=("a seven",))
    with pytest.raises(UserError, match="choose classes by --labels"):
        generate.main(how)


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_run_opens_on_fewer_devices_than_it_was_trained_on(whole, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 5)  # divides neither the batch nor fsdp
    config = json.loads((whole.run_dir / "config.json").read_text())
    assert Trainer.from_run(whole.run_dir).step == 12 and config["batch_size"] == 8


def test_broken_images_end_a_run_before_it_writes(tmp_path, capsys):
    for name in ("cat", "dog"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(8):
            Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    (tmp_path / "data/dog/9.png").write_text("not an image")
    config = replace(TINY, dataset_name=f"folder:{tmp_path / 'data'}", run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"row \d+, column 'image': the image cannot be read"):
        Trainer(config).fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_an_older_version_resumes_with_new_flags_at_their_defaults(whole, tmp_path):
    shutil.copytree(whole.run_dir, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["beta1"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert Trainer.from_run(tmp_path / "run").config.beta1 == 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", [c.name for c in DATASET_CONFIGS.values() if not c.latents_dir])
def test_every_dataset_trains(tmp_path, name, capsys):
    """On a local copy in the hub's schema. Two of them, one of captions, as a whole run."""
    config = replace(
        TINY,
        dataset_name=name,
        data_dir=make_copy(name, tmp_path / "data"),
        text_towers=(save_clip(tmp_path / "clip"),) if name == "coco" else None,  # pyright: ignore[reportArgumentType]
        model=("MM" if name in ("cifar10", "coco") else "")
        + ("DiT-Nano/8" if DATASET_CONFIGS[name].image_size % 8 == 0 else "DiT-Nano/4"),
        n_steps=5,
        eval_save_steps=5,
        run_dir=tmp_path / "run",
    )
    trainer = Trainer(config)
    if name in ("cifar10", "coco"):
        trainer.fit()
        assert trainer.step == 5 and np.isfinite(metrics(tmp_path / "run")[-1]["eval_loss"])
        return
    for batch in trainer.data.train_batches(0, 2):
        loss = trainer.train_step(batch).window["loss"]
    assert np.isfinite(loss) and np.isfinite(trainer.evaluate()["eval_loss"])
    labels = trainer.conditioning.grid_words(display.COLUMNS, trainer.source.eval) * display.ROWS
    side, channels = trainer.model_config.image_size, trainer.model_config.channels
    blank = np.zeros((len(labels), side, side, channels), np.float32)
    assert display.sample_grid(blank, labels, trainer.dataset.label_names).width > side
