"""Inputs and helpers shared by the tests of runtime.checkpoint."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from runtime import parallel
from runtime.checkpoint import Checkpoints

DDP, FSDP = parallel.make_mesh(1), parallel.make_mesh(8)
METADATA = {"config": {"model": "DiT-S/2", "depth": 3}, "data": {"n_rows": 17}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1, 0, 9)))


def make_arrays(seed=0):
    """Arrays of every kind that a run has, full of bits that only an exact copy keeps."""
    kernel, table = (
        jax.random.normal(jax.random.key(seed), (2, 64, 32)),
        jax.random.normal(jax.random.key(seed + 1), (33, 65)),
    )
    params = {"blocks": {"kernel": kernel}, "label": {"table": table}, "bias": jnp.zeros(3)}
    ema = jax.tree.map(lambda p: p / 3, params)
    moments = OPTIMIZER.update(ema, OPTIMIZER.init(params), params)[1]
    return {
        "params": params,
        "ema": ema,
        "optimizer": {"state": moments, "step": jnp.int32(seed)},
    }


def arrays_on(mesh, seed=0):
    return parallel.create_sharded(partial(make_arrays, seed), mesh)


def abstract_arrays(mesh):
    return parallel.abstract_state(make_arrays, mesh)


@pytest.fixture(scope="module")
def first():
    return arrays_on(DDP, 0)


def save(run_dir, *steps_and_arrays, keep=None, keep_every=None):
    with Checkpoints(run_dir, keep=keep, keep_every=keep_every) as checkpoints:
        for step, arrays in steps_and_arrays:
            checkpoints.save(step, arrays, METADATA)


def restore(run_dir, step=None, mesh=DDP):
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        return checkpoints.restore(checkpoints.resolve_step(step), abstract_arrays(mesh))


def truncate(path, share):
    os.truncate(path, int(share * path.stat().st_size))
