"""All that a step of training changes, and the step: `update`.

A state and a batch go in, a state and a report come out; the loss, its gradient and the optimizer
are the caller's.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from training import optim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint needs to go on bit for bit."""

    step: Array
    position: Array  # batches so far; more than steps, where some were left out
    skipped: Array  # steps that left the weights alone, for they were not finite
    bad_steps: Array  # how many of them in a row, up to now
    params: Any
    ema: Any
    opt_state: Any
    loss_scale: optim.LossScale | tuple[()]  # with float16
    window: dict[str, Array]  # sums of the metrics over the steps since the last log line


def update(
    state: TrainState,
    batch: Any,
    key: Key[Array, ""],
    *,
    draw: Callable[[Any, Array], Any],
    value_and_grad: Callable,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
    log_every: int,
) -> tuple[TrainState, dict[str, Any]]:
    """One step: gradients, clipped AdamW, EMA. Returns the new state and the step's report.

    A loss or gradient that is not finite changes nothing but the counts.
    """
    s, step_key = state, jax.random.fold_in(key, state.position)
    batch, scale = draw(batch, s.position), s.loss_scale[0] if s.loss_scale else None
    (loss, metrics), grads = value_and_grad(s.params, batch, step_key, scale)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, s.opt_state, s.params, finite=finite)
    params = optax.apply_updates(s.params, updates)
    ema = optim.update_ema(s.ema, params, optim.ema_decay_at(s.step, ema_decay))

    def if_finite(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    metrics |= {"loss": loss, "grad_norm": grad_norm, "steps": jnp.ones(())}
    window = jax.tree.map(lambda w: jnp.where(s.step % log_every == 0, 0, w), s.window)
    window = if_finite(jax.tree.map(jnp.add, window, metrics), window)
    # Too large a scale is no bad step: it is halved until gradients are finite, or it is 1.
    bad = ~finite & (scale is None or ~jnp.isfinite(loss) | (scale <= optim.LEAST_SCALE))
    new = TrainState(
        step=s.step + 1,
        position=s.position + 1,
        skipped=s.skipped + ~finite,
        bad_steps=jnp.where(bad, s.bad_steps + 1, 0),
        params=params,
        ema=if_finite(ema, s.ema),
        opt_state=opt_state,
        loss_scale=optim.next_loss_scale(s.loss_scale, finite) if s.loss_scale else (),
        window=window,
    )
    report = {
        "bad_steps": new.bad_steps,
        "skipped": new.skipped,
        "window": window,
        "param_norm": optax.tree.norm(new.params),
        "update_norm": optax.tree.norm(updates),
    }
    return new, report | ({"loss_scale": scale} if s.loss_scale else {})


def first_state(
    params: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    metrics: dict[str, jax.ShapeDtypeStruct],
    *,
    scaled: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
        metrics: what the loss will report.
        scaled: whether there is a loss scale.
    """
    window = {name: jnp.zeros(metric.shape) for name, metric in metrics.items()}
    window |= {name: jnp.zeros(()) for name in ("loss", "grad_norm", "steps")}
    return TrainState(
        step=jnp.int32(0),
        position=jnp.int32(0),
        skipped=jnp.int32(0),
        bad_steps=jnp.int32(0),
        params=params,
        # The average starts as a copy: one buffer in two places of the state cannot be donated.
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        loss_scale=optim.first_loss_scale() if scaled else (),
        window=window,
    )


def as_items(state: TrainState) -> dict[str, Any]:
    """A state as the items of a checkpoint."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {"params": rest.pop("params"), "ema": rest.pop("ema"), "optimizer": rest}


def from_items(items: dict[str, Any]) -> TrainState:
    """The inverse of `as_items`."""
    return TrainState(params=items["params"], ema=items["ema"], **items["optimizer"])
