"""The settings of a training run: every flag of `train.py`, and how what was not said is filled in.

`resolve` is the one place where holes are filled and values are checked. Only `train.py` reads the
result; every other module takes plain arguments.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import diffusion
import latents
import objectives
import optim
import sampling
import weights_and_biases
from cli import Text
from datasets_config import DATASET_CONFIGS, DatasetConfig
from errors import UserError, unknown
from latents import Encoding
from model import BLOCKS, JOINT, MODELS, ModelConfig, model_config
from vae import autoencoder

UNSAID: Any = None  # filled by `resolve`
Config = TypeVar("Config")  # this file's, or that of another command that trains


@dataclass(frozen=True)
class TrainConfig:
    """Train a diffusion transformer on a Hugging Face data set, by default on the digits in this
    repository.

    A value not given is the resumed run's, else the data set's recommendation, else the default in
    DEFAULTS.

    Args:
        dataset_name: a key of DATASET_CONFIGS, folder:PATH or hf:owner/name.
        data_dir: a local copy of the data set: Parquet files, an image folder or a `save_to_disk`
            folder.
        image_column: where to find pictures in folder: and hf: data.
        label_column: where to find classes in folder: and hf: data.
        conditioning: what the model is told: class, text or none; by default text where captions
            are named, class where there are classes.
        caption_column: where to find captions, one or a list of them a picture.
        caption: captions made from class names, such as "a photo of a {label}".
        text_towers: that encode captions, by Hugging Face id or folder; several are joined as in
            SD3.
        text_length: tokens beyond which captions are cut; by default what the towers take.
        caption_cache: where encoded captions are kept; by default beside the data set.
        image_size: pixels to a side after centre crop and resize.
        channels: 1 (grey) or 3 (RGB).
        latents: a folder of convert_imagenet.py, to train on in place of pictures.
        vae: where the VAE of the latents is now, if it has moved.
        streaming: read pictures from Parquet files, here or on the hub, as they are needed.
        shuffle_buffer: rows of a streamed set that are mixed at a time.
        in_memory: decode the whole set once and hold it; by default up to 1 GiB.
        cache_on_device: hold the whole set in device memory and draw batches there.
        n_workers: processes that decode a set that is not held.
        model: a preset such as DiT-S/2.
        init_from: start from these weights: a run's folder, a folder or hub id of diffusers or of
            export.py, or a file of DiT or SiT; flags of the model are then by default as there.
        patch_size: overrides the preset's.
        block: how a DiT's blocks are conditioned: adaln_zero, adaln, cross_attention or in_context.
        position: absolute positions: sincos, cropped or centred (from the middle of a large table,
            as in SD3), learned or none.
        rope: 2-D rotary positions in attention.
        qk_norm: normalise queries and keys.
        mlp: gelu or swiglu.
        norm: layer or rms.
        remat: recompute blocks in the backward pass to save memory; on by default for L and XL.
        half_precision: compute in bfloat16 (bf16 or true), or in float16 with loss scaling (fp16);
            by default bf16 on GPU and TPU, not on CPU.
        objective: what the model learns: rectified_flow or ddpm.
        prediction: what it says with ddpm: epsilon, x0 or v.
        learned_sigma: with ddpm, learn the variance of each step too.
        min_snr_gamma: with ddpm, of min-SNR weights, which 5 is usual for; 0 weighs steps alike.
        time_density: of training times: uniform, logit_normal or mode.
        logit_mean: of the logit-normal density.
        logit_std: of the logit-normal density.
        mode_scale: of the mode density.
        time_shift: moves training times towards noise; above 1 for large pictures.
        label_dropout: share of rows trained without their label or caption, for guidance.
        n_epochs: how long to train; n_steps wins.
        n_steps: how long to train, in updates; more on a resumed run stretches its schedule.
        batch_size: pictures per update, over all devices.
        accumulate_steps: parts that a batch is computed in, one after the other, to save memory.
        learning_rate: the peak of the schedule.
        schedule: constant, cosine or linear.
        warmup_steps: of linear rise to the peak.
        beta1: AdamW's decay of the mean of gradients.
        beta2: AdamW's decay of their squares.
        weight_decay: AdamW's, on matrices only.
        clip_norm: of the gradient; 0 never clips.
        ema_decay: of the averaged weights, which are the ones sampled and evaluated.
        nan_patience: steps in a row without a finite loss and gradient, each of which leaves the
            weights alone, before the run goes back to its last checkpoint.
        overfit_batch: train on the first batch alone, again and again, with fresh noise and times
            at each step, and evaluate on it, to see whether a model can learn. Its pictures are
            samples/batch.png, and samples should become these. The loss should fall towards 0, last
            where t is near 0 and the noise that is asked for hardly shows.
        seed: of everything random.
        fsdp: devices that share one copy of the weights; 1 is plain data parallelism.
        distributed: join the other processes of a cluster's job (SLURM, Open MPI, Kubernetes, Cloud
            TPU), as JAX detects it.
        coordinator: host:port of process 0, where no cluster is detected.
        n_processes: of the run, likewise.
        process_index: of this process, from 0, likewise.
        run_dir: the run's folder; by default runs/<dataset>-<model>-<time>.
        resume: go on in run_dir, or in the newest run of this data set and model.
        log_every: steps between lines of metrics.
        eval_save_steps: steps between evaluations, each with a checkpoint.
        n_eval_batches: batches of an evaluation.
        sample_every_n: steps between sample grids.
        keep_checkpoints: how many of the newest to keep.
        cfg_scale: guidance of the samples.
        n_sample_steps: solver steps of the samples.
        solver: of the samples: euler or heun, with ddpm: ddpm or ddim.
        sample_shift: of the samples' time grid.
        fid_every: steps between measurements of the Fréchet distance of samples to real pictures,
            and one at the end; 0 for none. Training waits while fid_n pictures are drawn, and
            looked at: Inception alone needs 20 minutes for 5000 on two CPU cores.
        fid_reference: statistics of the real ones: an .npz of evaluate.py --make_reference, of
            pytorch-fid, clean-fid or the ADM suite.
        fid_n: pictures that are drawn for it, as many of each class. Fewer have a larger distance:
            compare only numbers of equally many (published ones are of 50000).
        fid_features: inception, or pixels, which need no weights; the number is then called
            pixel_frechet, for it is no FID.
        inception: weights of FID's Inception network: a file, a folder or an id on the hub. They
            take 0.1 GB on each device while training, and half a GB more while they are used.
        wandb_project: record the run on Weights & Biases too, under this name; WANDB_MODE=offline
            keeps it in the run's folder.
        lr_range_test: raise the learning rate from 1e-6 to 1e-1 on fresh weights, over 300 steps or
            a number given, plot the loss, suggest a rate, and stop.
        profile: measure the train, eval and sampling steps, print a report, and stop.
        peak_tflops: this device's peak, where the table of profiling.py does not know it.
    """

    dataset_name: str = UNSAID
    data_dir: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    conditioning: str = UNSAID
    caption_column: str | None = None
    caption: tuple[Text, ...] | None = None
    text_towers: tuple[str, ...] = UNSAID
    text_length: int | None = None
    caption_cache: Path | None = None
    image_size: int = UNSAID
    channels: int = UNSAID
    latents: Path | None = None
    vae: str | None = None
    streaming: bool = UNSAID
    shuffle_buffer: int = UNSAID
    in_memory: bool | None = None
    cache_on_device: bool = UNSAID
    n_workers: int | None = None
    model: str = UNSAID
    init_from: str | None = None
    patch_size: int = UNSAID
    block: str = UNSAID
    position: str = UNSAID
    rope: bool = UNSAID
    qk_norm: bool = UNSAID
    mlp: str = UNSAID
    norm: str = UNSAID
    remat: bool = UNSAID
    half_precision: bool | Literal["bf16", "fp16"] = UNSAID
    objective: str = UNSAID
    prediction: str = UNSAID
    learned_sigma: bool = UNSAID
    min_snr_gamma: float = UNSAID
    time_density: str = UNSAID
    logit_mean: float = UNSAID
    logit_std: float = UNSAID
    mode_scale: float = UNSAID
    time_shift: float = UNSAID
    label_dropout: float = UNSAID
    n_epochs: float | None = None
    n_steps: int = UNSAID
    batch_size: int = UNSAID
    accumulate_steps: int = UNSAID
    learning_rate: float = UNSAID
    schedule: str = UNSAID
    warmup_steps: int = UNSAID
    beta1: float = UNSAID
    beta2: float = UNSAID
    weight_decay: float = UNSAID
    clip_norm: float = UNSAID
    ema_decay: float = UNSAID
    nan_patience: int = UNSAID
    overfit_batch: bool = UNSAID
    seed: int = UNSAID
    fsdp: int = UNSAID
    distributed: bool = False
    coordinator: str | None = None
    n_processes: int | None = None
    process_index: int | None = None
    run_dir: Path | None = None
    resume: bool = False
    log_every: int = UNSAID
    eval_save_steps: int = UNSAID
    n_eval_batches: int = UNSAID
    sample_every_n: int = UNSAID
    keep_checkpoints: int = UNSAID
    cfg_scale: float = UNSAID
    n_sample_steps: int = UNSAID
    solver: str = UNSAID
    sample_shift: float = UNSAID
    fid_every: int = UNSAID
    fid_reference: Path | None = None
    fid_n: int = UNSAID
    fid_features: Literal["inception", "pixels"] = UNSAID
    inception: str | None = None
    wandb_project: str | None = None
    lr_range_test: bool | int = False
    profile: bool = False
    peak_tflops: float | None = None


DEFAULTS: dict[str, Any] = {
    "dataset_name": "digits",
    "text_towers": ("openai/clip-vit-large-patch14",),
    "rope": False,
    "mlp": "gelu",
    "norm": "layer",
    "objective": "rectified_flow",
    "prediction": "epsilon",
    "learned_sigma": False,
    "min_snr_gamma": 0.0,
    "time_density": "logit_normal",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "time_shift": 1.0,
    "label_dropout": 0.1,
    "schedule": "cosine",
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "streaming": False,
    "shuffle_buffer": 10_000,
    "cache_on_device": False,
    "accumulate_steps": 1,
    "nan_patience": 5,
    "overfit_batch": False,
    "seed": 0,
    "fsdp": 1,
    "log_every": 50,
    "n_eval_batches": 6,
    "keep_checkpoints": 2,
    "n_sample_steps": 50,
    "sample_shift": 1.0,
    "fid_every": 0,
    "fid_n": 5000,
    "fid_features": "inception",
}

# What may change when a run goes on: where things lie, how often they are looked at, how long it
# goes, and what leaves the numbers as they are.
FREE_ON_RESUME = {
    *("run_dir", "resume", "data_dir", "latents", "vae", "caption_cache", "in_memory"),
    *("n_workers", "fsdp", "remat"),
    *("accumulate_steps", "cache_on_device", "nan_patience"),
    *("n_steps", "n_epochs", "log_every", "eval_save_steps", "n_eval_batches", "sample_every_n"),
    *("keep_checkpoints", "cfg_scale", "n_sample_steps", "solver", "sample_shift"),
    *("fid_every", "fid_reference", "fid_n", "fid_features", "inception"),
    *("wandb_project", "lr_range_test"),
    *("profile", "peak_tflops", "distributed", "coordinator", "n_processes", "process_index"),
}
# What is said of one objective alone, and None in a run with the other.
OF_OBJECTIVE = {
    "rectified_flow": (
        *("time_density", "logit_mean", "logit_std", "mode_scale"),
        *("time_shift", "sample_shift"),
    ),
    "ddpm": ("prediction", "learned_sigma", "min_snr_gamma"),
}
# What is read only beside another flag: one that is on, or has this value.
BESIDE = {
    **dict.fromkeys(("logit_mean", "logit_std"), ("time_density", "logit_normal")),
    "mode_scale": ("time_density", "mode"),
    "vae": ("latents", None),
    "shuffle_buffer": ("streaming", None),
    **dict.fromkeys(("fid_reference", "fid_n", "fid_features", "inception"), ("fid_every", None)),
}
SOLVERS = {"rectified_flow": sampling.SOLVERS, "ddpm": sampling.DESCENTS}
PROCESSES = ("distributed", "coordinator", "n_processes", "process_index")
OF_ONE_START = {"run_dir", "resume", "profile", "lr_range_test", *PROCESSES}
RECOMMENDED = (
    *("model", "batch_size", "learning_rate", "n_steps", "ema_decay", "cfg_scale"),
    *("image_size", "channels", "conditioning"),
)
PRESET = ("patch_size", "block", "position", "qk_norm")  # of the model, if not said
# What the help page says of values that are not given.
FILLED = (
    DEFAULTS
    | dict.fromkeys(RECOMMENDED, "as the data set recommends")
    | dict.fromkeys(("eval_save_steps", "sample_every_n"), "n_steps / 4, at most 1000")
    | {"warmup_steps": "n_steps / 20, at most 1000"}
    | dict.fromkeys(PRESET, "the model's")
    | {"solver": "euler, with ddpm: ddpm"}
    | {"remat": "for L and XL", "half_precision": "except on a CPU", "run_dir": "a new one"}
)
POSITIVE = (
    *("n_steps", "n_epochs", "batch_size", "learning_rate", "patch_size", "image_size", "fsdp"),
    *("logit_std", "time_shift", "sample_shift", "log_every", "eval_save_steps", "sample_every_n"),
    *("n_eval_batches", "keep_checkpoints", "n_sample_steps", "peak_tflops", "text_length"),
    *("shuffle_buffer", "accumulate_steps", "nan_patience"),
)
NOT_NEGATIVE = (
    *("weight_decay", "clip_norm", "warmup_steps", "n_workers", "seed", "min_snr_gamma"),
    "fid_every",
)
BETWEEN = {
    "label_dropout": (0, 1),
    "ema_decay": (0, 1),
    "beta1": (0, 0.999999),  # AdamW divides by 1 − βⁿ
    "beta2": (0, 0.999999),
    "mode_scale": (-1, 1.75),  # beyond, its times are no longer in order, then no longer in 0 … 1
}
PRECISIONS = {False: "float32", True: "bfloat16", "bf16": "bfloat16", "fp16": "float16"}
DENSITIES = {
    "uniform": lambda config: objectives.uniform(),
    "logit_normal": lambda config: objectives.logit_normal(config.logit_mean, config.logit_std),
    "mode": lambda config: objectives.mode(config.mode_scale),
}


def spoken(config: Any) -> dict[str, Any]:
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


def take_up(config: Config, saved: dict[str, Any]) -> Config:
    """Fill holes from the `config.json` of the run to go on with.

    Raises:
        UserError: `config` says something else about what cannot change, with the fields' names.
    """
    said = spoken(config)
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
    kept: dict[str, Any] = {name: saved[name] for name in fields & set(saved) - OF_ONE_START}
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


def require_same_latents(encoding: Encoding | None, saved: dict[str, Any]) -> None:
    """Raises UserError if a run would go on with latents that were made otherwise. The VAE and the
    pictures may have moved since.
    """
    record = saved["dataset"].get("encoding")
    before, now = (vars(e) if e else {} for e in (record and Encoding.of(record), encoding))
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
    said = spoken(config)
    filled = DEFAULTS | {name: getattr(dataset, name) for name in RECOMMENDED} | said
    if filled["conditioning"] == "none":
        filled["cfg_scale"] = said.get("cfg_scale", 1.0)
    if filled["conditioning"] != "text":
        for name in ("text_towers", "text_length", "caption_cache"):
            if said.get(name):
                raise UserError(f"--{name} is for captions; pass --caption_column or --caption too")
        filled["text_towers"] = ()
    filled = of_one_objective(filled, said)
    check_numbers(filled)
    if not config.resume:  # what a run was begun with may be of no use as it goes on
        require_read(filled, said)
    if config.n_epochs is not None and config.n_steps is None:
        filled["n_steps"] = math.ceil(config.n_epochs * n_rows / filled["batch_size"])
    resolved = TrainConfig(**derived(filled, platform) | filled)
    validate(resolved, n_devices)
    validate_fid(resolved)
    return resolved


def of_one_objective(filled: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """`filled` without what only the other objective reads.

    Raises:
        UserError: that was said, or there is no such objective.
    """
    chosen = filled["objective"]
    if chosen not in OF_OBJECTIVE:
        raise unknown("objective", chosen, OF_OBJECTIVE)
    left_out = {name: other for other, names in OF_OBJECTIVE.items() for name in names}
    left_out = {name: other for name, other in left_out.items() if other != chosen}
    for name, other in left_out.items():
        if name in said:
            raise UserError(f"--{name} is for --objective {other}; this is {chosen}")
    return {name: value for name, value in filled.items() if name not in left_out}


def require_read(filled: dict[str, Any], said: dict[str, Any]) -> None:
    """Raises UserError if what was said is read only beside another flag, which is not there."""
    for name, (other, value) in BESIDE.items():
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
        "prediction": diffusion.PREDICTIONS,
        "time_density": DENSITIES,
        "schedule": optim.SCHEDULES,
        "solver": sampling.SOLVERS | sampling.DESCENTS,
    }
    for name, table in tables.items():
        if getattr(config, name) not in (None, *table):
            raise unknown(name, getattr(config, name), table)
    if config.solver not in (fitting := SOLVERS[config.objective]):
        raise UserError(
            f"--solver {config.solver} does not fit --objective {config.objective}, which takes "
            f"one of: {', '.join(fitting)}"
        )
    if config.objective == "ddpm" and config.n_sample_steps > diffusion.N_STEPS:
        raise UserError(
            f"--n_sample_steps {config.n_sample_steps}: ddpm has {diffusion.N_STEPS} steps"
        )
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
        weights_and_biases.require_installed()


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


def reader(encoding: Encoding | None) -> objectives.Read:
    """What makes data of a batch's pictures, or of its latents' means and log-variances."""
    if not encoding:
        return objectives.pixels
    return partial(
        autoencoder.draw,
        scaling_factor=encoding.scaling_factor,
        shift_factor=encoding.shift_factor,
    )


def objective(
    config: TrainConfig, *, label_dropout: float, read: objectives.Read = objectives.pixels
) -> objectives.Objective:
    """The loss that a resolved `config` describes."""
    if config.objective == "ddpm":
        return objectives.ddpm(
            prediction=config.prediction,
            learned_sigma=config.learned_sigma,
            min_snr_gamma=config.min_snr_gamma,
            label_dropout=label_dropout,
            read=read,
        )
    density = DENSITIES[config.time_density](config)
    return objectives.rectified_flow(
        density=density, shift=config.time_shift, label_dropout=label_dropout, read=read
    )
