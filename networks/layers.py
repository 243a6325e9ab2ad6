"""Layers of a diffusion transformer: linear maps, norms, attention, positions, embedders, MLPs,
stacked blocks.

Every module holds only `nnx.Param`. Weights are float32. `dtype` is the precision of the operands
of matrix products; their sums, norms, activations and the softmax are computed in float32. Results
that are worth their memory in the backward pass are marked by `save_for_backward`.

Functions with hand-written derivatives are in `networks/ops.py`, whole models in `model.py`.
Nothing here knows of a loss or a mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from networks.ops import affine, affine_in_fp8, attention, in_float32, save_for_backward

xavier_uniform = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros
small_normal = jax.nn.initializers.normal(0.02)

N_TIME_FEATURES = 256  # sinusoids of t


class Linear(nnx.Module):
    """y = x W + b over the last axis, computed in `dtype` with float32 weights.

    Args:
        save_output: save y for the backward pass. False if the next operation saves its own result
            of y.

    Attributes:
        low_rank: an adapter, whose result is added: see `networks/lora.py`.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
        init: Callable[..., Array] = xavier_uniform,
        save_output: bool = True,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (n_in, n_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.dtype = dtype
        self.save_output = save_output
        self.affine = affine
        self.low_rank: Any = nnx.data(None)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = self.affine(x.astype(self.dtype), self.kernel[...], self.bias[...])
        if self.low_rank is not None:
            y = y + self.low_rank(x)
        return save_for_backward(y) if self.save_output else y


def compute_in_float32(module: nnx.Module) -> None:
    """Let all parts of a module compute in float32."""
    for _, part in nnx.iter_graph(module):
        if isinstance(part, nnx.Module) and hasattr(part, "dtype"):
            part.dtype = "float32"  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(part, Linear):
            part.affine = affine


def multiply_in_fp8(blocks: nnx.Module | None) -> None:
    """Let the linear maps of the tokens take their operands in eight bits.

    Modulations stay: they are of one vector an image, so that they cost nothing, and scale all of
    its tokens.
    """
    for path, module in nnx.iter_graph(blocks):
        if isinstance(module, Linear) and path[-1] != "modulation":
            module.affine = affine_in_fp8


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
    """adaLN: scale and shift an image's tokens by its condition (Peebles & Xie 2023, §3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]


@in_float32
def add_gated(x: Float[Array, "b n d"], gate: Float[Array, "b d"], y: Float[Array, "b n d"]):
    """The residual of adaLN-Zero: x + gate ∘ y, with one gate for all tokens of an image."""
    return x + gate[:, None] * y


# --- patches and positions ------------------------------------------------------------------------


def patchify(image: Float[Array, "b h w c"], p: int) -> Float[Array, "b n k"]:
    """Cut an image into p × p patches, row by row."""
    return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def unpatchify(tokens: Float[Array, "b n k"], p: int, rows: int) -> Float[Array, "b h w c"]:
    """Invert `patchify`, for a grid of `rows` rows of patches."""
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
        positions = [np.arange(side, dtype=float) for side in self.grid]
        return x + jnp.asarray(sincos_table(self.width, *positions), x.dtype)[None]


class CroppedPosition(nnx.Module):
    """Adds the middle of a large sine-cosine table, so that images of every size and shape share
    their centre (Esser et al. 2024, §5.3.2).

    The table has `side` positions to a side, over which an image of `base` patches to a side is
    stretched. Diffusers fills the table of a new SD3 like this; SD3 was trained with
    `CentredPosition`.
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

    def positions(self, n: int) -> Float[np.ndarray, "{n}"]:
        """Positions along an axis of n patches."""
        return ((self.side - n) // 2 + np.arange(n)) * (self.base / self.side)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        positions = [self.positions(n) for n in self.grid]
        return x + jnp.asarray(sincos_table(self.width, *positions), x.dtype)[None]


class CentredPosition(CroppedPosition):
    """Adds the middle of the table that SD3 was trained with: an image of `base` patches, 1024
    pixels, lies at 0 … 16, where one of 256 pixels was before (Esser et al. 2024, §5.3.2).
    """

    def positions(self, n: int) -> Float[np.ndarray, "{n}"]:
        first = (self.side - n) // 2 - (self.side - self.base) / 2
        return (first + np.arange(n)) * (16 / self.base)


class LearnedPosition(nnx.Module):
    """Adds a learned table to the tokens."""

    def __init__(self, width: int, grid: tuple[int, int], *, rngs: nnx.Rngs):
        self.table = nnx.Param(small_normal(rngs.params(), (grid[0] * grid[1], width)))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x + self.table[...].astype(x.dtype)[None]


class NoPosition(nnx.Module):
    """Returns the tokens unchanged: with RoPE, only attention depends on their positions."""

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


def apply_rotary_positions(
    x: Float[Array, "b n h k"], grid: tuple[int, int], token_ids: Int[Array, "b m"] | None = None
) -> Float[Array, "b n h k"]:
    """2-D rotary positions: pairs of channels turn by the row (first half) or the column (second
    half).

    Scores of rotated queries and keys depend only on the two offsets (Su et al. 2021, eq. 16; one
    axis of the grid for each half of the channels). Tokens before those of the grid are not
    rotated.

    Args:
        token_ids: numbers of the grid's tokens that are in x, row by row; None for all.

    Raises:
        ValueError: tokens of the grid are missing, and their numbers are not given.
    """
    n_frequencies = x.shape[-1] // 4
    frequency = 10_000.0 ** -(np.arange(n_frequencies) / n_frequencies)
    row, column = (axis.reshape(-1, 1) for axis in np.mgrid[: grid[0], : grid[1]])
    angle = np.concatenate([row * frequency, column * frequency], axis=1)
    n_before = x.shape[1] - (len(angle) if token_ids is None else token_ids.shape[1])
    if n_before < 0:
        raise ValueError(
            f"{x.shape[1]} tokens of a grid of {len(angle)}: on a route a block hands "
            "token_ids=cond.token_ids to its attention"
        )
    angle = np.pad(angle, ((n_before, 0), (0, 0)))[None, :, None]
    cos, sin = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    if token_ids is not None:
        # The tokens before the grid's take row 0, which is of no rotation if there are any.
        rows = jnp.pad(token_ids + n_before, ((0, 0), (n_before, 0)))
        cos, sin = cos[0][rows], sin[0][rows]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


# --- the condition --------------------------------------------------------------------------------


def time_features(
    t: Float[Array, "b"], n: int = N_TIME_FEATURES, *, endpoint: bool = False
) -> Float[Array, "b n"]:
    """Cosines and sines of t, frequencies from 1 down to 1/10 000 (Vaswani et al. 2017, §3.5).

    Args:
        endpoint: the last frequency is 1/10 000; otherwise that is the one after the last.
    """
    frequency = jnp.exp(-np.log(10_000.0) * jnp.arange(n // 2) / (n // 2 - endpoint))
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class VectorEmbedder(nnx.Module):
    """Features → a vector of the condition, by an MLP of two linear maps."""

    def __init__(
        self,
        n_in: int,
        width: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
        init: Callable[..., Array] = small_normal,
    ):
        self.hidden = Linear(n_in, width, dtype=dtype, rngs=rngs, init=small_normal)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs, init=init)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b d"]:
        return self.out(jax.nn.silu(self.hidden(features)))


class TimeEmbedder(nnx.Module):
    """t in [0, 1] → a vector. The sinusoids were made for 0 … 1000, hence `time_scale`."""

    def __init__(
        self,
        width: int,
        *,
        time_scale: float,
        endpoint: bool = False,
        dtype: str,
        rngs: nnx.Rngs,
        init: Callable[..., Array] = small_normal,
    ):
        self.mlp = VectorEmbedder(N_TIME_FEATURES, width, dtype=dtype, rngs=rngs, init=init)
        self.time_scale, self.endpoint = time_scale, endpoint

    def __call__(self, t: Float[Array, "b"]) -> Float[Array, "b d"]:
        return self.mlp(time_features(self.time_scale * t, endpoint=self.endpoint))


class Heads(nnx.Module):
    """Tokens → queries, keys and values of every head.

    Args:
        parts: which of the three, in this order, such as "qkv" or "kv".
        grid: rows and columns for rotary positions of q and k; None for none. If some tokens of the
            grid are missing, the call takes the numbers of the others, `token_ids`.
        qk_norm: normalize q and k by a learned `RMSNorm`.
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
        # `attention` saves its own rearranged q, k and v.
        self.linear = Linear(width, len(parts) * width, dtype=dtype, rngs=rngs, save_output=False)
        self.norm_q = RMSNorm(width // n_heads) if qk_norm and "q" in parts else identity
        self.norm_k = RMSNorm(width // n_heads) if qk_norm and "k" in parts else identity
        self.parts, self.n_heads, self.grid = parts, n_heads, grid

    def __call__(
        self, x: Float[Array, "b n d"], token_ids: Int[Array, "b m"] | None = None
    ) -> tuple[Float[Array, "b n h k"], ...]:
        heads = [
            rearrange(part, "b n (h k) -> b n h k", h=self.n_heads)
            for part in jnp.split(self.linear(x), len(self.parts), axis=-1)
        ]
        transforms = {
            "q": lambda q: self.rotate(self.norm_q(q), token_ids),
            "k": lambda k: self.rotate(self.norm_k(k), token_ids),
            "v": identity,
        }
        return tuple(transforms[part](head) for part, head in zip(self.parts, heads, strict=True))

    def rotate(
        self, x: Float[Array, "b n h k"], token_ids: Int[Array, "b m"] | None
    ) -> Float[Array, "b n h k"]:
        return apply_rotary_positions(x, self.grid, token_ids) if self.grid else x


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(
        self,
        width: int,
        n_heads: int,
        *,
        grid: tuple[int, int] | None = None,
        qk_norm: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.qkv = Heads("qkv", width, n_heads, grid=grid, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        token_ids: Int[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        return self.out(attention(*self.qkv(x, token_ids), mask=mask))


class CrossAttention(nnx.Module):
    """Multi-head attention from the tokens of an image to those of its condition."""

    def __init__(self, width: int, n_heads: int, *, qk_norm: bool, dtype: str, rngs: nnx.Rngs):
        self.q = Heads("q", width, n_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.kv = Heads("kv", width, n_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
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

    @staticmethod
    def multiply_adds(width: int, hidden: int) -> int:
        """Multiply-adds of one token."""
        return 2 * width * hidden


class SwiGLUMLP(nnx.Module):
    """A gated linear unit (Shazeer 2020, eq. 5). It has three products, so it takes two thirds of
    `hidden` to cost as much as `GeluMLP`.
    """

    def __init__(self, width: int, hidden: int, *, dtype: str, rngs: nnx.Rngs):
        hidden = self.narrow(hidden)
        self.gate = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(swiglu(self.gate(x), self.up(x)))

    @staticmethod
    def narrow(hidden: int) -> int:
        """Two thirds of the hidden channels, rounded to a multiple of 8."""
        return round(hidden * 2 / 3 / 8) * 8

    @staticmethod
    def multiply_adds(width: int, hidden: int) -> int:
        """Multiply-adds of one token."""
        return 3 * width * SwiGLUMLP.narrow(hidden)


MLPS = {"gelu": GeluMLP, "swiglu": SwiGLUMLP}


# --- depth ----------------------------------------------------------------------------------------


def stack_blocks(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Any:
    """Make `depth` blocks as one module, whose weights have a leading axis of that length. None for
    no block.
    """
    if not depth:
        return None
    return nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def scan_blocks(blocks: nnx.Module | None, x: Any, *args: Any, remat: bool, unroll: int) -> Any:
    """Apply stacked blocks one after the other: x → block(… block(x, *args) …, *args).

    Compile time does not grow with depth.

    Args:
        remat: save only each block's input for the backward pass: about a third more work, and
            memory for one block instead of all.
        unroll: number of blocks compiled side by side.
    """
    if blocks is None:
        return x
    graphdef, weights = nnx.split(blocks)

    def body(x: Any, weights: Any) -> tuple[Any, None]:
        return nnx.merge(graphdef, weights)(x, *args), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, weights, unroll=unroll)[0]


class Route(NamedTuple):
    """A part of a network that only some of the tokens pass; see `networks/routing.py`.

    Args:
        start, end: numbers of blocks after which it begins and ends.
        take: the state and the condition → those on the route.
        put: the state before the route and the one at its end → the state after it.
    """

    start: int
    end: int
    take: Callable[[Any, Any], tuple[Any, Any]]
    put: Callable[[Any, Any], Any]


def scan_with_taps(
    stacks: Sequence[tuple[nnx.Module | None, int]],
    x: Any,
    cond: Any,
    *,
    taps: Sequence[int],
    remat: bool,
    unroll: int,
    route: Route | None = None,
) -> tuple[Any, dict[int, Any]]:
    """`scan_blocks` over stacks of blocks, and the state after each number of blocks in `taps`.

    A stack is cut at the taps and its pieces are scanned one after the other: a tapped state that
    was carried through one scan would be saved for the backward pass once per block. The pieces are
    copies of the weights; without a tap before the end nothing is cut.

    Args:
        stacks: stacked blocks and how many they are. Blocks are numbered through all of them.
        taps: numbers of blocks, from 1 to all of them.
        route: its ends cut the stacks too.
    """
    cuts = {*taps, *((route.start, route.end) if route else ())}
    states: dict[int, Any] = {}
    before_route, full_cond, n_before = x, cond, 0
    for blocks, depth in stacks:
        if not depth:
            continue
        own = sorted(cut - n_before for cut in cuts if n_before < cut <= n_before + depth)
        for piece, end in zip(split_blocks(blocks, own), sorted({*own, depth}), strict=True):
            x = scan_blocks(piece, x, cond, remat=remat, unroll=unroll)
            n = n_before + end
            if route and n == route.end:
                x, cond = route.put(before_route, x), full_cond
            if n in taps:
                states[n] = x
            if route and n == route.start:
                before_route = x
                x, cond = route.take(x, cond)
        n_before += depth
    return x, states


def split_blocks(blocks: nnx.Module | None, cuts: Sequence[int]) -> list[Any]:
    """Cut stacked blocks after each number of blocks in `cuts`, which ascend."""
    if blocks is None or not cuts:
        return [blocks]
    graphdef, weights = nnx.split(blocks)
    depth = len(jax.tree.leaves(weights)[0])
    inner = [cut for cut in cuts if cut < depth]
    if not inner:
        return [blocks]
    # Not slices: the transpose of a split is one concatenation, that of a slice a padded copy.
    leaves, treedef = jax.tree.flatten(weights)
    pieces = zip(*(jnp.split(leaf, inner) for leaf in leaves), strict=True)
    return [nnx.merge(graphdef, jax.tree.unflatten(treedef, piece)) for piece in pieces]
