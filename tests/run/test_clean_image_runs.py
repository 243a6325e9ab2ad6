"""A narrow network learns a curve in many dimensions by predicting clean points, and not by
predicting velocities (Li & He 2025, JiT, figure 2).
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.batch import Batch
from methods.rectified_flow import RectifiedFlow

DIM, WIDTH, BATCH, STEPS = 128, 64, 256, 200
PLANE = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, 2)))[0].astype(np.float32)


def curve(n, seed=0):
    """Points of a spiral in a plane of the DIM dimensions."""
    angle = np.random.default_rng(seed).uniform(1, 9, n)
    spiral = np.stack([np.cos(angle), np.sin(angle)], -1) * angle[:, None] / 5
    return (spiral.astype(np.float32) @ PLANE.T).reshape(n, 1, 1, DIM)


def network(params):
    """A perceptron of x and t, narrower than the data's space."""

    def predict(x, t, label):
        times = jnp.stack([f(k * t) for k in (1, 2, 4) for f in (jnp.sin, jnp.cos)], -1)
        h = jnp.concatenate([x.reshape(len(x), DIM), times], -1)
        for w in params[:-1]:
            h = jax.nn.gelu(h @ w)
        return (h @ params[-1]).reshape(x.shape)

    predict.config = SimpleNamespace(n_classes=0)
    return predict


def train(method):
    sizes = [DIM + 6, WIDTH, WIDTH, WIDTH, DIM]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        jax.random.normal(k, (i, o)) * i**-0.5
        for k, i, o in zip(keys, sizes, sizes[1:], strict=False)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
    points = curve(STEPS * BATCH).reshape(STEPS, BATCH, 1, 1, DIM)

    def step(carry, i):
        params, state = carry
        batch = Batch(jnp.arange(BATCH), jnp.asarray(points)[i], jnp.zeros(BATCH, jnp.int32))

        def loss(params):
            key = jax.random.fold_in(jax.random.key(1), i)
            return method.loss(network(params), batch, key, to_input=lambda image, keys: image)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS))[0][0])
    return run((params, optimizer.init(params)))


@partial(jax.jit, static_argnames="method")
def sample(params, method):
    model = network(params)
    noise = jax.random.normal(jax.random.key(2), (500, 1, 1, DIM))
    steps = method.time_steps(50)
    return method.solve(
        lambda x, t: model(x, jnp.full(len(x), t), None),
        noise,
        steps,
        lambda step: noise,
        solver="euler",
    ).x


@pytest.mark.slow
def test_clean_points_are_learned_where_velocities_are_not():
    variance = np.square(curve(1000, 1)).sum((1, 2, 3)).mean()
    outside = {}
    for prediction in ("velocity", "x0"):
        method = RectifiedFlow("uniform", prediction=prediction)
        x = np.asarray(sample(train(method), method)).reshape(-1, DIM)
        in_plane = x @ PLANE
        outside[prediction] = np.square(x - in_plane @ PLANE.T).sum(1).mean()
    assert outside["velocity"] > 10 * variance
    assert outside["x0"] < 0.1 * variance
