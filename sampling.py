"""From noise to data: along the flow of a velocity, or down a chain of diffusion steps.

A solver of the flow's differential equation sees only `velocity(x, t)`, from t = 1 to t = 0; one of
a chain sees only what a model makes of x at a step. All of a batch is at one time. Models, guidance
scales and labels are bound by the caller. Solvers are traced: call them inside `jax.jit`, and the
whole loop is one compiled program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Velocity = Callable[[Float[Array, "b *s"], Float[Array, ""]], Float[Array, "b *s"]]
FreshNoise = Callable[[Int[Array, ""]], Float[Array, "b *s"]]  # the noise of a step
STEP_NOISE_TAG = 2**32 - 1  # where a picture's index would be: no picture has it


class Solution(NamedTuple):
    """Where a solver arrived. If asked for, all states, noise first and result last, and what each
    but the last was taken for: the data that the model saw in it.
    """

    x: Float[Array, "b *s"]
    trajectory: Float[Array, "times b *s"] | None
    estimates: Float[Array, "steps b *s"] | None


def time_grid(
    n_steps: int, *, shift: float = 1.0, start: float = 1.0
) -> Float[Array, "{n_steps}+1"]:
    """n + 1 times from `start` to 0; `shift` > 1 puts more near the noise, as in `shift_time`."""
    before = start / (start + shift * (1 - start))  # what the shift moves to `start`
    t = jnp.linspace(before, 0.0, n_steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def initial_noise(
    seed: Int[Array, "..."] | int, index: Int[Array, "b"], shape: tuple[int, ...]
) -> Float[Array, "b *s"]:
    """Standard normal noise: a function of a picture's seed and index, not of its batch. One seed
    may be that of all.
    """

    def draw(seed, index):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape)

    return jax.vmap(draw)(jnp.broadcast_to(seed, index.shape), index)


def step_noise(
    seed: Int[Array, "..."] | int, index: Int[Array, "b"], shape: tuple[int, ...]
) -> FreshNoise:
    """Standard normal noise of every step: a function of a picture's seed and index, and the step.
    One seed may be that of all.
    """

    def key(seed, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEP_NOISE_TAG), index)

    keys = jax.vmap(key)(jnp.broadcast_to(seed, index.shape), index)

    def renew(step):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step), shape))(keys)

    return renew


def scan_steps(step, noise: Float[Array, "b *s"], places: PyTree[Array], trajectory: bool) -> Solution:
    """Apply `step(x, place) -> (x, estimate of the data)` at one place after the other."""

    def body(x, place):
        x, data = step(x, place)
        return x, (x, data) if trajectory else None

    x, kept = jax.lax.scan(body, noise, places)
    if kept is None:
        return Solution(x, None, None)
    states, estimates = kept
    return Solution(x, jnp.concatenate([noise[None], states]), estimates)


# --- the flow of a velocity -----------------------------------------------------------------------


def integrate_velocity(step, noise: Float[Array, "b *s"], times: Float[Array, "times"], trajectory: bool):
    """Apply `step(x, t, s) -> (x, v)`, which carries x from time t to time s and tells the velocity
    at t, along the grid. The data are taken to be where that leads: x − t·v.
    """

    def carry(x, interval):
        t, s = interval
        y, v = step(x, t, s)
        return y, x - t * v

    return scan_steps(carry, noise, (times[:-1], times[1:]), trajectory)


def euler(velocity: Velocity, noise, times, *, trajectory: bool = False) -> Solution:
    """Euler's method: first order, one velocity a step."""

    def step(x, t, s):
        v = velocity(x, t)
        return x + (s - t) * v, v

    return integrate_velocity(step, noise, times, trajectory)


def heun(velocity: Velocity, noise, times, *, trajectory: bool = False) -> Solution:
    """Heun's method (the trapezoidal rule): second order, two velocities a step."""

    def step(x, t, s):
        v = velocity(x, t)
        return x + (s - t) * (v + velocity(x + (s - t) * v, s)) / 2, v

    return integrate_velocity(step, noise, times, trajectory)


SOLVERS = {"euler": euler, "heun": heun}  # of a velocity


# --- guidance -------------------------------------------------------------------------------------


def guided(
    velocity: Callable[..., Float[Array, "b *s"]],
    cond: PyTree[Array],
    null: PyTree[Array],
    scale: Float[Array, ""] | float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    together: bool = True,
) -> Velocity:
    """Classifier-free guidance as a velocity: v_null + scale·(v_cond − v_null).

    Ho & Salimans 2022, eq. 6 with scale = 1 + w; scale 1 is the conditional velocity. Outside
    `interval`, which is in t and closed, the scale is 1 (Kynkäänniemi et al. 2024).

    Args:
        velocity: `velocity(x, t, cond)` of the model; or whatever else it predicts.
        cond, null: trees of arrays with a leading batch axis.
        channels: guide so many, and leave the rest to the condition; by default all.
        together: one call of `velocity` with both, which fills a GPU better; a CPU's caches prefer
            two calls.
    """
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null)
    # Times of a grid are float32: without a rounding's room they miss the ends they are meant for.
    low, high = interval[0] - 1e-6, interval[1] + 1e-6

    def combined(x, t):
        if together:
            v_cond, v_null = jnp.split(velocity(jnp.concatenate([x, x]), t, both), 2)
        else:
            v_cond, v_null = velocity(x, t, cond), velocity(x, t, null)
        w = jnp.where((low <= t) & (t <= high), scale, 1.0)
        v = v_null + w * (v_cond - v_null)
        if channels is None:
            return v
        return jnp.concatenate([v[..., :channels], v_cond[..., channels:]], axis=-1)

    return combined
