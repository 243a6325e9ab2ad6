"""Solvers from noise to data, and guidance of one prediction by another.

A solver of a flow's differential equation sees only `velocity(x, t)` and integrates it from t = 1
(noise) to t = 0 (data). The whole batch shares one t. The solvers of DDPM, in `methods/ddpm.py`,
share `scan_steps` and the random numbers of this file. Models, guidance scales and labels are bound
by the caller.

Solvers are traced: call them inside `jax.jit`, and the whole loop is one compiled program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Velocity = Callable[[Float[Array, "b *s"], Float[Array, ""]], Float[Array, "b *s"]]
# The weak and the strong prediction at (x, t).
PredictionPair = Callable[
    [Float[Array, "b *s"], Float[Array, ""]], tuple[Float[Array, "b *s"], Float[Array, "b *s"]]
]
FreshNoise = Callable[[Int[Array, ""]], Float[Array, "b *s"]]  # step index → its noise
# Folded into a seed's key where initial noise folds the image's index: no image has this index.
STEP_NOISE_TAG = 2**32 - 1
ALWAYS = (0.0, 1.0)  # the interval of guidance at all times


class Solution(NamedTuple):
    """The result of a solver. With `trajectory`, also every state, noise first and result last, and
    the x0 prediction at every state but the last.
    """

    x: Float[Array, "b *s"]
    trajectory: Float[Array, "times b *s"] | None
    estimates: Float[Array, "steps b *s"] | None


# --- solvers --------------------------------------------------------------------------------------


def scan_steps(
    step: Callable[..., Any], noise: Float[Array, "b *s"], steps: PyTree[Array], trajectory: bool
) -> Solution:
    """Apply `step(x, s) -> (x, x0)` for each row s of `steps`, in order."""

    def body(x: Any, s: Any) -> Any:
        x, x0 = step(x, s)
        return x, (x, x0) if trajectory else None

    x, history = jax.lax.scan(body, noise, steps)
    if history is None:
        return Solution(x, None, None)
    states, estimates = history
    return Solution(x, jnp.concatenate([noise[None], states]), estimates)


def integrate_velocity(
    step: Callable[..., Any],
    noise: Float[Array, "b *s"],
    times: Float[Array, "times"],
    trajectory: bool,
) -> Solution:
    """Apply `step(x, t, s) -> (x, v)` along the grid: it takes x from time t to time s and returns
    the velocity at t. The x0 prediction is where that velocity leads: x − t·v.
    """

    def interval_step(x: Array, interval: Any) -> tuple[Array, Array]:
        t, s = interval
        y, v = step(x, t, s)
        return y, x - t * v

    return scan_steps(interval_step, noise, (times[:-1], times[1:]), trajectory)


def euler(
    velocity: Velocity,
    noise: Float[Array, "b *s"],
    times: Float[Array, "times"],
    *,
    trajectory: bool = False,
) -> Solution:
    """Euler's method: first order, one velocity a step."""

    def step(x: Array, t: Array, s: Array) -> tuple[Array, Array]:
        v = velocity(x, t)
        return x + (s - t) * v, v

    return integrate_velocity(step, noise, times, trajectory)


def heun(
    velocity: Velocity,
    noise: Float[Array, "b *s"],
    times: Float[Array, "times"],
    *,
    trajectory: bool = False,
) -> Solution:
    """Heun's method (the trapezoidal rule): second order, two velocities a step."""

    def step(x: Array, t: Array, s: Array) -> tuple[Array, Array]:
        v = velocity(x, t)
        return x + (s - t) * (v + velocity(x + (s - t) * v, s)) / 2, v

    return integrate_velocity(step, noise, times, trajectory)


def heun_then_euler(
    velocity: Velocity,
    noise: Float[Array, "b *s"],
    times: Float[Array, "times"],
    *,
    trajectory: bool = False,
) -> Solution:
    """Heun's method with a last step of Euler's, for a velocity that has no value at t = 0."""

    def step(x: Array, t: Array, s: Array) -> tuple[Array, Array]:
        v = velocity(x, t)
        y = x + (s - t) * v
        mean = jax.lax.cond(s > 0, lambda: (v + velocity(y, s)) / 2, lambda: v)
        return x + (s - t) * mean, v

    return integrate_velocity(step, noise, times, trajectory)


def dpmpp_2m(
    velocity: Velocity,
    noise: Float[Array, "b *s"],
    times: Float[Array, "times"],
    *,
    trajectory: bool = False,
) -> Solution:
    """DPM-Solver++(2M) on the straight path: second order, one velocity a step."""
    return multistep(
        lambda x, t: x - t * velocity(x, t),
        noise,
        times[:-1],
        signal=1 - times,
        sigma=times,
        trajectory=trajectory,
    )


def multistep(
    denoise: Callable[..., Float[Array, "b *s"]],
    noise: Float[Array, "b *s"],
    steps: PyTree[Array],
    *,
    signal: Float[Array, "times"],
    sigma: Float[Array, "times"],
    trajectory: bool,
) -> Solution:
    """DPM-Solver++(2M): x0 is extrapolated along the half-log-SNR λ = log(signal / σ) from its last
    two predictions (Lu et al. 2022, alg. 2). The first step, which has one, the second, whose λ
    came from −∞ at pure noise, and the last, which goes to ∞, use the latest alone.

    Args:
        denoise: `denoise(x, step)`, the prediction of x0.
        steps: what `denoise` takes at each step: a tree of arrays, one row for each.
        signal, sigma: coefficients of data and noise in each state; σ is 0 in the last.
    """
    # e^λ at each state; of e^(−h), h the step in λ, a ratio stays finite at both ends.
    scale = signal / jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny)
    h = jnp.diff(jnp.log(jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)))
    h_before = jnp.concatenate([h[:1], h[:-1]])
    is_first_order = jnp.arange(len(h)) == 0
    is_first_order |= (sigma[1:] == 0) | (jnp.roll(signal[:-1], 1) == 0)
    weight = jnp.where(is_first_order, 0.0, h / h_before / 2)

    def body(carry: Any, row: Any) -> Any:
        x, x0_before = carry
        step, weight, signal, sigma, signal_next, sigma_next = row
        x0 = denoise(x, step)
        extrapolated = x0 + weight * (x0 - x0_before)
        # σ'/σ x − signal' (e^(−h) − 1) x0, with e^(−h) = σ' signal / (signal' σ)
        ratio = sigma_next / sigma
        x = ratio * x + (signal_next - ratio * signal) * extrapolated
        return (x, x0), (x, x0) if trajectory else None

    rows = (steps, weight, signal[:-1], sigma[:-1], signal[1:], sigma[1:])
    (x, _), history = jax.lax.scan(body, (noise, jnp.zeros_like(noise)), rows)
    if history is None:
        return Solution(x, None, None)
    states, estimates = history
    return Solution(x, jnp.concatenate([noise[None], states]), estimates)


def euler_maruyama(
    velocity: Velocity,
    noise: Float[Array, "b *s"],
    times: Float[Array, "times"],
    fresh_noise: FreshNoise,
    *,
    trajectory: bool = False,
) -> Solution:
    """Euler–Maruyama of the reverse stochastic differential equation with diffusion w = 2t, which
    has the marginals of the flow: drift v − w·score/2 = x + (2 − t)·v (Ma et al. 2024, SiT, eq. 6
    and 9). One velocity a step; the last step, to t = 0, adds no noise.
    """

    def step(x: Array, row: Any) -> tuple[Array, Array]:
        i, t, s = row
        v = velocity(x, t)
        y = x + (s - t) * (x + (2 - t) * v)
        return y + jnp.where(s > 0, jnp.sqrt(2 * t * (t - s)), 0.0) * fresh_noise(i), x - t * v

    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    return scan_steps(step, noise, steps, trajectory)


# Of a velocity.
SOLVERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "sde": euler_maruyama}
STOCHASTIC = {"sde"}  # those that take `fresh_noise` after the times
SDE_LAST_TIME = 0.04  # the SDE's last step goes from here to 0, times the time of its first


# --- times and noise ------------------------------------------------------------------------------


def time_grid(
    n_steps: int, *, shift: float = 1.0, start: float = 1.0, last: float | None = None
) -> Float[Array, "{n_steps}+1"]:
    """n + 1 times from `start` to 0; `shift` > 1 puts more near the noise, as in
    `methods.rectified_flow.shift_time`.

    Args:
        last: the last time before 0, if it is to be another than the grid's.
    """

    def before_shift(time: float) -> float:
        """The time that the shift moves to this one."""
        return time / (time + shift * (1 - time))

    if last is None:
        t = jnp.linspace(before_shift(start), 0.0, n_steps + 1)
    else:
        t = jnp.append(jnp.linspace(before_shift(start), before_shift(last), n_steps), 0.0)
    return shift * t / (1 + (shift - 1) * t)


def initial_noise(
    seed: Int[Array, "..."] | int, index: Int[Array, "b"], shape: tuple[int, ...]
) -> Float[Array, "b *s"]:
    """Standard normal noise for each image: a function of its seed and index, not of its batch.

    Args:
        seed: one of each image, or one for all.
    """

    def sample(seed: Any, index: Any) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape)

    return jax.vmap(sample)(jnp.broadcast_to(seed, index.shape), index)


def step_noise(
    seed: Int[Array, "..."] | int, index: Int[Array, "b"], shape: tuple[int, ...]
) -> FreshNoise:
    """Standard normal noise for every step: a function of the image's seed and index and the step.

    Args:
        seed: one of each image, or one for all.
    """

    def image_key(seed: Any, index: Any) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEP_NOISE_TAG), index)

    keys = jax.vmap(image_key)(jnp.broadcast_to(seed, index.shape), index)

    def fresh_noise(step: Any) -> Array:
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step), shape))(keys)

    return fresh_noise


# --- guidance -------------------------------------------------------------------------------------


def extrapolate(
    weak: Velocity,
    strong: Velocity,
    scale: Float[Array, ""] | float,
    *,
    interval: tuple[float, ...] = ALWAYS,
    channels: int | None = None,
) -> Velocity:
    """Guidance away from a weaker prediction: weak + scale·(strong − weak) (Karras et al. 2024).

    Scale 1 is the strong prediction, up to rounding. Guidance nests: either prediction may itself
    be a result of this function, which then acts first.

    Args:
        weak, strong: predictions as functions of (x, t): of a velocity, or of the target of
            DDPM. They may be two models, two labels or two depths of one model.
        scale: the guidance scale w.
        interval: the two times, both inclusive, between which guidance acts; outside the scale is 1
            (Kynkäänniemi et al. 2024).
        channels: number of channels to guide; the rest are the strong prediction's. By default all.
    """

    def both(x: Array, t: Any) -> tuple[Array, Array]:
        return weak(x, t), strong(x, t)

    return extrapolate_pair(both, scale, interval=interval, channels=channels)


def extrapolate_pair(
    both: PredictionPair,
    scale: Float[Array, ""] | float,
    *,
    interval: tuple[float, ...] = ALWAYS,
    channels: int | None = None,
) -> Velocity:
    """`extrapolate`, where one function returns (weak, strong): one call of a model can give both.

    Args:
        both: the weak and the strong prediction at (x, t).
        scale, interval, channels: as of `extrapolate`.
    """
    # The grid's times are float32: without room for rounding they miss the ends they are meant for.
    low, high = interval[0] - 1e-6, interval[1] + 1e-6

    def extrapolated(x: Array, t: Any) -> Array:
        weak, strong = both(x, t)
        w = jnp.where((low <= t) & (t <= high), scale, 1.0)
        v = weak + w * (strong - weak)
        if channels is None:
            return v
        return jnp.concatenate([v[..., :channels], strong[..., channels:]], axis=-1)

    return extrapolated


def guided(
    velocity: Callable[..., Float[Array, "b *s"]],
    cond: PyTree[Array],
    null: PyTree[Array],
    scale: Float[Array, ""] | float,
    *,
    interval: tuple[float, ...] = ALWAYS,
    channels: int | None = None,
    one_call: bool = True,
) -> Velocity:
    """Classifier-free guidance as a velocity: v_null + scale·(v_cond − v_null).

    Ho & Salimans 2022, eq. 6 with scale = 1 + w: `extrapolate` from the unconditional velocity to
    the conditional one.

    Args:
        velocity: `velocity(x, t, cond)` of the model, or the output of a DDPM.
        cond, null: conditional and unconditional label: trees of arrays with a leading batch axis.
        scale, interval, channels: as of `extrapolate`.
        one_call: evaluate both halves in one call of `velocity`, which fills a GPU better. A CPU's
            caches prefer two calls.
    """
    labels = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null)

    def both(x: Array, t: Any) -> tuple[Array, Array]:
        if one_call:
            v_cond, v_null = jnp.split(velocity(jnp.concatenate([x, x]), t, labels), 2)
        else:
            v_cond, v_null = velocity(x, t, cond), velocity(x, t, null)
        return v_null, v_cond

    return extrapolate_pair(both, scale, interval=interval, channels=channels)
