"""The settings of an autoencoder's training: every flag of `train_vae.py`, and how what was not
said is filled in. Only `train_vae.py` reads the result.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets_config import DATASET_CONFIGS, DatasetConfig
from networks.autoencoder import AutoencoderConfig
from networks.perceptual import LPIPS_LEAST_SIZE, PIXEL_LOSSES
from runtime.errors import UserError, unknown
from training import optim, wandb_sink
from training import resolve as training_resolve
from training.config import UNSET


@dataclass(frozen=True)
class VaeConfig:
    """Train an autoencoder of pictures, whose latents a diffusion model can learn.

    A value not given is the resumed run's, else the default in DEFAULTS.

    Args:
        dataset_name: a key of DATASET_CONFIGS, folder:PATH or hf:owner/name; classes and captions
            are not read.
        data_dir: a local copy of the data set: Parquet files, an image folder or a `save_to_disk`
            folder.
        image_column: where to find pictures in folder: and hf: data.
        image_size: pixels to a side after centre crop and resize.
        channels: 1 (grey) or 3 (RGB).
        streaming: read pictures from Parquet files, here or on the hub, as they are needed.
        shuffle_buffer: rows of a streamed set that are mixed at a time.
        in_memory: decode the whole set once and hold it; by default up to 1 GiB.
        cache_on_device: hold the whole set in device memory and draw batches there.
        n_workers: processes that decode a set that is not held.
        latent_channels: numbers at each place of a latent.
        block_out_channels: widths of the levels; each after the first halves the size, so three of
            them make a latent of a quarter of the picture's sides.
        layers_per_block: residual blocks of a level.
        attention: between all places at the lowest level.
        half_precision: compute in bfloat16; the default on GPU and TPU, not on CPU.
        pixel_loss: l1 or l2.
        gradient_weight: of the pictures' finite differences; by default only without LPIPS.
        lpips: weights of the perceptual loss: a file, a folder or an id of the hub.
        lpips_weight: by default 0.1 beside l2 and 1 beside l1.
        kl_weight: of the latents' distance to a normal distribution, both summed over a picture.
        gan_weight: of the critic of patches, times its adaptive weight; 0 trains without.
        gan_start: the step at which the critic begins to learn and to be listened to.
        n_epochs: how long to train; n_steps wins.
        n_steps: how long to train, in updates; more on a resumed run stretches its schedule.
        batch_size: pictures per update, over all devices.
        accumulate_steps: parts that a batch is computed in, one after the other, to save memory.
        learning_rate: the peak of the schedule.
        schedule: constant, cosine or linear.
        warmup_steps: of linear rise to the peak.
        beta1: AdamW's decay of the mean of gradients.
        beta2: AdamW's decay of their squares.
        weight_decay: AdamW's, on kernels only.
        clip_norm: of the gradient; 0 never clips.
        ema_decay: of the averaged weights, which are the ones evaluated and exported.
        nan_patience: steps in a row without a finite loss and gradient, each of which leaves the
            weights alone, before the run goes back to its last checkpoint.
        seed: of everything random.
        distributed: join the other processes of a cluster's job (SLURM, Open MPI, Kubernetes, Cloud
            TPU), as JAX detects it.
        coordinator: host:port of process 0, where no cluster is detected.
        n_processes: of the run, likewise.
        process_index: of this process, from 0, likewise.
        run_dir: the run's folder; by default runs/<dataset>-vae-<time>.
        resume: go on in run_dir, or in the newest autoencoder of this data set.
        log_every: steps between lines of metrics.
        eval_save_steps: steps between evaluations, each with a checkpoint and an export to vae/.
        n_eval_batches: batches of an evaluation, and of the latents whose scale is measured.
        sample_every_n: steps between sheets of reconstructions.
        keep_checkpoints: how many of the newest to keep.
        wandb_project: record the run on Weights & Biases too, under this name; WANDB_MODE=offline
            keeps it in the run's folder.
    """

    overfit_batch: ClassVar[bool] = False  # which this command cannot do

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
LEAST_SIZE = 16  # pixels to a side: the digits' 8 would leave little to shrink
# What the help page says of values that are not given.
FILLED = (
    DEFAULTS
    | {"image_size": f"the data set's, at least {LEAST_SIZE}", "channels": "the data set's"}
    | {"gradient_weight": f"{GRADIENT_WEIGHT} without LPIPS", "lpips_weight": "0.1, or 1 with l1"}
    | dict.fromkeys(("eval_save_steps", "sample_every_n"), "n_steps / 4, at most 1000")
    | {"warmup_steps": "n_steps / 20, at most 1000"}
    | {"half_precision": "except on a CPU", "run_dir": "a new one"}
)
POSITIVE = ("latent_channels", "layers_per_block")
NOT_NEGATIVE = ("gradient_weight", "lpips_weight", "kl_weight", "gan_weight", "gan_start")


def size_to_open(config: VaeConfig) -> int | None:
    """Pixels to a side of the pictures to be read; None as the data say."""
    entry = DATASET_CONFIGS.get(config.dataset_name or DEFAULTS["dataset_name"])
    if config.image_size is None and entry:
        return max(entry.image_size, LEAST_SIZE)
    return config.image_size


def resolve(
    config: VaeConfig, dataset: DatasetConfig, *, n_rows: int, n_devices: int, platform: str
) -> VaeConfig:
    """Fill every hole of `config`.

    Args:
        n_rows: of the training split, for `n_epochs`.
        n_devices: that a batch is split over.
        platform: cpu, gpu or tpu; bfloat16 is the default except on a CPU.

    Raises:
        UserError: a value that cannot be.
    """
    sizes: dict[str, Any] = {"image_size": dataset.image_size, "channels": dataset.channels}
    said = training_resolve.given_flags(config)
    filled = DEFAULTS | sizes | said
    training_resolve.check_numbers(filled)
    if not config.resume:
        training_resolve.reject_unused_flags(filled, said)
    if config.n_epochs is not None and config.n_steps is None:
        filled["n_steps"] = math.ceil(config.n_epochs * n_rows / filled["batch_size"])
    quarter = max(1, min(1000, filled["n_steps"] // 4))
    derived: dict[str, Any] = {
        "gradient_weight": 0.0 if filled.get("lpips") else GRADIENT_WEIGHT,
        "lpips_weight": LPIPS_WEIGHTS.get(filled["pixel_loss"], 0.0),
        "half_precision": platform != "cpu",
        "warmup_steps": min(1000, filled["n_steps"] // 20),
        "eval_save_steps": quarter,
        "sample_every_n": quarter,
    }
    resolved = VaeConfig(**derived | filled)
    validate(resolved)
    training_resolve.require_even_batches(resolved, n_devices)
    return resolved


def validate(c: VaeConfig) -> None:
    """Refuse values that cannot be, before anything is loaded or written."""
    for name, table in {"pixel_loss": PIXEL_LOSSES, "schedule": optim.SCHEDULES}.items():
        if getattr(c, name) not in table:
            raise unknown(name, getattr(c, name), table)
    for name in POSITIVE:
        if getattr(c, name) <= 0:
            raise UserError(f"--{name} {getattr(c, name)}: must be above 0")
    for name in NOT_NEGATIVE:
        if getattr(c, name) < 0:
            raise UserError(f"--{name} {getattr(c, name)}: must not be below 0")
    if c.wandb_project is not None:
        wandb_sink.require_installed()
    if c.image_size % (f := network(c).downsampling):
        widths = len(c.block_out_channels)
        raise UserError(
            f"--image_size {c.image_size} is not divisible by {f}: {widths} widths of "
            f"--block_out_channels halve it {widths - 1} times"
        )
    if c.lpips and c.image_size < LPIPS_LEAST_SIZE:
        raise UserError(f"--lpips needs pictures of at least {LPIPS_LEAST_SIZE} pixels to a side")
    if c.gan_weight and c.image_size < 8:
        raise UserError("--gan_weight needs pictures of at least 8 pixels to a side")
    if c.gan_weight and c.accumulate_steps > 1:
        raise UserError(
            "the critic's adaptive weight is that of a whole batch: drop "
            "--accumulate_steps or --gan_weight"
        )


def network(c: VaeConfig) -> AutoencoderConfig:
    """The autoencoder that a resolved config describes, but for the scale of its latents."""
    return AutoencoderConfig(
        in_channels=c.channels,
        out_channels=c.channels,
        latent_channels=c.latent_channels,
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        norm_num_groups=norm_groups(c.block_out_channels),
        sample_size=c.image_size,
        mid_block_add_attention=c.attention,
    )


def norm_groups(widths: tuple[int, ...]) -> int:
    """The most groups, up to 32, that divide all widths and have four channels each, as those of
    the published autoencoders: a channel that is a group of its own loses its mean.
    """
    common = math.gcd(*widths)
    return max(n for n in range(1, 33) if common % n == 0 and (n == 1 or common // n >= 4))
