"""From gradients to updates: learning-rate schedules, AdamW, clipping, loss scaling, and the
exponential moving average (EMA) of the weights.

Plain optax transformations and functions of trees. Nothing here knows a model or devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree


def constant_schedule(peak: float, n_steps: int, decay_from: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def cosine_schedule(peak: float, n_steps: int, decay_from: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, n_steps)


def linear_schedule(peak: float, n_steps: int, decay_from: int) -> optax.Schedule:
    return optax.linear_schedule(peak, 0.0, n_steps)


def constant_then_linear_schedule(peak: float, n_steps: int, decay_from: int) -> optax.Schedule:
    """Keep the rate until `decay_from`, then lower it to 0 (warm-up, stable, decay: Hu et al.
    2024).
    """
    return optax.linear_schedule(peak, 0.0, n_steps - decay_from, decay_from)


BLOCK_PARTS = ("blocks", "dual_blocks", "last")  # of a network
MATRICES = ("kernel", "a", "b")  # names of weights: of linear maps, and of their adapters
SCHEDULES = {
    "constant": constant_schedule,
    "cosine": cosine_schedule,
    "linear": linear_schedule,
    "wsd": constant_then_linear_schedule,
}


def learning_rate_schedule(
    name: str, peak: float, *, warmup_steps: int, n_steps: int, decay_from: int | None = None
) -> optax.Schedule:
    """A linear warm-up to `peak` over `warmup_steps`, then the named decay until step `n_steps`.

    Args:
        decay_from: the step at which wsd begins to decay, by default four fifths of `n_steps`.
    """
    decay_from = n_steps - n_steps // 5 if decay_from is None else decay_from
    # The warm-up starts one notch above zero: an update of size zero is a wasted step.
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    n_after, stable = max(1, n_steps - warmup_steps), max(0, decay_from - warmup_steps)
    decay = SCHEDULES[name](peak, n_after, min(stable, n_after - 1))
    return optax.join_schedules([warmup, decay], [warmup_steps])


def clipped_adamw(
    schedule: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip_norm: float,
    moments: str = "fp32",
    blocks: optax.GradientTransformationExtraArgs | None = None,
    factors: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip the gradient's norm (0 never clips), then AdamW; only matrices decay.

    Args:
        blocks: the rule of the blocks' kernels, in place of AdamW.
        factors: of AdamW's steps, as `adamw` takes them.
    """

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in MATRICES, params)

    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    rule = adamw(
        schedule,
        beta1,
        beta2,
        weight_decay,
        matrices,
        moments=MOMENTS[moments],
        factors=factors,
    )
    if blocks:
        rule = optax.partition({True: blocks, False: rule}, block_kernels)
    return optax.chain(clip, rule)


def block_kernels(params: PyTree) -> Any:
    """Mark the kernels of a network's blocks in the tree of its weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key in BLOCK_PARTS and path[-1].key == "kernel", params
    )


def adamw(
    schedule: optax.Schedule,
    beta1: float,
    beta2: float,
    weight_decay: float,
    mask: Callable[[PyTree], PyTree],
    epsilon: float = 1e-8,
    moments: Any = jnp.float32,
    factors: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Kingma & Ba 2015, Algorithm 1; Loshchilov & Hutter 2019, Algorithm 2) whose
    `update(grads, state, params, finite=True)` changes nothing where `finite` is false.

    The result is that of `optax.adamw` with a choice between old and new moments afterwards, but
    choosing before they are read saves one copy of the moments.

    Args:
        moments: the precision that they are kept in. In bfloat16 they are rounded up or down at
            random, right on average: the second one moves by less than half of a last bit a step,
            and would stand still if it were rounded to nearest.
        factors: maps weights, or a part of their tree, to a factor of the learning rate for each
            leaf. Weight decay has none: a weight forgets at learning rate × decay, and networks of
            all widths, or all parts of one, are to forget alike (Wang & Aitchison 2024).
    """

    def init(params: Any) -> Any:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, moments), params)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any
    ) -> Any:
        def moving(average: Array, new: Array, decay: Any) -> Array:
            average = average.astype(jnp.float32)
            return jnp.where(finite, decay * average + (1 - decay) * new, average)

        count, rate = state.count + jnp.int32(finite), jnp.asarray(schedule(state.count))
        mu = jax.tree.map(lambda m, g: moving(m, g, beta1), state.mu, updates)
        nu = jax.tree.map(lambda n, g: moving(n, g * g, beta2), state.nu, updates)
        mu_correction, nu_correction = 1 - beta1**count, 1 - beta2**count  # of the zero start

        def direction(m: Any, n: Any) -> Array:
            return m / mu_correction / (jnp.sqrt(n / nu_correction) + epsilon)

        def step(x: Any, p: Any, decays: Any) -> Array:
            # Adding the negative zero changes no number, not even another negative zero.
            return jnp.where(finite, -rate * (x + weight_decay * decays * p), -0.0)

        directions = jax.tree.map(direction, mu, nu)
        if factors:
            directions = jax.tree.map(jnp.multiply, directions, factors(params))
        steps = jax.tree.map(step, directions, params, mask(params))
        if moments == jnp.bfloat16:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count))
            mu, nu = round_at_random(mu, keys[0]), round_at_random(nu, keys[1])
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


MOMENTS = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def round_at_random(tree: PyTree, key: Key[Array, ""]) -> Any:
    """Round float32 to a bfloat16 next to it, with the probabilities that make the mean exact.

    A bfloat16 is the upper half of a float32: a random lower half is added, and cut off. Numbers
    must be finite. One that is a bfloat16 already stays.
    """

    def rounded(x: Float[Array, "*s"], key: Key[Array, ""]) -> Float[Array, "*s"]:
        lower = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
        upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + lower) >> 16
        return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)

    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(map(rounded, leaves, jax.random.split(key, len(leaves))))


class LossScale(NamedTuple):
    """Factor of the loss that keeps small gradients from vanishing in float16 (Micikevicius et al.
    2018, §3.2).

    Args:
        scale: the factor.
        n_good: steps with finite gradients since it last changed.
    """

    scale: Float[Array, ""]
    n_good: Int[Array, ""]


INITIAL_LOSS_SCALE = 2.0**15
MIN_LOSS_SCALE = 1.0
LOSS_SCALE_GROWTH_STEPS = 1000  # good steps before a larger scale is tried


def initial_loss_scale() -> LossScale:
    return LossScale(jnp.float32(INITIAL_LOSS_SCALE), jnp.int32(0))


def next_loss_scale(loss_scale: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """Halve the scale after non-finite gradients; double it after `LOSS_SCALE_GROWTH_STEPS` good
    steps.
    """
    scale, n_good = loss_scale
    grows = n_good + 1 == LOSS_SCALE_GROWTH_STEPS
    return LossScale(
        jnp.where(
            finite, jnp.where(grows, scale * 2, scale), jnp.maximum(scale / 2, MIN_LOSS_SCALE)
        ),
        jnp.where(finite & ~grows, n_good + 1, 0),
    )


def ema_decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """The EMA's decay after `step` updates: min(decay, (1 + step) / (10 + step)).

    The warm-up lets early averages forget the random initialisation, which at 0.9999 would
    dominate the first 10 000 steps.
    """
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update_ema(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> Any:
    """decay·ema + (1 − decay)·params, leaf by leaf."""
    return move_average(ema, params, 1 - decay)


def move_average(average: PyTree, params: PyTree, share: Float[Array, ""]) -> Any:
    """(1 − share)·average + share·params, leaf by leaf."""
    return jax.tree.map(lambda a, p: a + share * (p - a), average, params)
