"""Low-rank adapters: beside a frozen map x W, a map (α/r)·x A B is trained (Hu et al. 2022, LoRA).

In training A B never exists: there are two narrow products per map, and no gradient of W, which is
a third of the work of a step. A network with adapters has one tree of weights; `split_adapter` cuts
out what is trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from networks.layers import Linear
from networks.ops import matmul
from runtime.errors import UserError, unknown_name

TARGETS = ("attention", "mlp")
ADAPTER = "low_rank"  # the name of an adapter's weights in the tree
Path = tuple[str, ...]


@dataclass(frozen=True)
class LoraConfig:
    """The adapters of a network.

    Args:
        rank: r, columns of A and rows of B.
        alpha: α; the adapter's output is scaled by α/r.
        targets: which maps of the blocks have one: those of attention, of the MLP, or both.
        full_parts: parts of the network that are trained in full, such as a table of classes.

    Raises:
        UserError: a rank below 1, or a target that does not exist.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    full_parts: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"a LoRA of rank {self.rank}: it takes at least 1")
        for target in self.targets or ("",):
            if target not in TARGETS:
                raise unknown_name("lora_targets", target, TARGETS)

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank


class LowRank(nnx.Module):
    """(α/r)·x A B. A is uniform in ±1/√n_in, as PEFT starts it, and B zero.

    Args:
        kernel: shape of W, with a leading axis of depth if it is of stacked blocks.
        n_parts: maps that W holds side by side, as those of queries, keys and values. Each has an A
            and a B of its own.
    """

    def __init__(
        self, kernel: tuple[int, ...], n_parts: int, config: LoraConfig, *, dtype: str, rngs: Any
    ):
        *stack, n_in, n_out = kernel
        shape, bound = (*stack, n_in, n_parts * config.rank), n_in**-0.5
        self.a = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((*stack, config.rank, n_out)))
        self.n_parts, self.scale, self.dtype = n_parts, config.scale, dtype

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        narrow = jnp.split(matmul(x.astype(self.dtype), self.a[...]), self.n_parts, axis=-1)
        wide = jnp.split(self.b[...], self.n_parts, axis=-1)
        return self.scale * jnp.concatenate([*map(matmul, narrow, wide)], axis=-1)


def add_adapters(blocks: nnx.Module | None, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Give an adapter to each of the linear maps of blocks, stacked or not, that is a target."""
    for path, module in list(nnx.iter_graph(blocks)):
        if not isinstance(module, Linear) or path[-1] == "modulation":
            continue
        if ("mlp" if "mlp" in path else "attention") in config.targets:
            shape = module.kernel.shape
            n_parts = shape[-1] // shape[-2] if path[-1] == "linear" else 1
            module.low_rank = LowRank(shape, n_parts, config, dtype=module.dtype, rngs=rngs)


# --- the tree of weights --------------------------------------------------------------------------


def split_adapter(
    params: Mapping[str, Any], config: LoraConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a network's weights into those that are trained, and the frozen base."""
    flat: dict[Path, Any] = dict(flatten_dict(params))
    trained = {path for path in flat if ADAPTER in path or path[0] in config.full_parts}
    return (
        unflatten_dict({path: x for path, x in flat.items() if path in trained}),
        unflatten_dict({path: x for path, x in flat.items() if path not in trained}),
    )


def merge_adapters(params: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Add each adapter to its map: W + (α/r)·A B, in float32. The weights are then those of a
    network without adapters.
    """
    flat: dict[Path, Any] = dict(flatten_dict(params))
    plain = {path: x for path, x in flat.items() if ADAPTER not in path}
    for path in [path for path in flat if path[-2:] == (ADAPTER, "a")]:
        kernel = (*path[:-2], "kernel")
        product = multiply_adapter(flat[path], flat[*path[:-1], "b"])
        plain[kernel] = plain[kernel] + config.scale * product
    return unflatten_dict(plain)


def multiply_adapter(
    a: Float[Array, "*d i rn"], b: Float[Array, "*d r no"]
) -> Float[Array, "*d i no"]:
    """Compute A B of each of n maps that lie side by side."""
    n_parts = a.shape[-1] // b.shape[-2]
    parts = zip(jnp.split(a, n_parts, axis=-1), jnp.split(b, n_parts, axis=-1), strict=True)
    multiply: Callable[..., Any] = jnp.matmul
    highest = jax.lax.Precision.HIGHEST
    return jnp.concatenate([multiply(x, y, precision=highest) for x, y in parts], axis=-1)
