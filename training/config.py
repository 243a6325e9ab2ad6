"""Every flag of `train.py`, its default, and the rules that a value must keep.

Facts only: a flag left out is `UNSET` here. `training.resolve` fills it in and checks the result by
the tables below. No other module reads flags by these tables.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from runtime.cli import FreeText

UNSET: Any = None  # a flag left out; `training.resolve` fills it in
AnyConfig = TypeVar("AnyConfig")  # TrainConfig, or the config of another command that trains


@dataclass(frozen=True)
class TrainConfig:
    """Train a diffusion transformer on a Hugging Face dataset, by default on the digits in this
    repository.

    A flag left out takes the value of the resumed run, else the dataset's recommendation, else its
    default.

    Args:
        dataset_name: a key of DATASET_CONFIGS, folder:PATH or hf:owner/name.
        data_dir: local copy of the dataset: Parquet files, an image folder or a `save_to_disk`
            folder.
        image_column: column of the images, for folder: and hf: datasets.
        label_column: column of the class labels, for folder: and hf: datasets.
        conditioning: class, text or none; by default text if captions are configured, class if
            there are classes.
        caption_column: column of the captions, one or a list of them per image.
        caption: caption templates filled with the class name, such as "a photo of a {label}".
        text_towers: text encoders, by Hugging Face id or folder; several are concatenated as in
            SD3.
        text_length: maximum caption length in tokens; by default the text encoders' own.
        caption_cache: folder for the encoded captions; by default beside the dataset.
        image_size: height and width in pixels after centre crop and resize.
        channels: 1 (greyscale) or 3 (RGB).
        latents: folder written by convert_imagenet.py, to train on latents instead of images.
        vae: current location of the latents' VAE, if it has moved.
        streaming: read images from Parquet files on demand, locally or from the hub.
        shuffle_buffer: rows in the shuffle buffer of a streamed dataset.
        in_memory: decode the dataset once and keep it in host memory; by default up to 1 GiB.
        cache_on_device: keep the dataset in device memory and sample batches there.
        n_workers: worker processes that decode images, unless the dataset is in memory.
        model: a preset such as DiT-S/2.
        init_from: initial weights: a run folder, a folder or hub id in the format of diffusers or
            export.py, or a DiT or SiT checkpoint file; model flags then default to its own.
        patch_size: patch size in pixels; overrides the preset.
        block: conditioning of the DiT blocks: adaln_zero, adaln, cross_attention or in_context.
        position: absolute position embedding: sincos, cropped or centred (the middle of a large
            table, as in SD3), learned or none.
        rope: 2-D rotary position embedding in attention.
        qk_norm: normalise queries and keys.
        mlp: gelu or swiglu.
        norm: layer or rms.
        remat: recompute activations in the backward pass to save memory; by default for L and XL.
        half_precision: compute in bfloat16 (bf16 or true), or in float16 with loss scaling (fp16);
            by default bf16 on GPU and TPU, float32 on CPU.
        objective: training objective: rectified_flow or ddpm.
        prediction: output of a ddpm model: epsilon, x0 or v.
        learned_sigma: learn the variance of the reverse process too (ddpm).
        min_snr_gamma: γ of min-SNR loss weighting (ddpm), usually 5; 0 disables it.
        time_density: density of training times: uniform, logit_normal or mode.
        logit_mean: mean of the logit-normal density.
        logit_std: standard deviation of the logit-normal density.
        mode_scale: scale of the mode density.
        time_shift: shift of training times towards noise; above 1 for large images.
        label_dropout: fraction of labels or captions replaced by the null label, for
            classifier-free guidance.
        n_epochs: length of training in epochs; n_steps takes precedence.
        n_steps: length of training in updates; a larger value on resume stretches the schedule.
        batch_size: images per update, over all devices.
        accumulate_steps: gradient accumulation: microbatches per update, to save memory.
        learning_rate: peak learning rate.
        schedule: constant, cosine or linear.
        warmup_steps: steps of linear warmup.
        beta1: AdamW's decay rate of the first moment.
        beta2: AdamW's decay rate of the second moment.
        weight_decay: AdamW's weight decay, on matrices only.
        clip_norm: maximum gradient norm; 0 disables clipping.
        ema_decay: decay of the averaged weights (EMA), which are sampled and evaluated.
        nan_patience: non-finite steps in a row before rollback to the last checkpoint; each of
            them leaves the weights unchanged.
        overfit_batch: train and evaluate on the first batch only, with new noise and times at each
            step, to check that the model can learn. The batch is written to samples/batch.png, and
            the samples should converge to it. The loss should approach 0, slowest near t = 0, where
            the noise to predict is almost invisible.
        seed: random seed.
        fsdp: devices that share one copy of the weights; 1 is plain data parallelism.
        distributed: join the other processes of a cluster job (SLURM, Open MPI, Kubernetes, Cloud
            TPU), as JAX detects it.
        coordinator: host:port of process 0, if JAX detects no cluster.
        n_processes: number of processes, if JAX detects no cluster.
        process_index: index of this process, from 0, if JAX detects no cluster.
        run_dir: run folder; by default runs/<dataset>-<model>-<time>.
        resume: continue run_dir, or the newest run of this dataset and model.
        log_every: steps between lines of metrics.
        eval_save_steps: steps between evaluations, each with a checkpoint.
        n_eval_batches: batches per evaluation.
        sample_every_n: steps between sample grids.
        keep_checkpoints: number of newest checkpoints to keep.
        cfg_scale: classifier-free guidance scale of the samples.
        n_sample_steps: solver steps per sample.
        solver: solver for sampling: euler or heun; with ddpm, ddpm or ddim.
        sample_shift: shift of the sampling times towards noise.
        fid_every: steps between FID evaluations, with one more at the end; 0 disables them.
            Training waits meanwhile: Inception alone needs 20 minutes for 5000 samples on two CPU
            cores.
        fid_reference: reference statistics: an .npz of evaluate.py --make_reference, of
            pytorch-fid, clean-fid or the ADM suite.
        fid_n: samples per FID evaluation, equally many of each class. FID falls as the number
            rises: compare only results with the same number (published ones use 50000).
        fid_features: inception, or pixels, which needs no weights; its result is not FID and is
            called pixel_frechet.
        inception: weights of FID's Inception network: a file, a folder or a hub id. They take 0.1
            GB of each device's memory in training, and half a GB more during an FID evaluation.
        wandb_project: also log to this Weights & Biases project; with WANDB_MODE=offline, into the
            run folder.
        lr_range_test: raise the learning rate from 1e-6 to 1e-1 on fresh weights, over 300 steps or
            the number given, plot the loss, suggest a learning rate, and exit.
        profile: measure the training, evaluation and sampling steps, print a report, and exit.
        peak_tflops: peak TFLOP/s of this device, if training/flops.py does not know it.
    """

    dataset_name: str = UNSET
    data_dir: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    conditioning: str = UNSET
    caption_column: str | None = None
    caption: tuple[FreeText, ...] | None = None
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


# Defaults that depend on no dataset, model or device.
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

# Flags that may change on resume: locations, intervals, length, and what leaves the numbers alone.
MAY_CHANGE_ON_RESUME = {
    *("run_dir", "resume", "data_dir", "latents", "vae", "caption_cache", "in_memory"),
    *("n_workers", "fsdp", "remat"),
    *("accumulate_steps", "cache_on_device", "nan_patience"),
    *("n_steps", "n_epochs", "log_every", "eval_save_steps", "n_eval_batches", "sample_every_n"),
    *("keep_checkpoints", "cfg_scale", "n_sample_steps", "solver", "sample_shift"),
    *("fid_every", "fid_reference", "fid_n", "fid_features", "inception"),
    *("wandb_project", "lr_range_test"),
    *("profile", "peak_tflops", "distributed", "coordinator", "n_processes", "process_index"),
}
# Flags of a single start, which a resumed run does not inherit.
CLUSTER_FLAGS = ("distributed", "coordinator", "n_processes", "process_index")
FLAGS_OF_ONE_START = {"run_dir", "resume", "profile", "lr_range_test", *CLUSTER_FLAGS}
# Flags that are read only if another flag has this value; None: any value but False and 0.
REQUIRED_FLAG = {
    "logit_mean": ("time_density", "logit_normal"),
    "logit_std": ("time_density", "logit_normal"),
    "mode_scale": ("time_density", "mode"),
    "vae": ("latents", None),
    "shuffle_buffer": ("streaming", None),
    "fid_reference": ("fid_every", None),
    "fid_n": ("fid_every", None),
    "fid_features": ("fid_every", None),
    "inception": ("fid_every", None),
}
# Flags whose default is in the dataset's entry in datasets_config.py.
RECOMMENDED_BY_DATASET = (
    *("model", "batch_size", "learning_rate", "n_steps", "ema_decay", "cfg_scale"),
    *("image_size", "channels", "conditioning"),
)
# Flags whose default is in the model's preset.
DEFAULT_FROM_PRESET = ("patch_size", "block", "position", "qk_norm")
# Defaults as the help page prints them.
HELP_DEFAULTS = (
    DEFAULTS
    | dict.fromkeys(RECOMMENDED_BY_DATASET, "as the dataset recommends")
    | dict.fromkeys(("eval_save_steps", "sample_every_n"), "n_steps / 4, at most 1000")
    | {"warmup_steps": "n_steps / 20, at most 1000"}
    | dict.fromkeys(DEFAULT_FROM_PRESET, "the model's")
    | {"solver": "euler, with ddpm: ddpm"}
    | {"remat": "for L and XL", "half_precision": "except on a CPU", "run_dir": "a new one"}
)
# Flags whose value must be above 0.
POSITIVE = (
    *("n_steps", "n_epochs", "batch_size", "learning_rate", "patch_size", "image_size", "fsdp"),
    *("logit_std", "time_shift", "sample_shift", "log_every", "eval_save_steps", "sample_every_n"),
    *("n_eval_batches", "keep_checkpoints", "n_sample_steps", "peak_tflops", "text_length"),
    *("shuffle_buffer", "accumulate_steps", "nan_patience"),
)
# Flags whose value must be 0 or more.
NON_NEGATIVE = (
    *("weight_decay", "clip_norm", "warmup_steps", "n_workers", "seed", "min_snr_gamma"),
    "fid_every",
)
# Closed intervals that a flag's value must lie in.
RANGES = {
    "label_dropout": (0, 1),
    "ema_decay": (0, 1),
    "beta1": (0, 0.999999),  # AdamW divides by 1 − βⁿ
    "beta2": (0, 0.999999),
    # Beyond these, u → t is first no longer increasing, then leaves 0 … 1.
    "mode_scale": (-1, 1.75),
}
# Values of --half_precision → the dtype of the computation.
PRECISIONS = {False: "float32", True: "bfloat16", "bf16": "bfloat16", "fp16": "float16"}
