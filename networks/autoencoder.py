"""The autoencoder of latent diffusion: images to a few channels at an eighth of the size, and back
(Rombach et al. 2022, §3.1 and appendix G; the networks are those of Esser et al. 2021).

The networks work on unscaled latents. `scale_latents` and `unscale_latents` convert between these
and the latents that a diffusion model sees. Nothing here knows of losses, files or the names of
published weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float, Key

from networks.layers import Linear, identity
from networks.ops import attention, in_float32, save_for_backward
from runtime.errors import UserError, unknown_name

# Uniform within ±1/√(inputs of an output): what the published autoencoders were trained from.
lecun_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
DTYPES = ("float32", "bfloat16")
LOG_VARIANCES = (-30.0, 20.0)  # range of a latent's log-variance, as published


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder, with the field names and defaults of diffusers' `config.json`.

    Args:
        in_channels, out_channels: of images; 3 for RGB.
        latent_channels: of a latent.
        block_out_channels: of each level, from full resolution down; each level halves it.
        layers_per_block: residual blocks of a level; the decoder has one more.
        norm_num_groups: of every group norm.
        sample_size: shorter side of the training images in pixels; other sizes work too.
        scaling_factor, shift_factor: of the latents; see `scale_latents`.
        use_quant_conv, use_post_quant_conv: a linear map of the moments, and one of the latents.
        mid_block_add_attention: attention between all positions of the lowest level.
        force_upcast: its activations overflow float16. (They never are float16 here.)

    Raises:
        UserError: a value out of range.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True

    def __post_init__(self):
        if not self.block_out_channels:
            raise UserError("block_out_channels () is empty: give one width for each level")
        counts = [("block_out_channels", n) for n in self.block_out_channels]
        for name, n in counts + [(name, getattr(self, name)) for name in COUNTS]:
            if n < 1:
                raise UserError(f"{name} {n}: must be above 0")
        for n in self.block_out_channels:
            if n % self.norm_num_groups:
                raise UserError(
                    f"block_out_channels {n}: not divisible by norm_num_groups "
                    f"{self.norm_num_groups}"
                )
        for name in ("scaling_factor", "shift_factor"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)}: must be finite")
        if self.scaling_factor <= 0:
            raise UserError(f"scaling_factor {self.scaling_factor}: must be above 0")

    @property
    def downsampling(self) -> int:
        """Side of a latent position in pixels."""
        return 2 ** (len(self.block_out_channels) - 1)


COUNTS = (
    *("in_channels", "out_channels", "latent_channels", "layers_per_block"),
    *("norm_num_groups", "sample_size"),
)


# --- layers ---------------------------------------------------------------------------------------


class Conv(nnx.Module):
    """A convolution with a bias, computed in `dtype` with float32 weights. Its result is saved for
    the backward pass.

    Args:
        padding: ((above, below), (left, right)); by default the size is preserved.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: Any = "SAME",
        dtype: str,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, n_in, n_out)
        self.kernel = nnx.Param(lecun_uniform(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.strides = (stride, stride)
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            self.strides,
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return save_for_backward(y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1))


def group_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "c"],
    shift: Float[Array, "c"],
    *,
    groups: int,
    activation: Callable[[Array], Array],
) -> Float[Array, "b h w c"]:
    """Normalize to zero mean and unit variance over all positions and a group of channels of an
    image, apply each channel's scale and shift (Wu & He 2018, eq. 1–3), then the activation.
    """
    x = x - group_mean(x, groups)
    x = x * jax.lax.rsqrt(group_mean(jnp.square(x), groups) + 1e-6)
    return activation(x * scale.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1))


def group_mean(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b 1 1 c"]:
    """The mean over all positions and each group of channels, repeated for the group's channels."""
    # Positions first: a CPU adds whole pixels several times as fast as parts of them.
    means = reduce(x.mean((1, 2)), "b (g k) -> b g", "mean", g=groups)
    return repeat(means, "b g -> b 1 1 (g k)", k=x.shape[-1] // groups)


class GroupNorm(nnx.Module):
    """`group_norm` in float32 with a learned scale and shift. The backward pass recomputes it from
    its input; nothing else is saved.
    """

    def __init__(self, n: int, groups: int, *, activation: Callable[[Array], Array] = identity):
        self.scale, self.shift = nnx.Param(jnp.ones(n)), nnx.Param(jnp.zeros(n))
        self.groups, self.activation = groups, activation

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        norm = in_float32(partial(group_norm, groups=self.groups, activation=self.activation))
        return norm(x, self.scale[...], self.shift[...])


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, added to the input. Where the number of channels changes,
    a linear map of the input takes its place.
    """

    def __init__(self, n_in: int, n_out: int, *, groups: int, dtype: str, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(n_in, groups, activation=jax.nn.silu)
        self.conv1 = Conv(n_in, n_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(n_out, groups, activation=jax.nn.silu)
        self.conv2 = Conv(n_out, n_out, dtype=dtype, rngs=rngs)
        if n_in == n_out:
            self.shortcut = identity
        else:
            self.shortcut = Conv(n_in, n_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        y = self.conv1(self.norm1(x))
        return self.shortcut(x) + self.conv2(self.norm2(y))


class SpatialAttention(nnx.Module):
    """Attention of one head among all positions of an image, added to the input.

    Its scores are (h·w)² float32 numbers an image: 64 MiB for 64×64 latents, 1 GiB for 128×128.
    """

    def __init__(self, n: int, *, groups: int, dtype: str, rngs: nnx.Rngs):
        self.norm = GroupNorm(n, groups)
        self.q, self.k, self.v, self.out = (
            Linear(n, n, dtype=dtype, rngs=rngs, init=lecun_uniform) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        tokens = rearrange(self.norm(x), "b h w c -> b (h w) c")
        q, k, v = (linear(tokens)[:, :, None] for linear in (self.q, self.k, self.v))
        return x + self.out(attention(q, k, v)).reshape(x.shape)


class Middle(nnx.Module):
    """The lowest level: two residual blocks, with or without attention between them."""

    def __init__(self, n: int, *, has_attention: bool, groups: int, dtype: str, rngs: nnx.Rngs):
        self.before = ResidualBlock(n, n, groups=groups, dtype=dtype, rngs=rngs)
        if has_attention:
            self.attention = SpatialAttention(n, groups=groups, dtype=dtype, rngs=rngs)
        else:
            self.attention = identity
        self.after = ResidualBlock(n, n, groups=groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.after(self.attention(self.before(x)))


class Downsample(nnx.Module):
    """Halve the size by a convolution, padded only below and right, as published."""

    def __init__(self, n: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = Conv(n, n, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Double the size: repeat each position four times, then convolve."""

    def __init__(self, n: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = Conv(n, n, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return self.conv(repeat(x, "b h w c -> b (h r) (w s) c", r=2, s=2))


class Level(nnx.Module):
    """Residual blocks at one size, then `resize` to the size of the next level, if there is one."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_blocks: int,
        resize: type[Downsample] | type[Upsample] | None,
        *,
        groups: int,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        widths = [n_in] + [n_out] * n_blocks
        self.blocks = nnx.List(
            ResidualBlock(a, b, groups=groups, dtype=dtype, rngs=rngs) for a, b in pairwise(widths)
        )
        self.resize = resize(n_out, dtype=dtype, rngs=rngs) if resize else identity

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        for block in self.blocks:
            x = block(x)
        return self.resize(x)


def make_levels(
    widths: list[int],
    n_blocks: int,
    resize: type[Downsample] | type[Upsample],
    *,
    groups: int,
    dtype: str,
    rngs: nnx.Rngs,
) -> list[Level]:
    """Make the levels of an encoder or decoder, with `resize` between them.

    Args:
        widths: channels of the first level's input, then of each level's output.
    """
    n_levels = len(widths) - 1
    return [
        Level(
            widths[i],
            widths[i + 1],
            n_blocks,
            resize if i + 1 < n_levels else None,
            groups=groups,
            dtype=dtype,
            rngs=rngs,
        )
        for i in range(n_levels)
    ]


# --- encoder and decoder --------------------------------------------------------------------------
# The last convolution of each, and the linear maps between them, are computed in float32: they cost
# nothing, and half precision would round an image near ±1 by half of an 8-bit step.


class Encoder(nnx.Module):
    """An image → the means and log-variances of its latents, concatenated along channels."""

    def __init__(self, config: AutoencoderConfig, *, dtype: str, rngs: nnx.Rngs):
        c, widths = config, config.block_out_channels
        groups = c.norm_num_groups
        self.conv_in = Conv(c.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.levels = nnx.List(
            make_levels(
                [widths[0], *widths],
                c.layers_per_block,
                Downsample,
                groups=groups,
                dtype=dtype,
                rngs=rngs,
            )
        )
        self.middle = Middle(
            widths[-1],
            has_attention=c.mid_block_add_attention,
            groups=groups,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm_out = GroupNorm(widths[-1], groups, activation=jax.nn.silu)
        self.conv_out = Conv(widths[-1], 2 * c.latent_channels, dtype="float32", rngs=rngs)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.conv_out(self.norm_out(x.astype(jnp.float32)))


class Decoder(nnx.Module):
    """Latents → an image."""

    def __init__(self, config: AutoencoderConfig, *, dtype: str, rngs: nnx.Rngs):
        c, widths = config, config.block_out_channels[::-1]
        groups = c.norm_num_groups
        self.conv_in = Conv(c.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.middle = Middle(
            widths[0],
            has_attention=c.mid_block_add_attention,
            groups=groups,
            dtype=dtype,
            rngs=rngs,
        )
        self.levels = nnx.List(
            make_levels(
                [widths[0], *widths],
                c.layers_per_block + 1,
                Upsample,
                groups=groups,
                dtype=dtype,
                rngs=rngs,
            )
        )
        self.norm_out = GroupNorm(widths[-1], groups, activation=jax.nn.silu)
        self.conv_out = Conv(widths[-1], c.out_channels, dtype="float32", rngs=rngs)

    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(self.norm_out(x.astype(jnp.float32)))


class Moments(NamedTuple):
    """The diagonal normal distribution of an image's unscaled latents, in float32."""

    mean: Float[Array, "b h w z"]
    log_variance: Float[Array, "b h w z"]


class AutoencoderKL(nnx.Module):
    """A variational autoencoder with spatial latents.

    Stable Diffusion's takes, beside its weights, 0.6 GiB to decode an image of 512×512 and 2.5 GiB
    for 1024×1024, and less to encode it. Larger images are for `decode_tiled`.

    Args:
        dtype: of convolutions and the activations between them, float32 or bfloat16. Weights,
            norms, softmax and results are float32.

    Raises:
        UserError: another dtype; when called, an image or latents of an unsuitable shape.
    """

    def __init__(self, config: AutoencoderConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        n = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        linear = partial(Conv, size=1, dtype="float32", rngs=rngs)
        self.quant = linear(2 * n, 2 * n) if config.use_quant_conv else identity
        self.post_quant = linear(n, n) if config.use_post_quant_conv else identity

    def encode(self, image: Float[Array, "b H W c"]) -> Moments:
        """Encode images in −1 … 1, with sides that are multiples of `config.downsampling`."""
        require_encodable_shape(self.config, image.shape)
        mean, log_variance = jnp.split(self.quant(self.encoder(image)), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCES))

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        """Decode unscaled latents to float32 images of about −1 … 1."""
        if z.shape[-1] != self.config.latent_channels:
            raise UserError(
                f"the autoencoder takes latents of {self.config.latent_channels} channels, "
                f"not {z.shape[-1]}"
            )
        return self.decoder(self.post_quant(z.astype(jnp.float32)))


def require_encodable_shape(config: AutoencoderConfig, shape: tuple[int, ...]) -> None:
    """Raise UserError unless images of shape (b, h, w, c) can be encoded."""
    _, h, w, c = shape
    if c != config.in_channels:
        raise UserError(f"the autoencoder takes images of {config.in_channels} channels, not {c}")
    if h % config.downsampling or w % config.downsampling or not h * w:
        raise UserError(
            f"the autoencoder takes images whose sides are multiples of {config.downsampling}, "
            f"not {h}×{w}"
        )


@lru_cache
def autoencoder_graphdef(config: AutoencoderConfig, dtype: str = "float32") -> nnx.GraphDef[Any]:
    """An autoencoder without its weights, static and hashable: `nnx.merge(graphdef, params)` is the
    network. The same weights serve every dtype.
    """
    make = partial(AutoencoderKL, config, dtype=dtype)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def init_autoencoder_params(config: AutoencoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Initialize weights as a plain tree of float32 arrays."""
    return nnx.to_pure_dict(nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(params=key)))[1])


# --- latents --------------------------------------------------------------------------------------


def sample_latents(moments: Moments, keys: Key[Array, "b"]) -> Float[Array, "b h w z"]:
    """Sample unscaled latents from their distribution (Kingma & Welling 2014, §2.4). Each row has
    its own key, so the numbers do not depend on how rows are spread over devices.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, moments.mean.shape[1:]))(keys)
    return moments.mean + jnp.exp(moments.log_variance / 2) * noise


def most_likely_latents(moments: Moments) -> Float[Array, "b h w z"]:
    """The mode of the latents' distribution, unscaled."""
    return moments.mean


def scale_latents(
    z: Float[Any, "*b"], *, scaling_factor: float, shift_factor: float
) -> Float[Any, "*b"]:
    """Scale latents to about unit variance for a diffusion model: (z − shift) · scale (Rombach et
    al. 2022, appendix G; the shift came with SD3).
    """
    return (z - shift_factor) * scaling_factor


def unscale_latents(
    z: Float[Any, "*b"], *, scaling_factor: float, shift_factor: float
) -> Float[Any, "*b"]:
    """Invert `scale_latents`, for the decoder: z / scale + shift."""
    return z / scaling_factor + shift_factor


def sample_scaled_latents(
    moments: Float[Array, "b h w m"],
    keys: Key[Array, "b"],
    *,
    scaling_factor: float,
    shift_factor: float,
) -> Float[Array, "b h w z"]:
    """Sample latents and scale them, for training a diffusion model.

    Args:
        moments: means and log-variances, concatenated along channels.
        keys: one for each row.
    """
    z = sample_latents(Moments(*jnp.split(moments.astype(jnp.float32), 2, axis=-1)), keys)
    return scale_latents(z, scaling_factor=scaling_factor, shift_factor=shift_factor)


def decode_tiled(
    decode: Callable[[Any], Any],
    z: Float[Any, "b h w z"],
    *,
    tile: int,
    overlap: int,
    downsampling: int,
) -> Float[np.ndarray, "b H W c"]:
    """Decode large images tile by tile, so that the device's memory does not grow with them.

    All tiles have one size, so that `decode` is compiled once. They are spread evenly, so that
    neighbours share at least `overlap` latents, where one fades linearly into the other. Each tile
    has its own norms and attends to itself alone: tiles differ a little from the undivided result,
    and from one another. With a single tile the result is exactly `decode`'s.

    Args:
        decode: unscaled latents → images, `downsampling` times the size; best jitted.
        tile: side of a tile in latents. A shorter side of the image is not cut.
        overlap: in latents, below `tile`.

    Raises:
        UserError: overlap is not in 0 … tile − 1.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"tiles of {tile} latents cannot overlap by {overlap}")
    z = np.asarray(z)  # cut on the host: on a device, each offset of a tile would be compiled
    rows, columns = (tile_axis(n, tile, overlap, downsampling) for n in z.shape[1:3])
    image = None
    for top, fade_rows in rows:
        for left, fade_columns in columns:
            part = np.asarray(decode(z[:, top : top + tile, left : left + tile]))
            if image is None:
                sides = (n * downsampling for n in z.shape[1:3])
                image = np.zeros((len(z), *sides, part.shape[-1]), np.float32)
            y, x = top * downsampling, left * downsampling
            weight = (fade_rows[:, None] * fade_columns[None])[None, :, :, None]
            image[:, y : y + part.shape[1], x : x + part.shape[2]] += weight * part
    assert image is not None
    return image


def tile_axis(
    n: int, tile: int, overlap: int, downsampling: int
) -> list[tuple[int, Float[np.ndarray, "p"]]]:
    """Lay tiles over an axis of n latents: each tile's start in latents, and the weights of its
    pixels. At every pixel of the image the weights of all tiles add up to 1.
    """
    tile = min(n, tile)
    n_tiles = 1 + math.ceil((n - tile) / max(1, tile - overlap))
    starts = [round(i * (n - tile) / max(1, n_tiles - 1)) for i in range(n_tiles)]
    centres = np.arange(n * downsampling) + 0.5
    weights = np.zeros((n_tiles, n * downsampling))
    for i, start in enumerate(starts):
        first, last = start * downsampling, (start + tile) * downsampling
        fade_in = (starts[i - 1] + tile - start) * downsampling if i else 0
        fade_out = (start + tile - starts[i + 1]) * downsampling if i + 1 < n_tiles else 0
        up = (centres - first) / fade_in if fade_in else np.where(centres > first, 1.0, 0.0)
        down = (last - centres) / fade_out if fade_out else np.where(centres < last, 1.0, 0.0)
        weights[i] = np.clip(np.minimum(up, down), 0, 1)
    weights = (weights / weights.sum(0, keepdims=True)).astype(np.float32)
    return [
        (start, weights[i, start * downsampling : (start + tile) * downsampling])
        for i, start in enumerate(starts)
    ]
