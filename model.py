"""The networks: what a diffusion transformer is made of and how its blocks are conditioned.

A model maps (x_t, t, label) to a velocity. It knows nothing of noise, losses, guidance or devices,
takes no random key and has no train flag; a label it should not see arrives as `n_classes`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from errors import UserError, unknown
from layers import (
    MLPS,
    NORMS,
    POSITIONS,
    Attention,
    LabelEmbedder,
    Linear,
    TimeEmbedder,
    modulate,
    patchify,
    scan,
    stack,
    unpatchify,
    zeros,
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Saved beside its weights, so that a checkpoint can be opened without
    its training flags.

    Args:
        width, depth, n_heads: of the transformer.
        patch_size: pixels (or latents) to a side of a token.
        image_size, channels: of the pictures, which are square.
        out_channels: of the prediction; the paper's learned sigma has twice `channels`.
        n_classes: 0 for unconditional. Label `n_classes` is the null class.
        position: sincos, learned or none; `rope` adds rotary positions in attention.
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
    block: str = "adaln_zero"
    position: str = "sincos"
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
        tables = {"block": BLOCKS, "position": POSITIONS, "mlp": MLPS, "norm": NORMS}
        for field, table in tables.items():
            if getattr(self, field) not in table:
                raise unknown(field, getattr(self, field), table)
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


class AdaLNZeroBlock(nnx.Module):
    """A transformer block whose norms and residual gates are functions of the condition (Peebles &
    Xie 2023, fig. 3).

    "Zero": the modulation starts at zero, so that at first every block is exactly the identity.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        grid = c.grid if c.rope else None
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 6 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        self.attention = Attention(
            d, c.n_heads, grid=grid, qk_norm=c.qk_norm, dtype=c.dtype, rngs=rngs
        )
        self.mlp = MLPS[c.mlp](d, round(c.mlp_ratio * d), dtype=c.dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], cond: Float[Array, "b d"]
    ) -> Float[Array, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(jax.nn.silu(cond)), 6, axis=-1
        )
        x = x + gate1[:, None] * self.attention(modulate(self.norm(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm(x), shift2, scale2))


BLOCKS = {"adaln_zero": AdaLNZeroBlock}


class FinalLayer(nnx.Module):
    """Tokens → patches. Starts at zero, as every block does: the untrained model predicts 0."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.norm = NORMS[c.norm]
        self.modulation = Linear(d, 2 * d, dtype=c.dtype, rngs=rngs, init=zeros)
        n_out = c.patch_size**2 * c.out_channels
        self.out = Linear(d, n_out, dtype=c.dtype, rngs=rngs, init=zeros)

    def __call__(
        self, x: Float[Array, "b n d"], cond: Float[Array, "b d"]
    ) -> Float[Array, "b n k"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(cond)), 2, axis=-1)
        return self.out(modulate(self.norm(x), shift, scale))


class DiT(nnx.Module):
    """Diffusion transformer (Peebles & Xie 2023): patches → blocks under a condition → patches."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.config = c
        self.patch = Linear(c.patch_size**2 * c.channels, d, dtype=c.dtype, rngs=rngs)
        self.position = POSITIONS[c.position](d, c.grid, rngs=rngs)
        self.time = TimeEmbedder(d, time_scale=c.time_scale, dtype=c.dtype, rngs=rngs)
        self.label = LabelEmbedder(c.n_classes, d, dtype=c.dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: BLOCKS[c.block](c, rngs=rngs), c.depth, rngs)
        self.final = FinalLayer(c, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, "b"], label: Int[Array, "b"]
    ) -> Float[Array, "b h w o"]:
        """The velocity at x_t, float32. `label` is in 0 … n_classes; n_classes means none."""
        c = self.config
        cond = self.time(t) + self.label(label)
        tokens = self.position(self.patch(patchify(x, c.patch_size)))
        tokens = scan(self.blocks, tokens, cond, remat=c.remat, unroll=c.unroll)
        tokens = self.final(tokens, cond)
        return unpatchify(tokens, c.patch_size, c.grid[0]).astype(jnp.float32)


# Table 1 of the paper, and a tiny size for laptops.
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


def model_config(name: str, **fields) -> ModelConfig:
    """The preset `name`, such as "DiT-S/2", completed and overridden by `fields`.

    Raises:
        UserError: the name is not in `MODELS`, or a field has a value that does not exist.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return ModelConfig(**MODELS[name] | fields)


@lru_cache
def graphdef(config: ModelConfig) -> nnx.GraphDef:
    """All of a model but its weights, static and hashable: `nnx.merge(graphdef, params)` lives."""
    return nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Fresh weights as a plain tree of float32 arrays (Peebles & Xie 2023, §4)."""
    return nnx.to_pure_dict(nnx.split(DiT(config, rngs=nnx.Rngs(params=key)))[1])
