"""The numbers are the same on any number of devices and for any sharding of the weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parallel_cases import (
    CONFIGS,
    LOSS,
    MESHES,
    TINY,
    assert_same_reports,
    batch_of,
    distance,
    key,
    quickly_compiled,
    steps,
    weights,
)

from methods.ddpm import ddpm_loss
from model import BLOCKS, JOINT, model_graphdef
from runtime import parallel


@pytest.mark.slow
def test_twenty_clipped_steps_of_an_mmdit_report_what_one_device_reports():
    expected = steps(CONFIGS["MMDiT"], MESHES["1 device"])["reports"]
    for name in list(MESHES)[1:]:
        assert_same_reports(steps(CONFIGS["MMDiT"], MESHES[name])["reports"], expected)


@pytest.mark.slow
def test_steps_of_ddpm_report_what_one_device_reports():
    """With the variational bound, whose gradient is stopped in part."""
    loss = ddpm_loss(learned_sigma=True, min_snr_gamma=5.0, label_dropout=0.3)
    config = replace(TINY, out_channels=2)
    expected = steps(config, MESHES["1 device"], n=4, loss=loss)["reports"]
    for name in ("DDP 8", "hybrid 2x4"):
        assert_same_reports(steps(config, MESHES[name], n=4, loss=loss)["reports"], expected)


TEXT = {"n_classes": 0, "text_length": 6, "text_width": 10, "pooled_width": 8}


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", [{}, TEXT], ids=["class", "captions"])
@pytest.mark.parametrize("block", [*BLOCKS, JOINT])
def test_every_design_has_one_devices_gradient_on_all(block, conditioning):
    config = replace(TINY, block=block, qk_norm=True, **conditioning)
    batch = batch_of(16, config)

    def plain(params):
        batch_on_one = jax.tree.map(jnp.asarray, batch)
        return LOSS(nnx.merge(model_graphdef(config), params), batch_on_one, key)[0]

    loss, expected = quickly_compiled(jax.value_and_grad(plain))(weights(config))
    for mesh in (MESHES["DDP 8"], MESHES["hybrid 2x4"])[: 1 if block in BLOCKS else 2]:
        step = quickly_compiled(parallel.value_and_grad(LOSS, model_graphdef(config), mesh))
        params = jax.device_put(weights(config), parallel.named_shardings(weights(config), mesh))
        (got, _), grads = step(params, parallel.shard_batch(batch, mesh), key)
        np.testing.assert_allclose(got, loss, rtol=1e-5)
        dead = jax.tree.map(lambda g: not np.abs(g).max() > 0, expected)
        pairs = zip(*map(jax.tree.leaves, (dead, grads, expected)), strict=True)
        alive = [(g, e) for d, g, e in pairs if not d]
        assert distance(*map(list, zip(*alive, strict=True))) < 1e-4
