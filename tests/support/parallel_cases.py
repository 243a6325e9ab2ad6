"""Inputs and helpers shared by the tests of runtime.parallel."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.batch import Batch, EncodedCaption
from methods.rectified_flow import RectifiedFlow
from model import JOINT, ModelConfig, init_model_params, model_graphdef
from runtime import parallel
from training import optim

key = jax.random.key(0)
DEVICES = jax.devices()
MESHES = {
    "1 device": parallel.make_mesh(devices=DEVICES[:1]),
    "DDP 8": parallel.make_mesh(1),
    "FSDP 8": parallel.make_mesh(8),
    "hybrid 2x4": parallel.make_mesh(4),
}
TINY = ModelConfig(
    width=64,
    depth=2,
    n_heads=2,
    patch_size=2,
    image_size=8,
    channels=1,
    out_channels=1,
    n_classes=5,
)
CONFIGS = {"DiT": TINY, "MMDiT": replace(TINY, block=JOINT, qk_norm=True)}
OPTIMIZER = optim.clipped_adamw(
    optax.constant_schedule(1e-3), beta1=0.9, beta2=0.999, weight_decay=0.1, clip_norm=0.1
)
# Four meshes are compiled: that takes longer than anything that is run.
quickly_compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LOSS = partial(RectifiedFlow().loss, label_dropout=0.3)


def weights(config):
    """Random weights, far from the zeros of init, so that every one has a gradient."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_model_params(config, key))
    return jax.tree.map(lambda p: np.float32(rng.normal(scale=0.1, size=p.shape)), shapes)


def batch_of(n, config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, config.image_size, config.image_size, config.channels)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    if config.text_width:
        mask = np.arange(config.text_length) < rng.integers(0, config.text_length, (n, 1))
        tokens = rng.normal(size=(*mask.shape, config.text_width)).astype(np.float16)
        pooled = rng.normal(size=(n, config.pooled_width)).astype(np.float16)
        label = EncodedCaption(tokens, mask, pooled)
    else:
        label = rng.integers(0, config.n_classes, n).astype(np.int32)
    return Batch(np.arange(n, dtype=np.int32), image, label)


def tapped_loss(model, batch, key):
    """A loss of the prediction and of two taps, as of deep supervision."""
    x, t = batch.image.astype(jnp.float32) / 255, batch.row / 16
    y, hidden = model(x, t, batch.label, taps=(2, 4))
    return jnp.square(y).mean() + sum(jnp.square(h.astype(jnp.float32)).mean() for h in hidden), {}


# --- the same numbers -----------------------------------------------------------------------------


def steps(config, mesh, n=20, loss: Any = LOSS, optimizer: Any = OPTIMIZER):
    """Train n steps: each step's loss, metrics and norms, the first gradient, the final weights."""
    value_and_grad = parallel.value_and_grad(loss, model_graphdef(config), mesh)

    @quickly_compiled
    def step(params, state, batch, key):
        (loss, metrics), grads = value_and_grad(params, batch, key)
        updates, state = optimizer.update(grads, state, params)
        norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        return optax.apply_updates(params, updates), state, metrics | norms | {"loss": loss}, grads

    params = parallel.create_sharded(lambda: jax.tree.map(jnp.asarray, weights(config)), mesh)
    state = parallel.create_sharded(lambda: optimizer.init(weights(config)), mesh)
    reports, gradients = [], []
    for i in range(n):
        batch = parallel.shard_rows(batch_of(16, config, seed=i), mesh)
        params, state, report, grads = step(params, state, batch, jax.random.fold_in(key, i))
        reports.append(parallel.fetch_to_host(report))
        gradients.append(grads)
    reports = jax.tree.map(lambda *x: np.stack(x), *reports)
    return {"reports": reports, "grads": gradients[0], "params": params}


def assert_same_reports(got, expected):
    """The gradient norm too: a mean in the wrong place makes it n_devices times too large."""
    assert (expected["grad_norm"] > 0.1).all()  # so that clipping acts
    for metric in ("loss", "grad_norm", "update_norm", "binned_loss", "bin_share"):
        np.testing.assert_allclose(got[metric], expected[metric], rtol=1e-5, err_msg=metric)


def distance(a, b):
    """Maximum difference of two trees, relative to the maximum of each array."""

    def array_distance(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.abs(a - b).max() / np.abs(b).max()

    return max(jax.tree.leaves(jax.tree.map(array_distance, a, b)))


WIDE = ModelConfig(
    width=256,
    depth=6,
    n_heads=4,
    patch_size=2,
    image_size=8,
    channels=1,
    out_channels=1,
    n_classes=10,
    remat=True,
)


@pytest.fixture(scope="module")
def results():
    return {name: steps(CONFIGS["DiT"], mesh) for name, mesh in MESHES.items()}
