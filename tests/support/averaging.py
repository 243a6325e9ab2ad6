"""A handmade autoencoder whose latents are known: means of 2×2 pixels, each times a gain.

Only weights such as these reconstruct images without training. Tests use it where they need a VAE
that does.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import reduce, repeat
from jaxtyping import Float, UInt8

from networks.autoencoder import AutoencoderConfig, init_autoencoder_params
from pretrained import autoencoder as pretrained

GAINS = (1.0, -0.5)  # one channel of an image becomes this many of latents
LOG_VARIANCE = -4.0
SCALE, SHIFT = 1.6, -0.1
LARGE = 100.0  # channels so large that a norm divides by them, whatever the image


def config(channels: int = 1, **facts: Any) -> AutoencoderConfig:
    return AutoencoderConfig(
        in_channels=channels,
        out_channels=channels,
        latent_channels=len(GAINS) * channels,
        block_out_channels=(8, 8),
        norm_num_groups=1,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        **facts,
    )


def params(channels: int = 1) -> dict[str, Any]:
    """Make its weights: all 0 but for a path through shortcuts.

    An image travels as x and −x beside two large constants: a norm's mean is then 0, its deviation
    one number, and silu(x) − silu(−x) = x.
    """
    c = config(channels)
    tree = jax.tree.map(np.zeros_like, init_autoencoder_params(c, jax.random.key(0)))
    n, z = channels, c.latent_channels
    both = np.stack([np.eye(n), -np.eye(n)], 1).reshape(n, 2 * n)  # x → x, −x, x, −x …
    gains = np.asarray(GAINS)
    spread = np.kron(np.eye(n), gains[None])  # x → z
    gather = np.kron(np.eye(n), gains[:, None]) / np.square(gains).sum()  # z → x
    back = both.T * np.sqrt(2 * LARGE**2 / 8) / 1e-3 / 2  # what a norm and its small scale leave

    for half, into, out in (("encoder", both, back @ spread), ("decoder", gather @ both, back)):
        part = tree[half]
        part["conv_in"]["kernel"][1, 1, :, : 2 * n] = into
        part["conv_in"]["bias"][-2:] = LARGE, -LARGE
        part["norm_out"]["scale"][:] = 2e-3
        part["conv_out"]["kernel"][1, 1, : 2 * n, : out.shape[1]] = out
        resize = part["levels"][0]["resize"]["conv"]
        if half == "encoder":
            resize["kernel"][:2, :2] = np.eye(8) / 4
        else:
            resize["kernel"][1, 1] = np.eye(8)
    tree["quant"]["kernel"][0, 0] = np.eye(2 * z)
    tree["quant"]["bias"][z:] = LOG_VARIANCE
    tree["post_quant"]["kernel"][0, 0] = np.eye(z)
    return tree


def save(folder: Path, channels: int = 1, **facts: Any) -> Path:
    """Write it in diffusers' layout."""
    pretrained.save_autoencoder(folder, config(channels, **facts), params(channels))
    return folder


def encode_means(images: UInt8[np.ndarray, "b H W c"]) -> Float[np.ndarray, "b h w z"]:
    """Compute the latents' means, in NumPy."""
    x = images.astype(np.float64) / 127.5 - 1
    small = reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)
    return (small[..., None] * np.asarray(GAINS)).reshape(*small.shape[:3], -1)


def decode_means(means: Float[np.ndarray, "b h w z"]) -> Float[np.ndarray, "b H W c"]:
    """Compute the images of latents that `encode_means` returned, in NumPy."""
    first = means[..., :: len(GAINS)] / GAINS[0]
    return repeat(first, "b h w c -> b (h p) (w q) c", p=2, q=2)
