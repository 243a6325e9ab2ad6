"""A value comes from the flag, the resumed run, the dataset or the default, in that order. An
impossible value is named, and no flag is ignored.
"""

import ast
import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from commands import ROOT

from datasets_config import DATASET_CONFIGS
from methods.ddpm import DDPM
from methods.rectified_flow import RectifiedFlow, logit_normal
from methods.registry import METHODS
from model import MODELS
from runtime import run_folder
from runtime.cli import parse_flags
from runtime.errors import UserError
from runtime.flags import flags_of
from training.autoencoder.config import VaeConfig, resolve_vae_config
from training.config import TrainConfig
from training.loop import flags_as_json
from training.resolve import (
    merge_saved,
    network_config,
    recorded_flags,
    resolve_train_config,
    training_method,
)
from training.session import RunRecord

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]
DIGITS = DATASET_CONFIGS["digits"]


def resolved(dataset=DIGITS, *, n_rows=1000, fast_bf16=False, **flags: Any):
    return resolve_train_config(
        TrainConfig(**flags), dataset, n_rows=n_rows, n_devices=8, fast_bf16=fast_bf16
    )


def resumed(run, **flags: Any):
    return merge_saved(TrainConfig(resume=True, **flags), run)


def saved(**flags: Any):
    """Return the flags in the `config.json` of a run, as they are read back."""
    return json.loads(json.dumps(vars(resolved(**flags)), default=str))


# --- where a value comes from ---------------------------------------------------------------------


def test_the_flag_wins_over_the_dataset_and_the_dataset_over_the_default():
    recommends = replace(DIGITS, batch_size=24, cfg_scale=3.0)
    assert (
        resolved(recommends).batch_size == 24 and resolved(recommends, batch_size=8).batch_size == 8
    )
    assert resolved(recommends).schedule == "cosine"
    assert resolved(recommends, schedule="linear").schedule == "linear"
    # 0 and False are given, not left out.
    assert resolved(recommends, cfg_scale=0.0).cfg_scale == 0
    assert resolved(fast_bf16=True, half_precision=False).half_precision is False


def test_the_flag_wins_over_the_resumed_run_and_the_run_over_the_dataset():
    run = saved(batch_size=16, solver="heun", learning_rate=1e-4)
    config = resolve_train_config(
        resumed(run, solver="euler"),
        DIGITS,
        n_rows=1000,
        n_devices=8,
        fast_bf16=False,
    )
    assert (config.batch_size, config.learning_rate, config.solver) == (16, 1e-4, "euler")


def test_a_run_resumed_without_flags_resolves_to_the_same_config():
    run = saved(batch_size=16, n_epochs=3.0, rope=True, half_precision=True, model="DiT-S/2")
    config = resumed(run)
    again = resolve_train_config(config, DIGITS, n_rows=1000, n_devices=8, fast_bf16=True)
    assert json.loads(json.dumps(vars(again), default=str)) == run | {"resume": True}


def test_every_flag_is_filled_in():
    may_be_none = {"data_dir", "image_column", "label_column", "in_memory", "n_workers", "n_epochs"}
    may_be_none |= {"run_dir", "peak_tflops", "caption_column", "caption", "caption_cache"}
    may_be_none |= {"latents", "vae", "learned_sigma", "min_snr_gamma"}
    may_be_none |= {"equal_share", "target_scale", "target_mix", "target_interval"}
    may_be_none |= {"adaptive_power", "tangent", "teacher", "teacher_scale", "align"}
    may_be_none |= {"fid_reference", "inception", "init_from"}
    may_be_none |= {"wandb_project", "train_split", "eval_split", "keep_every", "decay_from"}
    may_be_none |= {"text_length", "coordinator", "n_processes", "process_index"}
    config = resolved()
    assert {name for name in FIELDS if getattr(config, name) is None} == may_be_none


@pytest.mark.parametrize("name", DATASET_CONFIGS)
def test_every_datasets_recommendation_is_valid(name):
    dataset = DATASET_CONFIGS[name]
    config = resolved(dataset)
    model = network_config(config, dataset)
    assert (model.n_classes, model.image_size) == (dataset.n_classes, dataset.image_size)
    assert model.channels == model.out_channels == dataset.channels


# --- how long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows, n_epochs, n_steps", [(1000, 2, 125), (1000, 0.5, 32), (17, 1, 2)])
def test_epochs_become_steps(n_rows, n_epochs, n_steps):
    assert resolved(n_rows=n_rows, n_epochs=n_epochs, batch_size=16).n_steps == n_steps


def test_n_steps_takes_precedence_over_n_epochs():
    assert resolved(n_steps=7, n_epochs=100).n_steps == 7


@pytest.mark.parametrize("first", [{"n_steps": 50}, {"n_epochs": 4.0}])
def test_a_resumed_run_may_be_longer(first):
    for more, n_steps in (({"n_steps": 90}, 90), ({"n_epochs": 8.0}, 500)):
        config = resumed(saved(batch_size=16, **first), **more)
        config = resolve_train_config(config, DIGITS, n_rows=1000, n_devices=8, fast_bf16=False)
        assert config.n_steps == n_steps


def test_intervals_and_warmup_follow_from_the_length():
    config = resolved(n_steps=400)
    assert (config.warmup_steps, config.eval_save_steps, config.sample_every_n) == (20, 100, 100)
    short = resolved(n_steps=1)
    assert (short.warmup_steps, short.eval_save_steps, short.sample_every_n) == (0, 1, 1)


# --- resuming -------------------------------------------------------------------------------------


def test_a_changed_flag_is_named_with_both_values():
    with pytest.raises(UserError) as error:
        run = saved(learning_rate=1e-4, batch_size=16)
        resumed(run, learning_rate=1e-5, batch_size=8, rope=True, log_every=3)
    assert str(error.value) == (
        "cannot resume: rope was False, not True; batch_size was 16, not 8; "
        "learning_rate was 0.0001, not 1e-05"
    )


def test_the_same_flags_may_be_given_again():
    flags = {"learning_rate": 1e-4, "model": "DiT-S/4", "dataset_name": "digits", "seed": 3}
    resumed(saved(**flags), **flags)


FREE = {
    "data_dir": Path("/elsewhere"),
    "caption_cache": Path("/elsewhere"),
    "in_memory": True,
    "n_workers": 2,
    "fsdp": 4,
    "remat": True,
    "log_every": 3,
    "eval_save_steps": 11,
    "n_eval_batches": 1,
    "sample_every_n": 13,
    "keep_checkpoints": 9,
    "keep_every": 1000,
    "snapshot_every": 7,
    "cfg_scale": 4.0,
    "n_sample_steps": 7,
    "solver": "heun",
    "sample_shift": 2.0,
    "fid_every": 100,
    "fid_reference": Path("/elsewhere"),
    "fid_n": 50,
    "fid_features": "pixels",
    "inception": "elsewhere",
    "peak_tflops": 1.0,
}


@pytest.mark.parametrize("name, value", FREE.items(), ids=FREE)
def test_flags_that_leave_the_numbers_alone_may_change(name, value):
    config = resumed(saved(), **{name: value})
    assert getattr(config, name) == value


@pytest.mark.parametrize(
    "name, value",
    {
        "model": "DiT-S/2",
        "patch_size": 4,
        "seed": 1,
        "schedule": "linear",
        "ema_decay": 0.5,
        "ema_std": (0.05, 0.1),
        "label_dropout": 0.2,
        "half_precision": True,
        "image_size": 16,
        "conditioning": "none",
        "text_towers": ("another/encoder",),
        "caption": ("a {label}",),
        "objective": "ddpm",
        "learned_sigma": True,
    }.items(),
)
def test_flags_that_change_the_numbers_may_not(name, value):
    with pytest.raises(UserError, match=f"cannot resume: {name} was"):
        resumed(saved(), **{name: value})


def test_spellings_of_a_size_are_equal_and_a_square_is_its_side():
    """Also in a `config.json`, so that runs of any version resume."""
    run = saved(image_size=32)
    assert saved(image_size="32x32") == run and run["image_size"] == 32
    assert resumed(run, image_size="32×32") == resumed(run)
    assert resumed(saved(image_size="16x24"), image_size="16×24").image_size == "16x24"
    with pytest.raises(UserError, match="cannot resume: image_size was 16x24, not 24x16"):
        resumed(saved(image_size="16x24"), image_size="24x16")


def test_synonyms_of_a_precision_are_equal():
    run = saved(half_precision=True)
    assert resumed(run, half_precision="bf16").half_precision == "bf16"
    with pytest.raises(UserError, match="half_precision was True, not fp16"):
        resumed(run, half_precision="fp16")


# --- impossible values ----------------------------------------------------------------------------

BAD = [
    *[(name, 0) for name in ("n_steps", "batch_size", "patch_size", "image_size", "fsdp")],
    *[(name, 0) for name in ("log_every", "eval_save_steps", "sample_every_n", "n_eval_batches")],
    *[(name, 0) for name in ("keep_checkpoints", "n_sample_steps")],
    *[(name, 0.0) for name in ("learning_rate", "logit_std", "time_shift", "sample_shift")],
    *[(name, -1.0) for name in ("learning_rate", "weight_decay", "clip_norm", "label_dropout")],
    *[(name, -1.0) for name in ("ema_decay", "beta1", "beta2", "n_epochs", "peak_tflops")],
    *[(name, 1.5) for name in ("label_dropout", "ema_decay", "beta1", "beta2")],
    # Adam divides by 1 − βⁿ.
    *[(name, 1.0) for name in ("beta1", "beta2")],
    *[
        (name, float("nan"))
        for name in ("learning_rate", "cfg_scale", "logit_mean", "weight_decay")
    ],
    ("learning_rate", float("inf")),
    ("warmup_steps", -1),
    ("n_epochs", 0.0),
    ("n_workers", -1),
    # Esser et al. 2024, eq. 20: beyond −1 … 2 / (π − 2), times leave 0 … 1.
    *[("mode_scale", scale) for scale in (-1.5, 2.0)],
    ("model", "DiT-S/3"),
    ("schedule", "cosin"),
    ("solver", "rk4"),
    ("time_density", "normal"),
    ("objective", "ddim"),
    ("fsdp", 3),
]


@pytest.mark.parametrize("name, value", BAD, ids=[f"{name} {value}" for name, value in BAD])
def test_an_impossible_value_is_named_with_its_flag(name, value):
    with pytest.raises(UserError) as error:
        resolved(**{name: value})
    assert name in str(error.value) and str(value) in str(error.value)


def test_epochs_of_empty_batches_are_refused():
    with pytest.raises(UserError, match="--batch_size 0: must be above 0"):
        resolved(n_epochs=1.0, batch_size=0)


@pytest.mark.parametrize("name", ["block", "position", "mlp", "norm"])
def test_an_unknown_part_of_the_model_is_named(name):
    part: Any = {name: "nonesuch"}
    with pytest.raises(UserError, match=f"unknown {name} 'nonesuch'"):
        network_config(resolved(**part), DIGITS)


def test_an_image_size_that_patches_do_not_divide_is_named():
    with pytest.raises(UserError, match="image_size 30 is not divisible by patch_size 4"):
        network_config(resolved(image_size=30, patch_size=4), DIGITS)


# --- the model and the loss of a config -----------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_presets_patch_size_is_the_default(name):
    dataset = replace(DIGITS, image_size=32)
    preset = network_config(resolved(dataset, model=name), dataset)
    assert preset.patch_size == int(name.partition("/")[2] or 2)
    assert network_config(resolved(dataset, model=name, patch_size=16), dataset).grid == (2, 2)


@pytest.mark.parametrize("name", MODELS)
def test_the_presets_blocks_are_the_default(name):
    joint = name.startswith(("MMDiT", "SD3"))
    config = resolved(model=name)
    expected = ("joint", True, "cropped") if joint else ("adaln_zero", False, "sincos")
    if name.startswith("SD3"):
        expected = ("joint", "3.5" in name, "centred")
    if name.startswith("JiT"):
        expected = ("adaln_zero", True, "sincos")
        found = (config.bottleneck, config.mlp, config.norm, config.rope)
        assert found == (256 if "-H/" in name else 128, "swiglu", "rms", True)
    assert (config.block, config.qk_norm, config.position) == expected
    changed = resolved(model=name, qk_norm=not config.qk_norm, position="learned")
    assert (changed.qk_norm, changed.position) == (not config.qk_norm, "learned")
    with pytest.raises(UserError, match=f"--block .*: {name} takes"):
        resolved(model=name, block="adaln" if joint else "joint")


@pytest.mark.parametrize(
    "flag", [{"text_towers": ("a/b",)}, {"text_length": 8}, {"caption_cache": Path("x")}]
)
def test_flags_for_captions_are_rejected_without_captions(flag):
    with pytest.raises(UserError, match="is for captions; pass --caption_column or --caption too"):
        resolved(**flag)
    captioned = replace(DIGITS, templates=("a {label}",))
    assert resolved(captioned, **flag).conditioning == "text"


def test_a_text_encoders_folder_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    captioned = replace(DIGITS, templates=("a {label}",))
    config = resolved(captioned, text_towers=("encoder", "a/b"))
    assert config.text_towers == (str(tmp_path / "encoder"), "a/b")
    run = json.loads(json.dumps(vars(config), default=str))
    assert resumed(run, text_towers=("encoder", "a/b")).text_towers == config.text_towers


def test_an_unconditional_model_is_not_guided():
    unlabelled = replace(DIGITS, label_column=None, n_classes=0, cfg_scale=3.0)
    assert resolved(unlabelled).cfg_scale == resolved(conditioning="none").cfg_scale == 1
    assert network_config(resolved(conditioning="none"), DIGITS).n_classes == 0
    with pytest.raises(UserError, match=r"--cfg_scale 2\.0: an unconditional model"):
        resolved(conditioning="none", cfg_scale=2.0)


def test_a_run_that_drops_no_labels_is_not_guided():
    assert resolved(label_dropout=0.0).cfg_scale == 1
    assert resolved(label_dropout=0.0, cfg_scale=1.0).cfg_scale == 1
    assert resolved(label_dropout=0.1).cfg_scale == DIGITS.cfg_scale != 1
    with pytest.raises(UserError, match=r"--cfg_scale 2\.0: with --label_dropout 0 no null label"):
        resolved(label_dropout=0.0, cfg_scale=2.0)
    # The weights that it starts from may have a null label already.
    kept = resolve_train_config(
        TrainConfig(label_dropout=0.0),
        DIGITS,
        n_rows=1000,
        n_devices=8,
        fast_bf16=False,
        starts_with_null=True,
    )
    assert kept.cfg_scale == DIGITS.cfg_scale


@pytest.mark.parametrize(
    "fast_bf16, half_precision, dtype",
    [
        (False, None, "float32"),
        (True, None, "bfloat16"),
        (False, True, "bfloat16"),
        (True, False, "float32"),
    ],
)
def test_half_precision_is_the_default_where_it_is_faster(fast_bf16, half_precision, dtype):
    config = resolved(fast_bf16=fast_bf16, half_precision=half_precision)
    assert network_config(config, DIGITS).dtype == dtype


def test_every_flag_of_the_model_reaches_it():
    chosen: dict[str, Any] = {
        "block": "in_context",
        "position": "learned",
        "rope": True,
        "qk_norm": True,
        "mlp": "swiglu",
        "norm": "rms",
        "remat": True,
        "patch_size": 4,
        "image_size": 16,
        "channels": 3,
    }
    model = network_config(resolved(**chosen), DIGITS)
    assert {name: getattr(model, name) for name in chosen} == chosen


def test_large_models_rematerialise_by_default():
    for name in ("DiT-L/2", "DiT-XL/2", "MMDiT-L/2", "JiT-L/16", "JiT-H/32"):
        assert resolved(model=name).remat
    assert not resolved(model="DiT-B/2").remat
    assert network_config(resolved(model="DiT-XL/2"), DIGITS).remat
    assert not network_config(resolved(model="DiT-B/2"), DIGITS).remat
    assert not network_config(resolved(model="DiT-XL/2", remat=False), DIGITS).remat


def test_every_flag_of_rectified_flow_reaches_the_method():
    flags: dict[str, Any] = {"logit_mean": -0.5, "logit_std": 0.7, "time_shift": 3.0}
    method = training_method(resolved(time_density="logit_normal", **flags))
    assert method == RectifiedFlow("logit_normal", **flags)
    u = jnp.linspace(0.1, 0.9, 9)
    assert (RectifiedFlow("logit_normal", **flags).density(u) == logit_normal(-0.5, 0.7)(u)).all()
    assert training_method(resolved(time_density="mode", mode_scale=0.5)) == RectifiedFlow(
        "mode", mode_scale=0.5
    )


def test_every_flag_of_ddpm_reaches_the_method():
    flags: dict[str, Any] = {"prediction": "v", "learned_sigma": True, "min_snr_gamma": 5.0}
    config = resolved(objective="ddpm", **flags)
    assert training_method(config) == DDPM(**flags)
    assert (
        network_config(config, DIGITS).channels,
        network_config(config, DIGITS).out_channels,
    ) == (1, 2)
    assert network_config(resolved(objective="ddpm"), DIGITS).out_channels == 1


def test_each_objective_has_its_own_prediction():
    assert resolved().prediction == "velocity"
    assert resolved(objective="ddpm").prediction == "epsilon"
    assert resolved(prediction="x0").t_min == 0.05
    old = saved() | {"prediction": None}  # as runs of flows recorded it
    assert training_method(resolved()) == RectifiedFlow.from_flags(old)


def test_an_inner_head_stands_after_three_tenths_of_the_blocks_by_default():
    assert resolved().inner_head == 0
    assert resolved(model="DiT-B/2", inner_head=True).inner_head == 4
    assert resolved(model="DiT-XL/2", inner_head=True).inner_head == 8
    assert resolved(model="DiT-B/2", inner_head=1).inner_head == 1
    assert network_config(resolved(inner_head=2), DIGITS).inner_head == 2
    run = saved(model="DiT-B/2", inner_head=True)
    assert resumed(run, inner_head=True).inner_head == resumed(run).inner_head == 4
    with pytest.raises(UserError, match="inner_head was 4, not 3"):
        resumed(run, inner_head=3)
    with pytest.raises(UserError, match="inner_head 4: of 6 blocks it may stand after 1 to 3"):
        network_config(resolved(inner_head=4), DIGITS)


@pytest.mark.parametrize("blocks", [(2, 3, 4), (3,), (4, 2), (3, 3), (4, 8), (0, 2)])
def test_layer_sync_takes_two_blocks(blocks):
    words = " ".join(map(str, blocks))
    with pytest.raises(UserError, match=f"--layer_sync {words}: takes two blocks of the 6.* 2 4"):
        resolved(layer_sync=blocks)


def test_alignment_takes_a_block_and_no_teacher():
    assert resolved(model="DiT-XL/2", align="dinov2-base").align_at == 8
    assert resolved(align="dinov2-base").align_until == 1
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("--align_at 7: the network has 6 blocks", {"align_at": 7}),
        (r"--align_until 1\.5: must be at most 1", {"align_until": 1.5}),
        (r"--align_at 3: on --route 1 -1 tokens are missing", {"align_at": 3, "route": (1, -1)}),
        ("mutually exclusive", {"teacher": "runs/a", "objective": "meanflow"}),
    ]
    for message, flags in wrong:
        with pytest.raises(UserError, match=message):
            resolved(align="dinov2-base", **flags)
    with pytest.raises(UserError, match="cannot resume: there was no --align"):
        resumed(saved(), align="dinov2-base")


@pytest.mark.parametrize(
    "stds, message",
    [
        ((0.1,), "--ema_std 0.1: takes two or more widths, such as 0.05 0.1"),
        ((0.1, 0.0), "--ema_std 0: must be at least 0.001, and below 0.2887"),
        ((0.1, 0.3), "--ema_std 0.3: must be at least 0.001, and below 0.2887"),
        ((0.1, 0.05, 0.1), "--ema_std 0.1 0.1: must be at least a tenth apart"),
        ((0.105, 0.1), "--ema_std 0.1 0.105: must be at least a tenth apart"),
    ],
)
def test_averages_must_be_two_or_more_that_differ(stds, message):
    with pytest.raises(UserError, match=message):
        resolved(ema_std=stds)


def test_there_are_twenty_snapshots_by_default():
    assert resolved(ema_std=(0.05, 0.1), n_steps=2000).snapshot_every == 100
    assert resolved(ema_std=(0.05, 0.1), n_steps=7).snapshot_every == 1


def test_each_objective_has_its_own_solvers():
    assert resolved().solver == "euler"
    assert resolved(objective="ddpm").solver == "ddpm"
    assert resolved(objective="ddpm", solver="ddim").solver == "ddim"
    wrong: dict[str, dict[str, Any]] = {
        "euler, heun, dpmpp_2m, sde": {"solver": "ddim"},
        "ddpm, ddim, dpmpp_2m": {"solver": "heun", "objective": "ddpm"},
    }
    for takes, flags in wrong.items():
        with pytest.raises(UserError, match=rf"--solver \w+ is not for .*one of: {takes}$"):
            resolved(**flags)
    with pytest.raises(UserError, match="--solver sde takes at least 2 steps"):
        resolved(solver="sde", n_sample_steps=1)
    with pytest.raises(UserError, match="sampling steps is 1001; DDPM has 1000"):
        resolved(objective="ddpm", n_sample_steps=1001)
    with pytest.raises(UserError, match="unknown prediction 'eps'"):
        resolved(objective="ddpm", prediction="eps")
    with pytest.raises(UserError, match=r"unknown prediction 'epsilon'.*velocity, x0"):
        resolved(prediction="epsilon")
    with pytest.raises(UserError, match=r"--min_snr_gamma -1\.0: must be at least 0"):
        resolved(objective="ddpm", min_snr_gamma=-1.0)


@pytest.mark.parametrize(
    "objective, name, value",
    [
        *[("ddpm", name, 1.0) for name in ("logit_mean", "logit_std", "mode_scale")],
        *[("ddpm", name, 1.0) for name in ("time_shift", "sample_shift")],
        ("ddpm", "time_density", "uniform"),
        *[("ddpm", name, 0.5) for name in ("t_min", "noise_scale")],
        ("rectified_flow", "learned_sigma", False),
        ("rectified_flow", "min_snr_gamma", 5.0),
    ],
)
def test_a_flag_of_the_other_objective_is_rejected(objective, name, value):
    with pytest.raises(UserError, match=f"--{name} is for --objective .*; this is {objective}"):
        flag: Any = {name: value}
        resolved(objective=objective, **flag)
    assert getattr(resolved(objective=objective), name) is None


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("logit_mean", 0.0, "--logit_mean is for --time_density logit_normal"),
        ("logit_std", 0.5, "--logit_std is for --time_density logit_normal"),
        ("mode_scale", 1.0, "--mode_scale is for --time_density mode"),
        ("t_min", 0.1, "--t_min is for --prediction x0"),
        ("inner_weight", 0.4, "--inner_weight is for --inner_head"),
        ("sync_weight", 0.4, "--sync_weight is for --layer_sync"),
        ("align_until", 0.4, "--align_until is for --align"),
        ("snapshot_every", 5, "--snapshot_every is for --ema_std"),
        ("vae", "us/vae", "--vae is for --latents"),
        ("shuffle_buffer", 9, "--shuffle_buffer is for --streaming"),
        ("fid_reference", Path("a.npz"), "--fid_reference is for --fid_every"),
        ("fid_n", 9, "--fid_n is for --fid_every"),
        ("fid_features", "pixels", "--fid_features is for --fid_every"),
        ("inception", "a.pth", "--inception is for --fid_every"),
    ],
)
def test_a_flag_without_the_flag_it_needs_is_rejected(name, value, message):
    flag: Any = {name: value}
    with pytest.raises(UserError) as error:
        resolved(time_density="uniform", **flag)
    assert str(error.value) == message


def test_a_resumed_run_may_keep_unread_flags():
    config = resumed(saved(time_density="uniform") | {"logit_mean": 0.5}, fid_n=9)
    config = resolve_train_config(config, DIGITS, n_rows=1000, n_devices=8, fast_bf16=False)
    assert (config.logit_mean, config.fid_n) == (0.5, 9)


def test_a_ddpm_run_resumed_without_flags_resolves_to_the_same_config():
    run = saved(objective="ddpm", learned_sigma=True, solver="ddim")
    again = resolve_train_config(resumed(run), DIGITS, n_rows=1000, n_devices=8, fast_bf16=False)
    assert json.loads(json.dumps(vars(again), default=str)) == run | {"resume": True}
    config = resumed(run, solver="ddpm")
    assert (
        resolve_train_config(config, DIGITS, n_rows=1000, n_devices=8, fast_bf16=False).solver
        == "ddpm"
    )


# --- the record of given flags --------------------------------------------------------------------


def test_given_flags_are_recorded_over_all_starts():
    first = TrainConfig(
        run_dir=Path("runs/a"), model="DiT-S/2", n_steps=9, caption=("a {label}",), rope=False
    )
    record = recorded_flags(first, {})
    assert record == {"caption": ["a {label}"], "model": "DiT-S/2", "rope": False, "n_steps": 9}
    second = TrainConfig(resume=True, profile=True, latents=Path("moved"), n_steps=12)
    record = recorded_flags(second, {"given_flags": record})
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "caption": ["a {label}"],
        "model": "DiT-S/2",
        "rope": False,
        "n_steps": 12,
        "latents": "moved",
    }


def test_epochs_given_on_resume_replace_the_recorded_steps():
    config = TrainConfig(resume=True, n_epochs=2.0)
    assert recorded_flags(config, {"given_flags": {"n_steps": 9}}) == {"n_epochs": 2.0}


def test_flags_of_a_run_without_a_record_stay_unknown():
    assert recorded_flags(TrainConfig(resume=True, n_steps=12), saved()) is None


# --- starting a run once more ---------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "no flags": {},
    "another length": {"n_epochs": 3.0, "batch_size": 16, "learning_rate": 1e-5},
    "a density": {"time_density": "uniform", "time_shift": 3.0, "seed": 7},
    "ddpm": {"objective": "ddpm", "learned_sigma": True, "solver": "ddim"},
    "captions": {"caption": ("a {label}, drawn", "none"), "text_towers": ("a/b", "c/d")},
    "a place": {"run_dir": Path("runs/x"), "resume": True, "profile": True, "distributed": True},
    "fid": {"fid_every": 9, "fid_reference": Path("x.npz"), "fid_features": "pixels"},
}


def write_run(path: Path, config: TrainConfig, given: dict[str, Any] | None) -> list[str]:
    """Write the `config.json` of a run, and return the words that start it once more."""
    record = RunRecord(flags_as_json(config), path, network_config(config, DIGITS), DIGITS)
    extra = {"text_revisions": (), "yardstick": None}
    run_folder.write_config(path, record.as_json() | extra | {"given_flags": given})
    return ["--config", str(path / "config.json")]


@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_the_config_of_a_run_starts_the_same_training(tmp_path, name, has_record):
    """From the flags given, or in a run of a version that did not record them from all values."""
    captions = {"templates": ("a {label}",)} if "caption" in RUNS[name] else {}
    dataset = replace(DIGITS, **captions)
    first = TrainConfig(**RUNS[name])

    def resolve(config):
        return resolve_train_config(config, dataset, n_rows=1000, n_devices=8, fast_bf16=False)

    given = recorded_flags(first, {}) if has_record else None
    words = write_run(tmp_path, resolve(first), given)
    again = parse_flags(TrainConfig, words)
    of_one_start = {name: getattr(TrainConfig(), name) for name in ("run_dir", "resume", "profile")}
    of_one_start["distributed"] = False
    assert resolve(again) == replace(resolve(first), **of_one_start)
    shorter = resolve(parse_flags(TrainConfig, [*words, "--n_steps", "8", "--seed", "5"]))
    assert (shorter.n_steps, shorter.seed) == (8, 5)


def test_flags_that_a_resumed_run_no_longer_reads_are_left_out(tmp_path):
    config = replace(resolved(time_density="uniform"), logit_mean=0.5, fid_n=9)
    words = write_run(tmp_path, config, {"time_density": "uniform", "logit_mean": 0.5, "fid_n": 9})
    assert parse_flags(TrainConfig, words).logit_mean is None
    resolve_train_config(
        parse_flags(TrainConfig, words), DIGITS, n_rows=1000, n_devices=8, fast_bf16=False
    )


def test_weights_to_start_from_have_the_model(tmp_path):
    """With a model given, the patch size would be the preset's and not the source's."""
    config = resolved(model="DiT-S/2", init_from="us/dit", patch_size=4)
    words = write_run(tmp_path, config, {"init_from": "us/dit"})
    again = parse_flags(TrainConfig, words)
    assert (again.init_from, again.model, again.dataset_name) == ("us/dit", None, "digits")


def test_the_run_of_another_command_is_refused(tmp_path):
    words = write_run(tmp_path, resolved(), None)
    with pytest.raises(UserError, match=r"config\.json: this is a run of train.py, not of train_v"):
        parse_flags(VaeConfig, words)


def test_the_config_of_an_autoencoder_starts_the_same_training(tmp_path):
    def resolve(config):
        dataset = replace(DIGITS, image_size=16)
        return resolve_vae_config(config, dataset, n_rows=99, n_devices=8, platform="cpu")

    first = resolve(VaeConfig(kl_weight=1e-4, block_out_channels=(8, 8), n_epochs=2.0))
    record = flags_as_json(first) | {"command": "train_vae.py", "model": "vae"}
    run_folder.write_config(tmp_path, record | {"model_config": {}, "dataset": {}})
    again = parse_flags(VaeConfig, ["--config", str(tmp_path / "config.json")])
    assert resolve(again) == first


# --- no field is ignored --------------------------------------------------------------------------


def test_every_field_is_documented():
    assert sorted(flags_of(TrainConfig)) == sorted(FIELDS)
    assert all(known.help for known in flags_of(TrainConfig).values())


def read_fields(path):
    """Yield the attributes that a module reads of a variable called config or c, outside the
    functions that check or merge flags.
    """
    checks = ("validate", "_validate", "_reject", "merge_saved")
    tree = ast.parse((ROOT / path).read_text())
    tree.body = [node for node in tree.body if not getattr(node, "name", "").startswith(checks)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name in ("c", "config"):
                yield node.attr


def test_every_field_is_read():
    """A flag that nothing reads is a promise that nobody keeps."""
    modules = ["train.py"]
    modules += [
        f"training/{name}.py"
        for name in ("config", "prepare", "conditionings", "resolve", "loop", "session", "lora")
    ]
    read = {name for module in modules for name in read_fields(module)}
    read |= {name for method in METHODS.values() for name in flags_of(method)}
    assert set(FIELDS) - read == set()
