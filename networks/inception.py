"""The Inception-v3 network behind FID, sFID, KID and the Inception Score.

It is the graph that Google published in December 2015 (Szegedy et al. 2016), not torchvision's:
average pools leave the padding out, the last block pools by maximum, and there are 1,008 classes.
`inception_features` is a function of a tree of weights, with batch norms folded into the
convolutions; `pretrained/inception.py` loads them. Published tools resize and scale images in
different ways (`PREPARATIONS`), and their numbers cannot be compared with each other.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree, UInt8

SIDE = 299  # pixels, of the network's input
N_CLASSES = 1008
N_POOL = 2048
SPATIAL, N_SPATIAL = "Mixed_6d", 7  # the block and how many of its channels
# A GPU would otherwise round factors to ten bits (TF32), which FID can see.
EXACT = jax.lax.Precision.HIGHEST

Block = Mapping[str, Any]  # convolutions by name
Kernel = tuple[int, int, int, int]  # height, width, in, out


class Features(NamedTuple):
    """Features of a batch of images.

    `pool`: means over the last block's 8 × 8 positions (FID, KID, precision and recall). `spatial`:
    the first 7 of the 192 channels of the 1 × 1 branch of the third 17 × 17 block, which is
    `mixed_6/conv` in the graph of 2015 and `Mixed_6d.branch1x1` in torchvision's names, by rows,
    columns and channels (sFID, as Dhariwal & Nichol 2021). `logits`: of the classes, without their
    bias, for the Inception Score since Salimans et al. 2016.
    """

    pool: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    logits: Float[Array, "b 1008"]


# --- the network ----------------------------------------------------------------------------------


def inception_features(params: PyTree[Array], image: Float[Array, "b 299 299 3"]) -> Features:
    """Compute the features of images in −1 … 1, with `params` as in `inception_shapes`."""
    p = params
    x = convolve(p["Conv2d_1a_3x3"], image, stride=2, padding="VALID")
    x = convolve(p["Conv2d_2a_3x3"], x, padding="VALID")
    x = max_pool(convolve(p["Conv2d_2b_3x3"], x))
    x = convolve(p["Conv2d_3b_1x1"], x, padding="VALID")
    x = max_pool(convolve(p["Conv2d_4a_3x3"], x, padding="VALID"))
    spatial = x
    for name, (block, _) in BLOCKS.items():
        x = block(p[name], x)
        if name == SPATIAL:  # its first channels are those of its first branch
            spatial = x[..., :N_SPATIAL].reshape(len(x), -1)
    pool = x.mean((1, 2))
    return Features(pool, spatial, jnp.dot(pool, p["fc"]["kernel"], precision=EXACT))


def convolve(
    p: Block, x: Float[Array, "b h w i"], *, stride: int = 1, padding: str = "SAME"
) -> Float[Array, "b p q o"]:
    """Apply a convolution with its batch norm, then ReLU."""
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), padding, dimension_numbers=layout, precision=EXACT
    )
    return jax.nn.relu(y + p["bias"].reshape(1, 1, 1, -1))


def convolve_in_sequence(
    block: Block, x: Float[Array, "b h w i"], *names: str, halve: bool = False
) -> Float[Array, "b p q o"]:
    """Apply convolutions one after the other; with `halve`, the last halves the size."""
    for name in names[:-1]:
        x = convolve(block[name], x)
    if halve:
        return convolve(block[names[-1]], x, stride=2, padding="VALID")
    return convolve(block[names[-1]], x)


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


def average_around(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Average over 3 × 3 positions, leaving out the padding."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def max_around(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def concatenate_channels(*branches: Float[Array, "b h w _c"]) -> Float[Array, "b h w c"]:
    return jnp.concatenate(branches, axis=-1)


def mixed_a(block: Block, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
    """35 × 35 (Szegedy et al. 2016, figure 5, with a 5 × 5)."""
    return concatenate_channels(
        convolve_in_sequence(block, x, "branch1x1"),
        convolve_in_sequence(block, x, "branch5x5_1", "branch5x5_2"),
        convolve_in_sequence(block, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        convolve_in_sequence(block, average_around(x), "branch_pool"),
    )


def mixed_b(block: Block, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
    """35 × 35 → 17 × 17 (figure 10)."""
    return concatenate_channels(
        convolve_in_sequence(block, x, "branch3x3", halve=True),
        convolve_in_sequence(
            block, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", halve=True
        ),
        max_pool(x),
    )


def mixed_c(block: Block, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
    """7 × 7 as 1 × 7 and 7 × 1 (figure 6)."""
    return concatenate_channels(
        convolve_in_sequence(block, x, "branch1x1"),
        convolve_in_sequence(block, x, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
        convolve_in_sequence(block, x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
        convolve_in_sequence(block, average_around(x), "branch_pool"),
    )


def mixed_d(block: Block, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
    """17 × 17 → 8 × 8."""
    return concatenate_channels(
        convolve_in_sequence(block, x, "branch3x3_1", "branch3x3_2", halve=True),
        convolve_in_sequence(block, x, *(f"branch7x7x3_{i}" for i in range(1, 5)), halve=True),
        max_pool(x),
    )


def mixed_e(
    block: Block, x: Float[Array, "b h w i"], around: Callable[..., Array]
) -> Float[Array, "b h w o"]:
    """8 × 8: branches that end in 1 × 3 and 3 × 1, concatenated (figure 7)."""
    short = convolve_in_sequence(block, x, "branch3x3_1")
    long = convolve_in_sequence(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
    return concatenate_channels(
        convolve_in_sequence(block, x, "branch1x1"),
        convolve_in_sequence(block, short, "branch3x3_2a"),
        convolve_in_sequence(block, short, "branch3x3_2b"),
        convolve_in_sequence(block, long, "branch3x3dbl_3a"),
        convolve_in_sequence(block, long, "branch3x3dbl_3b"),
        convolve_in_sequence(block, around(x), "branch_pool"),
    )


def mixed_e_average(block: Block, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
    return mixed_e(block, x, average_around)


def mixed_e_max(block: Block, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
    return mixed_e(block, x, max_around)


# --- weights --------------------------------------------------------------------------------------

STEM: dict[str, Kernel] = {
    "Conv2d_1a_3x3": (3, 3, 3, 32),
    "Conv2d_2a_3x3": (3, 3, 32, 32),
    "Conv2d_2b_3x3": (3, 3, 32, 64),
    "Conv2d_3b_1x1": (1, 1, 64, 80),
    "Conv2d_4a_3x3": (3, 3, 80, 192),
}


def kernels_a(n: int, n_pool: int) -> dict[str, Kernel]:
    return {
        "branch1x1": (1, 1, n, 64),
        "branch5x5_1": (1, 1, n, 48),
        "branch5x5_2": (5, 5, 48, 64),
        "branch3x3dbl_1": (1, 1, n, 64),
        "branch3x3dbl_2": (3, 3, 64, 96),
        "branch3x3dbl_3": (3, 3, 96, 96),
        "branch_pool": (1, 1, n, n_pool),
    }


def kernels_b(n: int) -> dict[str, Kernel]:
    return {
        "branch3x3": (3, 3, n, 384),
        "branch3x3dbl_1": (1, 1, n, 64),
        "branch3x3dbl_2": (3, 3, 64, 96),
        "branch3x3dbl_3": (3, 3, 96, 96),
    }


def kernels_c(n: int, width: int) -> dict[str, Kernel]:
    return {
        "branch1x1": (1, 1, n, 192),
        "branch7x7_1": (1, 1, n, width),
        "branch7x7_2": (1, 7, width, width),
        "branch7x7_3": (7, 1, width, 192),
        "branch7x7dbl_1": (1, 1, n, width),
        "branch7x7dbl_2": (7, 1, width, width),
        "branch7x7dbl_3": (1, 7, width, width),
        "branch7x7dbl_4": (7, 1, width, width),
        "branch7x7dbl_5": (1, 7, width, 192),
        "branch_pool": (1, 1, n, 192),
    }


def kernels_d(n: int) -> dict[str, Kernel]:
    return {
        "branch3x3_1": (1, 1, n, 192),
        "branch3x3_2": (3, 3, 192, 320),
        "branch7x7x3_1": (1, 1, n, 192),
        "branch7x7x3_2": (1, 7, 192, 192),
        "branch7x7x3_3": (7, 1, 192, 192),
        "branch7x7x3_4": (3, 3, 192, 192),
    }


def kernels_e(n: int) -> dict[str, Kernel]:
    return {
        "branch1x1": (1, 1, n, 320),
        "branch3x3_1": (1, 1, n, 384),
        "branch3x3_2a": (1, 3, 384, 384),
        "branch3x3_2b": (3, 1, 384, 384),
        "branch3x3dbl_1": (1, 1, n, 448),
        "branch3x3dbl_2": (3, 3, 448, 384),
        "branch3x3dbl_3a": (1, 3, 384, 384),
        "branch3x3dbl_3b": (3, 1, 384, 384),
        "branch_pool": (1, 1, n, 192),
    }


BLOCKS: dict[str, tuple[Callable[..., Array], dict[str, Kernel]]] = {
    "Mixed_5b": (mixed_a, kernels_a(192, 32)),
    "Mixed_5c": (mixed_a, kernels_a(256, 64)),
    "Mixed_5d": (mixed_a, kernels_a(288, 64)),
    "Mixed_6a": (mixed_b, kernels_b(288)),
    "Mixed_6b": (mixed_c, kernels_c(768, 128)),
    "Mixed_6c": (mixed_c, kernels_c(768, 160)),
    "Mixed_6d": (mixed_c, kernels_c(768, 160)),
    "Mixed_6e": (mixed_c, kernels_c(768, 192)),
    "Mixed_7a": (mixed_d, kernels_d(768)),
    "Mixed_7b": (mixed_e_average, kernels_e(1280)),
    "Mixed_7c": (mixed_e_max, kernels_e(2048)),
}


def inception_shapes() -> PyTree[jax.ShapeDtypeStruct]:
    """The tree of weights that `inception_features` takes."""

    def float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def convolution(kernel: Kernel) -> dict[str, jax.ShapeDtypeStruct]:
        return {"kernel": float32(kernel), "bias": float32(kernel[-1:])}

    tree: dict[str, Any] = {name: convolution(kernel) for name, kernel in STEM.items()}
    for name, (_, kernels) in BLOCKS.items():
        tree[name] = {branch: convolution(kernel) for branch, kernel in kernels.items()}
    return tree | {"fc": {"kernel": float32((N_POOL, N_CLASSES))}}


# --- preparation of images ------------------------------------------------------------------------


def triangle(distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Weights of linear interpolation at these distances."""
    return np.maximum(0, 1 - np.abs(distance))


def cubic(distance: Float[np.ndarray, "..."], a: float = -0.5) -> Float[np.ndarray, "..."]:
    """Weights of cubic convolution at these distances (Keys 1981, eq. 4; a = −½ is its eq. 15)."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d < 1, near, np.where(d < 2, far, 0))


def resize(
    x: Float[Array, "b h w c"],
    height: int,
    width: int,
    *,
    kernel: Callable[..., Any] = triangle,
    antialias: bool = False,
    centred: bool = True,
) -> Float[Array, "b p q c"]:
    """Resize images.

    Args:
        antialias: when shrinking, widen the kernel so that it covers every pixel.
        centred: pixels are squares around their values; otherwise the first pixels' corners meet,
            as in TensorFlow 1.
    """
    rows, columns = (
        jnp.asarray(resize_matrix(n, n_out, kernel=kernel, antialias=antialias, centred=centred))
        for n, n_out in zip(x.shape[1:3], (height, width), strict=True)
    )
    return jnp.einsum("ph,bhwc,qw->bpqc", rows, x, columns, precision=EXACT)


def resize_matrix(
    n: int, n_out: int, *, kernel: Callable[..., Any], antialias: bool, centred: bool
) -> Float[np.ndarray, "p n"]:
    """The matrix that resizes a line of n pixels to n_out."""
    scale = n / n_out
    half = 0.5 if centred else 0.0
    position = (np.arange(n_out) + half) * scale - half
    stretch = max(scale, 1.0) if antialias else 1.0
    if not antialias:
        position = np.clip(position, 0, n - 1)
    weights = kernel((np.arange(n)[None] - position[:, None]) / stretch)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def prepare_like_pytorch_fid(image: UInt8[Array, "b h w c"]) -> Float[Array, "b 299 299 3"]:
    """Prepare images like pytorch-fid: linear, not antialiased."""
    return resize(to_rgb(image) / 255, SIDE, SIDE) * 2 - 1


def prepare_like_adm(image: UInt8[Array, "b h w c"]) -> Float[Array, "b 299 299 3"]:
    """Prepare images like the evaluator of Dhariwal & Nichol 2021 and everything that feeds the
    TensorFlow graph: linear, not antialiased, corners on corners.
    """
    return (resize(to_rgb(image), SIDE, SIDE, centred=False) - 128) / 128


def prepare_like_clean_fid(image: UInt8[Array, "b h w c"]) -> Float[Array, "b 299 299 3"]:
    """Prepare images like clean-fid: cubic, antialiased, not rounded (Parmar et al. 2022)."""
    x = resize(to_rgb(image), SIDE, SIDE, kernel=cubic, antialias=True)
    return (jnp.clip(x, 0, 255) - 128) / 128


def to_rgb(image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """Repeat a grey channel three times, and convert to float."""
    return jnp.broadcast_to(image, (*image.shape[:3], 3)).astype(jnp.float32)


PREPARATIONS = {
    "pytorch_fid": prepare_like_pytorch_fid,
    "adm": prepare_like_adm,
    "clean_fid": prepare_like_clean_fid,
}
