"""Diffusion transformers: DiT with its four kinds of block, and MMDiT.

A model maps (x_t, t, label) to a velocity, or to the target of another objective. A label is a
class id or an encoded caption. Read in this order: the config, the condition, the blocks, DiT,
MMDiT, the presets.

A model knows nothing of noise, losses, guidance or devices, takes no random key and has no train
flag. A label that it should not see arrives as the null class or as the empty caption.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from data.batch import EncodedCaption
from networks.layers import (
    MLPS,
    NORMS,
    POSITIONS,
    AffineNorm,
    Attention,
    CroppedPosition,
    CrossAttention,
    Heads,
    Linear,
    Route,
    TimeEmbedder,
    VectorEmbedder,
    add_gated,
    compute_in_float32,
    identity,
    modulate,
    multiply_in_fp8,
    patchify,
    rms_norm,
    scan_with_taps,
    small_normal,
    stack_blocks,
    unpatchify,
    zeros,
)
from networks.lora import LoraConfig, add_adapters
from networks.ops import attention
from networks.routing import prepend_others, put_tokens, resolve_route, take_tokens
from runtime.errors import UserError, unknown_name
from runtime.image_size import ImageSize, WrittenSize, canonical_size


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Saved beside its weights, so that a checkpoint can be opened without
    its training flags.

    Args:
        width, depth, n_heads: of the transformer.
        patch_size: side of a token in pixels (or latents).
        image_size, channels: of the images; 256, or 256x192 (height x width).
        out_channels: of the prediction; a learned sigma has twice `channels`.
        n_classes: label `n_classes` is the null class. 0 for unconditional models and for captions,
            whose null is the caption without tokens.
        n_class_tokens: with joint blocks, length of the sequence learned for each class.
        text_length, text_width, pooled_width: number of caption tokens in training (any number
            works afterwards), channels of a token and of the pooled vector; 0 without captions.
        caption_norm: scale both to unit mean square, whatever the text encoders' scale. SD3 takes
            them as they are.
        block: a key of `BLOCKS`, or `JOINT` for MMDiT.
        n_dual: of an MMDiT, the number of first blocks with a second attention among the image's
            tokens alone (as in SD3.5 medium).
        position: sincos, cropped, centred, learned or none. `rope` adds rotary positions in
            attention.
        position_side, position_base: of the table that cropped and centred positions are cut from:
            its side, and the patches to a side of the image that it is stretched over.
        qk_norm: RMS norms of queries and keys.
        mlp: gelu or swiglu, `mlp_ratio` × width wide.
        norm: layer or rms.
        time_scale: factor of t in [0, 1] before its sinusoids.
        time_endpoint: their frequencies end at 1/10 000, as those of diffusers' DiT; without it one
            step before, as those of DiT, SiT and SD3.
        bottleneck: channels between the two maps that embed a patch; 0 for one map.
        inner_head: number of blocks after which a second head predicts too; 0 for none.
        route: two numbers of blocks, between which some of the image's tokens may be left out;
            empty for none.
        takes_span: a second time is embedded too: how far the mean velocity reaches.
        dtype: of matrix products and of the tokens between blocks. Weights are always float32.
        fp8: blocks multiply tokens and weights in eight bits, in training; what is around the
            blocks stays in `dtype`.
        remat: recompute each block in the backward pass.
        unroll: number of blocks compiled side by side.
        lora: adapters of the blocks, which alone are trained; None without.

    Raises:
        UserError: a name that does not exist, a size that is impossible, or values that exclude
            each other.
    """

    width: int
    depth: int
    n_heads: int
    patch_size: int
    image_size: WrittenSize
    channels: int
    out_channels: int
    n_classes: int
    n_class_tokens: int = 4
    text_length: int = 0
    text_width: int = 0
    pooled_width: int = 0
    caption_norm: bool = True
    block: str = "adaln_zero"
    n_dual: int = 0
    position: str = "sincos"
    position_side: int = 192
    position_base: int = 64
    rope: bool = False
    qk_norm: bool = False
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    norm: str = "layer"
    time_scale: float = 1000.0
    time_endpoint: bool = False
    bottleneck: int = 0
    inner_head: int = 0
    route: tuple[int, ...] = ()
    takes_span: bool = False
    dtype: str = "float32"
    fp8: bool = False
    remat: bool = False
    unroll: int = 1
    lora: LoraConfig | None = None

    def __post_init__(self):
        object.__setattr__(self, "route", resolve_route(self.route, self.depth))
        object.__setattr__(self, "image_size", canonical_size(self.image_size))
        tables = {
            "block": (*BLOCKS, JOINT),
            "position": POSITIONS,
            "mlp": MLPS,
            "norm": NORMS,
        }
        for field, table in tables.items():
            if getattr(self, field) not in table:
                raise unknown_name(field, getattr(self, field), table)
        if self.n_classes and self.text_width:
            raise UserError(
                f"n_classes {self.n_classes} and text_width {self.text_width}: a model takes class "
                "labels or captions; set one of the two to 0"
            )
        if self.n_dual and (self.block != JOINT or not 0 < self.n_dual < self.depth):
            raise UserError(
                f"n_dual {self.n_dual}: only joint blocks have a second attention, and never the "
                f"last of the {self.depth}"
            )
        if not 0 <= self.inner_head <= self.depth // 2:
            raise UserError(
                f"inner_head {self.inner_head}: of {self.depth} blocks it may stand after 1 to "
                f"{self.depth // 2}; later it harms"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raises UserError if no network has these sizes."""
        sizes = (
            "width",
            "depth",
            "n_heads",
            "patch_size",
            "channels",
            "out_channels",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        if not self.size.divided(self.patch_size):
            raise UserError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.width % self.n_heads:
            raise UserError(f"width {self.width} is not divisible by {self.n_heads} heads")
        # Sines and cosines of rows and of columns share the channels.
        if self.width % 4 and self.position in ("sincos", "cropped", "centred"):
            raise UserError(
                f"width {self.width}: must be divisible by 4 for position {self.position}"
            )
        if self.rope and self.width // self.n_heads % 4:
            raise UserError(
                f"width {self.width} with {self.n_heads} heads: a head has "
                f"{self.width // self.n_heads} channels, which must be divisible by 4 for rotary "
                "positions (rope)"
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Make the config that was saved as JSON, which has no tuples."""

        def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}

        values = with_tuples(fields)
        if isinstance(values.get("lora"), dict):
            values["lora"] = LoraConfig(**with_tuples(values["lora"]))
        return cls(**values)

    @property
    def is_conditional(self) -> bool:
        """True if the model takes classes or captions, so that it can be guided."""
        return bool(self.n_classes or self.text_width)

    @property
    def size(self) -> ImageSize:
        """Height and width of the images."""
        return ImageSize.parse(self.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        return *self.size.sides, self.channels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.size.sides
        return height // self.patch_size, width // self.patch_size

    @property
    def rotary_grid(self) -> tuple[int, int] | None:
        """The grid of rotary positions, or None without them."""
        return self.grid if self.rope else None

    @property
    def n_label_tokens(self) -> int:
        """Number of tokens that a label becomes, for captions in training."""
        return self.text_length or (self.n_class_tokens if self.block == JOINT else 1)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of an MLP; `SwiGLUMLP` takes two thirds."""
        return round(self.mlp_ratio * self.width)


# --- the condition --------------------------------------------------------------------------------

Label = Int[Array, "b"] | EncodedCaption


class Condition(NamedTuple):
    """Conditioning of a block: a vector, and a sequence of tokens. Tokens where `mask` is False are
    padding; without a mask all are real. On a route, where tokens of the image are missing,
    `token_ids` are the numbers of the others.
    """

    vector: Float[Array, "b d"]
    tokens: Float[Array, "b m d"]
    mask: Bool[Array, "b m"] | None
    token_ids: Int[Array, "b k"] | None = None


class ClassVector(nnx.Module):
    """A learned vector for each class; row `n_classes` is the null class (Ho & Salimans 2022)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = nnx.Param(small_normal(rngs.params(), (config.n_classes + 1, config.width)))
        self.dtype = config.dtype

    def __call__(self, label: Int[Array, "b"]) -> Condition:
        vector = self.table[...][label].astype(self.dtype)
        return Condition(vector, vector[:, None], None)


class ClassTokens(nnx.Module):
    """A learned stand-in of a caption for each class: a vector and a short sequence."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        n, m, d = config.n_classes + 1, config.n_class_tokens, config.width
        self.table = nnx.Param(small_normal(rngs.params(), (n, d)))
        self.tokens = nnx.Param(jax.nn.initializers.normal(1.0)(rngs.params(), (n, m, d)))
        self.dtype = config.dtype

    def __call__(self, label: Int[Array, "b"]) -> Condition:
        vector, tokens = (p[...][label].astype(self.dtype) for p in (self.table, self.tokens))
        return Condition(vector, tokens, None)


class CaptionEmbedder(nnx.Module):
    """A text encoder's tokens and pooled vector, projected to the model's width."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = rms_norm if c.caption_norm else identity
        self.tokens = Linear(c.text_width, d, dtype=c.dtype, rngs=rngs)
        self.pooled = VectorEmbedder(c.pooled_width, d, dtype=c.dtype, rngs=rngs)

    def __call__(self, caption: EncodedCaption) -> Condition:
        tokens, pooled = (
            self.norm(x.astype(jnp.float32)) for x in (caption.tokens, caption.pooled)
        )
        return Condition(self.pooled(pooled), self.tokens(tokens), caption.mask)


def make_label_embedder(
    config: ModelConfig, class_embedder: Callable[..., Any], *, rngs: nnx.Rngs
) -> Any:
    """Make the module that maps a label to a `Condition`: the same for captions in every model."""
    return (CaptionEmbedder if config.text_width else class_embedder)(config, rngs=rngs)


def add_time(time: Float[Array, "b d"], label: Condition) -> Condition:
    """Add t to the label's vector, and put it as a token before the label's."""
    tokens = jnp.concatenate([time[:, None], label.tokens], axis=1)
    return Condition(time + label.vector, tokens, pad_mask(label.mask, before=1))


def pad_mask(mask: Bool[Array, "b m"] | None, *, before: int = 0, after: int = 0):
    """Extend a mask by real tokens that stand before or after its sequence."""
    if mask is None:
        return None
    return jnp.pad(mask, ((0, 0), (before, after)), constant_values=True)


# --- blocks: four ways to condition a transformer (Peebles & Xie 2023, §3.2 and fig. 3) -----------


@dataclass(frozen=True)
class BlockProducts:
    """Size of the matrix products in one forward pass of one image, from which FLOPs follow.

    A block states its own in a static method `products(config, n_image, n_condition)`, where n are
    numbers of tokens. A block without it works, but its FLOPs and MFU are n/a.

    Args:
        modulations: d × d maps of the condition's vector.
        projections: d × d maps of a token.
        scores: pairs of tokens of which one attends to the other.
        mlp_tokens: tokens that pass an MLP.
    """

    modulations: int = 0
    projections: int = 0
    scores: int = 0
    mlp_tokens: int = 0

    def __add__(self, other: "BlockProducts") -> "BlockProducts":
        return BlockProducts(
            self.modulations + other.modulations,
            self.projections + other.projections,
            self.scores + other.scores,
            self.mlp_tokens + other.mlp_tokens,
        )


def make_self_attention(c: ModelConfig, *, rngs: nnx.Rngs) -> Attention:
    return Attention(
        c.width, c.n_heads, grid=c.rotary_grid, qk_norm=c.qk_norm, dtype=c.dtype, rngs=rngs
    )


def make_mlp(c: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    return MLPS[c.mlp](c.width, c.mlp_width, dtype=c.dtype, rngs=rngs)


class AdaLNZeroBlock(nnx.Module):
    """A transformer block whose norms and residual gates are functions of the condition.

    "Zero": the modulation starts at zero, so that at first every block is exactly the identity.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 6 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.attention = make_self_attention(c, rngs=rngs)
        self.mlp = make_mlp(c, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], cond: Condition) -> Float[Array, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(jax.nn.silu(cond.vector)), 6, axis=-1
        )
        y = self.attention(modulate(self.norm(x), shift1, scale1), token_ids=cond.token_ids)
        x = add_gated(x, gate1, y)
        return add_gated(x, gate2, self.mlp(modulate(self.norm(x), shift2, scale2)))

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        n = n_image
        return BlockProducts(modulations=6, projections=4 * n, scores=n * n, mlp_tokens=n)


class AdaLNBlock(nnx.Module):
    """A transformer block whose norms are functions of the condition."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 4 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.attention = make_self_attention(c, rngs=rngs)
        self.mlp = make_mlp(c, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], cond: Condition) -> Float[Array, "b n d"]:
        shift1, scale1, shift2, scale2 = jnp.split(
            self.modulation(jax.nn.silu(cond.vector)), 4, axis=-1
        )
        x = x + self.attention(modulate(self.norm(x), shift1, scale1), token_ids=cond.token_ids)
        return x + self.mlp(modulate(self.norm(x), shift2, scale2))

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        n = n_image
        return BlockProducts(modulations=4, projections=4 * n, scores=n * n, mlp_tokens=n)


class CrossAttentionBlock(nnx.Module):
    """A transformer block that attends to the image's tokens, then to those of the condition."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm1, self.norm2, self.norm3 = (AffineNorm(c.norm, d) for _ in range(3))
        self.attention = make_self_attention(c, rngs=rngs)
        self.cross_attention = CrossAttention(
            d, c.n_heads, qk_norm=c.qk_norm, dtype=c.dtype, rngs=rngs
        )
        self.mlp = make_mlp(c, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], cond: Condition) -> Float[Array, "b n d"]:
        x = x + self.attention(self.norm1(x), token_ids=cond.token_ids)
        x = x + self.cross_attention(self.norm2(x), cond.tokens, cond.mask)
        return x + self.mlp(self.norm3(x))

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        n, m = n_image, n_condition
        return BlockProducts(projections=4 * n + 2 * n + 2 * m, scores=n * (n + m), mlp_tokens=n)


class InContextBlock(nnx.Module):
    """The plain transformer block: in x the condition's tokens stand before the image's."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm1, self.norm2 = (AffineNorm(c.norm, d) for _ in range(2))
        self.attention = make_self_attention(c, rngs=rngs)
        self.mlp = make_mlp(c, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"], cond: Condition) -> Float[Array, "b s d"]:
        mask = pad_mask(cond.mask, after=x.shape[1] - cond.tokens.shape[1])
        x = x + self.attention(self.norm1(x), mask, cond.token_ids)
        return x + self.mlp(self.norm2(x))

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        s = n_image + n_condition
        return BlockProducts(projections=4 * s, scores=s * s, mlp_tokens=s)


class AdaptiveFinalLayer(nnx.Module):
    """Tokens → patches, under a modulated norm. Its zeros make the untrained model predict 0."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 2 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        n_out = c.patch_size**2 * c.out_channels
        self.out = Linear(d, n_out, dtype=c.dtype, rngs=rngs, init=zeros)

    def __call__(self, x: Float[Array, "b n d"], cond: Condition) -> Float[Array, "b n k"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 2, axis=-1)
        return self.out(modulate(self.norm(x), shift, scale))

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        return BlockProducts(modulations=2)


class PlainFinalLayer(nnx.Module):
    """Tokens → patches, for blocks that do without modulation."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = AffineNorm(c.norm, d)
        n_out = c.patch_size**2 * c.out_channels
        self.out = Linear(d, n_out, dtype=c.dtype, rngs=rngs, init=zeros)

    def __call__(self, x: Float[Array, "b n d"], cond: Condition) -> Float[Array, "b n k"]:
        return self.out(self.norm(x))

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        return BlockProducts()


# --- DiT ------------------------------------------------------------------------------------------


class TwoPredictions(NamedTuple):
    """The network's prediction and that of its inner head."""

    final: Float[Array, "b h w o"]
    inner: Float[Array, "b h w o"]


Output = Float[Array, "b h w o"] | TwoPredictions
# With taps: the output, and the image's tokens after each tapped block.
Tapped = tuple[Output, tuple[Float[Array, "b n d"], ...]]


def check_taps(taps: Sequence[int], depth: int) -> None:
    """Raises UserError unless `taps` are ascending numbers of blocks, from 1 to `depth`."""
    if list(taps) != sorted({tap for tap in taps if 1 <= tap <= depth}):
        raise UserError(
            f"taps {', '.join(map(str, taps))}: must be numbers of blocks in 1 … {depth}, "
            "ascending and without repeats"
        )


class Design(NamedTuple):
    """A block, the layer after the last block, and whether the condition's tokens stand before the
    image's in the sequence.
    """

    block: Callable[..., nnx.Module]
    final: Callable[..., nnx.Module]
    tokens_join: bool = False


JOINT = "joint"  # the block of an MMDiT
BLOCKS = {
    "adaln_zero": Design(AdaLNZeroBlock, AdaptiveFinalLayer),
    "adaln": Design(AdaLNBlock, AdaptiveFinalLayer),
    "cross_attention": Design(CrossAttentionBlock, PlainFinalLayer),
    "in_context": Design(InContextBlock, PlainFinalLayer, tokens_join=True),
}


class BottleneckPatch(nnx.Module):
    """Embed patches by a narrow map and a wide one: images of a large patch fill few dimensions (Li
    & He 2025, JiT).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c = config
        self.narrow = Linear(c.patch_size**2 * c.channels, c.bottleneck, dtype=c.dtype, rngs=rngs)
        self.wide = Linear(c.bottleneck, c.width, dtype=c.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n p"]) -> Float[Array, "b n d"]:
        return self.wide(self.narrow(x))


def make_patch_embedding(c: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Make the module that maps patches to tokens."""
    if c.bottleneck:
        return BottleneckPatch(c, rngs=rngs)
    return Linear(c.patch_size**2 * c.channels, c.width, dtype=c.dtype, rngs=rngs)


def make_time_embedder(
    c: ModelConfig, *, rngs: nnx.Rngs, init: Callable[..., Array] = small_normal
) -> TimeEmbedder:
    """Make the embedding of a time."""
    return TimeEmbedder(
        c.width,
        time_scale=c.time_scale,
        endpoint=c.time_endpoint,
        dtype=c.dtype,
        rngs=rngs,
        init=init,
    )


def make_span_embedder(c: ModelConfig, *, rngs: nnx.Rngs) -> TimeEmbedder | None:
    """Make the embedding of the span, whose last kernel is zero: at first it has no effect."""
    return make_time_embedder(c, rngs=rngs, init=zeros) if c.takes_span else None


def make_position_embedding(c: ModelConfig, *, rngs: nnx.Rngs) -> Any:
    """Make the module that adds absolute positions to the image's tokens."""
    position = POSITIONS[c.position]
    if issubclass(position, CroppedPosition):
        return position(c.width, c.grid, side=c.position_side, base=c.position_base, rngs=rngs)
    return position(c.width, c.grid, rngs=rngs)


class Transformer(nnx.Module):
    """Parts of both networks: times → their vector, and tokens of the image → predictions."""

    config: ModelConfig
    time: Any
    span: Any
    final: Any
    inner: Any

    def embed_times(
        self, t: Float[Array, "b"], span: Float[Array, "b"] | None
    ) -> Float[Array, "b d"]:
        """Embed t and, in a network that takes one, the span, by default 0."""
        if self.span is None:
            return self.time(t)
        return self.time(t) + self.span(jnp.zeros_like(t) if span is None else span)

    def check_cuts(self, taps: Sequence[int], cuts: Sequence[int], token_ids: Any) -> None:
        """Raise UserError for taps that do not ascend, or for cuts where tokens are missing.

        Args:
            cuts: the taps, and the block after which the inner head stands, if it predicts.
            token_ids: numbers of the tokens on the route; None if all pass.
        """
        check_taps(taps, self.config.depth)
        if token_ids is None:
            return
        if not self.config.route:
            raise UserError("token_ids: the model's config has no route")
        start, end = self.config.route
        if missing := [cut for cut in cuts if start < cut < end]:
            raise UserError(f"tap {missing[0]}: on the route {start} {end} tokens are missing")

    def frozen(self) -> Any:
        """Return a copy that computes in float32, whose weights get no gradient."""
        graphdef, weights = nnx.split(self)  # not by the config: a part may gather its weights
        copy = nnx.merge(graphdef, jax.lax.stop_gradient(weights))
        compute_in_float32(copy)
        return copy

    def read(
        self,
        last: Float[Array, "b n d"],
        states: Mapping[int, Float[Array, "b n d"]],
        cond: Condition,
        *,
        taps: Sequence[int],
        inner: bool,
    ) -> Output | Tapped:
        """Predict from the tokens after the last block and, with `inner`, after block `inner_head`.

        Args:
            states: the tokens after other blocks, by the number of blocks.
        """
        c = self.config

        def predict(head: Any, tokens: Array) -> Array:
            patches = head(tokens, cond)
            return unpatchify(patches, c.patch_size, c.grid[0]).astype(jnp.float32)

        output: Any = predict(self.final, last)
        if inner:
            output = TwoPredictions(output, predict(self.inner, states[c.inner_head]))
        return (output, tuple(states[tap] for tap in taps)) if taps else output


class DiT(Transformer):
    """Diffusion transformer (Peebles & Xie 2023): patches → blocks under a condition → patches."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, design = config, BLOCKS[config.block]
        self.config = c
        self.n_joining = None if design.tokens_join else 0  # None: all of the condition's tokens
        self.patch = make_patch_embedding(c, rngs=rngs)
        self.position = make_position_embedding(c, rngs=rngs)
        self.time = make_time_embedder(c, rngs=rngs)
        self.label = make_label_embedder(c, ClassVector, rngs=rngs)
        self.blocks = stack_blocks(lambda rngs: design.block(c, rngs=rngs), c.depth, rngs)
        self.final = design.final(c, rngs=rngs)
        self.inner = design.final(c, rngs=rngs) if c.inner_head else None
        self.span = make_span_embedder(c, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, "b"],
        label: Label,
        *,
        taps: Sequence[int] = (),
        inner: bool = False,
        span: Float[Array, "b"] | None = None,
        token_ids: Int[Array, "b k"] | None = None,
    ) -> Output | Tapped:
        """Predict at x_t, in float32. A class is in 0 … n_classes; n_classes is the null class.

        Args:
            taps: numbers of blocks, ascending, from 1 to `depth`. With them the result is the
                prediction and the image's tokens after so many blocks, (b n d) in `dtype`, in the
                order of `taps`.
            inner: predict by the inner head too: in place of the prediction stand both.
            span: of a network that predicts a mean velocity, how far before t it reaches.
            token_ids: numbers of the image's tokens that pass the blocks of the config's `route`,
                row by row of the grid; None for all.

        Raises:
            UserError: taps out of range, not ascending, or where tokens are missing.
        """
        c = self.config
        cuts = [*taps, c.inner_head] if inner else [*taps]
        self.check_cuts(taps, cuts, token_ids)
        cond = add_time(self.embed_times(t, span), self.label(label))
        x = self.position(self.patch(patchify(x, c.patch_size)))
        n = x.shape[1]
        x = jnp.concatenate([cond.tokens[:, : self.n_joining], x], axis=1)
        x, states = scan_with_taps(
            [(self.blocks, c.depth)],
            x,
            cond,
            taps=cuts,
            remat=c.remat,
            unroll=c.unroll,
            route=None if token_ids is None else self.route(token_ids, n_before=x.shape[1] - n),
        )
        tokens = {n_blocks: state[:, -n:] for n_blocks, state in states.items()}
        return self.read(x[:, -n:], tokens, cond, taps=taps, inner=inner)

    def route(self, token_ids: Int[Array, "b k"], n_before: int) -> Route:
        """Make the route of some tokens, in a sequence that begins with `n_before` others."""
        ids = prepend_others(token_ids, n_before)

        def take(x: Array, cond: Condition) -> tuple[Array, Condition]:
            return take_tokens(x, ids), cond._replace(token_ids=token_ids)

        start, end = self.config.route
        return Route(start, end, take, lambda before, x: put_tokens(before, ids, x))


# --- MMDiT: two streams with one attention (Esser et al. 2024, §4 and fig. 2b) --------------------


class Streams(NamedTuple):
    """The tokens of an image and of its condition."""

    image: Float[Array, "b n d"]
    context: Float[Array, "b m d"]


class Modulations(NamedTuple):
    """Modulations of one stream: 1 around the attention, 2 around the MLP."""

    shift1: Float[Array, "b d"]
    scale1: Float[Array, "b d"]
    gate1: Float[Array, "b d"]
    shift2: Float[Array, "b d"]
    scale2: Float[Array, "b d"]
    gate2: Float[Array, "b d"]


class Stream(nnx.Module):
    """One stream's own weights in a joint block: those of an adaLN-Zero block. The attention itself
    is the block's.
    """

    def __init__(self, config: ModelConfig, *, grid: tuple[int, int] | None, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 6 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.qkv = Heads(
            "qkv", d, c.n_heads, grid=grid, qk_norm=c.qk_norm, dtype=c.dtype, rngs=rngs
        )
        self.out = Linear(d, d, dtype=c.dtype, rngs=rngs)
        self.mlp = make_mlp(c, rngs=rngs)

    def modulations(self, vector: Float[Array, "b d"]) -> Modulations:
        return Modulations(*jnp.split(self.modulation(jax.nn.silu(vector)), 6, axis=-1))

    def before_attention(
        self, x: Float[Array, "b n d"], m: Modulations, token_ids: Int[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n h k"], ...]:
        """Compute this stream's queries, keys and values."""
        return self.qkv(modulate(self.norm(x), m.shift1, m.scale1), token_ids)

    def after_attention(
        self, x: Float[Array, "b n d"], y: Float[Array, "b n d"], m: Modulations
    ) -> Float[Array, "b n d"]:
        """Add the attention's result y to x, then apply the MLP."""
        x = add_gated(x, m.gate1, self.out(y))
        return add_gated(x, m.gate2, self.mlp(modulate(self.norm(x), m.shift2, m.scale2)))


class JointBlock(nnx.Module):
    """Two streams, each with its own weights, that attend to all tokens of both."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        # "picture" is the image's stream: a name in every checkpoint.
        self.picture = Stream(config, grid=config.rotary_grid, rngs=rngs)
        self.context = Stream(config, grid=None, rngs=rngs)

    def __call__(self, x: Streams, cond: Condition) -> Streams:
        n = x.image.shape[1]
        mi = self.picture.modulations(cond.vector)
        mc = self.context.modulations(cond.vector)
        q, k, v = join_streams(
            self.picture.before_attention(x.image, mi, cond.token_ids),
            self.context.before_attention(x.context, mc),
        )
        y = attention(q, k, v, pad_mask(cond.mask, before=n))
        return Streams(
            self.picture.after_attention(x.image, y[:, :n], mi),
            self.context.after_attention(x.context, y[:, n:], mc),
        )

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        s = n_image + n_condition
        return BlockProducts(modulations=12, projections=4 * s, scores=s * s, mlp_tokens=s)


class DualJointBlock(JointBlock):
    """A joint block with a second attention, of the image's tokens to themselves alone. Both
    attentions read the block's input (MMDiT-X, the blocks of SD3.5 medium).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        c, d = config, config.width
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 3 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.attention = make_self_attention(c, rngs=rngs)

    def __call__(self, x: Streams, cond: Condition) -> Streams:
        n = x.image.shape[1]
        mi = self.picture.modulations(cond.vector)
        mc = self.context.modulations(cond.vector)
        shift, scale, gate = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 3, axis=-1)
        y = modulate(self.norm(x.image), shift, scale)
        image_only = self.attention(y, token_ids=cond.token_ids)
        q, k, v = join_streams(
            self.picture.before_attention(x.image, mi, cond.token_ids),
            self.context.before_attention(x.context, mc),
        )
        y = attention(q, k, v, pad_mask(cond.mask, before=n))
        image = add_gated(x.image, gate, image_only)
        return Streams(
            self.picture.after_attention(image, y[:, :n], mi),
            self.context.after_attention(x.context, y[:, n:], mc),
        )

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        n = n_image
        second_attention = BlockProducts(modulations=3, projections=4 * n, scores=n * n)
        return JointBlock.products(config, n_image, n_condition) + second_attention


def join_streams(image: Any, context: Any) -> list[Float[Array, "b s h k"]]:
    """Concatenate queries, keys or values of both streams to one sequence."""
    return [jnp.concatenate(pair, axis=1) for pair in zip(image, context, strict=True)]


class LastJointBlock(nnx.Module):
    """The last block. Only the image's tokens go on from here, so the context gives keys and values
    and is not updated (as in SD3).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.picture = Stream(c, grid=c.rotary_grid, rngs=rngs)
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 2 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.kv = Heads("kv", d, c.n_heads, qk_norm=c.qk_norm, dtype=c.dtype, rngs=rngs)

    def __call__(self, x: Streams, cond: Condition) -> Float[Array, "b n d"]:
        mi = self.picture.modulations(cond.vector)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 2, axis=-1)
        q, *kv = self.picture.before_attention(x.image, mi)
        k, v = join_streams(kv, self.kv(modulate(self.norm(x.context), shift, scale)))
        y = attention(q, k, v, pad_mask(cond.mask, before=x.image.shape[1]))
        return self.picture.after_attention(x.image, y, mi)

    @staticmethod
    def products(config: ModelConfig, n_image: int, n_condition: int) -> BlockProducts:
        n, m = n_image, n_condition
        return BlockProducts(
            modulations=6 + 2, projections=4 * n + 2 * m, scores=n * (n + m), mlp_tokens=n
        )


class MMDiT(Transformer):
    """Multimodal diffusion transformer (Esser et al. 2024): t and the label's vector modulate both
    streams, and the label's tokens are the second stream.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = make_patch_embedding(c, rngs=rngs)
        self.position = make_position_embedding(c, rngs=rngs)
        self.time = make_time_embedder(c, rngs=rngs)
        self.label = make_label_embedder(c, ClassTokens, rngs=rngs)
        n_plain = c.depth - 1 - c.n_dual
        self.dual_blocks = stack_blocks(lambda rngs: DualJointBlock(c, rngs=rngs), c.n_dual, rngs)
        self.blocks = stack_blocks(lambda rngs: JointBlock(c, rngs=rngs), n_plain, rngs)
        self.last = LastJointBlock(c, rngs=rngs)
        self.final = AdaptiveFinalLayer(c, rngs=rngs)
        self.inner = AdaptiveFinalLayer(c, rngs=rngs) if c.inner_head else None
        self.span = make_span_embedder(c, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, "b"],
        label: Label,
        *,
        taps: Sequence[int] = (),
        inner: bool = False,
        span: Float[Array, "b"] | None = None,
        token_ids: Int[Array, "b k"] | None = None,
    ) -> Output | Tapped:
        """Predict at x_t, in float32. A class is in 0 … n_classes; n_classes is the null class.

        Args:
            taps, inner, span, token_ids: as of a `DiT`. Dual blocks come first, then the joint
                ones, then the last block.

        Raises:
            UserError: taps out of range, not ascending, or where tokens are missing.
        """
        c = self.config
        cuts = [*taps, c.inner_head] if inner else [*taps]
        self.check_cuts(taps, cuts, token_ids)
        cond = self.label(label)
        cond = cond._replace(vector=self.embed_times(t, span) + cond.vector)
        streams = Streams(self.position(self.patch(patchify(x, c.patch_size))), cond.tokens)
        streams, states = scan_with_taps(
            [(self.dual_blocks, c.n_dual), (self.blocks, c.depth - 1 - c.n_dual)],
            streams,
            cond,
            taps=cuts,
            remat=c.remat,
            unroll=c.unroll,
            route=None if token_ids is None else self.route(token_ids),
        )
        tokens = {n_blocks: state.image for n_blocks, state in states.items()}
        tokens[c.depth] = self.last(streams, cond)
        return self.read(tokens[c.depth], tokens, cond, taps=taps, inner=inner)

    def route(self, token_ids: Int[Array, "b k"]) -> Route:
        """Make the route of some tokens of the image; the context's all pass."""

        def take(x: Streams, cond: Condition) -> tuple[Streams, Condition]:
            image = take_tokens(x.image, token_ids)
            return x._replace(image=image), cond._replace(token_ids=token_ids)

        def put(before: Streams, x: Streams) -> Streams:
            return x._replace(image=put_tokens(before.image, token_ids, x.image))

        start, end = self.config.route
        return Route(start, end, take, put)


# --- presets --------------------------------------------------------------------------------------

# Table 1 of the paper (Peebles & Xie), and a tiny size for laptops.
SIZES = {
    "Ti": {"width": 128, "depth": 6, "n_heads": 4},
    "S": {"width": 384, "depth": 12, "n_heads": 6},
    "B": {"width": 768, "depth": 12, "n_heads": 12},
    "L": {"width": 1024, "depth": 24, "n_heads": 16},
    "XL": {"width": 1152, "depth": 28, "n_heads": 16},
}
MODELS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{p}": shape | {"patch_size": p}
    for size, shape in SIZES.items()
    for p in (1, 2, 4, 8)
}
# The image's stream is a DiT of the same name; positions and norms of q and k are as in SD3.
MODELS |= {  # pyright: ignore[reportConstantRedefinition]
    f"MM{name}": shape | {"block": JOINT, "qk_norm": True, "position": "cropped"}
    for name, shape in MODELS.items()
}
# Of pixels without a VAE, for clean images as `prediction` (Li & He 2025).
JIT: dict[str, Any] = {
    "mlp": "swiglu",
    "norm": "rms",
    "qk_norm": True,
    "rope": True,
}
MODELS |= {  # pyright: ignore[reportConstantRedefinition]
    f"JiT-{size}/{p}": shape | JIT | {"patch_size": p, "bottleneck": bottleneck}
    for size, shape, bottleneck in (
        ("B", SIZES["B"], 128),
        ("L", SIZES["L"], 128),
        ("H", {"width": 1280, "depth": 32, "n_heads": 16}, 256),
    )
    for p in (16, 32)
}
# Stable Diffusion 3 and 3.5, as published (Esser et al. 2024), for captions.
SD3: dict[str, Any] = {
    "block": JOINT,
    "patch_size": 2,
    "position": "centred",
    "caption_norm": False,
}
MODELS |= {  # pyright: ignore[reportConstantRedefinition]
    "SD3-2B": SD3 | {"width": 1536, "depth": 24, "n_heads": 24},
    "SD3.5-M": SD3
    | {"width": 1536, "depth": 24, "n_heads": 24, "qk_norm": True, "n_dual": 13}
    | {"position_side": 384},
    "SD3.5-L": SD3 | {"width": 2432, "depth": 38, "n_heads": 38, "qk_norm": True},
}


def model_config(name: str, **fields: Any) -> ModelConfig:
    """Complete and override the preset `name`, such as "DiT-S/2", by `fields`.

    Raises:
        UserError: the name is not in `MODELS`, or a field has a value that does not exist.
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    return ModelConfig(**MODELS[name] | fields)


def build_model(config: ModelConfig, rngs: nnx.Rngs) -> DiT | MMDiT:
    """Build the network of a config, with fresh weights."""
    model = (MMDiT if config.block == JOINT else DiT)(config, rngs=rngs)
    for blocks in (getattr(model, name, None) for name in ("dual_blocks", "blocks", "last")):
        if config.fp8:
            multiply_in_fp8(blocks)
        if config.lora:
            add_adapters(blocks, config.lora, rngs=rngs)
    return model


@lru_cache
def model_graphdef(config: ModelConfig) -> nnx.GraphDef[Any]:
    """A model without its weights, static and hashable: `nnx.merge(graphdef, params)` is the
    network.
    """
    return nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))[0]


def init_model_params(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Initialize weights as a plain tree of float32 arrays (Peebles & Xie 2023, §4)."""
    return nnx.to_pure_dict(nnx.split(build_model(config, nnx.Rngs(params=key)))[1])


def count_products(config: ModelConfig, *, routed_share: float = 0.0) -> BlockProducts | None:
    """Sum the matrix products of all blocks and of the final layer for one image, with captions of
    the length in training. None if one of them does not state its `products`.

    Args:
        routed_share: of the image's tokens that go around the blocks of the route.
    """
    n, m = config.grid[0] * config.grid[1], config.n_label_tokens
    if config.block == JOINT:
        n_plain = config.depth - 1 - config.n_dual
        layers: list[Any] = [DualJointBlock] * config.n_dual + [JointBlock] * n_plain
        layers += [LastJointBlock, AdaptiveFinalLayer]
    else:
        design, m = BLOCKS[config.block], m + 1  # t is a token of the condition too
        layers = [*[design.block] * config.depth, design.final]
    total = BlockProducts()
    on_route = range(*config.route) if config.route else ()
    for i, layer in enumerate(layers):
        if not hasattr(layer, "products"):
            return None
        n_here = n - round(routed_share * n) if i in on_route else n
        total += layer.products(config, n_here, m)
    return total
