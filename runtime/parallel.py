"""Devices: the mesh, where each array lives, and gradients over all of them. Nothing else knows of
devices.

The mesh has two axes, ("data", "fsdp"). A batch is split over both, parameters over "fsdp" only:
`fsdp=1` replicates them (DDP), `fsdp=8` on one host shards them (ZeRO-3), 4 hosts × 8 is the
hybrid. All three are the same code.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
STACKS = ("blocks", "dual_blocks")  # parts of a model whose weights have a leading axis of depth
MIN_SHARDED_SIZE = 1024  # elements; smaller arrays cost more to gather than to keep


def enable_compilation_cache() -> None:
    """Keep compiled programs for the next start, if the environment does not say where. For
    commands to call: importing must not change JAX.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dit-jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def make_mesh(fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, or those given, as ("data", "fsdp"). `fsdp` must divide their number."""
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp, fsdp)
    # Auto: model code stays free of shardings. (The default, Explicit, wants them on every reshape
    # and gather.)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def abstract_mesh(data: int, fsdp: int) -> AbstractMesh:
    """A mesh of devices that are not here: enough for `partition`."""
    return AbstractMesh((data, fsdp), AXES)


# --- where arrays live ----------------------------------------------------------------------------


def partition_specs(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shape rule: the `PartitionSpec` of every array, for parameters, their moments and their
    averages alike.

    The largest axis that the fsdp axis divides is split, never the leading (depth) axis of stacked
    blocks; small arrays and arrays without such an axis are replicated.
    """
    n = mesh.shape["fsdp"]

    def rule(path, x):
        first = int(any(getattr(key, "key", None) in STACKS for key in path))
        axes = [axis for axis in range(first, len(x.shape)) if x.shape[axis] % n == 0]
        if n == 1 or not axes or math.prod(x.shape[first:]) < MIN_SHARDED_SIZE:
            return P()
        split = max(axes, key=lambda axis: x.shape[axis])
        return P(*("fsdp" if axis == split else None for axis in range(len(x.shape))))

    return jax.tree_util.tree_map_with_path(rule, tree)


def named_shardings(tree: Any, mesh: Mesh) -> Any:
    """`partition` as shardings of this mesh, for `out_shardings` and for restoring a checkpoint."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))


def abstract_state(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, types and shardings of what `make` would create."""
    tree = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, named_shardings(tree, mesh)
    )


def create_sharded(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Run `make` with each device computing its own shards: the whole never exists anywhere."""
    return jax.jit(make, out_shardings=named_shardings(jax.eval_shape(make), mesh))()


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch → one global array per field, split over all devices. What is
    on devices already stays as it is.
    """
    sharding = NamedSharding(mesh, P(AXES))

    def leaf(x):
        if isinstance(x, jax.Array):
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(leaf, batch)


def prefetch_to_device(batches: Iterable[Any], mesh: Mesh, n: int = 2) -> Iterator[Any]:
    """`place` of every batch, n of them ahead of the one in use: copies hide behind a step.

    An error of `batches` comes out when those before it are used up.
    """
    ahead, iterator, error = deque(), iter(batches), None
    while error is None:
        try:
            ahead.append(shard_batch(next(iterator), mesh))
        except Exception as caught:
            error = caught
        while len(ahead) > (0 if error else n):
            yield ahead.popleft()
    if not isinstance(error, StopIteration):
        raise error


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has in full → global arrays, their rows split over all devices."""
    return _from_everywhere(tree, NamedSharding(mesh, P(AXES)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has in full → global arrays, whole on every device."""
    return _from_everywhere(tree, NamedSharding(mesh, P()))


def shard_params(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has in full → global arrays that live as `partition` says."""
    return jax.tree.map(_from_everywhere, tree, named_shardings(tree, mesh))


def _from_everywhere(tree: Any, sharding: NamedSharding) -> Any:
    def leaf(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(leaf, tree)


def constrain_rows(tree: Any, mesh: Mesh) -> Any:
    """Inside `jit`: let every device have its rows."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(AXES)))


def fetch_to_host(tree: Any) -> Any:
    """Global arrays → NumPy arrays, in full in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def any_across_processes(flag: bool, mesh: Mesh) -> Any:
    """Whether the flag is set in any process: a number that is there when the device has come to
    it. Every process must ask.
    """
    if jax.process_count() == 1:
        return flag
    return _any_flag(shard_batch(np.full(jax.local_device_count(), flag), mesh))


@jax.jit
def _any_flag(flags: Any) -> Any:
    return flags.any()


# --- gradients ------------------------------------------------------------------------------------


def gather_params(shards: Any, axes: tuple[int | None, ...]) -> Any:
    """Gather every leaf that has an axis. The transpose is the reduce-scatter of its gradient."""
    leaves, treedef = jax.tree.flatten(shards)
    full = [
        x if axis is None else jax.lax.all_gather(x, "fsdp", axis=x.ndim + axis, tiled=True)
        for x, axis in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(treedef, full)


def sharded_axes(specs: Any, ndims: Any) -> tuple[int | None, ...]:
    """Every leaf's sharded axis, counted from the end so that it survives the scan over depth."""
    return tuple(
        tuple(spec).index("fsdp") - ndim if "fsdp" in spec else None
        for spec, ndim in zip(_spec_leaves(specs), jax.tree.leaves(ndims), strict=True)
    )


def _spec_leaves(specs: Any) -> list[P]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))


# What the backward pass finds again: what layers `keep`. All else is cheaper to compute once more
# than to keep: norms, activations, casts, and gathered weights, which would add up to the model.
SAVE_NAMED_VALUES = jax.checkpoint_policies.save_any_names_but_these()


class GatheredOnCall(nnx.Module):
    """A part of a model whose sharded weights are gathered for the length of one call, and once
    more for its backward pass. With nothing to gather, it still keeps no copies of weights.
    """

    def __init__(self, part: nnx.Module, axes: tuple[int | None, ...]):
        self.part, self.axes = part, axes

    def __call__(self, *args):
        graphdef, shards = nnx.split(self.part)

        @partial(jax.checkpoint, policy=SAVE_NAMED_VALUES)
        def call(shards, *args):
            return nnx.merge(graphdef, gather_params(shards, self.axes))(*args)

        return call(shards, *args)


def merge_sharded_model(graphdef, params: Any, specs: Any) -> nnx.Module:
    """The model on this device's shards, each part of which gathers itself when it is called."""
    model = nnx.merge(graphdef, params)
    for name, weights in params.items():
        axes = sharded_axes(specs[name], jax.tree.map(lambda x: x.ndim, weights))
        setattr(model, name, GatheredOnCall(getattr(model, name), axes))
    return model


def value_and_grad(loss: Callable, graphdef, mesh: Mesh, *, accumulate_steps: int = 1) -> Callable:
    """`jax.value_and_grad` of `loss(model, batch, key)`, averaged over every device's rows of the
    batch.

    Returns `run(params, batch, key, scale=None) -> ((loss, metrics), grads)`: the first two
    replicated, gradients sharded as `params`. The loss is multiplied by `scale` before it is
    differentiated and the gradients are divided by it, so that small ones survive float16. Every
    device must hold the same number of rows.

    Args:
        accumulate_steps: parts that a device's rows are cut into. Their gradients are added up one
            after the other, which takes the memory of one part and gives the gradient of all.
    """

    def run(params, batch, key, scale=None):
        specs = partition_specs(params, mesh)
        share = (1 if scale is None else scale) / (mesh.size * accumulate_steps)

        def local(params, batch, key, share):
            def weighed(params, rows):
                value, metrics = loss(merge_sharded_model(graphdef, params, specs), rows, key)
                return value * share, (value, metrics)

            # Each device differentiates by weights of its own, and the sum over devices that hold
            # the same comes last: what was scattered is summed as shards, and parts only once.
            own = jax.tree.map(lambda x, spec: _mark_varying(x, _replicated_axes(spec)), params, specs)
            gradient = _accumulate(jax.grad(weighed, has_aux=True), accumulate_steps)
            grads, sums = gradient(own, batch)
            grads = jax.tree.map(lambda g, spec: jax.lax.psum(g, _replicated_axes(spec)), grads, specs)
            means = jax.tree.map(lambda x: x / accumulate_steps, sums)
            return jax.lax.pmean(means, AXES), grads

        means, grads = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, P(AXES), P(), P()),
            out_specs=((P(), P()), specs),
        )(params, batch, key, share)
        return means, grads if scale is None else jax.tree.map(lambda g: g / scale, grads)

    return run


def mean_over_devices(tree: Any) -> Any:
    """Inside a loss of `value_and_grad`: the mean over all devices' rows of what a loss is to know
    of the whole batch, such as a gradient of its own.
    """
    return jax.lax.pmean(tree, AXES)


def _replicated_axes(spec: P) -> tuple[str, ...]:
    """The axes along which devices hold the same."""
    return tuple(axis for axis in AXES if axis not in spec)


def _mark_varying(x: Any, axes: tuple[str, ...]) -> Any:
    """The same, as something that differs along these axes."""
    return jax.lax.pcast(x, axes, to="varying")


def _accumulate(function: Callable, n: int) -> Callable:
    """The sum of `function(params, rows)` over n equal parts of the rows, one after the other."""
    if n == 1:
        return function

    def run(params, batch):
        parts = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], parts))
        nothing = jax.tree.map(lambda s: _mark_varying(jnp.zeros(s.shape, s.dtype), AXES), shapes)

        def add(total, rows):
            return jax.tree.map(jnp.add, total, function(params, rows)), None

        return jax.lax.scan(add, nothing, parts)[0]

    return run
