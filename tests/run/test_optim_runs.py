"""Learning-rate schedules, AdamW against optax, clipping, EMA and loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_cases import key

from training import optim


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_ten_updates_are_those_of_optax(clip_norm):
    """With non-finite steps in between, which change nothing."""
    params = {"kernel": jax.random.normal(key, (5, 3)), "bias": jnp.ones(3)}
    schedule = optim.learning_rate_schedule("cosine", 0.1, warmup_steps=3, n_steps=10)
    settings = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "clip_norm": clip_norm}
    ours = optim.clipped_adamw(schedule, **settings)
    mask = {"kernel": True, "bias": False}
    theirs = optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=0.1, mask=mask)
    if clip_norm:
        theirs = optax.chain(optax.clip_by_global_norm(clip_norm), theirs)
    p, state, q, their_state = params, ours.init(params), params, theirs.init(params)
    for i in range(10):
        k = jax.random.fold_in(key, i)
        grads = {name: jax.random.normal(k, x.shape) for name, x in params.items()}
        updates, state = ours.update(grads, state, p, finite=jnp.asarray(True))
        p = optax.apply_updates(p, updates)
        updates, their_state = theirs.update(grads, their_state, q)
        q = optax.apply_updates(q, updates)
        bad = jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, after = ours.update(bad, state, p, finite=jnp.asarray(False))
        for new, old in zip(
            jax.tree.leaves((optax.apply_updates(p, updates), after)),
            jax.tree.leaves((p, state)),
            strict=True,
        ):
            np.testing.assert_array_equal(new, old)
    for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
