"""Every flag of `train_vae.py`, its default, and how a flag left out is filled in and checked.

Nothing is loaded here and no device is used. Only the trainer of autoencoders reads the result.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets_config import DATASET_CONFIGS, DatasetConfig
from networks.autoencoder import AutoencoderConfig
from networks.perceptual import LPIPS_MIN_SIZE, PIXEL_LOSSES
from runtime.errors import UserError, unknown_name
from training import optim, wandb_sink
from training import resolve as training_resolve
from training.config import UNSET


@dataclass(frozen=True)
class VaeConfig:
    """Train an autoencoder of images; a diffusion model can then be trained on its latents.

    A flag left out takes the value of the resumed run, else its default.

    Args:
        dataset_name: a key of DATASET_CONFIGS, folder:PATH or hf:owner/name; its labels and
            captions are not used.
        data_dir: local copy of the dataset: Parquet files, an image folder or a `save_to_disk`
            folder.
        image_column: column of the images, for folder: and hf: datasets.
        image_size: height and width in pixels after centre crop and resize.
        channels: 1 (greyscale) or 3 (RGB).
        streaming: read images from Parquet files on demand, locally or from the hub.
        shuffle_buffer: rows in the shuffle buffer of a streamed dataset.
        in_memory: decode the dataset once and keep it in host memory; by default up to 1 GiB.
        cache_on_device: keep the dataset in device memory and sample batches there.
        n_workers: worker processes that decode images, unless the dataset is in memory.
        latent_channels: channels of a latent.
        block_out_channels: channels of each level. Each level after the first halves height and
            width, so three levels make latents of a quarter of the image's sides.
        layers_per_block: residual blocks per level.
        attention: self-attention at the lowest resolution.
        half_precision: compute in bfloat16; by default on GPU and TPU, not on CPU.
        pixel_loss: l1 or l2.
        gradient_weight: weight of the loss on the images' finite differences; by default only
            without LPIPS.
        lpips: weights of the LPIPS perceptual loss: a file, a folder or a hub id.
        lpips_weight: weight of the LPIPS loss; by default 0.1 with l2 and 1 with l1.
        kl_weight: weight of the KL divergence of the latents from a standard normal; it and the
            reconstruction loss count as sums over an image.
        gan_weight: weight of the patch discriminator's loss, times its adaptive weight; 0 disables
            it.
        gan_start: first step that trains and uses the discriminator.
        n_epochs: length of training in epochs; n_steps takes precedence.
        n_steps: length of training in updates; a larger value on resume stretches the schedule.
        batch_size: images per update, over all devices.
        accumulate_steps: gradient accumulation: microbatches per update, to save memory.
        learning_rate: peak learning rate.
        schedule: constant, cosine or linear.
        warmup_steps: steps of linear warmup.
        beta1: AdamW's decay rate of the first moment.
        beta2: AdamW's decay rate of the second moment.
        weight_decay: AdamW's weight decay, on kernels only.
        clip_norm: maximum gradient norm; 0 disables clipping.
        ema_decay: decay of the averaged weights (EMA), which are evaluated and exported.
        nan_patience: non-finite steps in a row before rollback to the last checkpoint; each of
            them leaves the weights unchanged.
        seed: random seed.
        distributed: join the other processes of a cluster job (SLURM, Open MPI, Kubernetes, Cloud
            TPU), as JAX detects it.
        coordinator: host:port of process 0, if JAX detects no cluster.
        n_processes: number of processes, if JAX detects no cluster.
        process_index: index of this process, from 0, if JAX detects no cluster.
        run_dir: run folder; by default runs/<dataset>-vae-<time>.
        resume: continue run_dir, or the newest autoencoder of this dataset.
        log_every: steps between lines of metrics.
        eval_save_steps: steps between evaluations, each with a checkpoint and an export to vae/.
        n_eval_batches: batches per evaluation, and per measurement of the latents' scale.
        sample_every_n: steps between grids of reconstructions.
        keep_checkpoints: number of newest checkpoints to keep.
        wandb_project: also log to this Weights & Biases project; with WANDB_MODE=offline, into the
            run folder.
    """

    overfit_batch: ClassVar[bool] = False  # a flag of train.py alone, read by the shared loop

    dataset_name: str = UNSET
    data_dir: Path | None = None
    image_column: str | None = None
    image_size: int = UNSET
    channels: int = UNSET
    streaming: bool = UNSET
    shuffle_buffer: int = UNSET
    in_memory: bool | None = None
    cache_on_device: bool = UNSET
    n_workers: int | None = None
    latent_channels: int = UNSET
    block_out_channels: tuple[int, ...] = UNSET
    layers_per_block: int = UNSET
    attention: bool = UNSET
    half_precision: bool = UNSET
    pixel_loss: str = UNSET
    gradient_weight: float = UNSET
    lpips: str | None = None
    lpips_weight: float = UNSET
    kl_weight: float = UNSET
    gan_weight: float = UNSET
    gan_start: int = UNSET
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
    seed: int = UNSET
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
    wandb_project: str | None = None


DEFAULTS: dict[str, Any] = {
    "dataset_name": "digits",
    "streaming": False,
    "shuffle_buffer": 10_000,
    "cache_on_device": False,
    "latent_channels": 4,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "attention": True,
    "pixel_loss": "l2",
    "kl_weight": 1e-6,
    "gan_weight": 0.0,
    "gan_start": 0,
    "n_steps": 1000,
    "batch_size": 32,
    "accumulate_steps": 1,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "ema_decay": 0.995,
    "nan_patience": 5,
    "seed": 0,
    "log_every": 50,
    "n_eval_batches": 6,
    "keep_checkpoints": 2,
}
LPIPS_WEIGHTS = {"l1": 1.0, "l2": 0.1}  # as Rombach et al. 2022 and, later, sd-vae-ft-mse
GRADIENT_WEIGHT = 0.1
MIN_IMAGE_SIZE = 16  # pixels; the 8 of the digits would leave little to downsample
MIN_GAN_IMAGE_SIZE = 8  # pixels
# Defaults as the help page prints them.
HELP_DEFAULTS = (
    DEFAULTS
    | {"image_size": f"the dataset's, at least {MIN_IMAGE_SIZE}", "channels": "the dataset's"}
    | {"gradient_weight": f"{GRADIENT_WEIGHT} without LPIPS", "lpips_weight": "0.1, or 1 with l1"}
    | dict.fromkeys(("eval_save_steps", "sample_every_n"), "n_steps / 4, at most 1000")
    | {"warmup_steps": "n_steps / 20, at most 1000"}
    | {"half_precision": "except on a CPU", "run_dir": "a new one"}
)
# Flags whose value must be above 0, or 0 or more, besides those shared with train.py.
POSITIVE = ("latent_channels", "layers_per_block")
NON_NEGATIVE = ("gradient_weight", "lpips_weight", "kl_weight", "gan_weight", "gan_start")


def requested_image_size(config: VaeConfig) -> int | None:
    """Return the image size to open the dataset with, in pixels; None for the dataset's own."""
    dataset = DATASET_CONFIGS.get(config.dataset_name or DEFAULTS["dataset_name"])
    if config.image_size is None and dataset:
        return max(dataset.image_size, MIN_IMAGE_SIZE)
    return config.image_size


def resolve_vae_config(
    config: VaeConfig, dataset: DatasetConfig, *, n_rows: int, n_devices: int, platform: str
) -> VaeConfig:
    """Fill in every flag left out, and check all values.

    Args:
        n_rows: rows of the training split, for `n_epochs`.
        n_devices: devices that a batch is split over.
        platform: cpu, gpu or tpu; the default is bfloat16 except on a CPU.

    Raises:
        UserError: a value is impossible, or contradicts another.
    """
    sizes: dict[str, Any] = {"image_size": dataset.image_size, "channels": dataset.channels}
    given = training_resolve.given_flags(config)
    values = DEFAULTS | sizes | given
    training_resolve.check_ranges(values)
    if not config.resume:  # a resumed run may have inherited flags that are no longer read
        training_resolve.reject_unused_flags(values, given)
    if config.n_epochs is not None and config.n_steps is None:
        values["n_steps"] = math.ceil(config.n_epochs * n_rows / values["batch_size"])
    quarter = max(1, min(1000, values["n_steps"] // 4))
    derived: dict[str, Any] = {
        "gradient_weight": 0.0 if values.get("lpips") else GRADIENT_WEIGHT,
        "lpips_weight": LPIPS_WEIGHTS.get(values["pixel_loss"], 0.0),
        "half_precision": platform != "cpu",
        "warmup_steps": min(1000, values["n_steps"] // 20),
        "eval_save_steps": quarter,
        "sample_every_n": quarter,
    }
    resolved = VaeConfig(**derived | values)
    validate_vae_config(resolved)
    training_resolve.require_even_batches(resolved, n_devices)
    return resolved


def validate_vae_config(c: VaeConfig) -> None:
    """Reject impossible values and combinations, before anything is loaded or written.

    Raises:
        UserError: the first one found.
    """
    for name, table in {"pixel_loss": PIXEL_LOSSES, "schedule": optim.SCHEDULES}.items():
        if getattr(c, name) not in table:
            raise unknown_name(name, getattr(c, name), table)
    for name in POSITIVE:
        if getattr(c, name) <= 0:
            raise UserError(f"--{name} {getattr(c, name)}: must be above 0")
    for name in NON_NEGATIVE:
        if getattr(c, name) < 0:
            raise UserError(f"--{name} {getattr(c, name)}: must not be below 0")
    if c.wandb_project is not None:
        wandb_sink.require_installed()
    factor = autoencoder_config(c).downsampling
    if c.image_size % factor:
        n_levels = len(c.block_out_channels)
        raise UserError(
            f"--image_size {c.image_size} is not divisible by {factor}: the {n_levels} levels of "
            f"--block_out_channels halve it {n_levels - 1} times"
        )
    if c.lpips and c.image_size < LPIPS_MIN_SIZE:
        raise UserError(f"--lpips needs images of at least {LPIPS_MIN_SIZE}×{LPIPS_MIN_SIZE}")
    if c.gan_weight and c.image_size < MIN_GAN_IMAGE_SIZE:
        raise UserError(
            f"--gan_weight needs images of at least {MIN_GAN_IMAGE_SIZE}×{MIN_GAN_IMAGE_SIZE}"
        )
    if c.gan_weight and c.accumulate_steps > 1:
        raise UserError(
            "the discriminator's adaptive weight needs the whole batch at once: drop "
            "--accumulate_steps or --gan_weight"
        )


def autoencoder_config(c: VaeConfig) -> AutoencoderConfig:
    """Return the autoencoder of a resolved config; the scale of its latents is not known yet."""
    return AutoencoderConfig(
        in_channels=c.channels,
        out_channels=c.channels,
        latent_channels=c.latent_channels,
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        norm_num_groups=largest_norm_groups(c.block_out_channels),
        sample_size=c.image_size,
        mid_block_add_attention=c.attention,
    )


def largest_norm_groups(widths: tuple[int, ...]) -> int:
    """Return the largest number of groups, up to 32, that divides all widths into groups of at
    least four channels, as in the published autoencoders. A group of one channel loses its mean.
    """
    common = math.gcd(*widths)
    return max(n for n in range(1, 33) if common % n == 0 and (n == 1 or common // n >= 4))
