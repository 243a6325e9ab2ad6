"""Devices: the mesh, where each array lives, and gradients over all devices.

No other module knows meshes or shardings. The mesh has two axes, ("data", "fsdp"). A batch is split
over both, parameters over "fsdp" only: `fsdp=1` replicates them (DDP), `fsdp=8` on one host shards
them (ZeRO-3), 4 hosts × 8 is the hybrid. All three run the same code.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")
R = TypeVar("R")

AXES = ("data", "fsdp")
STACKS = ("blocks", "dual_blocks")  # parts of a model whose weights have a leading axis of depth
MIN_SHARDED_SIZE = 1024  # elements; smaller arrays cost more to gather than to replicate


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk for the next start, unless the environment names a cache.

    Only commands call this: importing must not change JAX.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dit-jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@dataclass(frozen=True)
class Devices:
    """The devices of all processes.

    Args:
        count: how many there are.
        platform: cpu, gpu or tpu.
        kind: JAX's name of one, such as "NVIDIA H200".
        has_fp8: they multiply numbers of eight bits.
    """

    count: int
    platform: str
    kind: str
    has_fp8: bool


def devices() -> Devices:
    """Describe the devices. Starts JAX's backend."""
    device = jax.devices()[0]
    # NVIDIA's from Ada on. Of other makers none was tried.
    has_fp8 = "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.9
    return Devices(jax.device_count(), jax.default_backend(), device.device_kind, has_fp8)


def make_mesh(fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange all devices, or those given, as ("data", "fsdp"). `fsdp` must divide their number."""
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp, fsdp)
    # Auto: model code stays free of shardings. (The default, Explicit, wants them on every reshape
    # and gather.)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def abstract_mesh(data: int, fsdp: int) -> AbstractMesh:
    """Make a mesh without devices, for `partition_specs` of a machine that is not here."""
    return AbstractMesh((data, fsdp), AXES)


# --- where arrays live ----------------------------------------------------------------------------


def partition_specs(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Apply the shape rule: the `PartitionSpec` of every array.

    The same rule holds for parameters, their moments and their averages. The largest axis that the
    fsdp axis divides is split, never the leading (depth) axis of stacked blocks; small arrays and
    arrays without such an axis are replicated.
    """
    n = mesh.shape["fsdp"]

    def rule(path: Any, x: Any) -> Any:
        first = int(any(getattr(key, "key", None) in STACKS for key in path))
        axes = [axis for axis in range(first, len(x.shape)) if x.shape[axis] % n == 0]
        if n == 1 or not axes or math.prod(x.shape[first:]) < MIN_SHARDED_SIZE:
            return P()
        split = max(axes, key=lambda axis: x.shape[axis])
        return P(*("fsdp" if axis == split else None for axis in range(len(x.shape))))

    return jax.tree_util.tree_map_with_path(rule, tree)


def named_shardings(tree: Any, mesh: Mesh) -> Any:
    """`partition_specs` as shardings of this mesh, for `out_shardings` and for restoring."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))


def abstract_state(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, types and shardings of the arrays that `make` would create."""
    tree = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        named_shardings(tree, mesh),
    )


def create_sharded(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Run `make` with each device computing its own shards: the whole never exists anywhere."""
    return jax.jit(make, out_shardings=named_shardings(jax.eval_shape(make), mesh))()


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch → one global array per field, split over all devices.

    Fields that are on devices already are returned as they are.
    """
    sharding = NamedSharding(mesh, P(AXES))

    def shard_field(x: Any) -> Any:
        if isinstance(x, jax.Array):
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(shard_field, batch)


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has in full → global arrays, their rows split over all devices."""
    return _from_full_copies(tree, NamedSharding(mesh, P(AXES)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has in full → global arrays, whole on every device."""
    return _from_full_copies(tree, NamedSharding(mesh, P()))


def shard_params(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has in full → global arrays split as `partition_specs` says."""
    return jax.tree.map(_from_full_copies, tree, named_shardings(tree, mesh))


def _from_full_copies(tree: Any, sharding: NamedSharding) -> Any:
    def make_global(x: Any) -> Any:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(make_global, tree)


def constrain_rows(tree: Any, mesh: Mesh) -> Any:
    """Inside `jit`: split the rows of every array over all devices."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(AXES)))


def spread_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Inside `jit`: split rows over all devices, after zeros are added until they can be."""
    n_missing = -len(x) % mesh.size
    return constrain_rows(jnp.pad(x, [(0, n_missing)] + [(0, 0)] * (x.ndim - 1)), mesh)


def fetch_to_host(tree: Any) -> Any:
    """Global arrays → NumPy arrays, in full in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def is_finite(tree: Any) -> bool:
    """Return True if no array of a tree holds NaN or infinity."""
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def any_across_processes(flag: bool, mesh: Mesh) -> Any:
    """Combine a flag of every process with "or". Every process must call this.

    With several processes the result is an array, ready when the devices have computed it.
    """
    if jax.process_count() == 1:
        return flag
    return _any_flag(shard_batch(np.full(jax.local_device_count(), flag), mesh))


@jax.jit
def _any_flag(flags: Any) -> Any:
    return flags.any()


# --- device work in flight ------------------------------------------------------------------------


def keep_in_flight(dispatched: Iterable[T], *, n: int, read: Callable[[T], R]) -> Iterator[R]:
    """Yield `read(item)` of every item, in order, each after the n items behind it were dispatched.

    JAX dispatches asynchronously: reading a result waits for the devices, which idle meanwhile
    unless more work is queued behind it.

    Args:
        dispatched: starts the work of an item when asked for it, such as `map(jitted, batches)`.
        n: items in flight while one is read.

    Raises:
        Exception: what `dispatched` raised, after the items before it.
    """
    pending: deque[T] = deque()
    iterator = iter(dispatched)
    error: Exception | None = None
    while error is None:
        try:
            pending.append(next(iterator))
        except Exception as caught:
            error = caught
        while len(pending) > (0 if error else n):
            yield read(pending.popleft())
    if not isinstance(error, StopIteration):
        raise error


def prefetch_to_device(batches: Iterable[Any], mesh: Mesh, n: int = 2) -> Iterator[Any]:
    """`shard_batch` of every batch, n batches before its use: copies overlap with training steps.

    Raises:
        Exception: what `batches` raised, after the batches before it.
    """
    copies = (shard_batch(batch, mesh) for batch in batches)
    return keep_in_flight(copies, n=n, read=lambda copy: copy)


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
    """Sharded axis of every leaf, counted from the end so that it survives the scan over depth."""
    return tuple(
        tuple(spec).index("fsdp") - ndim if "fsdp" in spec else None
        for spec, ndim in zip(_spec_leaves(specs), jax.tree.leaves(ndims), strict=True)
    )


def _spec_leaves(specs: Any) -> list[P]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))


# The backward pass finds only what layers name with `keep`. All else is cheaper to recompute than
# to store: norms, activations, casts, and gathered weights, which would add up to the whole model.
SAVE_NAMED_VALUES = jax.checkpoint_policies.save_any_names_but_these()


class GatheredOnCall(nnx.Module):
    """A part of a model that gathers its sharded weights for each call and each backward pass.

    With nothing to gather, it still stores no copies of weights for the backward pass.
    """

    def __init__(self, part: nnx.Module, axes: tuple[int | None, ...]):
        self.part = part
        self.axes = axes

    def __call__(self, *args: Any) -> Any:
        graphdef, shards = nnx.split(self.part)

        @partial(jax.checkpoint, policy=SAVE_NAMED_VALUES)
        def call(shards: Any, *args: Any) -> Any:
            return nnx.merge(graphdef, gather_params(shards, self.axes))(*args)

        return call(shards, *args)


def merge_sharded_model(graphdef: Any, params: Any, specs: Any) -> nnx.Module:
    """`nnx.merge` of this device's shards, with every part of the model a `GatheredOnCall`. Weights
    of its own, which belong to no part, are gathered at once.
    """
    model = nnx.merge(graphdef, params)
    for name, weights in params.items():
        axes = sharded_axes(specs[name], jax.tree.map(lambda x: x.ndim, weights))
        part = getattr(model, name)
        if isinstance(part, nnx.Variable):
            setattr(model, name, nnx.Param(gather_params(weights, axes)))
        else:
            setattr(model, name, GatheredOnCall(part, axes))
    return model


def join_trees(tree: Any, other: Any) -> Any:
    """Join two trees of dicts that have no leaf in common."""
    if not (isinstance(tree, dict) and isinstance(other, dict)):
        raise ValueError("both trees have the same leaf")
    joined = {**tree, **other}
    return joined | {name: join_trees(tree[name], other[name]) for name in tree.keys() & other}


def value_and_grad(
    loss: Callable[..., Any],
    graphdef: Any,
    mesh: Mesh,
    *,
    frozen_graphdef: Any = None,
    accumulate_steps: int = 1,
) -> Callable[..., Any]:
    """`jax.value_and_grad` of `loss(model, batch, key)`, averaged over the rows of all devices.

    Returns `run(params, batch, key, scale=None, *, base=None, frozen=None) -> ((loss, metrics),
    grads)`: the first two replicated, gradients sharded as `params`. The loss is multiplied by
    `scale` before it is differentiated and the gradients are divided by it, so that small ones
    survive float16. Every device must hold the same number of rows.

    `base` are weights of the model that are not among `params` and get no gradient, sharded as
    `partition_specs` says.

    Args:
        frozen_graphdef: of a second model, such as a teacher, that the loss takes and that is not
            trained: `loss(model, batch, key, frozen_model)`. `run` then needs its weights `frozen`,
            sharded as `partition_specs` says, as `params` are. Gradients pass through its inputs.
        accumulate_steps: microbatches that a device's rows are cut into. Their gradients are summed
            one after the other, which takes the memory of one and gives the gradient of all.
    """

    def run(
        params: Any,
        batch: Any,
        key: Any,
        scale: Any = None,
        *,
        base: Any = None,
        frozen: Any = None,
    ) -> Any:
        if (frozen is None) != (frozen_graphdef is None):
            raise ValueError("`frozen` and `frozen_graphdef` belong together: one of them is None")
        trees = (params, {} if base is None else base, {} if frozen is None else frozen)
        specs, base_specs, frozen_specs = (partition_specs(tree, mesh) for tree in trees)
        all_specs = join_trees(specs, base_specs)
        share = (1 if scale is None else scale) / (mesh.size * accumulate_steps)

        def local(params: Any, base: Any, frozen: Any, batch: Any, key: Any, share: Any) -> Any:
            base = _mark_own(base, base_specs)
            frozen_model: list[nnx.Module] = []
            if frozen_graphdef is not None:
                frozen = _mark_own(frozen, frozen_specs)
                frozen_model = [merge_sharded_model(frozen_graphdef, frozen, frozen_specs)]

            def scaled_loss(params: Any, rows: Any) -> Any:
                model = merge_sharded_model(graphdef, join_trees(params, base), all_specs)
                value, metrics = loss(model, rows, key, *frozen_model)
                return value * share, (value, metrics)

            # Each device differentiates by weights of its own, and the sum over devices that hold
            # the same weights comes last: scattered gradients are summed as shards, and
            # microbatches only once.
            gradient = _accumulate(jax.grad(scaled_loss, has_aux=True), accumulate_steps)
            grads, sums = gradient(_mark_own(params, specs), batch)
            grads = _sum_over_copies(grads, specs)
            means = jax.tree.map(lambda x: x / accumulate_steps, sums)
            return jax.lax.pmean(means, AXES), grads

        means, grads = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, base_specs, frozen_specs, P(AXES), P(), P()),
            out_specs=((P(), P()), specs),
        )(*trees, batch, key, share)
        return means, grads if scale is None else jax.tree.map(lambda g: g / scale, grads)

    return run


def mean_over_devices(tree: Any) -> Any:
    """Inside a loss of `value_and_grad`: average over all devices.

    For a value that the loss needs of the whole batch, such as a gradient of its own.
    """
    return jax.lax.pmean(tree, AXES)


def _replicated_axes(spec: P) -> tuple[str, ...]:
    """Mesh axes along which devices hold the same values."""
    return tuple(axis for axis in AXES if axis not in spec)


def _mark_own(tree: Any, specs: Any) -> Any:
    """Type a device's shards as different on all devices, those that are the same too."""
    return jax.tree.map(lambda x, spec: _mark_varying(x, _replicated_axes(spec)), tree, specs)


def _sum_over_copies(grads: Any, specs: Any) -> Any:
    """Sum a device's gradients over the devices that hold the same weights."""
    return jax.tree.map(lambda g, spec: jax.lax.psum(g, _replicated_axes(spec)), grads, specs)


def _mark_varying(x: Any, axes: tuple[str, ...]) -> Any:
    """Type x as different on the devices along these axes; its values stay."""
    return jax.lax.pcast(x, axes, to="varying")


def _accumulate(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    """Sum `function(params, rows)` over n equal parts of the rows, one after the other."""
    if n == 1:
        return function

    def run(params: Any, batch: Any) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: _mark_varying(jnp.zeros(s.shape, s.dtype), AXES), shapes)

        def add(total: Any, rows: Any) -> Any:
            return jax.tree.map(jnp.add, total, function(params, rows)), None

        return jax.lax.scan(add, zeros, parts)[0]

    return run
