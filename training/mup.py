"""Width transfer: a learning rate that was found at a small width holds at a large one (the maximal
update parametrisation, μP: Yang et al. 2022, table 3; diffusion transformers: Zheng et al. 2025).

A network is compared with the same one at the base width, leaf by leaf. Its initial values and the
sizes of its steps are scaled so that what a layer adds to an activation, at first and by a step, is
as large as there. The network itself is unchanged, and so is everything that reads its weights.

The inputs of a kernel are its last axis but one. Tables and biases have a fixed one there, or none.
Output layers need no rule of their own, because they start from zero: the paper's smaller initial
variance makes no difference to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from model import ModelConfig, init_model_params
from runtime.errors import UserError
from runtime.flags import setting

MAX_RATIO = 64  # of the base width to the network's; the base is initialized too
Shape = tuple[int, ...]
Factors = Callable[[PyTree], PyTree]


@dataclass(frozen=True, kw_only=True)
class WidthTransferFlags:
    """Width transfer."""

    mup: int = setting(
        0,
        "width of another network of this kind, whose learning rate is to hold at this one's width "
        "(μP): steps and initial values are scaled by the ratio of the two, with init_from the "
        "steps alone; 0 scales nothing",
        at_least=0,
    )


def check_mup(base_width: int, *, width: int, n_heads: int) -> None:
    """Check that heads of the same size fit into the base width. They keep their size, so that
    attention's scale needs no change: a wider network has more of them.

    Raises:
        UserError: they do not.
    """
    if base_width > MAX_RATIO * width:
        raise UserError(
            f"--mup {base_width}: more than {MAX_RATIO} times the width of this network, {width}"
        )
    head = width // n_heads
    if base_width % head:
        raise UserError(
            f"--mup {base_width}: heads have {head} channels at every width; pass a multiple of "
            f"{head}"
        )


def at_width(config: ModelConfig, width: int) -> ModelConfig:
    """The same network at another width, with heads of the same size."""
    return replace(config, width=width, n_heads=width * config.n_heads // config.width)


@lru_cache
def leaf_shapes(config: ModelConfig) -> dict[Any, Shape]:
    """Shapes of a network's weights by their paths."""
    params = jax.eval_shape(lambda: init_model_params(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


# --- steps ----------------------------------------------------------------------------------------


def adamw_factor(shape: Shape, base: Shape) -> float:
    """Factor of AdamW's steps: the inputs at the base width over the inputs here.

    The numbers of such a step have a fixed size and the signs of the activations that it was made
    of: over n inputs they add up to n times that size.
    """
    return base[-2] / shape[-2] if len(shape) > 1 else 1.0


def muon_factor(shape: Shape, base: Shape) -> float:
    """Factor of Muon's steps, whose singular values are all √(larger side): it makes them grow as
    √(outputs / inputs), with which a change of the activations keeps its size (Yang, Simon &
    Bernstein 2023, condition 1). If both sides grow alike it is √(base width / width), for a kernel
    of several maps too.
    """

    def wanted_over_actual(shape: Shape) -> float:
        n_in, n_out = shape[-2:]
        return (n_out / n_in / max(n_in, n_out)) ** 0.5

    return wanted_over_actual(shape) / wanted_over_actual(base)


def step_factors(
    factor: Callable[[Shape, Shape], float], config: ModelConfig, base_width: int
) -> Factors | None:
    """Make the function from weights, or a part of their tree, to the factor of each leaf's steps.
    None if there is no base width, or if it is the network's own: every factor is 1 then.

    Args:
        factor: of a leaf, by its shape here and at the base width.
    """
    if base_width in (0, config.width):
        return None
    base = leaf_shapes(at_width(config, base_width))
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: factor(leaf.shape, base[path]), params
    )


# --- initial values -------------------------------------------------------------------------------


def init_params(config: ModelConfig, base_width: int, key: Key[Array, ""]) -> dict[str, Any]:
    """Initialize weights, each leaf with the root mean square of the same leaf at the base width,
    times √(inputs there / inputs here). Zeros stay.

    Measured, because layers choose the sizes of their initial values themselves: xavier's shrink
    with the outputs too, those of an embedder are fixed.
    """
    params = init_model_params(config, key)
    if base_width in (0, config.width):
        return params
    return jax.tree.map(rescale, params, init_model_params(at_width(config, base_width), key))


def rescale(leaf: Float[Array, "..."], base: Float[Array, "..."]) -> Float[Array, "..."]:
    """Give a leaf the size that follows from that of the base network's."""
    now, then = (jnp.sqrt(jnp.square(x).mean()) for x in (leaf, base))
    wanted = then * adamw_factor(leaf.shape, base.shape) ** 0.5
    return jnp.where(now > 0, leaf * (wanted / jnp.maximum(now, 1e-30)), leaf)
