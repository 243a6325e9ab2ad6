"""The settings of a training run: every flag of `train.py`, and how what was not said is filled in.

`resolve` is the one place where holes are filled and values are checked. Only `train.py` reads the
result; every other module takes plain arguments.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import sampling
from data import latents
from datasets_config import DATASET_CONFIGS, DatasetConfig, LatentEncoding
from methods import ddpm, rectified_flow
from model import BLOCKS, JOINT, MODELS, ModelConfig, model_config
from networks import autoencoder
from runtime.errors import UserError, unknown
from training import optim, wandb_sink
from training.config import (
    BETWEEN,
    BY_OBJECTIVE,
    DEFAULTS,
    DENSITIES,
    FREE_ON_RESUME,
    NOT_NEGATIVE,
    ONLY_WITH,
    PER_START,
    POSITIVE,
    PRECISIONS,
    PRESET,
    RECOMMENDED,
    SOLVERS,
    Config,
    TrainConfig,
)


def given_flags(config: Any) -> dict[str, Any]:
    """What was said, with paths of text towers and weights as they are called from anywhere."""
    said = {name: value for name, value in vars(config).items() if value is not None}
    if (start := said.get("init_from")) and Path(start).expanduser().exists():
        said["init_from"] = str(Path(start).expanduser().resolve())
    if towers := said.get("text_towers"):
        folders = [Path(tower).expanduser() for tower in towers]
        said["text_towers"] = tuple(
            str(folder.resolve()) if folder.is_dir() else tower
            for folder, tower in zip(folders, towers)
        )
    return said


def merge_saved(config: Config, saved: dict[str, Any]) -> Config:
    """Fill holes from the `config.json` of the run to go on with.

    Raises:
        UserError: `config` says something else about what cannot change, with the fields' names.
    """
    said = given_flags(config)
    # JSON has no tuples; the first runs had no choice of an objective.
    saved = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    saved.setdefault("objective", "rectified_flow")
    changed = [
        f"{name} was {saved.get(name)}, not {value}"
        for name, value in said.items()
        if name not in FREE_ON_RESUME and _meant(name, saved.get(name)) != _meant(name, value)
    ]
    if changed:
        raise UserError(f"cannot resume: {'; '.join(changed)}")
    fields = vars(config).keys()
    kept: dict[str, Any] = {name: saved[name] for name in fields & set(saved) - PER_START}
    if "n_epochs" in said:
        kept["n_steps"] = None
    for name in ("data_dir", "latents", "caption_cache", "fid_reference"):
        if kept.get(name):
            kept[name] = Path(kept[name])
    return type(config)(**kept | said)


def _meant(name: str, value: Any) -> Any:
    return PRECISIONS.get(value, value) if name == "half_precision" else value


def with_subject(config: TrainConfig) -> TrainConfig:
    """The data set and its latents, where one follows from the other."""
    name = config.dataset_name
    if config.latents and not name:
        name = latents.read(config.latents).encoding.dataset_name
    name = name or DEFAULTS["dataset_name"]
    entry = DATASET_CONFIGS.get(name)
    folder = config.latents
    if not folder and entry and entry.latents_dir:
        folder = Path(entry.latents_dir)
    return replace(config, dataset_name=name, latents=folder)


def require_same_latents(encoding: LatentEncoding | None, saved: dict[str, Any]) -> None:
    """Raises UserError if a run would go on with latents that were made otherwise. The VAE and the
    pictures may have moved since.
    """
    record = saved["dataset"].get("encoding")
    before, now = (vars(e) if e else {} for e in (record and LatentEncoding.of(record), encoding))
    for name in (now or before).keys() - {"vae", "source"}:
        if before.get(name) != now.get(name):
            raise UserError(
                f"cannot resume: {name} of the latents was {before.get(name)}, not {now.get(name)}"
            )


def resolve(
    config: TrainConfig, dataset: DatasetConfig, *, n_rows: int, n_devices: int, platform: str
) -> TrainConfig:
    """Fill every hole of `config`: by what the data set recommends, else by DEFAULTS.

    Args:
        n_rows: of the training split, for `n_epochs`.
        n_devices: that a batch is split over.
        platform: cpu, gpu or tpu; bfloat16 is the default except on a CPU.

    Raises:
        UserError: a value that cannot be.
    """
    said = given_flags(config)
    filled = DEFAULTS | {name: getattr(dataset, name) for name in RECOMMENDED} | said
    if filled["conditioning"] == "none":
        filled["cfg_scale"] = said.get("cfg_scale", 1.0)
    if filled["conditioning"] != "text":
        for name in ("text_towers", "text_length", "caption_cache"):
            if said.get(name):
                raise UserError(f"--{name} is for captions; pass --caption_column or --caption too")
        filled["text_towers"] = ()
    filled = drop_other_objectives(filled, said)
    check_numbers(filled)
    if not config.resume:  # what a run was begun with may be of no use as it goes on
        reject_unused_flags(filled, said)
    if config.n_epochs is not None and config.n_steps is None:
        filled["n_steps"] = math.ceil(config.n_epochs * n_rows / filled["batch_size"])
    resolved = TrainConfig(**derived(filled, platform) | filled)
    validate(resolved, n_devices)
    validate_fid(resolved)
    return resolved


def drop_other_objectives(filled: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """`filled` without what only the other objective reads.

    Raises:
        UserError: that was said, or there is no such objective.
    """
    chosen = filled["objective"]
    if chosen not in BY_OBJECTIVE:
        raise unknown("objective", chosen, BY_OBJECTIVE)
    left_out = {name: other for other, names in BY_OBJECTIVE.items() for name in names}
    left_out = {name: other for name, other in left_out.items() if other != chosen}
    for name, other in left_out.items():
        if name in said:
            raise UserError(f"--{name} is for --objective {other}; this is {chosen}")
    return {name: value for name, value in filled.items() if name not in left_out}


def reject_unused_flags(filled: dict[str, Any], said: dict[str, Any]) -> None:
    """Raises UserError if what was said is read only beside another flag, which is not there."""
    for name, (other, value) in ONLY_WITH.items():
        there = filled.get(other)
        if name in said and not (there == value if value else there):
            raise UserError(f"--{name} is for --{other}{f' {value}' if value else ''}")


def derived(filled: dict[str, Any], platform: str) -> dict[str, Any]:
    """Defaults that follow from other values."""
    quarter = max(1, min(1000, filled["n_steps"] // 4))
    preset = MODELS.get(filled["model"], {})
    return {
        **{name: preset.get(name, getattr(ModelConfig, name, None)) for name in PRESET},
        "remat": "DiT-L/" in filled["model"] or "DiT-XL/" in filled["model"],
        "half_precision": platform != "cpu",
        "solver": next(iter(SOLVERS[filled["objective"]])),
        "warmup_steps": min(1000, filled["n_steps"] // 20),
        "eval_save_steps": quarter,
        "sample_every_n": quarter,
    }


def check_numbers(settings: dict[str, Any]) -> None:
    """Refuse numbers that cannot be, before anything is computed from them."""
    for name, value in settings.items():
        low, high = BETWEEN.get(name, (-math.inf, math.inf))
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be finite")
        if name in POSITIVE and value <= 0:
            raise UserError(f"--{name} {value}: must be above 0")
        if name in NOT_NEGATIVE and value < 0:
            raise UserError(f"--{name} {value}: must not be below 0")
        if name in BETWEEN and not low <= value <= high:
            raise UserError(f"--{name} {value}: must be between {low} and {high}")


def validate(config: TrainConfig, n_devices: int) -> None:
    """Refuse values that cannot be, before anything is loaded or written."""
    tables = {
        "model": MODELS,
        "prediction": ddpm.PREDICTIONS,
        "time_density": DENSITIES,
        "schedule": optim.SCHEDULES,
        "solver": sampling.SOLVERS | ddpm.DESCENTS,
    }
    for name, table in tables.items():
        if getattr(config, name) not in (None, *table):
            raise unknown(name, getattr(config, name), table)
    if config.solver not in (fitting := SOLVERS[config.objective]):
        raise UserError(
            f"--solver {config.solver} does not fit --objective {config.objective}, which takes "
            f"one of: {', '.join(fitting)}"
        )
    if config.objective == "ddpm" and config.n_sample_steps > ddpm.N_STEPS:
        raise UserError(f"--n_sample_steps {config.n_sample_steps}: ddpm has {ddpm.N_STEPS} steps")
    joint = MODELS[config.model].get("block") == JOINT
    if joint != (config.block == JOINT):
        allowed = "joint blocks only" if joint else f"one of: {', '.join(BLOCKS)}"
        raise UserError(f"--block {config.block}: {config.model} takes {allowed}")
    if config.conditioning == "none" and config.cfg_scale != 1:
        raise UserError(
            f"--cfg_scale {config.cfg_scale}: an unconditional model has no label to be guided by; "
            "leave it at 1"
        )
    if n_devices % config.fsdp:
        raise UserError(f"--fsdp {config.fsdp} does not divide the {n_devices} devices")
    _validate_kind_of_run(config)
    if config.streaming and config.in_memory:
        raise UserError("a set that is held --in_memory is not --streaming; pass one of them")
    if config.cache_on_device and (config.streaming or config.in_memory is False):
        raise UserError("--cache_on_device holds the whole set; drop --streaming or --noin_memory")
    if config.cache_on_device and config.conditioning == "text":
        raise UserError("--cache_on_device is for classes; captions are read from their own cache")


def validate_fid(config: TrainConfig) -> None:
    """Refuse distances that lack what they are measured with."""
    if not config.fid_every:
        return
    if config.fid_n < 2:
        raise UserError(f"--fid_n {config.fid_n}: statistics need at least 2 pictures")
    if not config.fid_reference:
        raise UserError(
            "--fid_every needs --fid_reference FILE.npz, which `python evaluate.py "
            "--make_reference FILE.npz --dataset_name NAME` makes"
        )
    if config.fid_features == "inception" and not config.inception:
        raise UserError(
            "--fid_every needs Inception's weights: pass --inception FILE (README.md says where "
            "they are); --fid_features pixels does without, but is no FID"
        )


def _validate_kind_of_run(config: TrainConfig) -> None:
    """Refuse what a run cannot be at the same time."""
    if config.lr_range_test and (config.resume or config.profile):
        other = "--resume" if config.resume else "--profile"
        raise UserError(f"--lr_range_test is of fresh weights, and then stops: drop {other}")
    if config.profile and config.cache_on_device:
        raise UserError("--profile is of blank batches, and caches none: add --nocache_on_device")
    if config.overfit_batch and config.cache_on_device:
        raise UserError("--overfit_batch has one batch and needs no --cache_on_device; drop one")
    if config.wandb_project is not None:
        wandb_sink.require_installed()


def require_even_batches(config: Any, n_devices: int) -> None:
    """Raises UserError if a batch cannot be split over the devices, and then into its parts."""
    parts = n_devices * config.accumulate_steps
    if config.batch_size % parts:
        times = f" × {config.accumulate_steps} parts" if config.accumulate_steps > 1 else ""
        raise UserError(
            f"--batch_size {config.batch_size} is not divisible by the {n_devices} devices{times}"
        )


def network(config: TrainConfig, dataset: DatasetConfig) -> ModelConfig:
    """The model that a resolved `config` describes, but for the shape of captions."""
    return model_config(
        config.model,
        patch_size=config.patch_size,
        image_size=config.image_size,
        channels=config.channels,
        out_channels=config.channels * (2 if config.learned_sigma else 1),
        n_classes=dataset.n_classes if config.conditioning == "class" else 0,
        block=config.block,
        position=config.position,
        rope=config.rope,
        qk_norm=config.qk_norm,
        mlp=config.mlp,
        norm=config.norm,
        dtype=PRECISIONS[config.half_precision],
        remat=config.remat,
    )


def reader(encoding: LatentEncoding | None) -> rectified_flow.Read:
    """What makes data of a batch's pictures, or of its latents' means and log-variances."""
    if not encoding:
        return rectified_flow.pixels
    return partial(
        autoencoder.draw,
        scaling_factor=encoding.scaling_factor,
        shift_factor=encoding.shift_factor,
    )


def objective(
    config: TrainConfig, *, label_dropout: float, read: rectified_flow.Read = rectified_flow.pixels
) -> rectified_flow.Objective:
    """The loss that a resolved `config` describes."""
    if config.objective == "ddpm":
        return ddpm.ddpm_loss(
            prediction=config.prediction,
            learned_sigma=config.learned_sigma,
            min_snr_gamma=config.min_snr_gamma,
            label_dropout=label_dropout,
            read=read,
        )
    density = DENSITIES[config.time_density](config)
    return rectified_flow.rectified_flow_loss(
        density=density, shift=config.time_shift, label_dropout=label_dropout, read=read
    )
