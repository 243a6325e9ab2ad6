"""Muon: steps whose singular values are all near one (Jordan et al. 2024; Liu et al. 2025).

For the matrices of the blocks; everything else keeps AdamW. A matrix that holds several maps side
by side, as qkv does, is cut into them first: each gets singular values of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

Distribute = Callable[[Float[Array, "m r c"]], Float[Array, "m_or_more r c"]]
BETA = 0.95  # of the momentum
FUSED = ("qkv", "kv", "modulation")  # kernels that hold square maps side by side
# Odd polynomials of degree five, one after the other. Each is the best of its degree for where the
# one before leaves singular values that begin in 0.005 … 1, which is the best composition of four
# (Amsel et al. 2025, theorem 4.1): they end within 8.3 % of one.
POLYNOMIALS = (
    (8.29871, -24.43051, 18.09032),
    (3.9152, -2.92109, 0.55921),
    (3.17466, -2.3805, 0.49784),
    (2.18954, -1.56732, 0.40792),
)
# Beyond its range a polynomial grows so fast that a rounding error in bfloat16 would explode: each
# but the last is stretched by this much (the same paper, section 4.4).
MARGIN = 1.01


class MuonState(NamedTuple):
    """The momentum of each matrix, and the number of its updates."""

    count: Any
    momentum: Any


def orthogonalize(x: Float[Array, "*b m n"], dtype: Any = jnp.float32) -> Float[Array, "*b m n"]:
    """Bring the singular values of matrices near one, the singular vectors as they are.

    Args:
        dtype: of the products.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / (MARGIN * norm + 1e-8)

    # Sums in float32: a CPU would take twice as long to round them.
    def product(subscripts: str, a: Array, b: Array) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(subscripts, a, b, precision="float32", preferred_element_type=jnp.float32)

    for i, (a, b, c) in enumerate(POLYNOMIALS):
        margin = MARGIN if i + 1 < len(POLYNOMIALS) else 1.0
        gram = product("...ik,...jk->...ij", x, x)
        square = product("...ik,...jk->...ij", gram, gram)
        even = b / margin**3 * gram + c / margin**5 * square
        x = a / margin * x + product("...ik,...kj->...ij", even, x)
    return x.mT if is_tall else x


def split_maps(path: Sequence[Any], kernel: Float[Array, "*b i o"]) -> Float[Array, "m r c"]:
    """Split a stack of kernels into single maps, the smaller side first."""
    rows, columns = kernel.shape[-2:]
    if {part.key for part in path} & {*FUSED}:
        parts = kernel.reshape(-1, rows, columns // rows, rows)
        return parts.swapaxes(1, 2).reshape(-1, rows, rows)
    kernel = kernel.reshape(-1, rows, columns)
    return kernel.mT if rows > columns else kernel


def merge_maps(maps: Float[Array, "m r c"], shape: tuple[int, ...], path: Sequence[Any]) -> Array:
    """Undo `split_maps`."""
    rows, columns = shape[-2:]
    if {part.key for part in path} & {*FUSED}:
        return maps.reshape(-1, columns // rows, rows, rows).swapaxes(1, 2).reshape(shape)
    return (maps.mT if rows > columns else maps).reshape(shape)


def orthogonalize_all(tree: PyTree, dtype: Any, distribute: Distribute) -> Any:
    """Orthogonalize every map of a tree of kernels, those of one shape in one batch, and scale it
    so that its root mean square is that of AdamW's steps (Liu et al. 2025, eq. 4).
    """
    kernels, treedef = jax.tree_util.tree_flatten_with_path(tree)
    maps = [split_maps(path, kernel) for path, kernel in kernels]
    steps: dict[int, Array] = {}
    for shape in sorted({m.shape[1:] for m in maps}):
        batch = [i for i, m in enumerate(maps) if m.shape[1:] == shape]
        x = distribute(jnp.concatenate([maps[i] for i in batch]))
        x = 0.2 * max(shape) ** 0.5 * orthogonalize(x, dtype)
        ends = np.cumsum([len(maps[i]) for i in batch])
        steps |= dict(zip(batch, jnp.split(x, ends)))  # behind the last end there may be padding
    merged = [merge_maps(steps[i], kernel.shape, path) for i, (path, kernel) in enumerate(kernels)]
    return treedef.unflatten(merged)


def muon(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    dtype: Any = jnp.float32,
    distribute: Distribute = lambda maps: maps,
    factors: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon with Nesterov's momentum, for a tree of block kernels, whose `update(grads, state,
    params, finite=True)` changes nothing where `finite` is false.

    Args:
        weight_decay: decoupled, as AdamW's.
        dtype: of the products of the orthogonalization.
        distribute: spreads a batch of maps over devices, each of which orthogonalizes its share. It
            may add maps of zeros at the end.
        factors: maps a tree of kernels to a factor of the learning rate for each; weight decay has
            none, as in `optim.adamw`.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any
    ) -> Any:
        rate = jnp.asarray(schedule(state.count))
        momentum = jax.tree.map(
            lambda m, g: jnp.where(finite, BETA * m + g, m), state.momentum, updates
        )
        ahead = jax.tree.map(lambda m, g: g + BETA * m, momentum, updates)
        directions = orthogonalize_all(ahead, dtype, distribute)
        if factors:
            directions = jax.tree.map(jnp.multiply, directions, factors(params))
        steps = jax.tree.map(
            lambda x, p: jnp.where(finite, -rate * (x + weight_decay * p), -0.0),
            directions,
            params,
        )
        return steps, MuonState(state.count + jnp.int32(finite), momentum)

    return optax.GradientTransformationExtraArgs(init, update)
