"""training.config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import sampling
from methods import ddpm, rectified_flow
from runtime.cli import Text

UNSET: Any = None  # filled by `resolve`
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

    dataset_name: str = UNSET
    data_dir: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    conditioning: str = UNSET
    caption_column: str | None = None
    caption: tuple[Text, ...] | None = None
    text_towers: tuple[str, ...] = UNSET
    text_length: int | None = None
    caption_cache: Path | None = None
    image_size: int = UNSET
    channels: int = UNSET
    latents: Path | None = None
    vae: str | None = None
    streaming: bool = UNSET
    shuffle_buffer: int = UNSET
    in_memory: bool | None = None
    cache_on_device: bool = UNSET
    n_workers: int | None = None
    model: str = UNSET
    init_from: str | None = None
    patch_size: int = UNSET
    block: str = UNSET
    position: str = UNSET
    rope: bool = UNSET
    qk_norm: bool = UNSET
    mlp: str = UNSET
    norm: str = UNSET
    remat: bool = UNSET
    half_precision: bool | Literal["bf16", "fp16"] = UNSET
    objective: str = UNSET
    prediction: str = UNSET
    learned_sigma: bool = UNSET
    min_snr_gamma: float = UNSET
    time_density: str = UNSET
    logit_mean: float = UNSET
    logit_std: float = UNSET
    mode_scale: float = UNSET
    time_shift: float = UNSET
    label_dropout: float = UNSET
    n_epochs: float | None = None
    n_steps: int = UNSET
    batch_size: int = UNSET
    accumulate_steps: int = UNSET
    learning_rate: float = UNSET
    schedule: str = UNSET
    warmup_steps: int = UNSET
    beta1: float = UNSET
    beta2: float = UNSET
    weight_decay: float = UNSET
    clip_norm: float = UNSET
    ema_decay: float = UNSET
    nan_patience: int = UNSET
    overfit_batch: bool = UNSET
    seed: int = UNSET
    fsdp: int = UNSET
    distributed: bool = False
    coordinator: str | None = None
    n_processes: int | None = None
    process_index: int | None = None
    run_dir: Path | None = None
    resume: bool = False
    log_every: int = UNSET
    eval_save_steps: int = UNSET
    n_eval_batches: int = UNSET
    sample_every_n: int = UNSET
    keep_checkpoints: int = UNSET
    cfg_scale: float = UNSET
    n_sample_steps: int = UNSET
    solver: str = UNSET
    sample_shift: float = UNSET
    fid_every: int = UNSET
    fid_reference: Path | None = None
    fid_n: int = UNSET
    fid_features: Literal["inception", "pixels"] = UNSET
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
BY_OBJECTIVE = {
    "rectified_flow": (
        *("time_density", "logit_mean", "logit_std", "mode_scale"),
        *("time_shift", "sample_shift"),
    ),
    "ddpm": ("prediction", "learned_sigma", "min_snr_gamma"),
}
# What is read only beside another flag: one that is on, or has this value.
ONLY_WITH = {
    **dict.fromkeys(("logit_mean", "logit_std"), ("time_density", "logit_normal")),
    "mode_scale": ("time_density", "mode"),
    "vae": ("latents", None),
    "shuffle_buffer": ("streaming", None),
    **dict.fromkeys(("fid_reference", "fid_n", "fid_features", "inception"), ("fid_every", None)),
}
SOLVERS = {"rectified_flow": sampling.SOLVERS, "ddpm": ddpm.DESCENTS}
PROCESSES = ("distributed", "coordinator", "n_processes", "process_index")
PER_START = {"run_dir", "resume", "profile", "lr_range_test", *PROCESSES}
RECOMMENDED = (
    *("model", "batch_size", "learning_rate", "n_steps", "ema_decay", "cfg_scale"),
    *("image_size", "channels", "conditioning"),
)
PRESET = ("patch_size", "block", "position", "qk_norm")  # of the model, if not said
# What the help page says of values that are not given.
SHOWN_DEFAULTS = (
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
    "uniform": lambda config: rectified_flow.uniform(),
    "logit_normal": lambda config: rectified_flow.logit_normal(config.logit_mean, config.logit_std),
    "mode": lambda config: rectified_flow.mode(config.mode_scale),
}
