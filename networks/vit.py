"""The vision transformer of DINOv2: images to features (Dosovitskiy et al. 2021; Oquab et al.
2023).

Its features compare images, or guide the training of another network; here it is never trained.
`pretrained/dinov2.py` loads published weights. Nothing here knows of files, sizes of images or how
they are normalised.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from networks.inception import cubic, resize_matrix
from networks.layers import (
    AffineNorm,
    Attention,
    Linear,
    patchify,
    scan_blocks,
    small_normal,
    stack_blocks,
    swiglu,
)
from networks.ops import in_float32
from runtime.errors import UserError


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a vision transformer.

    Args:
        width, depth, n_heads: channels of a token, blocks, heads of each.
        hidden: channels inside an MLP.
        patch: side of a patch in pixels.
        grid: patches to a side of the images that its positions were trained for.
        n_registers: tokens without a place in the image (Darcet et al. 2024).
        mlp: gelu, or swiglu as the giant has it.
        position_offset: see `interpolate_positions`.
    """

    width: int
    depth: int
    n_heads: int
    hidden: int
    patch: int = 14
    grid: int = 37
    n_registers: int = 0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    position_offset: float = 0.0


class ViT(nnx.Module):
    """Images → features of each image, and of each of its patches.

    Args:
        dtype: of the operands of matrix products, float32 or bfloat16.
    """

    def __init__(self, config: ViTConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        c = self.config = config
        self.patch = Linear(3 * c.patch**2, c.width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(small_normal(rngs.params(), (c.width,)))  # and its position
        self.positions = nnx.Param(small_normal(rngs.params(), (c.grid, c.grid, c.width)))
        registers = small_normal(rngs.params(), (c.n_registers, c.width))
        self.registers = nnx.Param(registers) if c.n_registers else None
        self.blocks = stack_blocks(lambda rngs: ViTBlock(c, dtype=dtype, rngs=rngs), c.depth, rngs)
        self.norm = AffineNorm("layer", c.width)

    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b p q d"]]:
        """Return the class token and the patches' tokens, both after the last norm.

        Args:
            images: RGB, normalised as the network was trained.

        Raises:
            UserError: the images' sides are no multiples of the patch.
        """
        c, (n, height, width, _) = self.config, images.shape
        if height % c.patch or width % c.patch:
            raise UserError(
                f"images of {height} × {width} pixels: the patches have {c.patch} × {c.patch}, and "
                "sides must be multiples of that"
            )
        grid = (height // c.patch, width // c.patch)
        patches = self.patch(patchify(images, c.patch))
        patches += interpolate_positions(self.positions[...], grid, c).astype(patches.dtype)[None]
        first = self.class_token[...][None]
        if self.registers is not None:
            first = jnp.concatenate([first, self.registers[...]])
        first = jnp.broadcast_to(first.astype(patches.dtype)[None], (n, *first.shape))
        x = jnp.concatenate([first, patches], axis=1)
        x = self.norm(scan_blocks(self.blocks, x, remat=False, unroll=1))
        return x[:, 0], x[:, first.shape[1] :].reshape(n, *grid, c.width)


def vit_graphdef(config: ViTConfig, dtype: str = "float32") -> nnx.GraphDef[Any]:
    """A ViT without its weights, static and hashable: `nnx.merge(graphdef, params)` is it."""
    make = partial(ViT, config, dtype=dtype)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


# --- blocks ---------------------------------------------------------------------------------------


class ViTBlock(nnx.Module):
    """Attention, then an MLP, each scaled channel by channel (LayerScale; Touvron et al. 2021)."""

    def __init__(self, config: ViTConfig, *, dtype: str, rngs: nnx.Rngs):
        c = config
        self.norm1, self.norm2 = AffineNorm("layer", c.width), AffineNorm("layer", c.width)
        self.scale1, self.scale2 = nnx.Param(jnp.ones(c.width)), nnx.Param(jnp.ones(c.width))
        self.attention = Attention(c.width, c.n_heads, qk_norm=False, dtype=dtype, rngs=rngs)
        self.mlp = MLPS[c.mlp](c.width, c.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = add_scaled(x, self.scale1[...], self.attention(self.norm1(x)))
        return add_scaled(x, self.scale2[...], self.mlp(self.norm2(x)))


@in_float32
def add_scaled(x: Float[Array, "b n d"], scale: Float[Array, "d"], y: Float[Array, "b n d"]):
    """The residual of LayerScale: x + scale ∘ y."""
    return x + scale[None, None] * y


@in_float32
def exact_gelu(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    return jax.nn.gelu(x, approximate=False)


class ExactGeluMLP(nnx.Module):
    """Two linear maps with a GELU between them: x Φ(x) itself, not its tanh form."""

    def __init__(self, width: int, hidden: int, *, dtype: str, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(exact_gelu(self.up(x)))


class FusedSwiGLUMLP(nnx.Module):
    """A gated linear unit (Shazeer 2020, eq. 5) whose first two maps are one: gate, then value."""

    def __init__(self, width: int, hidden: int, *, dtype: str, rngs: nnx.Rngs):
        self.up = Linear(width, 2 * hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(swiglu(*jnp.split(self.up(x), 2, axis=-1)))


MLPS = {"gelu": ExactGeluMLP, "swiglu": FusedSwiGLUMLP}


# --- positions ------------------------------------------------------------------------------------


def interpolate_positions(
    positions: Float[Array, "g g d"], grid: tuple[int, int], config: ViTConfig
) -> Float[Array, "n d"]:
    """Resize the table of positions to a grid of patches, row by row.

    Networks with registers were trained with antialiasing, the others without, and these are
    resized as if the grid had `position_offset` more patches to a side. transformers' DINOv2 has
    an offset of 0, the original's code one of 0.1. On the trained grid nothing is resized.
    """
    if grid != positions.shape[:2]:
        rows, columns = (
            jnp.asarray(
                resize_matrix(len(positions), n, kernel=cubic, antialias=True, centred=True)
                if config.n_registers
                else bicubic_matrix(len(positions), n, offset=config.position_offset)
            )
            for n in grid
        )
        exact = jax.lax.Precision.HIGHEST
        table = positions.astype(jnp.float32)
        positions = jnp.einsum("pr,rcd,qc->pqd", rows, table, columns, precision=exact)
    return positions.reshape(-1, positions.shape[-1])


def bicubic_matrix(n: int, n_out: int, *, offset: float) -> Float[np.ndarray, "p n"]:
    """The matrix that resizes a line of n numbers to n_out as torch's `interpolate` does: cubic
    convolution with a = −¾ over four of them, not antialiased, edges repeated.
    """
    position = (np.arange(n_out) + 0.5) * (n / (n_out + offset)) - 0.5
    source = np.floor(position)[:, None] + np.arange(-1, 3)[None]
    weights = cubic(position[:, None] - source, a=-0.75)
    matrix = np.zeros((n_out, n))
    rows = np.arange(n_out)[:, None]
    np.add.at(matrix, (rows, np.clip(source, 0, n - 1).astype(int)), weights)
    return matrix.astype(np.float32)
