"""Training low-rank adapters of another model's weights, which stay frozen (Hu et al. 2022, LoRA).

The state of the run, and so its checkpoints, averages and moments, hold the adapters, and the parts
of the network that are trained in full: a table of classes, and whatever the base does not have.
The mathematics is `networks.lora`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from datasets_config import DatasetConfig
from inference.run_weights import hash_base, take_base
from model import ModelConfig, init_model_params
from networks.lora import split_adapter
from runtime import parallel
from runtime.errors import UserError
from training.optim import BLOCK_PARTS
from training.warm_start import StartingWeights, fit_weights


def parts_to_train(
    weights: StartingWeights | None, network: ModelConfig, dataset: DatasetConfig
) -> tuple[str, ...]:
    """Name the parts of a network that are trained in full: the embedding of its classes, and all
    that cannot be the base's.

    Args:
        weights: of the base; None if it has all parts.

    Raises:
        UserError: a field that must match does not.
    """
    shapes: Any = jax.eval_shape(lambda: init_model_params(network, jax.random.key(0)))
    parts = {"label"} if network.n_classes else set[str]()
    if weights:
        if (weights.settings.get("model_config") or {}).get("lora"):
            raise UserError(
                f"--init_from {weights.name}: it holds adapters itself; adapt an export of it "
                "(export.py), or their base"
            )

        def zeros(part: str) -> Any:
            return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes[part])

        fitted, _ = fit_weights(weights, network, dataset, zeros)
        parts |= {name for name, part in fitted.items() if part is not weights.params.get(name)}
    return tuple(sorted(parts))


@dataclass(frozen=True)
class Base:
    """The frozen weights of a run with adapters.

    Args:
        params: in host memory; the blocks' matrices in the precision that they are multiplied in.
        hash: of the weights in float32.
    """

    params: dict[str, Any]
    hash: str


def open_base(weights: StartingWeights, network: ModelConfig, recorded: str | None) -> Base:
    """Take the frozen weights out of the base's.

    Args:
        recorded: their hash when the run was started; None for a new run.

    Raises:
        UserError: they are other weights now.
    """
    frozen = take_base(weights.params, network)
    base_hash = hash_base(frozen)
    if recorded not in (None, base_hash):
        raise UserError(
            f"cannot resume: the weights of {weights.name} have changed since the run was started "
            f"from them (the hash was {recorded[:12]}); give the place of the former ones by "
            "--init_from"
        )
    return Base(in_precision_of_products(frozen, network), base_hash)


def in_precision_of_products(frozen: Mapping[str, Any], network: ModelConfig) -> dict[str, Any]:
    """Round the blocks' frozen matrices to the precision that they are multiplied in, which changes
    no product, but of the copies of `Transformer.frozen`. (Eight bits are taken of float32.)
    """
    if network.fp8 or network.dtype == "float32":
        return dict(frozen)
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[network.dtype]
    flat: dict[Any, Any] = dict(flatten_dict(frozen))
    return unflatten_dict(
        {
            path: x.astype(dtype) if path[0] in BLOCK_PARTS and path[-1] == "kernel" else x
            for path, x in flat.items()
        }
    )


def random_base(network: ModelConfig, mesh: parallel.Mesh) -> Any:
    """Make random frozen weights on the devices, to profile a network without its base."""

    def make() -> Any:
        params = init_model_params(network, jax.random.key(0))
        base = split_adapter(params, network.lora)[1] if network.lora else params
        return in_precision_of_products(base, network)

    return parallel.create_sharded(make, mesh)


def with_fitted_parts(own: Mapping[str, Any], fitted: Mapping[str, Any], network: ModelConfig):
    """Replace the parts that are trained in full by those of the base's weights, as they were
    fitted to this network.
    """
    parts = network.lora.full_parts if network.lora else ()
    return {**own, **{name: jax.tree.map(jnp.asarray, fitted[name]) for name in parts}}
