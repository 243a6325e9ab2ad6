"""The autoencoder of latent diffusion: pictures to a few channels at an eighth of the size, and
back (Rombach et al. 2022, §3.1 and appendix G; its networks are those of Esser et al. 2021).

It knows latents as the decoder takes them; `scale` and `unscale` are the step between them and what
a diffusion model sees. Nothing here knows of losses, files or the names of published weights.
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
lecun = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
DTYPES = ("float32", "bfloat16")
LOG_VARIANCES = (-30.0, 20.0)  # as published: no variance is nothing or all


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder, in the words of diffusers' `config.json`. A default is what is
    meant where that file says nothing.

    Args:
        in_channels, out_channels: of pictures; 3 for RGB.
        latent_channels: of what a picture becomes.
        block_out_channels: of each level, from a picture's size down: each level halves it.
        layers_per_block: residual blocks of a level; the decoder has one more.
        norm_num_groups: of every group norm.
        sample_size: to a side of the pictures it was trained on; it takes others.
        scaling_factor, shift_factor: of its latents; see `scale`.
        use_quant_conv, use_post_quant_conv: a linear map of the moments, and one of the latents.
        mid_block_add_attention: attention between all places at the lowest level.
        force_upcast: its activations overflow float16. (They never are float16 here.)

    Raises:
        UserError: a value that cannot be.
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
            raise UserError("block_out_channels must have a width")
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
        """Pixels to a side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


COUNTS = (
    *("in_channels", "out_channels", "latent_channels", "layers_per_block"),
    *("norm_num_groups", "sample_size"),
)


# --- parts ----------------------------------------------------------------------------------------


class Conv(nnx.Module):
    """A convolution with a bias, computed in `dtype` with float32 weights. The result is kept for
    the backward pass.

    By default it keeps the size; `padding` is ((above, below), (left, right)).
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
        self.kernel = nnx.Param(lecun(rngs.params(), (size, size, n_in, n_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.strides, self.padding, self.dtype = (stride, stride), padding, dtype

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
    then: Callable[[Array], Array],
) -> Float[Array, "b h w c"]:
    """Zero mean and unit variance over the places of a picture and a group of its channels, then
    each channel's scale and shift (Wu & He 2018, eq. 1–3), then a function.
    """
    x = x - group_mean(x, groups)
    x = x * jax.lax.rsqrt(group_mean(jnp.square(x), groups) + 1e-6)
    return then(x * scale.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1))


def group_mean(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b 1 1 c"]:
    """Of a picture's places and each group of its channels, once for each of these channels."""
    # Places first: a CPU adds whole pixels several times as fast as parts of them.
    of_groups = reduce(x.mean((1, 2)), "b (g k) -> b g", "mean", g=groups)
    return repeat(of_groups, "b g -> b 1 1 (g k)", k=x.shape[-1] // groups)


class GroupNorm(nnx.Module):
    """`group_norm` in float32 with a learned scale and shift. The backward pass computes it again
    from its input, which is all that it keeps.
    """

    def __init__(self, n: int, groups: int, *, then: Callable[[Array], Array] = identity):
        self.scale, self.shift = nnx.Param(jnp.ones(n)), nnx.Param(jnp.zeros(n))
        self.groups, self.then = groups, then

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        normal = in_float32(partial(group_norm, groups=self.groups, then=self.then))
        return normal(x, self.scale[...], self.shift[...])


class ResidualBlock(nnx.Module):
    """Twice a norm, SiLU and a convolution, added to the input: to a linear map of it where the
    number of channels changes.
    """

    def __init__(self, n_in: int, n_out: int, *, groups: int, dtype: str, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(n_in, groups, then=jax.nn.silu)
        self.conv1 = Conv(n_in, n_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(n_out, groups, then=jax.nn.silu)
        self.conv2 = Conv(n_out, n_out, dtype=dtype, rngs=rngs)
        same = n_in == n_out
        self.shortcut = identity if same else Conv(n_in, n_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        y = self.conv1(self.norm1(x))
        return self.shortcut(x) + self.conv2(self.norm2(y))


class SpatialAttention(nnx.Module):
    """Attention of one head from each place of a picture to all, added to the input.

    Its scores are (h·w)² float32 numbers a picture: 64 MiB for 64×64 latents, 1 GiB for 128×128.
    """

    def __init__(self, n: int, *, groups: int, dtype: str, rngs: nnx.Rngs):
        self.norm = GroupNorm(n, groups)
        self.q, self.k, self.v, self.out = (
            Linear(n, n, dtype=dtype, rngs=rngs, init=lecun) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        places = rearrange(self.norm(x), "b h w c -> b (h w) c")
        q, k, v = (part(places)[:, :, None] for part in (self.q, self.k, self.v))
        return x + self.out(attention(q, k, v)).reshape(x.shape)


class Middle(nnx.Module):
    """What stands at the lowest level: two residual blocks, with attention between them or not."""

    def __init__(self, n: int, *, attends: bool, groups: int, dtype: str, rngs: nnx.Rngs):
        how = {"groups": groups, "dtype": dtype, "rngs": rngs}
        self.before = ResidualBlock(n, n, **how)
        self.attention = SpatialAttention(n, **how) if attends else identity
        self.after = ResidualBlock(n, n, **how)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.after(self.attention(self.before(x)))


class Downsample(nnx.Module):
    """Half the size, by a convolution. It is padded below and right alone, as published."""

    def __init__(self, n: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = Conv(n, n, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the size: each place four times, then a convolution."""

    def __init__(self, n: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = Conv(n, n, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return self.conv(repeat(x, "b h w c -> b (h r) (w s) c", r=2, s=2))


class Level(nnx.Module):
    """Residual blocks at one size, then `resize` to the next level's: by nothing, at the end."""

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


def levels(widths: list[int], n_blocks: int, resize, **how) -> list[Level]:
    """One for each width but the first, which is that of what comes in."""
    steps = [resize] * (len(widths) - 2) + [None]
    return [Level(a, b, n_blocks, step, **how) for (a, b), step in zip(pairwise(widths), steps)]


# --- the two halves -------------------------------------------------------------------------------
# The last convolution of each, and the linear maps between them, are computed in float32: they cost
# nothing, and half precision would round a picture near ±1 by half of an 8-bit step.


class Encoder(nnx.Module):
    """A picture → its latents' means and log-variances, side by side."""

    def __init__(self, config: AutoencoderConfig, *, dtype: str, rngs: nnx.Rngs):
        c, widths = config, config.block_out_channels
        how: dict[str, Any] = {"groups": c.norm_num_groups, "dtype": dtype, "rngs": rngs}
        self.conv_in = Conv(c.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.levels = nnx.List(levels([widths[0], *widths], c.layers_per_block, Downsample, **how))
        self.middle = Middle(widths[-1], attends=c.mid_block_add_attention, **how)
        self.norm_out = GroupNorm(widths[-1], c.norm_num_groups, then=jax.nn.silu)
        self.conv_out = Conv(widths[-1], 2 * c.latent_channels, dtype="float32", rngs=rngs)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.conv_out(self.norm_out(x.astype(jnp.float32)))


class Decoder(nnx.Module):
    """Latents → a picture."""

    def __init__(self, config: AutoencoderConfig, *, dtype: str, rngs: nnx.Rngs):
        c, widths = config, config.block_out_channels[::-1]
        how: dict[str, Any] = {"groups": c.norm_num_groups, "dtype": dtype, "rngs": rngs}
        self.conv_in = Conv(c.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.middle = Middle(widths[0], attends=c.mid_block_add_attention, **how)
        self.levels = nnx.List(
            levels([widths[0], *widths], c.layers_per_block + 1, Upsample, **how)
        )
        self.norm_out = GroupNorm(widths[-1], c.norm_num_groups, then=jax.nn.silu)
        self.conv_out = Conv(widths[-1], c.out_channels, dtype="float32", rngs=rngs)

    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(self.norm_out(x.astype(jnp.float32)))


class Moments(NamedTuple):
    """The normal distribution of a picture's latents, each number for itself; float32, unscaled."""

    mean: Float[Array, "b h w z"]
    log_variance: Float[Array, "b h w z"]


class AutoencoderKL(nnx.Module):
    """A variational autoencoder whose latents are pictures, of a few channels and small.

    Stable Diffusion's takes, beside its weights, 0.6 GiB to decode a picture of 512×512 and 2.5 GiB
    for 1024×1024, and less to encode it. Larger ones are for `decode_tiled`.

    Args:
        dtype: of convolutions and what stands between them, float32 or bfloat16. Weights, norms,
            softmax and results are float32.

    Raises:
        UserError: another dtype; when it is called, a picture or latents that it does not take.
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
        """Of pictures in −1 … 1, with sides that are multiples of `config.downsampling`."""
        require_picture(self.config, image.shape)
        mean, log_variance = jnp.split(self.quant(self.encoder(image)), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCES))

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        """Of unscaled latents; float32, about −1 … 1."""
        if z.shape[-1] != self.config.latent_channels:
            raise UserError(
                f"the autoencoder takes latents of {self.config.latent_channels} channels, "
                f"not {z.shape[-1]}"
            )
        return self.decoder(self.post_quant(z.astype(jnp.float32)))


def require_picture(config: AutoencoderConfig, shape: tuple[int, ...]) -> None:
    """Raises UserError unless pictures of (b, h, w, c) can be encoded."""
    _, h, w, c = shape
    if c != config.in_channels:
        raise UserError(f"the autoencoder takes pictures of {config.in_channels} channels, not {c}")
    if h % config.downsampling or w % config.downsampling or not h * w:
        raise UserError(
            f"the autoencoder takes pictures whose sides are multiples of {config.downsampling}, "
            f"not {h}×{w}"
        )


@lru_cache
def graphdef(config: AutoencoderConfig, dtype: str = "float32") -> nnx.GraphDef:
    """All of an autoencoder but its weights, static and hashable: `nnx.merge(graphdef, params)`
    lives. The same weights serve every dtype.
    """
    make = partial(AutoencoderKL, config, dtype=dtype)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def init_params(config: AutoencoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Fresh weights as a plain tree of float32 arrays."""
    return nnx.to_pure_dict(nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(params=key)))[1])


# --- latents --------------------------------------------------------------------------------------


def sample(moments: Moments, keys: Key[Array, "b"]) -> Float[Array, "b h w z"]:
    """Latents drawn from their distribution (Kingma & Welling 2014, §2.4), unscaled. Each row has
    its own key, so the numbers do not depend on how rows are spread over devices.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, moments.mean.shape[1:]))(keys)
    return moments.mean + jnp.exp(moments.log_variance / 2) * noise


def mode(moments: Moments) -> Float[Array, "b h w z"]:
    """The likeliest latents, unscaled."""
    return moments.mean


def scale(z: Float[Any, "*b"], *, scaling_factor: float, shift_factor: float) -> Float[Any, "*b"]:
    """Latents as a diffusion model sees them, of about unit variance: (z − shift) · scale (Rombach
    et al. 2022, appendix G; the shift came with SD3).
    """
    return (z - shift_factor) * scaling_factor


def unscale(z: Float[Any, "*b"], *, scaling_factor: float, shift_factor: float) -> Float[Any, "*b"]:
    """Latents as the decoder takes them: z / scale + shift, the inverse of `scale`."""
    return z / scaling_factor + shift_factor


def draw(
    moments: Float[Array, "b h w m"],
    keys: Key[Array, "b"],
    *,
    scaling_factor: float,
    shift_factor: float,
) -> Float[Array, "b h w z"]:
    """What a diffusion model is trained on: latents drawn from means and log-variances that stand
    side by side, each row by its own key, and scaled.
    """
    z = sample(Moments(*jnp.split(moments.astype(jnp.float32), 2, axis=-1)), keys)
    return scale(z, scaling_factor=scaling_factor, shift_factor=shift_factor)


def decode_tiled(
    decode: Callable[[Any], Any],
    z: Float[Any, "b h w z"],
    *,
    tile: int,
    overlap: int,
    downsampling: int,
) -> Float[np.ndarray, "b H W c"]:
    """Decode large pictures tile by tile, so that the device's memory does not grow with them.

    The tiles are of one size, so that `decode` is compiled once, and spread evenly, so that
    neighbours share at least `overlap` latents; there one fades linearly into the other. Each tile
    has its own norms and attends to itself alone: tiles differ a little from the whole, and from
    one another. A picture of one tile is exactly `decode`'s.

    Args:
        decode: unscaled latents → pictures, `downsampling` times the size; best jitted.
        tile: latents to a side. A shorter side of the picture is not cut.
        overlap: latents, below `tile`.

    Raises:
        UserError: an overlap that leaves no step from one tile to the next, or a tile of none.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"tiles of {tile} latents cannot overlap by {overlap}")
    z = np.asarray(z)  # cut on the host: on a device, each place of a tile would be compiled
    rows, columns = (tile_axis(n, tile, overlap, downsampling) for n in z.shape[1:3])
    picture = None
    for top, fade_rows in rows:
        for left, fade_columns in columns:
            part = np.asarray(decode(z[:, top : top + tile, left : left + tile]))
            if picture is None:
                sides = (n * downsampling for n in z.shape[1:3])
                picture = np.zeros((len(z), *sides, part.shape[-1]), np.float32)
            y, x = top * downsampling, left * downsampling
            weight = (fade_rows[:, None] * fade_columns[None])[None, :, :, None]
            picture[:, y : y + part.shape[1], x : x + part.shape[2]] += weight * part
    assert picture is not None
    return picture


def tile_axis(
    n: int, tile: int, overlap: int, downsampling: int
) -> list[tuple[int, Float[np.ndarray, "p"]]]:
    """Where tiles start on an axis of n latents, and the weight of each of a tile's pixels there.
    At every pixel of the picture the weights of all tiles add up to 1.
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
