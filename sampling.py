"""Ordinary differential equation solvers from noise (t = 1) to data (t = 0).

A solver sees only `velocity(x, t)`, with one time for the whole batch. Models, guidance scales and
labels are bound by the caller. Solvers are traced: call them inside `jax.jit`, and the whole loop
is one compiled program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Velocity = Callable[[Float[Array, "b *s"], Float[Array, ""]], Float[Array, "b *s"]]


class Solution(NamedTuple):
    """Where a solver arrived and, if asked for, all states: noise first, result last."""

    x: Float[Array, "b *s"]
    trajectory: Float[Array, "times b *s"] | None


def time_grid(n_steps: int, *, shift: float = 1.0) -> Float[Array, "{n_steps}+1"]:
    """n + 1 times from 1 to 0; `shift` > 1 puts more near the noise, as in `shift_time`."""
    t = jnp.linspace(1.0, 0.0, n_steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def initial_noise(
    seed: Int[Array, ""] | int, index: Int[Array, "b"], shape: tuple[int, ...]
) -> Float[Array, "b *s"]:
    """Standard normal noise: a function of the seed and a picture's index, not of its batch."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)


def integrate(step, noise: Float[Array, "b *s"], times: Float[Array, "times"], trajectory: bool):
    """Apply `step(x, t, s)`, which carries x from time t to time s, along the grid."""

    def body(x, interval):
        x = step(x, *interval)
        return x, x if trajectory else None

    x, states = jax.lax.scan(body, noise, (times[:-1], times[1:]))
    return Solution(x, None if states is None else jnp.concatenate([noise[None], states]))


def euler(velocity: Velocity, noise, times, *, trajectory: bool = False) -> Solution:
    """Euler's method: first order, one velocity a step."""

    def step(x, t, s):
        return x + (s - t) * velocity(x, t)

    return integrate(step, noise, times, trajectory)


def heun(velocity: Velocity, noise, times, *, trajectory: bool = False) -> Solution:
    """Heun's method (the trapezoidal rule): second order, two velocities a step."""

    def step(x, t, s):
        v = velocity(x, t)
        return x + (s - t) * (v + velocity(x + (s - t) * v, s)) / 2

    return integrate(step, noise, times, trajectory)


SOLVERS = {"euler": euler, "heun": heun}


def guided(
    velocity: Callable[..., Float[Array, "b *s"]],
    cond: PyTree[Array],
    null: PyTree[Array],
    scale: Float[Array, ""] | float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    together: bool = True,
) -> Velocity:
    """Classifier-free guidance as a velocity: v_null + scale·(v_cond − v_null).

    Ho & Salimans 2022, eq. 6 with scale = 1 + w; scale 1 is the conditional velocity. Outside
    `interval`, which is in t and closed, the scale is 1 (Kynkäänniemi et al. 2024).

    Args:
        velocity: `velocity(x, t, cond)` of the model.
        cond, null: trees of arrays with a leading batch axis.
        together: one call of `velocity` with both, which fills a GPU better; a CPU's caches prefer
            two calls.
    """
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null)
    low, high = interval

    def combined(x, t):
        if together:
            v_cond, v_null = jnp.split(velocity(jnp.concatenate([x, x]), t, both), 2)
        else:
            v_cond, v_null = velocity(x, t, cond), velocity(x, t, null)
        w = jnp.where((low <= t) & (t <= high), scale, 1.0)
        return v_null + w * (v_cond - v_null)

    return combined
