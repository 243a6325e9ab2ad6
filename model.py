"""The networks: what a diffusion transformer is made of and how its blocks are conditioned.

A model maps (x_t, t, label) to a velocity, or to what else it is trained for. A label says what the
picture is of: the id of a class, or a caption as a text tower encoded it. The model knows nothing
of noise, losses, guidance or devices, takes no random key and has no train flag; a label it should
not see arrives as the null class or the empty caption.
"""

from collections.abc import Callable
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
    CrossAttention,
    Heads,
    Linear,
    TimeEmbedder,
    VectorEmbedder,
    add_gated,
    identity,
    modulate,
    patchify,
    rms_norm,
    scan,
    small_normal,
    stack,
    unpatchify,
    zeros,
)
from networks.ops import attention
from runtime.errors import UserError, unknown_name


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Saved beside its weights, so that a checkpoint can be opened without
    its training flags.

    Args:
        width, depth, n_heads: of the transformer.
        patch_size: pixels (or latents) to a side of a token.
        image_size, channels: of the pictures, which are square.
        out_channels: of the prediction; the paper's learned sigma has twice `channels`.
        n_classes: label `n_classes` is the null class. 0 for unconditional and for captions, whose
            null is the caption without tokens.
        n_class_tokens: with joint blocks, the length of the sequence that stands for a class.
        text_length, text_width, pooled_width: of captions: tokens as trained (any number works),
            channels of a token and of the pooled vector; 0 for none. caption_norm: bring both to
            unit mean square, whatever the towers' scale; SD3 takes them as they are.
        block: of `BLOCKS`, or joint (MMDiT), where the picture's tokens also attend to themselves
            alone in the first `n_dual` blocks (as in SD3.5 medium).
        position: sincos, cropped, centred, learned or none; `rope` adds rotary positions in
            attention. position_side, position_base: of the table that the second and third are cut
            from, the places to a side, and the patches of a picture that they are counted by.
        mlp: gelu or swiglu, `mlp_ratio` × width wide. norm: layer or rms.
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.
        dtype: of matrix products and of the tokens between blocks; weights are always float32.
        remat: recompute each block in the backward pass. unroll: blocks compiled side by side.
    """

    width: int
    depth: int
    n_heads: int
    patch_size: int
    image_size: int
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
    dtype: str = "float32"
    remat: bool = False
    unroll: int = 1

    def __post_init__(self):
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
                "a model is told classes or captions: n_classes or text_width must be 0"
            )
        if self.n_dual and (self.block != JOINT or not 0 < self.n_dual < self.depth):
            raise UserError(
                f"n_dual {self.n_dual}: only joint blocks have a second attention, and never the "
                f"last of the {self.depth}"
            )
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def rotary_grid(self) -> tuple[int, int] | None:
        return self.grid if self.rope else None


# --- the condition --------------------------------------------------------------------------------

Label = Int[Array, "b"] | EncodedCaption


class Condition(NamedTuple):
    """What a block may read: one vector, and a sequence of tokens. Those where `mask` is False are
    padding; without a mask all count.
    """

    vector: Float[Array, "b d"]
    tokens: Float[Array, "b m d"]
    mask: Bool[Array, "b m"] | None


class ClassVector(nnx.Module):
    """A learned vector for each class; row `n_classes` is "no class" (Ho & Salimans 2022)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = nnx.Param(small_normal(rngs.params(), (config.n_classes + 1, config.width)))
        self.dtype = config.dtype

    def __call__(self, label: Int[Array, "b"]) -> Condition:
        vector = self.table[...][label].astype(self.dtype)
        return Condition(vector, vector[:, None], None)


class ClassTokens(nnx.Module):
    """What a caption would be, learned for each class: a vector and a short sequence."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        n, m, d = config.n_classes + 1, config.n_class_tokens, config.width
        self.table = nnx.Param(small_normal(rngs.params(), (n, d)))
        self.tokens = nnx.Param(jax.nn.initializers.normal(1.0)(rngs.params(), (n, m, d)))
        self.dtype = config.dtype

    def __call__(self, label: Int[Array, "b"]) -> Condition:
        vector, tokens = (p[...][label].astype(self.dtype) for p in (self.table, self.tokens))
        return Condition(vector, tokens, None)


class CaptionEmbedder(nnx.Module):
    """A text tower's tokens and pooled vector, of whatever scale, brought to the model's width."""

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


def make_label_embedder(config: ModelConfig, of_class: Callable[..., Any], *, rngs: nnx.Rngs) -> Any:
    """What turns a label into a `Condition`: captions are told alike to every model."""
    return (CaptionEmbedder if config.text_width else of_class)(config, rngs=rngs)


def pad_mask(mask: Bool[Array, "b m"] | None, *, before: int = 0, after: int = 0):
    """The mask of a sequence with tokens that all count put before or after it."""
    if mask is None:
        return None
    return jnp.pad(mask, ((0, 0), (before, after)), constant_values=True)


# --- blocks: four ways to condition a transformer (Peebles & Xie 2023, §3.2 and fig. 3) -----------


def make_self_attention(c: ModelConfig, *, rngs: nnx.Rngs) -> Attention:
    how = {"grid": c.rotary_grid, "qk_norm": c.qk_norm, "dtype": c.dtype}
    return Attention(c.width, c.n_heads, rngs=rngs, **how)


def make_mlp(c: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    return MLPS[c.mlp](c.width, round(c.mlp_ratio * c.width), dtype=c.dtype, rngs=rngs)


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
        x = add_gated(x, gate1, self.attention(modulate(self.norm(x), shift1, scale1)))
        return add_gated(x, gate2, self.mlp(modulate(self.norm(x), shift2, scale2)))


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
        x = x + self.attention(modulate(self.norm(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm(x), shift2, scale2))


class CrossAttentionBlock(nnx.Module):
    """A transformer block that looks at the tokens of the condition after those of the picture."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm1, self.norm2, self.norm3 = (AffineNorm(c.norm, d) for _ in range(3))
        self.attention = make_self_attention(c, rngs=rngs)
        self.cross_attention = CrossAttention(
            d, c.n_heads, qk_norm=c.qk_norm, dtype=c.dtype, rngs=rngs
        )
        self.mlp = make_mlp(c, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], cond: Condition) -> Float[Array, "b n d"]:
        x = x + self.attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), cond.tokens, cond.mask)
        return x + self.mlp(self.norm3(x))


class InContextBlock(nnx.Module):
    """The plain transformer block: the condition's tokens stand before the picture's, in x."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm1, self.norm2 = (AffineNorm(c.norm, d) for _ in range(2))
        self.attention = make_self_attention(c, rngs=rngs)
        self.mlp = make_mlp(c, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"], cond: Condition) -> Float[Array, "b s d"]:
        mask = pad_mask(cond.mask, after=x.shape[1] - cond.tokens.shape[1])
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


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


class PlainFinalLayer(nnx.Module):
    """Tokens → patches, for blocks that do without modulation."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = AffineNorm(c.norm, d)
        n_out = c.patch_size**2 * c.out_channels
        self.out = Linear(d, n_out, dtype=c.dtype, rngs=rngs, init=zeros)

    def __call__(self, x: Float[Array, "b n d"], cond: Condition) -> Float[Array, "b n k"]:
        return self.out(self.norm(x))


def make_position_embedding(c: ModelConfig, *, rngs: nnx.Rngs) -> Any:
    """What adds positions to the picture's tokens: a table that is cropped has its own size."""
    table = {"side": c.position_side, "base": c.position_base}
    how = table if c.position in ("cropped", "centred") else {}
    return POSITIONS[c.position](c.width, c.grid, rngs=rngs, **how)


class Design(NamedTuple):
    """A block, the layer after the last one, and whether the condition's tokens stand before the
    picture's.
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


class DiT(nnx.Module):
    """Diffusion transformer (Peebles & Xie 2023): patches → blocks under a condition → patches."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d, design = config, config.width, BLOCKS[config.block]
        self.config, self.n_joining = c, None if design.tokens_join else 0  # None: all tokens
        self.patch = Linear(c.patch_size**2 * c.channels, d, dtype=c.dtype, rngs=rngs)
        self.position = make_position_embedding(c, rngs=rngs)
        self.time = TimeEmbedder(d, time_scale=c.time_scale, dtype=c.dtype, rngs=rngs)
        self.label = make_label_embedder(c, ClassVector, rngs=rngs)
        self.blocks = stack(lambda rngs: design.block(c, rngs=rngs), c.depth, rngs)
        self.final = design.final(c, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, "b"], label: Label
    ) -> Float[Array, "b h w o"]:
        """The prediction at x_t, float32. A class is in 0 … n_classes; n_classes means none."""
        c = self.config
        cond = add_time(self.time(t), self.label(label))
        x = self.position(self.patch(patchify(x, c.patch_size)))
        n = x.shape[1]
        x = jnp.concatenate([cond.tokens[:, : self.n_joining], x], axis=1)
        x = scan(self.blocks, x, cond, remat=c.remat, unroll=c.unroll)
        x = self.final(x[:, -n:], cond)
        return unpatchify(x, c.patch_size, c.grid[0]).astype(jnp.float32)


def add_time(time: Float[Array, "b d"], label: Condition) -> Condition:
    """t joins the label: added to its vector, and as a token of its own before its tokens."""
    tokens = jnp.concatenate([time[:, None], label.tokens], axis=1)
    return Condition(time + label.vector, tokens, pad_mask(label.mask, before=1))


# --- MMDiT: two streams with one attention (Esser et al. 2024, §4 and fig. 2b) --------------------


class Streams(NamedTuple):
    """The tokens of a picture and of its condition."""

    picture: Float[Array, "b n d"]
    context: Float[Array, "b m d"]


class Modulations(NamedTuple):
    """Of one stream: 1 around the attention, 2 around the MLP."""

    shift1: Float[Array, "b d"]
    scale1: Float[Array, "b d"]
    gate1: Float[Array, "b d"]
    shift2: Float[Array, "b d"]
    scale2: Float[Array, "b d"]
    gate2: Float[Array, "b d"]


class Stream(nnx.Module):
    """One stream's own weights in a joint block: those of an adaLN-Zero block, with the attention
    left to the block.
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

    def before(
        self, x: Float[Array, "b n d"], m: Modulations
    ) -> tuple[Float[Array, "b n h k"], ...]:
        """This stream's queries, keys and values."""
        return self.qkv(modulate(self.norm(x), m.shift1, m.scale1))

    def after(
        self, x: Float[Array, "b n d"], y: Float[Array, "b n d"], m: Modulations
    ) -> Float[Array, "b n d"]:
        """Takes in what attention found, then applies the MLP."""
        x = add_gated(x, m.gate1, self.out(y))
        return add_gated(x, m.gate2, self.mlp(modulate(self.norm(x), m.shift2, m.scale2)))


class JointBlock(nnx.Module):
    """Two streams, each with its own weights, that attend to all tokens of both."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.picture = Stream(config, grid=config.rotary_grid, rngs=rngs)
        self.context = Stream(config, grid=None, rngs=rngs)

    def __call__(self, x: Streams, cond: Condition) -> Streams:
        n = x.picture.shape[1]
        mp = self.picture.modulations(cond.vector)
        mc = self.context.modulations(cond.vector)
        q, k, v = join(self.picture.before(x.picture, mp), self.context.before(x.context, mc))
        y = attention(q, k, v, pad_mask(cond.mask, before=n))
        return Streams(
            self.picture.after(x.picture, y[:, :n], mp), self.context.after(x.context, y[:, n:], mc)
        )


class DualJointBlock(JointBlock):
    """A joint block with a second attention, of the picture's tokens to themselves alone: both
    attentions read the tokens as they came (MMDiT-X, the blocks of SD3.5 medium).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        c, d = config, config.width
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 3 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.attention = make_self_attention(c, rngs=rngs)

    def __call__(self, x: Streams, cond: Condition) -> Streams:
        n = x.picture.shape[1]
        mp = self.picture.modulations(cond.vector)
        mc = self.context.modulations(cond.vector)
        shift, scale, gate = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 3, axis=-1)
        alone = self.attention(modulate(self.norm(x.picture), shift, scale))
        q, k, v = join(self.picture.before(x.picture, mp), self.context.before(x.context, mc))
        y = attention(q, k, v, pad_mask(cond.mask, before=n))
        picture = add_gated(x.picture, gate, alone)
        return Streams(
            self.picture.after(picture, y[:, :n], mp), self.context.after(x.context, y[:, n:], mc)
        )


def join(picture, context) -> list[Float[Array, "b s h k"]]:
    """Queries, keys or values of both streams as one sequence."""
    return [jnp.concatenate(pair, axis=1) for pair in zip(picture, context, strict=True)]


class LastJointBlock(nnx.Module):
    """The last block, of which only the picture's tokens are wanted: the context is looked at and
    not changed (as in SD3).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.picture = Stream(c, grid=c.rotary_grid, rngs=rngs)
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 2 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.kv = Heads("kv", d, c.n_heads, qk_norm=c.qk_norm, dtype=c.dtype, rngs=rngs)

    def __call__(self, x: Streams, cond: Condition) -> Float[Array, "b n d"]:
        mp = self.picture.modulations(cond.vector)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 2, axis=-1)
        q, *kv = self.picture.before(x.picture, mp)
        k, v = join(kv, self.kv(modulate(self.norm(x.context), shift, scale)))
        y = attention(q, k, v, pad_mask(cond.mask, before=x.picture.shape[1]))
        return self.picture.after(x.picture, y, mp)


class MMDiT(nnx.Module):
    """Multimodal diffusion transformer (Esser et al. 2024): t and the label's vector modulate both
    streams, and the label's tokens are the second.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.config = c
        self.patch = Linear(c.patch_size**2 * c.channels, d, dtype=c.dtype, rngs=rngs)
        self.position = make_position_embedding(c, rngs=rngs)
        self.time = TimeEmbedder(d, time_scale=c.time_scale, dtype=c.dtype, rngs=rngs)
        self.label = make_label_embedder(c, ClassTokens, rngs=rngs)
        n_plain = c.depth - 1 - c.n_dual
        self.dual_blocks = stack(lambda rngs: DualJointBlock(c, rngs=rngs), c.n_dual, rngs)
        self.blocks = stack(lambda rngs: JointBlock(c, rngs=rngs), n_plain, rngs)
        self.last = LastJointBlock(c, rngs=rngs)
        self.final = AdaptiveFinalLayer(c, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, "b"], label: Label
    ) -> Float[Array, "b h w o"]:
        """The prediction at x_t, float32. A class is in 0 … n_classes; n_classes means none."""
        c = self.config
        cond = self.label(label)
        cond = cond._replace(vector=self.time(t) + cond.vector)
        picture = self.position(self.patch(patchify(x, c.patch_size)))
        streams = Streams(picture, cond.tokens)
        for blocks in (self.dual_blocks, self.blocks):
            streams = scan(blocks, streams, cond, remat=c.remat, unroll=c.unroll)
        picture = self.final(self.last(streams, cond), cond)
        return unpatchify(picture, c.patch_size, c.grid[0]).astype(jnp.float32)


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
# The picture's stream is a DiT of the same name; positions and norms of q and k are as in SD3.
MODELS |= {
    f"MM{name}": shape | {"block": JOINT, "qk_norm": True, "position": "cropped"}
    for name, shape in MODELS.items()
}


def model_config(name: str, **fields) -> ModelConfig:
    """The preset `name`, such as "DiT-S/2", completed and overridden by `fields`.

    Raises:
        UserError: the name is not in `MODELS`, or a field has a value that does not exist.
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    return ModelConfig(**MODELS[name] | fields)


def build_model(config: ModelConfig, rngs: nnx.Rngs) -> DiT | MMDiT:
    """The network of a configuration."""
    return (MMDiT if config.block == JOINT else DiT)(config, rngs=rngs)


@lru_cache
def model_graphdef(config: ModelConfig) -> nnx.GraphDef:
    """All of a model but its weights, static and hashable: `nnx.merge(graphdef, params)` lives."""
    return nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))[0]


def init_model_params(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Fresh weights as a plain tree of float32 arrays (Peebles & Xie 2023, §4)."""
    return nnx.to_pure_dict(nnx.split(build_model(config, nnx.Rngs(params=key)))[1])
