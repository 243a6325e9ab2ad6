"""The training state, and one step that updates it.

`update` maps a state and a batch to a state and a report. The loss, its gradient and the optimizer
are arguments; nothing here knows a network.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from networks import power_ema
from training import optim

PROJECTOR = "projector"  # its name among the weights that a step trains


class ProjectorState(NamedTuple):
    """A part of the network that only training has.

    Args:
        weights: its own; it has no average.
        opt_state: of an optimizer of its own, so that its gradient does not clip the network's.
    """

    weights: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; restored from a checkpoint, a run resumes bit for bit.

    Args:
        step: updates so far.
        position: batches so far; more than steps after a rollback.
        skipped: non-finite steps, which left the weights unchanged.
        bad_steps: non-finite steps in a row, up to now.
        params: the weights.
        ema: their exponential moving average.
        opt_state: the optimizer's state.
        loss_scale: with float16.
        window: sums of the metrics over the steps since the last logged line.
        power_ema: averages of the weights by power functions, from which others are made after
            training; empty without `--ema_std`.
        projector: empty without `--align`.
    """

    step: Array
    position: Array
    skipped: Array
    bad_steps: Array
    params: Any
    ema: Any
    opt_state: Any
    loss_scale: optim.LossScale | tuple[()]
    window: dict[str, Array]
    power_ema: tuple[Any, ...] = ()
    projector: ProjectorState | tuple[()] = ()

    @property
    def n_updates(self) -> Array:
        """Updates that moved the weights."""
        return self.step - self.skipped


class StepReport(NamedTuple):
    """Numbers of one step for the log. Until they are fetched, arrays on the device.

    Args:
        bad_steps, skipped, window: those of the new `TrainState`.
        param_norm: L2 norm of the new weights.
        update_norm: L2 norm of the update.
        loss_scale: the scale that this step used, with float16.
    """

    bad_steps: Int[Array, ""]
    skipped: Int[Array, ""]
    window: dict[str, Array]
    param_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    loss_scale: Float[Array, ""] | None


def update(
    state: TrainState,
    batch: Any,
    key: Key[Array, ""],
    frozen: Mapping[str, Any] | None = None,
    *,
    read_batch: Callable[[Any, Array], Any],
    value_and_grad: Callable[..., Any],
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
    log_every: int,
    power_gammas: Sequence[float] = (),
    projector_optimizer: optax.GradientTransformationExtraArgs | None = None,
) -> tuple[TrainState, StepReport]:
    """One step: gradients, the optimizer, EMA.

    A non-finite loss or gradient changes nothing but the counts.

    Args:
        key: the run's; a step's own is folded from it and the position.
        frozen: weights that are not trained, by the names that `value_and_grad` takes them by.
        read_batch: maps `batch` and the position to the rows that the loss takes.
        value_and_grad: `(params, batch, key, loss_scale, **frozen) -> ((loss, metrics),
            gradients)`.
        log_every: steps after which the window of metrics starts anew.
        power_gammas: exponents of the averages `power_ema`.
        projector_optimizer: trains the projector too, which `value_and_grad` then finds among the
            weights.
    """
    s = state
    step_key = jax.random.fold_in(key, s.position)
    batch = read_batch(batch, s.position)
    scale = s.loss_scale[0] if s.loss_scale else None
    projector = s.projector if projector_optimizer else ()
    weights = s.params | {PROJECTOR: projector.weights} if projector else s.params
    (loss, metrics), grads = value_and_grad(weights, batch, step_key, scale, **(frozen or {}))
    projector_grads = grads.pop(PROJECTOR) if projector else {}
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if projector and projector_optimizer:
        finite &= jnp.isfinite(optax.tree.norm(projector_grads))
        projector = update_projector(projector, projector_grads, projector_optimizer, finite)
    updates, opt_state = optimizer.update(grads, s.opt_state, s.params, finite=finite)
    params = optax.apply_updates(s.params, updates)
    ema = optim.update_ema(s.ema, params, optim.ema_decay_at(s.step, ema_decay))
    averages = tuple(
        optim.move_average(average, params, power_ema.share_at(s.n_updates + 1, gamma))
        for average, gamma in zip(s.power_ema, power_gammas, strict=True)
    )
    # A loss that is a sum of several reports the method's own as "loss".
    metrics = {"loss": loss} | metrics | {"grad_norm": grad_norm, "steps": jnp.ones(())}
    window = jax.tree.map(lambda w: jnp.where(s.step % log_every == 0, 0, w), s.window)
    window = _where(finite, jax.tree.map(jnp.add, window, metrics), window)
    # A loss scale that is too large is no bad step: it is halved until gradients are finite.
    bad = ~finite & (scale is None or ~jnp.isfinite(loss) | (scale <= optim.MIN_LOSS_SCALE))
    new = TrainState(
        step=s.step + 1,
        position=s.position + 1,
        skipped=s.skipped + ~finite,
        bad_steps=jnp.where(bad, s.bad_steps + 1, 0),
        params=params,
        ema=_where(finite, ema, s.ema),
        opt_state=opt_state,
        loss_scale=optim.next_loss_scale(s.loss_scale, finite) if s.loss_scale else (),
        window=window,
        power_ema=_where(finite, averages, s.power_ema),
        projector=projector,
    )
    report = StepReport(
        bad_steps=new.bad_steps,
        skipped=new.skipped,
        window=window,
        param_norm=optax.tree.norm(new.params),
        update_norm=optax.tree.norm(updates),
        loss_scale=scale,
    )
    return new, report


def update_projector(
    state: ProjectorState,
    grads: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    finite: Bool[Array, ""],
) -> ProjectorState:
    """Update the projector, unless a gradient is not finite."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.weights, finite=finite)
    return ProjectorState(optax.apply_updates(state.weights, updates), opt_state)


def _where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`jnp.where` over two trees."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def metrics_line(report: StepReport) -> dict[str, Any]:
    """A line of metrics from a fetched report: means over the steps since the last line, and
    the norms of this step. A loss in bins of t becomes the mean loss of each bin.
    """
    window = dict(report.window)
    n_steps = window.pop("steps") or math.nan  # none of them was finite
    means = {name: total / n_steps for name, total in window.items()}
    line: dict[str, Any] = {}
    if report.loss_scale is not None:
        line["loss_scale"] = float(report.loss_scale)
    line["param_norm"] = float(report.param_norm)
    line["update_norm"] = float(report.update_norm)
    if "binned_loss" in means:
        bins = zip(means.pop("binned_loss"), means.pop("bin_share"), strict=True)
        line["loss_by_t"] = [float(loss / share) if share else None for loss, share in bins]
    return {name: float(value) for name, value in means.items()} | line


def initial_state(
    params: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    metrics: dict[str, jax.ShapeDtypeStruct],
    *,
    scaled: bool = False,
    n_averages: int = 0,
    projector: Any = None,
    projector_optimizer: optax.GradientTransformationExtraArgs | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        metrics: shapes of the metrics that the loss returns.
        scaled: whether the loss is scaled, for float16.
        n_averages: number of trees in `power_ema`.
        projector: weights of the projector, which `projector_optimizer` trains.
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
        loss_scale=optim.initial_loss_scale() if scaled else (),
        window=window,
        power_ema=copies(params, n_averages),
        projector=(
            ProjectorState(projector, projector_optimizer.init(projector))
            if projector and projector_optimizer
            else ()
        ),
    )


def copies(params: Any, n: int) -> tuple[Any, ...]:
    """Copy the weights n times, in buffers of their own."""
    return tuple(jax.tree.map(jnp.copy, params) for _ in range(n))


def as_items(state: TrainState) -> dict[str, Any]:
    """Split a state into the items of a checkpoint."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    parts = {name: rest.pop(name) for name in ("params", "ema", "power_ema")}
    if not parts["power_ema"]:  # nothing to write
        del parts["power_ema"]
    if not rest["projector"]:
        del rest["projector"]
    return parts | {"optimizer": rest}


def from_items(items: dict[str, Any]) -> TrainState:
    """Join the items of a checkpoint into a state: the inverse of `as_items`."""
    return TrainState(
        params=items["params"],
        ema=items["ema"],
        power_ema=items.get("power_ema", ()),
        **items["optimizer"],
    )
