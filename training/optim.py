"""How gradients become updates: learning-rate schedules, AdamW, clipping, loss scaling, and the
average of the weights (EMA).

Plain optax transformations and functions of trees; nothing here knows of a model or of devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree


def constant_schedule(peak: float, n_steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def cosine_schedule(peak: float, n_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, n_steps)


def linear_schedule(peak: float, n_steps: int) -> optax.Schedule:
    return optax.linear_schedule(peak, 0.0, n_steps)


SCHEDULES = {"constant": constant_schedule, "cosine": cosine_schedule, "linear": linear_schedule}


def learning_rate_schedule(
    name: str, peak: float, *, warmup_steps: int, n_steps: int
) -> optax.Schedule:
    """A linear rise to `peak` over `warmup_steps`, then the named fall until step `n_steps`."""
    # The rise starts one notch above zero: an update of size zero is a wasted step.
    rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    fall = SCHEDULES[name](peak, max(1, n_steps - warmup_steps))
    return optax.join_schedules([rise, fall], [warmup_steps])


def clipped_adamw(
    schedule: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformationExtraArgs:
    """Clip the norm (0: never), then AdamW; only matrices decay."""

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, adamw(schedule, beta1, beta2, weight_decay, matrices))


def adamw(
    schedule: optax.Schedule,
    beta1: float,
    beta2: float,
    weight_decay: float,
    mask: Callable[[PyTree], PyTree],
    epsilon: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Kingma & Ba 2015, Algorithm 1; Loshchilov & Hutter 2019, Algorithm 2) whose
    `update(grads, state, params, finite=True)` changes nothing where `finite` is false.

    `optax.adamw` and a choice between old and new afterwards come to the same, for one more copy of
    the moments: here they are chosen before they are read.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates, state, params=None, *, finite: Any = True, **_):
        def moving(average, new, decay):
            return jnp.where(finite, decay * average + (1 - decay) * new, average)

        count, rate = state.count + jnp.int32(finite), jnp.asarray(schedule(state.count))
        mu = jax.tree.map(lambda m, g: moving(m, g, beta1), state.mu, updates)
        nu = jax.tree.map(lambda n, g: moving(n, g * g, beta2), state.nu, updates)
        mu_share, nu_share = 1 - beta1**count, 1 - beta2**count  # of what has come in so far

        def step(m, n, p, decays):
            direction = m / mu_share / (jnp.sqrt(n / nu_share) + epsilon)
            # The negative zero is the one that changes no number.
            return jnp.where(finite, -rate * (direction + weight_decay * decays * p), -0.0)

        steps = jax.tree.map(step, mu, nu, params, mask(params))
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


class LossScale(NamedTuple):
    """What a loss is multiplied by, so that small gradients survive float16 (Micikevicius et al.
    2018, §3.2), and for how many steps it has not been too large.
    """

    scale: Float[Array, ""]
    n_good: Int[Array, ""]


INITIAL_LOSS_SCALE, MIN_LOSS_SCALE = 2.0**15, 1.0
LOSS_SCALE_GROWTH_STEPS = 1000  # until a larger scale is tried


def initial_loss_scale() -> LossScale:
    return LossScale(jnp.float32(INITIAL_LOSS_SCALE), jnp.int32(0))


def next_loss_scale(loss_scale: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """Half of it after gradients that were not finite, twice after `GOOD_STEPS` that were."""
    scale, n_good = loss_scale
    grows = n_good + 1 == LOSS_SCALE_GROWTH_STEPS
    return LossScale(
        jnp.where(finite, jnp.where(grows, scale * 2, scale), jnp.maximum(scale / 2, MIN_LOSS_SCALE)),
        jnp.where(finite & ~grows, n_good + 1, 0),
    )


def ema_decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """The decay of the average after `step` updates: min(decay, (1 + step) / (10 + step)).

    The warm-up lets early averages forget the random start, which at 0.9999 would colour the first
    10 000 steps.
    """
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update_ema(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> Any:
    """decay·ema + (1 − decay)·params, leaf by leaf."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
