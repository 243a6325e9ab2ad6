"""MeanFlow: the mean velocity between two times, which leads from noise to data in one step
(Geng et al. 2025).

For r ≤ t, u(x_t, t, r) = ∫ v(x_τ, τ) dτ / (t − r) from r to t along the flow, so that
x_r = x_t − (t − r)·u(x_t, t, r). It obeys u = v − (t − r)·du/dt, where du/dt is along the flow with
r fixed. Read in this order: the pair of times, the derivative, the solver, the method with its
loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from methods.method import (
    Metrics,
    ToModelInput,
    drop_labels,
    loss_by_time,
    pixels_to_input,
    sample_data_and_noise,
)
from methods.rectified_flow import Flow, TimeFlags, interpolate
from runtime.errors import UserError
from runtime.flags import check_interval, setting
from sampling import ALWAYS, FreshNoise, Solution, scan_steps

# u(x, t, span): the mean velocity over the span before t.
MeanVelocity = Callable[[Array, Array, Array], Array]
# (x, t, label) → a teacher's velocity, guided if at all
TeacherVelocity = Callable[[Array, Array, Any], Array]
DELTA = 0.005  # half the distance of the two times of a difference
MAX_SLOPE = 20.0  # du/dt is clipped to ± this, which tames the first steps
MAX_TIME_SCALE = 10.0


# --- times ----------------------------------------------------------------------------------------


def sample_times(
    key: Key[Array, "b"], quantile: Callable[[Array], Array], equal_share: float
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Sample times t ≥ r of each row: two draws, the larger first, or in a share of the rows one
    for both.
    """

    def pair(key: Array) -> tuple[Array, Array]:
        first, second, choice = jax.random.split(key, 3)
        tiny = jnp.finfo(jnp.float32).tiny
        a, b = (quantile(jax.random.uniform(k, minval=tiny)) for k in (first, second))
        t, r = jnp.maximum(a, b), jnp.minimum(a, b)
        return t, jnp.where(jax.random.bernoulli(choice, equal_share), t, r)

    return jax.vmap(pair)(key)


# --- the derivative along the flow ----------------------------------------------------------------


def derivative(
    u: MeanVelocity,
    x: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    v: Float[Array, "b *s"],
    *,
    delta: float = DELTA,
) -> Float[Array, "b *s"]:
    """du/dt along the flow, by a central difference: the derivative in the direction (v, 1) of (x,
    t), with r fixed. Both times stay between r and 1, as far as there is room.
    """
    later = jnp.minimum(t + delta, 1.0)
    earlier = jnp.maximum(later - 2 * delta, r)
    later = earlier + 2 * delta

    def at(time: Array) -> Array:
        return u(x + _column(time - t, x) * v, time, time - r)

    return (at(later) - at(earlier)) / (2 * delta)


def _column(t: Shaped[Array, "b"], like: Float[Array, "b *s"]) -> Array:
    return t.reshape(-1, *[1] * (like.ndim - 1))


# --- the solver -----------------------------------------------------------------------------------


def follow_map(
    u: Callable[..., Float[Array, "b *s"]],
    noise: Float[Array, "b *s"],
    times: Float[Array, "times"],
    *,
    trajectory: bool = False,
) -> Solution:
    """Take each step by the map x_s = x − (t − s)·u(x, t, s), which is exact however long it is
    (Geng et al. 2025, eq. 12). The x0 prediction is the map to 0.

    Args:
        u: `u(x, t, span=t − s)`.
    """

    def step(x: Array, interval: Any) -> tuple[Array, Array]:
        t, s = interval
        return x - (t - s) * u(x, t, span=t - s), x - t * u(x, t, span=t)

    return scan_steps(step, noise, (times[:-1], times[1:]), trajectory)


# --- the method -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanFlowFlags(TimeFlags):
    """MeanFlow."""

    equal_share: float = setting(
        0.75, "share of the rows that train the velocity itself (meanflow)", at_least=0, at_most=1
    )
    target_scale: float = setting(
        1.0,
        "scale of the classifier-free guidance that a meanflow model learns as its own",
        at_least=1,
    )
    target_mix: float = setting(
        0.0,
        "share of the model's own prediction in that guidance, whose scale is then target_scale / "
        "(1 - target_mix)",
        at_least=0,
        at_most=0.99,
    )
    target_interval: tuple[float, ...] = setting(
        ALWAYS, "two times between which a meanflow model learns to be guided; 1 is noise"
    )
    tangent: str = setting(
        "prediction",
        "velocity to differentiate along (meanflow): the model's prediction, or data: noise - data",
        choices=("prediction", "data"),
    )
    adaptive_power: float = setting(
        0.0,
        "a row's loss e is divided by (e + 0.01) to this power (meanflow); 1 as in the paper",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True)
class MeanFlow(MeanFlowFlags, Flow):
    """Match u to v − (t − r)·du/dt, in which du/dt is of the network itself, without gradient:
    E |u(x_t, t, r) − (v − (t − r)·du/dt)|² (Geng et al. 2025, eq. 9 and 10). du/dt is along the
    flow, whose velocity is the network's own u(x_t, t, t) (improved mean flows, Geng et al. 2025,
    arXiv 2512.02012) or, with `tangent` data, the noisier noise − data of the first paper.

    With `target_scale` ω and `target_mix` κ, v is guided: ω·v + κ·u(x_t, t, t; label) + (1 − ω −
    κ)·u(x_t, t, t; null) (eq. 19), for t in `target_interval`. Labels are dropped in rows with r =
    t alone. With a teacher, a frozen flow, v is its velocity at x_t, which varies less than noise −
    data.

    With `adaptive_power` p, the gradient is that of each row's squared error e, a sum over its
    values, over (e + 0.01)^p, a constant divisor (eq. 22, up to a factor); the value stays the mean
    error. du/dt is clipped, which the paper does not do.
    """

    title = "MeanFlow"
    solvers = {"map": follow_map}  # noqa: RUF012
    takes_span = True
    is_guidable = False
    default_steps = 1
    default_time_scale = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_interval("target_interval", self.target_interval)

    def loss(
        self,
        model: Any,
        batch: Any,
        key: Key[Array, ""],
        *,
        label_dropout: float = 0.0,
        to_input: ToModelInput | None = None,
        null: Any = None,
        teacher: TeacherVelocity | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        n_classes = model.config.n_classes
        keys, data, noise = sample_data_and_noise(batch, key, to_input or pixels_to_input)
        t, r = sample_times(keys.time, self.at_shape(data).quantile, self.equal_share)
        drop = self._rows_to_drop(keys.drop, t == r, label_dropout)
        x_t, v = interpolate(data, noise, t)
        span, label = t - r, drop_labels(batch.label, drop, n_classes, null)

        frozen = model.frozen()
        if teacher:
            v = teacher(x_t, t, label)
        elif self.learns_guidance:
            no_label = drop_labels(label, jnp.ones_like(drop), n_classes, null)
            low, high = self.target_interval
            is_guided = ~drop & (low <= t) & (t <= high)
            v = jnp.where(_column(is_guided, v), self.guide(frozen, v, x_t, t, label, no_label), v)
        # A difference of two outputs over 0.01: TF32 and bfloat16 would leave only noise of it.
        with jax.default_matmul_precision("float32"):
            is_own = self.tangent == "prediction" and not teacher
            tangent = frozen(x_t, t, label) if is_own else v
            slope = derivative(lambda x, t, s: frozen(x, t, label, span=s), x_t, t, r, tangent)
        slope = jnp.clip(slope, -MAX_SLOPE, MAX_SLOPE)
        target = jax.lax.stop_gradient(v - _column(span, v) * slope)
        error = jnp.square(model(x_t, t, label, span=span) - target).mean((1, 2, 3))
        weight = jax.lax.stop_gradient(error + 0.01 / data[0].size) ** -self.adaptive_power
        weighted = (weight * error).mean()
        # What is reported is the error; its gradient is the weighted one's.
        value = weighted + jax.lax.stop_gradient(error.mean() - weighted)
        return value, loss_by_time(t, error)

    @property
    def learns_guidance(self) -> bool:
        """True if the velocity to match is guided by the network itself."""
        return self.target_scale != 1 or self.target_mix != 0

    def extra_passes(self, *, is_taught: bool) -> int:
        """Count the passes of the difference, of its tangent and of the guidance."""
        n_guided = self.learns_guidance + (self.target_mix != 0)
        return 2 if is_taught else 2 + (self.tangent == "prediction") + n_guided

    def guide(
        self,
        network: Any,
        v: Float[Array, "b *s"],
        x: Float[Array, "b *s"],
        t: Float[Array, "b"],
        label: Any,
        null: Any,
    ) -> Float[Array, "b *s"]:
        """Guide the velocity by the network's own predictions (Geng et al. 2025, eq. 19)."""
        w, k = self.target_scale, self.target_mix
        guided = w * v + (1 - w - k) * network(x, t, null)
        return guided + k * network(x, t, label) if k else guided

    def _rows_to_drop(
        self, key: Key[Array, "b"], is_equal: Bool[Array, "b"], label_dropout: float
    ) -> Bool[Array, "b"]:
        """Choose rows with r = t, so many that they are a share of `label_dropout` of all."""
        share = min(1.0, label_dropout / self.equal_share) if self.equal_share else 0.0
        return is_equal & jax.vmap(lambda key: jax.random.bernoulli(key, share))(key)

    def describe(self) -> str:
        return (
            "MeanFlow: x_t = (1 − t)·data + t·noise; t = 1 is noise. It predicts the mean of the "
            "velocity noise − data over the span before t: x_s = x_t − (t − s)·model(x_t, t, "
            "label, span=t − s), and one step is noise − model(noise, 1, label, span=1)."
        )

    def check_training(self, *, time_scale: float, label_dropout: float, is_taught: bool) -> None:
        """Reject a time scale at which the derivative by differences is wrong, guidance that has
        nothing to guide by, and labels dropped where none are.
        """
        if time_scale > MAX_TIME_SCALE:
            raise UserError(
                f"--time_scale {time_scale:g}: the features of t turn too fast for the derivative "
                "that MeanFlow needs; train with --time_scale 1, which with "
                "--init_from starts the embedding of t anew"
            )
        if label_dropout > self.equal_share:
            raise UserError(
                f"--label_dropout {label_dropout:g}: labels are dropped in rows with equal times "
                f"alone, a share of --equal_share {self.equal_share:g}; it must not be larger"
            )
        if self.learns_guidance and not label_dropout:
            raise UserError(
                f"--target_scale {self.target_scale:g} --target_mix {self.target_mix:g}: guidance "
                "needs labels, some of them dropped (--label_dropout)"
            )
        if self.target_interval != ALWAYS and not self.learns_guidance:
            raise UserError("--target_interval has no effect without --target_scale")
        if is_taught and self.tangent != "prediction":
            raise UserError("--tangent data: with --teacher the tangent is its velocity")
        if is_taught and self.learns_guidance:
            raise UserError(
                "--target_scale and --target_mix are for training without --teacher, which is "
                "guided at --teacher_scale"
            )

    def solve(
        self,
        predict: Any,
        noise: Float[Array, "b *s"],
        steps: Float[Array, "times"],
        fresh_noise: FreshNoise,
        *,
        solver: str,
        eta: float = 0.0,
        clip: bool = False,
        trajectory: bool = False,
    ) -> Solution:
        return self.solvers[solver](predict, noise, steps, trajectory=trajectory)
