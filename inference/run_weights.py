"""The weights of a run, for sampling: of a checkpoint, or of an average made of snapshots.

A run that trains adapters (LoRA) has no others in its checkpoints. Its base is read from where it
was started from, recognised by a hash, and the adapters are added to it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from inference.snapshots import check_std, load_average
from model import ModelConfig, init_model_params
from networks.lora import merge_adapters, split_adapter
from pretrained import transformer, weight_files
from runtime import parallel, processes
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.run_folder import absolute_reference, find_run, read_config, with_step_of

MOVED = (
    "name the place of the former weights by --base of generate.py, evaluate.py, figures.py or "
    "export.py, or by --init_from of a resumed run"
)


class Weights(NamedTuple):
    """A choice among a run's weights: averaged or raw, and of a step.

    Args:
        ema_std: relative width of an average that is made of the run's snapshots.
        step: of a checkpoint or snapshot; None for the newest.
    """

    ema: bool = True
    ema_std: float | None = None
    step: int | None = None


def read_model_config(folder: Path, settings: Mapping[str, Any]) -> ModelConfig:
    """Make the config of a run's network.

    Args:
        settings: its `config.json`.

    Raises:
        UserError: that does not describe a network.
    """
    try:
        return ModelConfig.from_json(settings["model_config"])
    except TypeError as error:
        raise UserError(f"the config.json of '{folder}' is damaged: {error}") from None


def check_average(name: str, settings: Mapping[str, Any], std: float, *, ema: bool) -> None:
    """Raises UserError if a run cannot give an average of this relative width.

    Args:
        settings: its `config.json`.
        ema: whether averaged weights are wanted.
    """
    if not ema:
        raise UserError(f"--ema_std {std:g} names an average, and --noema wants none: drop one")
    check_std(std)
    if not settings.get("ema_std"):
        raise UserError(
            f"--ema_std {std:g}: '{name}' kept no averages to make it of, as a run of train.py "
            "--ema_std 0.05 0.1 does; leave it out"
        )


def load_params(
    run: Path, config: ModelConfig, mesh: parallel.Mesh, which: Weights
) -> tuple[int, Any]:
    """Load what a run has trained: all weights, or with LoRA the adapters and the parts that are
    trained in full.

    Returns the checkpoint's or snapshot's step, and the weights.

    Raises:
        UserError: there is no such checkpoint, or it cannot be read.
    """

    def init() -> Any:
        params = init_model_params(config, jax.random.key(0))
        return split_adapter(params, config.lora)[0] if config.lora else params

    shapes = parallel.abstract_state(init, mesh)
    if which.ema_std is not None:
        return load_average(run, shapes, mesh, which.ema_std, step=which.step)
    item = "ema" if which.ema else "params"
    like = {item: shapes}
    with Checkpoints(run, read_only=True) as checkpoints:
        if which.step is None:
            step, items, _ = checkpoints.restore_newest(like)
        else:
            step = checkpoints.resolve_step(which.step)
            items = checkpoints.restore(step, like)
    return step, items[item]


# --- LoRA -----------------------------------------------------------------------------------------


def load_merged(
    run: Path,
    config: ModelConfig,
    mesh: parallel.Mesh,
    which: Weights,
    *,
    settings: Mapping[str, Any],
    base: str | None = None,
) -> tuple[int, Any]:
    """Load a LoRA's adapters and add them to their base.

    Args:
        settings: the run's `config.json`.
        base: where the base is now, by default where it was when the run was started.

    Returns the adapters' step, and the weights of a network without adapters.

    Raises:
        UserError: the base is not there, or has other weights now; or there is no such checkpoint.
    """
    if config.lora is None:
        raise ValueError(f"'{run}' has no adapters")
    lora = config.lora
    recorded = settings["init_from"]
    reference = with_step_of(absolute_reference(base), recorded) if base else recorded
    frozen = load_base(reference, config, settings["base_hash"], name=str(run))
    step, adapter = load_params(run, config, mesh, which)

    def merge(frozen: Any, adapter: Any) -> Any:
        return merge_adapters(parallel.join_trees(frozen, adapter), lora)

    placed = parallel.shard_params(frozen, mesh)
    shardings = parallel.named_shardings(jax.eval_shape(merge, placed, adapter), mesh)
    return step, jax.jit(merge, out_shardings=shardings, donate_argnums=0)(placed, adapter)


def load_base(
    reference: str, config: ModelConfig, expected_hash: str, *, name: str
) -> dict[str, Any]:
    """Load the frozen weights of a LoRA into host memory.

    Args:
        reference: a run, `RUN@STEP`, or a published model.
        config: of the network with adapters.
        expected_hash: of the weights when the LoRA was started.
        name: of the LoRA, for messages.

    Raises:
        UserError: they are not there, or are other weights now.
    """
    try:
        frozen = take_base(read_all_weights(reference), config)
    except UserError as error:
        raise UserError(
            f"'{name}' holds adapters (LoRA), and their base {reference} cannot be read: {error}",
            how=MOVED,
        ) from None
    if hash_base(frozen) != expected_hash:
        raise UserError(
            f"'{name}' holds adapters (LoRA) of {reference}, whose weights have changed since (the "
            f"hash was {expected_hash[:12]})",
            how=MOVED,
        )
    return frozen


def read_all_weights(reference: str) -> dict[str, Any]:
    """Read the averaged weights of a run, or those of a published model, into host memory.

    Raises:
        UserError: there is no such model, or its checkpoint has adapters alone.
    """
    run = find_run(reference, "--base")
    if run is None:
        with processes.first_then_others():
            return transformer.load_transformer(reference, announce=False).params
    folder, step = run
    config = read_model_config(folder, read_config(folder))
    if config.lora:
        raise UserError(f"'{folder}' holds adapters itself; export it (export.py)")
    mesh = parallel.make_mesh(parallel.devices().count)  # sharded while loading
    return parallel.fetch_to_host(load_params(folder, config, mesh, Weights(step=step))[1])


def take_base(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Take the frozen weights of a LoRA out of all weights of another model.

    Raises:
        UserError: they are not of a network of this shape.
    """
    if config.lora is None:
        raise ValueError("the network has no adapters")
    shapes: Any = jax.eval_shape(partial(init_model_params, config), jax.random.key(0))
    wanted: dict[Any, Any] = dict(flatten_dict(split_adapter(shapes, config.lora)[1]))
    leaves: dict[Any, Any] = dict(flatten_dict(params))
    for path, like in wanted.items():
        if path not in leaves or leaves[path].shape != like.shape:
            raise UserError(f"{'.'.join(path)} is missing, or not of shape {like.shape}")
    return unflatten_dict({path: leaves[path] for path in wanted})


def hash_base(frozen: Mapping[str, Any]) -> str:
    """Return the sha256 of the frozen weights' names, shapes and numbers."""
    leaves: dict[Any, Any] = dict(flatten_dict(frozen))
    return weight_files.hash_tensors({".".join(path): np.asarray(x) for path, x in leaves.items()})
