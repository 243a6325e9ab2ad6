"""Rectified flow: a straight path from data to noise, and the loss that matches its velocity.

Read in this order: the path, the densities of training times, the method with its loss (Liu et al.
2022; Esser et al. 2024). Time runs from data (t = 0) to noise (t = 1). The solvers are in
`sampling.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from methods.method import (
    Method,
    Metrics,
    ToModelInput,
    loss_by_time,
    pixels_to_input,
    sample_loss_inputs,
)
from runtime.errors import UserError, unknown_name
from runtime.flags import setting
from sampling import (
    SDE_LAST_TIME,
    SOLVERS,
    STOCHASTIC,
    FreshNoise,
    Solution,
    Velocity,
    heun_then_euler,
    time_grid,
)

# A density of t on (0, 1) as its quantile function: uniform u → t.
Density = Callable[[Float[Array, "b"]], Float[Array, "b"]]


# --- the path -------------------------------------------------------------------------------------


def interpolate(data: Float[Array, "b *s"], noise: Float[Array, "b *s"], t: Float[Array, "b"]):
    """The straight path: x_t = (1 − t)·data + t·noise, and its velocity dx_t/dt = noise − data (Liu
    et al. 2022, eq. 1).

    Returns (x_t, velocity), both shaped as `data`.
    """
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * data + t * noise, noise - data


# --- densities of training times ------------------------------------------------------------------


def uniform() -> Density:
    """t ~ U(0, 1) (Liu et al. 2022)."""
    return lambda u: u


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """logit t ~ N(mean, std²): more weight mid-path (Esser et al. 2024, eq. 19)."""
    return lambda u: jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))


def heavy_tailed_mode(scale: float = 1.29) -> Density:
    """Heavy tails around a mode at the middle; scale 0 is uniform (Esser et al. 2024, eq. 20 at
    1 − u, so that it rises). `scale` is in −1 … 2 / (π − 2) = 1.75.
    """
    return lambda u: u + scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)


def shift_time(t: Float[Array, "*n"], shift: float) -> Float[Array, "*n"]:
    """More noise for larger images: s·t / (1 + (s − 1)·t) (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


DENSITIES: dict[str, Callable[["TimeFlags"], Density]] = {
    "uniform": lambda flags: uniform(),
    "logit_normal": lambda flags: logit_normal(flags.logit_mean, flags.logit_std),
    "mode": lambda flags: heavy_tailed_mode(flags.mode_scale),
}


@dataclass(frozen=True)
class TimeFlags:
    """Training times of a flow."""

    time_density: str = setting(
        "logit_normal",
        "density of training times: uniform, logit_normal or mode",
        choices=DENSITIES,
    )
    logit_mean: float = setting(
        0.0, "mean of the logit-normal density", only_with=("time_density", "logit_normal")
    )
    logit_std: float = setting(
        1.0,
        "standard deviation of the logit-normal density",
        above=0,
        only_with=("time_density", "logit_normal"),
    )
    # Beyond these, u → t is first no longer increasing, then leaves 0 … 1.
    mode_scale: float = setting(
        1.29,
        "scale of the mode density",
        at_least=-1,
        at_most=1.75,
        only_with=("time_density", "mode"),
    )
    time_shift: float = setting(
        1.0, "shift of training times towards noise; above 1 for large images", above=0
    )


N_SD3_TIMES = 1000  # SD3's times are multiples of 1 / 1000
TIME_GRIDS = ("even", "sd3")


@dataclass(frozen=True)
class Flow(TimeFlags, Method):
    """A method on the straight path: its training times, and the times of its solvers.

    Args:
        time_grid: of the solvers, before its shift. "even" divides 1 … 0 into equal steps. "sd3" is
            the grid that SD3's own code and diffusers sample by: all steps but the last divide what
            is above the smallest of 1000 times. That one is shifted twice, s² / (999 + s²) in all,
            so the last evaluation is at t = 0.0089 with s = 3. A solver of the SDE has a last time
            of its own. It is no flag of training.
        area: height × width of the data that `time_shift` is for; 0 for all. Data of another area
            are shifted by its square root more (Esser et al. 2024, eq. 23). It is no flag either.
    """

    sampling_flags = ("sample_shift",)

    time_grid: str = field(default="even", kw_only=True)
    area: int = field(default=0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.time_grid not in TIME_GRIDS:
            raise unknown_name("time_grid", self.time_grid, TIME_GRIDS)

    @property
    def density(self) -> Density:
        """The density of training times, before `time_shift`."""
        return DENSITIES[self.time_density](self)

    def at_shape(self, data: Float[Array, "b h w c"]) -> "Flow":
        """Return this method with the training times of data of this shape."""
        _, height, width, _ = data.shape
        factor = math.sqrt(height * width / self.area) if self.area else 1.0
        return self if factor == 1 else replace(self, time_shift=self.time_shift * factor, area=0)

    def quantile(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        """The quantile function of the training times: uniform u → t."""
        return shift_time(self.density(u), self.time_shift)

    def check_sampler(self, *, solver: str, n_steps: int, shift: float, eta: float) -> None:
        super().check_sampler(solver=solver, n_steps=n_steps, shift=shift, eta=eta)
        if not 0 < shift < np.inf:
            raise UserError(f"--shift {shift:g}: must be above 0")
        if eta:
            raise UserError(f"--eta {eta} is for --solver ddim")
        if solver in STOCHASTIC and n_steps < 2:
            raise UserError(f"--solver {solver} takes at least 2 steps: the last one adds no noise")

    def time_steps(
        self, n_steps: int, *, solver: str = "", shift: float = 1.0, start: float = 1.0
    ) -> Float[Array, "{n_steps}+1"]:
        last = None
        if solver in STOCHASTIC:
            last = SDE_LAST_TIME * start
        elif self.time_grid == "sd3":
            last = start * shift**2 / (N_SD3_TIMES - 1 + shift**2)
        return time_grid(n_steps, shift=shift, start=start, last=last)

    def state_times(self, steps: Float[Array, "times"]) -> Float[np.ndarray, "times"]:
        return np.asarray(steps)

    def add_noise(
        self, data: Float[Array, "b *s"], noise: Float[Array, "b *s"], steps: Float[Array, "times"]
    ) -> Float[Array, "b *s"]:
        x_t, _ = interpolate(data, noise, jnp.full(len(data), steps[0]))
        return x_t


# --- the method -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RectifiedFlowFlags(TimeFlags):
    """Rectified flow."""

    prediction: str = setting(
        "velocity",
        "output of the network: velocity or x0 (the clean image)",
        choices=("velocity", "x0"),
    )
    t_min: float = setting(
        0.05,
        "with --prediction x0, the time below which the loss weighs errors no more",
        above=0,
        at_most=1,
        only_with=("prediction", "x0"),
    )
    noise_scale: float = setting(
        1.0, "standard deviation of the noise; above 1 for large images of pixels", above=0
    )


@dataclass(frozen=True)
class RectifiedFlow(RectifiedFlowFlags, Flow):
    """Match the velocity of the straight path: E |model(x_t, t, label) − (noise − data)|² (Liu et
    al. 2022, eq. 1).

    With `prediction` x0 the network gives the clean image, which is simpler than noise in the many
    dimensions of a large patch. The loss is that of the velocity it implies, (x_t − x0) / t, with t
    at least `t_min`: E |model − data|² / max(t, t_min)² (Li & He 2025, JiT).
    """

    title = "rectified flow"
    solvers = SOLVERS
    output_flags = ("prediction", "noise_scale")

    def loss(
        self,
        model: Any,
        batch: Any,
        key: Key[Array, ""],
        *,
        label_dropout: float = 0.0,
        to_input: ToModelInput | None = None,
        null: Any = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        keys, data, noise, label = sample_loss_inputs(
            batch,
            key,
            n_classes=model.config.n_classes,
            label_dropout=label_dropout,
            to_input=to_input or pixels_to_input,
            null=null,
        )
        # The smallest normal number instead of 0, which is no quantile of an unbounded density.
        u = jax.vmap(lambda key: jax.random.uniform(key, minval=jnp.finfo(jnp.float32).tiny))
        t = self.at_shape(data).quantile(u(keys.time))

        x_t, velocity = interpolate(data, self.noise_scale * noise, t)
        output = model(x_t, t, label)
        if self.prediction == "x0":
            error = jnp.square(output - data).mean((1, 2, 3)) / jnp.maximum(t, self.t_min) ** 2
        else:
            error = jnp.square(output - velocity).mean((1, 2, 3))
        return error.mean(), loss_by_time(t, error)

    def describe(self) -> str:
        output = "velocity noise − data" if self.prediction == "velocity" else "clean image"
        noise = "noise" if self.noise_scale == 1 else f"{self.noise_scale:g}·noise"
        return (
            f"Rectified flow: x_t = (1 − t)·data + t·{noise}. It predicts the {output}; t = 1 is "
            "noise."
        )

    def velocity(
        self, output: Float[Array, "b *s"], x: Float[Array, "b *s"], t: Float[Array, "..."]
    ) -> Float[Array, "b *s"]:
        """The velocity at x and t, from the network's output there: the output itself, or that of
        the straight line from the predicted image through x.
        """
        if self.prediction == "velocity":
            return output
        return (x - output) / t

    def solve(
        self,
        predict: Velocity,
        noise: Float[Array, "b *s"],
        steps: Float[Array, "times"],
        fresh_noise: FreshNoise,
        *,
        solver: str,
        eta: float = 0.0,
        clip: bool = False,
        trajectory: bool = False,
    ) -> Solution:
        def velocity(x: Array, t: Array) -> Array:
            return self.velocity(predict(x, t), x, t)

        if solver == "heun" and self.prediction == "x0":  # the velocity at t = 0 is 0 / 0
            return heun_then_euler(velocity, noise, steps, trajectory=trajectory)
        noises = (fresh_noise,) if solver in STOCHASTIC else ()
        return self.solvers[solver](velocity, noise, steps, *noises, trajectory=trajectory)
