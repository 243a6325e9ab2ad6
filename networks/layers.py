"""The parts of a diffusion transformer: linear maps, norms, attention, positions, embedders,
stacked blocks.

Every module holds only `nnx.Param`. Weights are float32; `dtype` is what the operands of matrix
products are rounded to, while their sums and what stands between them, from norms to the softmax,
are computed in float32. What is worth keeping for the backward pass says so (`keep`). Nothing here
knows of a whole model, a loss or a mesh.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from networks.ops import affine, attention, in_float32, save_for_backward

xavier = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros
small_normal = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """y = x W + b over the last axis, computed in `dtype` with float32 weights. The result is kept
    for the backward pass, unless what follows keeps what it makes of it.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
        init=xavier,
        kept: bool = True,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (n_in, n_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.dtype, self.kept = dtype, kept

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = affine(x.astype(self.dtype), self.kernel[...], self.bias[...])
        return save_for_backward(y) if self.kept else y


# --- norms ----------------------------------------------------------------------------------------


@in_float32
def layer_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Zero mean and unit variance over the last axis; adaLN supplies scale and shift."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


@in_float32
def rms_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Unit mean square over the last axis (Zhang & Sennrich 2019, eq. 4)."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


NORMS = {"layer": layer_norm, "rms": rms_norm}


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale: it keeps attention's logits bounded (Esser et al. 2024)."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.scale[...].reshape([1] * (x.ndim - 1) + [-1])
        return rms_norm(save_for_backward(x)) * scale.astype(x.dtype)


class AffineNorm(nnx.Module):
    """A norm of `NORMS` with a learned scale and shift, where no condition supplies them."""

    def __init__(self, kind: str, dim: int):
        self.norm = NORMS[kind]
        self.scale, self.shift = nnx.Param(jnp.ones(dim)), nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale, shift = (
            p[...].reshape([1] * (x.ndim - 1) + [-1]).astype(x.dtype)
            for p in (self.scale, self.shift)
        )
        return self.norm(x) * scale + shift


def identity(x: Array) -> Array:
    return x


@in_float32
def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]):
    """adaLN: a picture's condition scales and shifts its tokens (Peebles & Xie 2023, §3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]


@in_float32
def add_gated(x: Float[Array, "b n d"], gate: Float[Array, "b d"], y: Float[Array, "b n d"]):
    """The residual of adaLN-Zero: x + gate ∘ y, and a picture has one gate for all its tokens."""
    return x + gate[:, None] * y


# --- pictures and positions -----------------------------------------------------------------------


def patchify(image: Float[Array, "b h w c"], p: int) -> Float[Array, "b n k"]:
    """Cut a picture into p × p patches, row by row."""
    return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def unpatchify(tokens: Float[Array, "b n k"], p: int, rows: int) -> Float[Array, "b h w c"]:
    """The inverse of `patchify` for a grid of `rows` rows of patches."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", p=p, q=p, h=rows)


def sincos_table(
    width: int, rows: Float[np.ndarray, "r"], columns: Float[np.ndarray, "c"]
) -> Float[np.ndarray, "r*c d"]:
    """Absolute positions on a grid: half of the channels encode the column, half the row
    (Dosovitskiy et al. 2021, D.4).

    Column first, as in the published DiT weights.
    """
    frequency = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = (axis.reshape(-1, 1) for axis in np.meshgrid(rows, columns, indexing="ij"))
    angle = [column * frequency, row * frequency]
    table = np.concatenate([f(a) for a in angle for f in (np.sin, np.cos)], axis=1)
    return table.astype(np.float32)


class SinCosPosition(nnx.Module):
    """Adds a fixed 2-D sine-cosine table to the tokens."""

    def __init__(self, width: int, grid: tuple[int, int], *, rngs: nnx.Rngs):
        self.width, self.grid = width, grid

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        places = [np.arange(side, dtype=float) for side in self.grid]
        return x + jnp.asarray(sincos_table(self.width, *places), x.dtype)[None]


class CroppedPosition(nnx.Module):
    """The middle of a large sine-cosine table, so that pictures of every size and shape share
    their centre (Esser et al. 2024, §5.3.2).

    The table has `side` places to a side, on which a picture of `base` patches would be stretched:
    that is how diffusers fills that of a new SD3. `CentredPosition` is the one that was trained.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        *,
        rngs: nnx.Rngs,
        side: int = 192,
        base: int = 64,
    ):
        self.width, self.grid, self.side, self.base = width, grid, side, base

    def places(self, n: int) -> Float[np.ndarray, "{n}"]:
        """Along an axis of n patches."""
        return ((self.side - n) // 2 + np.arange(n)) * (self.base / self.side)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        places = [self.places(n) for n in self.grid]
        return x + jnp.asarray(sincos_table(self.width, *places), x.dtype)[None]


class CentredPosition(CroppedPosition):
    """Positions in the middle of the table that SD3 was trained with: a picture of `base` patches,
    its 1024 pixels, is at 0 … 16 as one of 256 pixels was before (Esser et al. 2024, §5.3.2).
    """

    def places(self, n: int) -> Float[np.ndarray, "{n}"]:
        first = (self.side - n) // 2 - (self.side - self.base) / 2
        return (first + np.arange(n)) * (16 / self.base)


class LearnedPosition(nnx.Module):
    """Adds a learned table to the tokens."""

    def __init__(self, width: int, grid: tuple[int, int], *, rngs: nnx.Rngs):
        self.table = nnx.Param(small_normal(rngs.params(), (grid[0] * grid[1], width)))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x + self.table[...].astype(x.dtype)[None]


class NoPosition(nnx.Module):
    """Leaves the tokens as they are: with RoPE, attention alone knows where they lie."""

    def __init__(self, width: int, grid: tuple[int, int], *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x


POSITIONS = {
    "sincos": SinCosPosition,
    "cropped": CroppedPosition,
    "centred": CentredPosition,
    "learned": LearnedPosition,
    "none": NoPosition,
}


def rotate(x: Float[Array, "b n h k"], grid: tuple[int, int]) -> Float[Array, "b n h k"]:
    """2-D rotary positions: pairs of channels turn by the row (first half) or the column (second
    half).

    Scores of rotated queries and keys depend only on the two offsets (Su et al. 2021, eq. 16; one
    axis of the grid for each half of the channels). Tokens that stand before the grid's are left
    as they are.
    """
    n_frequencies = x.shape[-1] // 4
    frequency = 10_000.0 ** -(np.arange(n_frequencies) / n_frequencies)
    row, column = (axis.reshape(-1, 1) for axis in np.mgrid[: grid[0], : grid[1]])
    angle = np.concatenate([row * frequency, column * frequency], axis=1)
    angle = np.pad(angle, ((x.shape[1] - len(angle), 0), (0, 0)))[None, :, None]
    cos, sin = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


# --- the condition --------------------------------------------------------------------------------


def time_features(t: Float[Array, "b"], n: int = 256) -> Float[Array, "b n"]:
    """Cosines and sines of t, frequencies from 1 down to 1/10 000 (Vaswani et al. 2017, §3.5)."""
    frequency = jnp.exp(-np.log(10_000.0) * jnp.arange(n // 2) / (n // 2))
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class VectorEmbedder(nnx.Module):
    """Features → a vector of the condition, by two linear maps."""

    def __init__(self, n_in: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.hidden = Linear(n_in, width, dtype=dtype, rngs=rngs, init=small_normal)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs, init=small_normal)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b d"]:
        return self.out(jax.nn.silu(self.hidden(features)))


class TimeEmbedder(nnx.Module):
    """t in [0, 1] → a vector. The sinusoids were made for 0 … 1000, hence `time_scale`."""

    def __init__(self, width: int, *, time_scale: float, dtype: str, rngs: nnx.Rngs):
        self.mlp = VectorEmbedder(256, width, dtype=dtype, rngs=rngs)
        self.time_scale = time_scale

    def __call__(self, t: Float[Array, "b"]) -> Float[Array, "b d"]:
        return self.mlp(time_features(self.time_scale * t))


class Heads(nnx.Module):
    """Tokens → the queries, keys and values of every head: those that `parts`, such as "qkv",
    names.

    Optional norms of q and k, and rotary positions of both on `grid`.
    """

    def __init__(
        self,
        parts: str,
        width: int,
        n_heads: int,
        *,
        grid: tuple[int, int] | None = None,
        qk_norm: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        # Attention keeps what is made of it.
        self.linear = Linear(width, len(parts) * width, dtype=dtype, rngs=rngs, kept=False)
        self.norm_q = RMSNorm(width // n_heads) if qk_norm and "q" in parts else identity
        self.norm_k = RMSNorm(width // n_heads) if qk_norm and "k" in parts else identity
        self.parts, self.n_heads, self.grid = parts, n_heads, grid

    def __call__(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n h k"], ...]:
        heads = [
            rearrange(part, "b n (h k) -> b n h k", h=self.n_heads)
            for part in jnp.split(self.linear(x), len(self.parts), axis=-1)
        ]
        place = functools.partial(rotate, grid=self.grid) if self.grid else identity
        finish = {
            "q": lambda q: place(self.norm_q(q)),
            "k": lambda k: place(self.norm_k(k)),
            "v": identity,
        }
        return tuple(finish[part](head) for part, head in zip(self.parts, heads, strict=True))


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, n_heads: int, *, dtype: str, rngs: nnx.Rngs, **heads):
        self.qkv = Heads("qkv", width, n_heads, dtype=dtype, rngs=rngs, **heads)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        return self.out(attention(*self.qkv(x), mask=mask))


class CrossAttention(nnx.Module):
    """Multi-head attention from the tokens of a picture to those of its condition."""

    def __init__(self, width: int, n_heads: int, *, dtype: str, rngs: nnx.Rngs, **heads):
        self.q = Heads("q", width, n_heads, dtype=dtype, rngs=rngs, **heads)
        self.kv = Heads("kv", width, n_heads, dtype=dtype, rngs=rngs, **heads)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"],
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        return self.out(attention(*self.q(x), *self.kv(context), mask=mask))


@in_float32
def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    return jax.nn.gelu(x, approximate=True)


@in_float32
def swiglu(gate: Float[Array, "*b d"], x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    return jax.nn.silu(gate) * x


class GeluMLP(nnx.Module):
    """Two linear maps with a GELU (its tanh form, as the published DiT) between them."""

    def __init__(self, width: int, hidden: int, *, dtype: str, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(gelu(self.up(x)))


class SwiGLUMLP(nnx.Module):
    """A gated linear unit (Shazeer 2020, eq. 5), narrower so that it costs what `GeluMLP` does."""

    def __init__(self, width: int, hidden: int, *, dtype: str, rngs: nnx.Rngs):
        hidden = round(hidden * 2 / 3 / 8) * 8
        self.gate = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(swiglu(self.gate(x), self.up(x)))


MLPS = {"gelu": GeluMLP, "swiglu": SwiGLUMLP}


# --- depth ----------------------------------------------------------------------------------------


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` blocks as one: every weight gets a leading axis of that length. None for no block."""
    if not depth:
        return None
    return nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def scan(blocks: nnx.Module | None, x: Any, *args, remat: bool, unroll: int) -> Any:
    """x → block(… block(x, *args) …, *args) over the leading axis of the stacked weights.

    Compile time does not grow with depth. `remat` keeps only each block's input for the backward
    pass: about a third more work, and memory for one block instead of all. `unroll` blocks are
    compiled side by side.
    """
    if blocks is None:
        return x
    graphdef, weights = nnx.split(blocks)

    def body(x, weights):
        return nnx.merge(graphdef, weights)(x, *args), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, weights, unroll=unroll)[0]
