"""A rate that holds at another width: activations change alike, on any number of devices."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parallel_cases import LOSS, MESHES, assert_same_reports, batch_of, key, steps
from parallel_cases import TINY as NETWORK
from train_cases import TINY, assert_same

from model import model_graphdef
from runtime import parallel
from train import Trainer
from training import mup, optim
from training.muon import muon

BASE, WIDTH = 64, 512
RATE = optax.constant_schedule(3e-3)


def optimizer(config, base, *, by_muon=False, clip_norm=0.0):
    blocks = muon(RATE, weight_decay=0.0, factors=mup.step_factors(mup.muon_factor, config, base))
    factors = mup.step_factors(mup.adamw_factor, config, base)
    return optim.clipped_adamw(
        RATE,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        blocks=blocks if by_muon else None,
        factors=factors,
        clip_norm=clip_norm,
    )


def changes(config, base):
    """Root mean squares of how four steps change the tokens after the blocks and the prediction."""
    batch = jax.tree.map(jnp.asarray, batch_of(8, config))
    x, t = jax.random.normal(key, batch.image.shape), jnp.linspace(0.1, 0.9, 8)
    tx = optimizer(config, base)

    def activations(params):
        return nnx.merge(model_graphdef(config), params)(x, t, batch.label, taps=(config.depth,))

    @jax.jit
    def train(params):
        def step(carry, i):
            params, state = carry
            grads = jax.grad(
                lambda p: LOSS(
                    nnx.merge(model_graphdef(config), p), batch, jax.random.fold_in(key, i)
                )[0]
            )(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(4))
        moved = jax.tree.map(jnp.subtract, activations(trained), activations(params))
        return jax.tree.map(lambda d: jnp.sqrt(jnp.square(d).mean()), moved)

    prediction, (tokens,) = train(mup.init_params(config, base, key))
    return np.array([prediction, tokens])


def test_activations_change_alike_at_every_width():
    """As it is, the tokens of a network of eight times the width change 35 times as much, its
    prediction 7.6 times.
    """
    wide = mup.at_width(NETWORK, WIDTH)
    narrow = changes(NETWORK, BASE)
    np.testing.assert_allclose(changes(wide, BASE) / narrow, 1, atol=0.2)
    assert (changes(wide, 0) / narrow > [4, 20]).all()


@pytest.mark.slow
def test_two_steps_report_what_one_device_reports():
    """Muon's in the blocks, AdamW's around them, from weights that were rescaled in shards."""
    reports, params = {}, {}
    for name in ("1 device", "hybrid 2x4"):
        tx = optimizer(NETWORK, 32, by_muon=True, clip_norm=1.0)
        reports[name] = steps(NETWORK, MESHES[name], n=2, optimizer=tx)["reports"]
        initial = partial(mup.init_params, NETWORK, 32, key)
        params[name] = parallel.fetch_to_host(parallel.create_sharded(initial, MESHES[name]))
    assert_same_reports(reports["hybrid 2x4"], reports["1 device"])
    for ours, theirs in zip(*map(jax.tree.leaves, params.values()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_run_at_the_base_width_is_one_without_the_flag():
    plain, own = (Trainer(replace(TINY, mup=base)) for base in (None, 32))
    for trainer in (plain, own):
        for batch in trainer.batches(0, 2):
            trainer.train_step(batch)
    assert_same(own.state, plain.state)
