"""Every flag of `train_vae.py`, its default, and how a flag left out is filled in and checked.

Nothing is loaded here and no device is used. Only the trainer of autoencoders reads the result.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets_config import DATASET_CONFIGS, DatasetConfig
from networks.autoencoder import AutoencoderConfig
from networks.perceptual import LPIPS_MIN_SIZE, PIXEL_LOSSES
from runtime.errors import UserError
from runtime.flags import Derived, again, flag, setting
from runtime.image_size import ImageSize, WrittenSize
from training import resolve as training_resolve
from training import wandb_sink
from training.flag_groups import (
    DEFAULT_DATASET,
    ClusterFlags,
    DatasetFlags,
    ImageFlags,
    OptimizerFlags,
    RunFlags,
    StorageFlags,
)

LPIPS_WEIGHTS = {"l1": 1.0, "l2": 0.1}  # as Rombach et al. 2022 and, later, sd-vae-ft-mse
GRADIENT_WEIGHT = 0.1
MIN_IMAGE_SIZE = 16  # pixels; the 8 of the digits would leave little to downsample
MIN_GAN_IMAGE_SIZE = 8  # pixels


@dataclass(frozen=True, kw_only=True)
class AutoencoderFlags:
    """Autoencoder."""

    latent_channels: int = setting(4, "channels of a latent", above=0)
    block_out_channels: tuple[int, ...] = setting(
        (32, 64, 64),
        "channels of each level. Each level after the first halves height and width, so three "
        "levels make latents of a quarter of the image's sides",
    )
    layers_per_block: int = setting(1, "residual blocks per level", above=0)
    attention: bool = setting(True, "self-attention at the lowest resolution")
    half_precision: bool = setting(Derived("except on a CPU"), "compute in bfloat16")


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """Losses."""

    pixel_loss: str = setting("l2", "l1 or l2", choices=PIXEL_LOSSES)
    gradient_weight: float = setting(
        Derived(f"{GRADIENT_WEIGHT} without LPIPS"),
        "weight of the loss on the images' finite differences",
        at_least=0,
    )
    lpips: str | None = flag(
        None, "weights of the LPIPS perceptual loss: a file, a folder or a hub id"
    )
    lpips_weight: float = setting(
        Derived("0.1, or 1 with l1"), "weight of the LPIPS loss", at_least=0
    )
    kl_weight: float = setting(
        1e-6,
        "weight of the KL divergence of the latents from a standard normal; it and the "
        "reconstruction loss count as sums over an image",
        at_least=0,
    )
    gan_weight: float = setting(
        0.0,
        "weight of the patch discriminator's loss, times its adaptive weight; 0 disables it",
        at_least=0,
    )
    gan_start: int = setting(0, "first step that trains and uses the discriminator", at_least=0)


@dataclass(frozen=True, kw_only=True)
class VaeConfig(
    DatasetFlags,
    ImageFlags,
    StorageFlags,
    AutoencoderFlags,
    LossFlags,
    OptimizerFlags,
    ClusterFlags,
    RunFlags,
):
    """Train an autoencoder of images; a diffusion model can then be trained on its latents.

    A flag left out takes the value of the resumed run, else its default. Labels and captions of the
    dataset are not used. Each evaluation exports to vae/ in the run's folder, runs/<dataset>-vae-….
    """

    COMMAND: ClassVar[str] = "train_vae.py"
    overfit_batch: ClassVar[bool] = False  # a flag of train.py alone, read by the shared loop

    image_size: WrittenSize = again(
        ImageFlags, "image_size", default=Derived(f"the dataset's, at least {MIN_IMAGE_SIZE}")
    )
    n_steps: int = again(OptimizerFlags, "n_steps", default=1000)
    batch_size: int = again(OptimizerFlags, "batch_size", default=32)
    learning_rate: float = again(OptimizerFlags, "learning_rate", default=1e-3)
    beta2: float = again(OptimizerFlags, "beta2", default=0.99)
    ema_decay: float = again(OptimizerFlags, "ema_decay", default=0.995)


def requested_image_size(config: VaeConfig) -> WrittenSize | None:
    """Return the image size to open the dataset with, in pixels; None for the dataset's own."""
    dataset = DATASET_CONFIGS.get(config.dataset_name or DEFAULT_DATASET)
    if config.image_size is None and dataset:
        height, width = dataset.size.sides
        return ImageSize(max(height, MIN_IMAGE_SIZE), max(width, MIN_IMAGE_SIZE)).written
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
    sizes: dict[str, Any] = {"image_size": dataset.image_size}
    values = sizes | training_resolve.known_values(config, dataset)
    training_resolve.check_given(config, values)
    values["n_steps"] = training_resolve.length_of_training(config, values, [n_rows])
    derived: dict[str, Any] = {
        "gradient_weight": 0.0 if values.get("lpips") else GRADIENT_WEIGHT,
        "lpips_weight": LPIPS_WEIGHTS[values["pixel_loss"]],
        "half_precision": platform != "cpu",
        **training_resolve.defaults_of_length(values["n_steps"]),
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
    training_resolve.check_decay(c)
    if c.wandb_project is not None:
        wandb_sink.require_installed()
    factor = autoencoder_config(c).downsampling
    size = ImageSize.parse(c.image_size)
    if not size.divided(factor):
        n_levels = len(c.block_out_channels)
        raise UserError(
            f"--image_size {c.image_size} is not divisible by {factor}: the {n_levels} levels of "
            f"--block_out_channels halve it {n_levels - 1} times"
        )
    if c.lpips and min(size.sides) < LPIPS_MIN_SIZE:
        raise UserError(f"--lpips needs images of at least {LPIPS_MIN_SIZE}×{LPIPS_MIN_SIZE}")
    if c.gan_weight and min(size.sides) < MIN_GAN_IMAGE_SIZE:
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
        sample_size=min(ImageSize.parse(c.image_size).sides),
        mid_block_add_attention=c.attention,
    )


def largest_norm_groups(widths: tuple[int, ...]) -> int:
    """Return the largest number of groups, up to 32, that divides all widths into groups of at
    least four channels, as in the published autoencoders. A group of one channel loses its mean.
    """
    common = math.gcd(*widths)
    return max(n for n in range(1, 33) if common % n == 0 and (n == 1 or common // n >= 4))
