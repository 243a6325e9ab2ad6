"""Devices: the mesh, where each array lives, and gradients over all of them. Nothing else knows of
devices.

The mesh has two axes, ("data", "fsdp"). A batch is split over both, parameters over "fsdp" only:
`fsdp=1` replicates them (DDP), `fsdp=8` on one host shards them (ZeRO-3), 4 hosts × 8 is the
hybrid. All three are the same code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
MIN_SHARDED_SIZE = 1024  # elements; smaller arrays cost more to gather than to keep


def make_mesh(fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, or those given, as ("data", "fsdp"). `fsdp` must divide their number."""
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp, fsdp)
    # Auto: model code stays free of shardings. (The default, Explicit, wants them on every reshape
    # and gather.)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


# --- where arrays live ----------------------------------------------------------------------------


def partition(tree: Any, mesh: Mesh) -> Any:
    """The shape rule: the `PartitionSpec` of every array, for parameters, their moments and their
    averages alike.

    The largest axis that the fsdp axis divides is split, never the leading (depth) axis of stacked
    blocks; small arrays and arrays without such an axis are replicated.
    """
    n = mesh.shape["fsdp"]

    def rule(path, x):
        first = int(any(getattr(key, "key", None) == "blocks" for key in path))
        axes = [axis for axis in range(first, len(x.shape)) if x.shape[axis] % n == 0]
        if n == 1 or not axes or math.prod(x.shape[first:]) < MIN_SHARDED_SIZE:
            return P()
        split = max(axes, key=lambda axis: x.shape[axis])
        return P(*("fsdp" if axis == split else None for axis in range(len(x.shape))))

    return jax.tree_util.tree_map_with_path(rule, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`partition` as shardings of this mesh, for `out_shardings` and for restoring a checkpoint."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition(tree, mesh))


def abstract(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, types and shardings of what `make` would create."""
    tree = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
    )


def create(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Run `make` with each device computing its own shards: the whole never exists anywhere."""
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def place(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch → one global array per field, split over all devices."""
    sharding = NamedSharding(mesh, P(AXES))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


# --- gradients ------------------------------------------------------------------------------------


def unshard(shards: Any, axes: tuple[int | None, ...]) -> Any:
    """Gather every leaf that has an axis. The transpose is the reduce-scatter of its gradient."""
    leaves, treedef = jax.tree.flatten(shards)
    full = [
        x if axis is None else jax.lax.all_gather(x, "fsdp", axis=x.ndim + axis, tiled=True)
        for x, axis in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(treedef, full)


def sharded_axes(specs: Any, ndims: Any) -> tuple[int | None, ...]:
    """Every leaf's sharded axis, counted from the end so that it survives the scan over depth."""
    specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    return tuple(
        tuple(spec).index("fsdp") - ndim if "fsdp" in spec else None
        for spec, ndim in zip(specs, jax.tree.leaves(ndims), strict=True)
    )


class Gathered(nnx.Module):
    """A block whose sharded weights are gathered for the length of one call."""

    def __init__(self, block: nnx.Module, axes: tuple[int | None, ...]):
        self.block, self.axes = block, axes

    def __call__(self, *args):
        graphdef, shards = nnx.split(self.block)
        return nnx.merge(graphdef, unshard(shards, self.axes))(*args)


def live_model(graphdef, params: Any, specs: Any) -> nnx.Module:
    """The model on this device's shards; `blocks` gather themselves, the rest is gathered here."""
    axes = sharded_axes(specs, jax.tree.map(lambda x: x.ndim, params))
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    outside = tuple(None if n == "blocks" else axis for n, axis in zip(names, axes, strict=True))
    model = nnx.merge(graphdef, unshard(params, outside))
    inside = tuple(axis for n, axis in zip(names, axes, strict=True) if n == "blocks")
    model.blocks = Gathered(model.blocks, inside)
    return model


def value_and_grad(loss: Callable, graphdef, mesh: Mesh) -> Callable:
    """`jax.value_and_grad` of `loss(model, batch, key)`, averaged over every device's rows of the
    batch.

    Returns `run(params, batch, key) -> ((loss, metrics), grads)`: the first two replicated,
    gradients sharded as `params`. Every device must hold the same number of rows.
    """

    def run(params, batch, key):
        specs = partition(params, mesh)

        def local(params, batch, key):
            def mean(params):
                # The mean is taken inside the differentiated function: gradients come out summed
                # over devices, and a mean taken afterwards would not divide them again (a norm
                # n_devices times too large).
                return jax.lax.pmean(loss(live_model(graphdef, params, specs), batch, key), AXES)

            return jax.value_and_grad(mean, has_aux=True)(params)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, P(AXES), P()),
            out_specs=((P(), P()), specs),
        )(params, batch, key)

    return run
