"""Denoising diffusion in discrete steps (Ho et al. 2020).

Read in this order: the noise schedule, one step in closed form, what a model predicts, the
variational bound, the solvers, the method with its loss. At a step x = √ᾱ·data + √(1 − ᾱ)·noise:
step 0 is almost data, the last step almost noise. Steps map to the model's t by `model_time`, so
here too t = 1 is noise.

The inputs of the loss are those of `methods/method.py`. A solver sees only `denoise(x, schedule)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

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
from sampling import FreshNoise, Solution, Velocity, multistep, scan_steps

N_STEPS = 1000
BETAS = 1e-4, 2e-2  # of the first step and the last, linear in between (Ho et al. 2020, §4)
BYTE_STEP = 2 / 255  # distance of neighbouring byte values in −1 … 1
BOUND_WEIGHT = 1e-3  # λ, of the sum of the variational bound over all steps
Table = Any  # an array over steps (NumPy), or one value for each image of a batch (JAX)


# --- the schedule ---------------------------------------------------------------------------------


class NoiseSchedule(NamedTuple):
    """The constants of diffusion steps in order from data to noise, each an array over the steps;
    after `gather_steps`, those of one step for each image of a batch.

    `_prev` is the step before, nearer to the data; before step 0 is the data itself.
    """

    step: Table  # 0 … N_STEPS − 1; see `model_time`
    signal: Table  # √ᾱ
    noise: Table  # √(1 − ᾱ)
    signal_prev: Table
    noise_prev: Table  # 0 at the first step
    coef_x0: Table  # weight of the data in the posterior's mean
    coef_xt: Table  # weight of x in the posterior's mean
    log_var_max: Table  # log β: variance of a step if the data are pure noise
    log_var_min: Table  # log β̃: variance of a step if all data are one image


def noise_schedule(n_steps: int = N_STEPS) -> NoiseSchedule:
    """All steps, or `n_steps` of them from first to last in even strides; of one, the last.

    Where steps are left out, β of the rest follows from their ᾱ (Nichol & Dhariwal 2021, eq. 19).
    Strides are summed and then rounded, halves to even: the published code of DiT takes the same
    steps. The arrays are float64.
    """
    if n_steps > 1:
        stride = (N_STEPS - 1) / (n_steps - 1)
        step = np.round(np.cumsum([0.0] + [stride] * (n_steps - 1))).astype(np.int32)
    else:
        step = np.array([N_STEPS - 1], np.int32)
    alpha_bar = np.cumprod(1 - np.linspace(*BETAS, N_STEPS))[step]
    alpha_bar_prev = np.concatenate([[1.0], alpha_bar[:-1]])
    beta = 1 - alpha_bar / alpha_bar_prev
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    # It is 0 at the first step and has no logarithm there: take the second's, as Nichol & Dhariwal.
    variance[0] = variance[1] if n_steps > 1 else beta[0]
    return NoiseSchedule(
        step=step,
        signal=np.sqrt(alpha_bar),
        noise=np.sqrt(1 - alpha_bar),
        signal_prev=np.sqrt(alpha_bar_prev),
        noise_prev=np.sqrt(1 - alpha_bar_prev),
        coef_x0=np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar),
        coef_xt=np.sqrt(alpha_bar / alpha_bar_prev) * (1 - alpha_bar_prev) / (1 - alpha_bar),
        log_var_max=np.log(beta),
        log_var_min=np.log(variance),
    )


def truncate_schedule(schedule: NoiseSchedule, t: float) -> NoiseSchedule:
    """The steps from the data up to the one that is nearest to a model's time t."""
    n = np.abs(schedule.step / N_STEPS - t).argmin() + 1
    return NoiseSchedule(*(table[:n] for table in schedule))


def gather_steps(schedule: NoiseSchedule, k: Int[Array, "b"], n_axes: int) -> NoiseSchedule:
    """The constants of a k-th step for each image, shaped to broadcast against arrays of `n_axes`
    axes.
    """
    shape = (-1, *[1] * (n_axes - 1))
    return jax.tree.map(lambda table: jnp.asarray(table)[k].reshape(shape), schedule)


def model_time(step: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Step index → model time in [0, 1]: times a `time_scale` of 1000 it is the step again."""
    return step / N_STEPS


# --- one step -------------------------------------------------------------------------------------


def diffuse(
    data: Float[Array, "*s"], noise: Float[Array, "*s"], schedule: NoiseSchedule
) -> Float[Array, "*s"]:
    """x = √ᾱ·data + √(1 − ᾱ)·noise (Ho et al. 2020, eq. 4)."""
    return schedule.signal * data + schedule.noise * noise


def posterior_mean(
    data: Float[Array, "*s"], x: Float[Array, "*s"], schedule: NoiseSchedule
) -> Float[Array, "*s"]:
    """The mean of x at the step before, given the data and x (Ho et al. 2020, eq. 7)."""
    return schedule.coef_x0 * data + schedule.coef_xt * x


def step_noise_std(log_variance: Float[Array, "*s"], schedule: NoiseSchedule) -> Float[Array, "*s"]:
    """The standard deviation of the noise that a reverse step adds; 0 at the first step."""
    return jnp.where(schedule.noise_prev > 0, jnp.exp(log_variance / 2), 0.0)


# --- what a model predicts ------------------------------------------------------------------------


class Prediction(NamedTuple):
    """A target to train a model on, and how to turn its output into the clean image.

    `x0_weight` is a function of SNR = ᾱ / (1 − ᾱ): the weight of the output's squared error that
    makes it the squared error of x0 (Hang et al. 2023, §3.3).
    """

    target: Callable[[Array, Array, NoiseSchedule], Array]  # (data, noise, schedule) →
    to_x0: Callable[[Array, Array, NoiseSchedule], Array]  # (output, x, schedule) →
    x0_weight: Callable[[Array], Array]


PREDICTIONS = {
    "epsilon": Prediction(  # Ho et al. 2020, §3.2
        target=lambda data, noise, schedule: noise,
        to_x0=lambda output, x, schedule: (x - schedule.noise * output) / schedule.signal,
        x0_weight=lambda snr: 1 / snr,
    ),
    "x0": Prediction(
        target=lambda data, noise, schedule: data,
        to_x0=lambda output, x, schedule: output,
        x0_weight=lambda snr: jnp.ones_like(snr),
    ),
    "v": Prediction(  # Salimans & Ho 2022, appendix D
        target=lambda data, noise, schedule: schedule.signal * noise - schedule.noise * data,
        to_x0=lambda output, x, schedule: schedule.signal * x - schedule.noise * output,
        x0_weight=lambda snr: 1 / (snr + 1),
    ),
}


def min_snr_weight(prediction: str, gamma: float, schedule: NoiseSchedule) -> Float[Array, "*s"]:
    """The weight of the output's squared error for which x0's has weight min(SNR, γ) (Hang et al.
    2023, eq. 10).
    """
    snr = jnp.square(schedule.signal / schedule.noise)
    return jnp.minimum(snr, gamma) * PREDICTIONS[prediction].x0_weight(snr)


# The variance of a reverse step where none is learned (Ho et al. 2020, §3.2).
FIXED_VARIANCES: dict[str, Callable[[NoiseSchedule], Array]] = {
    "posterior": lambda schedule: schedule.log_var_min,
    "beta": lambda schedule: schedule.log_var_max,
}


class Estimate(NamedTuple):
    """Estimates of the clean image and of the log-variance of the step before."""

    x0: Float[Array, "*s c"]
    log_variance: Float[Array, "*s c"]


def interpret_output(
    output: Float[Array, "*s o"],
    x: Float[Array, "*s c"],
    schedule: NoiseSchedule,
    *,
    prediction: str,
    fixed_variance: str = "posterior",
    clip: bool = False,
) -> Estimate:
    """Turn a model's output at x into x0 and a variance.

    Args:
        output: with as many channels as x, the variance is fixed. With twice as many, the second
            half is where it lies: −1 is β̃, 1 is β, linear in the logarithm between (Nichol &
            Dhariwal 2021, eq. 15).
        prediction: a key of `PREDICTIONS`.
        fixed_variance: a key of `FIXED_VARIANCES`.
        clip: clip x0 to −1 … 1, the range of pixels.
    """
    n_channels = x.shape[-1]
    x0 = PREDICTIONS[prediction].to_x0(output[..., :n_channels], x, schedule)
    x0 = jnp.clip(x0, -1, 1) if clip else x0
    if output.shape[-1] == n_channels:
        log_variance = FIXED_VARIANCES[fixed_variance](schedule)
        return Estimate(x0, jnp.broadcast_to(log_variance, x.shape).astype(x.dtype))
    var_fraction = (output[..., n_channels:] + 1) / 2
    log_variance = var_fraction * schedule.log_var_max + (1 - var_fraction) * schedule.log_var_min
    return Estimate(x0, log_variance)


# --- the variational bound ------------------------------------------------------------------------


def bound_in_bits(
    estimate: Estimate,
    data: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
) -> Float[Array, "b"]:
    """A step's term of the variational bound in bits per dimension: the divergence of the estimated
    reverse step from the posterior; at the first step the code length of the bytes (Ho et al. 2020,
    eq. 5 and 13).
    """
    mean = posterior_mean(estimate.x0, x, schedule)
    true_mean = posterior_mean(data, x, schedule)
    divergence = gaussian_kl(true_mean, schedule.log_var_min, mean, estimate.log_variance)
    code_length = -log_likelihood(data, mean, estimate.log_variance)
    nats = jnp.where(schedule.noise_prev > 0, divergence, code_length)
    return nats.mean((1, 2, 3)) / math.log(2)


def gaussian_kl(
    mean: Float[Array, "*s"],
    log_variance: Float[Array, "..."],
    other_mean: Float[Array, "*s"],
    other_log_variance: Float[Array, "*s"],
) -> Float[Array, "*s"]:
    """KL(N(mean, variance) ‖ N(other …)) in nats, of each dimension."""
    ratio = log_variance - other_log_variance
    distance = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    return (jnp.exp(ratio) - 1 - ratio + distance) / 2


def log_likelihood(
    data: Float[Array, "*s"], mean: Float[Array, "*s"], log_variance: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Log-likelihood of bytes in −1 … 1 under a Gaussian: the log of its mass within half a byte
    step of each. The tails count to the first and the last byte (Ho et al. 2020, eq. 13).
    """
    per_std = jnp.exp(-log_variance / 2)

    def mass_below(y: Array) -> Array:
        return jax.scipy.special.ndtr(y * per_std)

    # By symmetry always on the lower side, where a float can tell small masses from each other.
    distance = -jnp.abs(data - mean)
    inside = mass_below(distance + BYTE_STEP / 2) - mass_below(distance - BYTE_STEP / 2)
    below = mass_below(data - mean + BYTE_STEP / 2)
    above = mass_below(mean - data + BYTE_STEP / 2)
    mass = jnp.where(data < -0.999, below, jnp.where(data > 0.999, above, inside))
    return jnp.log(jnp.maximum(mass, 1e-12))


# --- solvers --------------------------------------------------------------------------------------

Denoiser = Callable[[Float[Array, "b *s"], NoiseSchedule], Estimate]  # denoise(x, schedule)


def run_reverse_process(
    step: Callable[..., Any], noise: Float[Array, "b *s"], schedule: NoiseSchedule, trajectory: bool
) -> Solution:
    """Apply `step(x, schedule) -> (x, x0)` from the schedule's last step to its first."""
    return scan_steps(step, noise, from_noise_to_data(schedule), trajectory)


def from_noise_to_data(schedule: NoiseSchedule) -> NoiseSchedule:
    """Return the schedule from its last step to its first."""
    return jax.tree.map(lambda table: jnp.asarray(table)[::-1], schedule)


def ancestral(
    denoise: Denoiser,
    noise: Float[Array, "b *s"],
    schedule: NoiseSchedule,
    fresh_noise: FreshNoise,
    *,
    trajectory: bool = False,
) -> Solution:
    """Ancestral sampling: sample the step before from the posterior of the estimated x0 (Ho et al.
    2020, alg. 2).
    """

    def step(x: Array, schedule: NoiseSchedule) -> tuple[Array, Array]:
        x0, log_variance = denoise(x, schedule)
        mean = posterior_mean(x0, x, schedule)
        return mean + step_noise_std(log_variance, schedule) * fresh_noise(schedule.step), x0

    return run_reverse_process(step, noise, schedule, trajectory)


def ddim(
    denoise: Denoiser,
    noise: Float[Array, "b *s"],
    schedule: NoiseSchedule,
    fresh_noise: FreshNoise,
    *,
    eta: float = 0.0,
    trajectory: bool = False,
) -> Solution:
    """DDIM: the same marginals with less fresh noise. η = 0 adds none, η = 1 as much as `ancestral`
    does where no variance is learned (Song et al. 2021, eq. 12 and 16).
    """

    def step(x: Array, schedule: NoiseSchedule) -> tuple[Array, Array]:
        x0, _ = denoise(x, schedule)
        epsilon = (x - schedule.signal * x0) / schedule.noise
        sigma = eta * step_noise_std(schedule.log_var_min, schedule)
        coef_epsilon = jnp.sqrt(jnp.maximum(schedule.noise_prev**2 - sigma**2, 0))
        x = schedule.signal_prev * x0 + coef_epsilon * epsilon
        return x + sigma * fresh_noise(schedule.step) if eta else x, x0

    return run_reverse_process(step, noise, schedule, trajectory)


def dpmpp_2m(
    denoise: Denoiser,
    noise: Float[Array, "b *s"],
    schedule: NoiseSchedule,
    fresh_noise: FreshNoise,
    *,
    trajectory: bool = False,
) -> Solution:
    """DPM-Solver++(2M) on the steps of DDIM: see `sampling.multistep`."""
    steps = from_noise_to_data(schedule)
    return multistep(
        lambda x, step: denoise(x, step).x0,
        noise,
        steps,
        signal=jnp.append(steps.signal, 1.0),
        sigma=jnp.append(steps.noise, 0.0),
        trajectory=trajectory,
    )


DDPM_SOLVERS = {"ddpm": ancestral, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


# --- the method -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DDPMFlags:
    """DDPM."""

    prediction: str = setting(
        "epsilon", "output of a ddpm model: epsilon, x0 or v", choices=PREDICTIONS
    )
    learned_sigma: bool = setting(False, "learn the variance of the reverse process too (ddpm)")
    min_snr_gamma: float = setting(
        0.0, "γ of min-SNR loss weighting (ddpm), usually 5; 0 disables it", at_least=0
    )


@dataclass(frozen=True)
class DDPM(DDPMFlags, Method):
    """Match the noise at a uniformly random step: E |model(x, t, label) − noise|² (Ho et al. 2020,
    eq. 14), or another target of `PREDICTIONS`.

    With `learned_sigma` the model has twice the channels, and the second half learns each step's
    variance from the variational bound, whose gradient does not reach the first half (Nichol &
    Dhariwal 2021, eq. 16 with λ = 0.001, in bits per dimension as in their code; with latents the
    first step counts as one of bytes, as in DiT's).

    Args:
        fixed_variance: of ancestral steps without `learned_sigma`, a key of `FIXED_VARIANCES`. It
            is no flag: published DiTs are sampled with beta.
    """

    title = "DDPM"
    solvers = DDPM_SOLVERS
    output_flags = ("prediction", "learned_sigma")
    max_steps = N_STEPS

    fixed_variance: str = field(default="posterior", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.fixed_variance not in FIXED_VARIANCES:
            raise unknown_name("fixed_variance", self.fixed_variance, FIXED_VARIANCES)

    def out_channels(self, channels: int) -> int:
        return channels * (2 if self.learned_sigma else 1)

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
        k = jax.vmap(lambda key: jax.random.randint(key, (), 0, N_STEPS))(keys.time)
        t = model_time(k)
        steps = gather_steps(noise_schedule(), k, data.ndim)

        x = diffuse(data, noise, steps)
        output, var_output = jnp.split(model(x, t, label), [data.shape[-1]], axis=-1)
        squares = jnp.square(output - PREDICTIONS[self.prediction].target(data, noise, steps))
        if self.min_snr_gamma:
            squares *= min_snr_weight(self.prediction, self.min_snr_gamma, steps)
        error = squares.mean((1, 2, 3))
        if self.learned_sigma:
            output = jnp.concatenate([jax.lax.stop_gradient(output), var_output], axis=-1)
            estimate = interpret_output(output, x, steps, prediction=self.prediction)
            error += BOUND_WEIGHT * N_STEPS * bound_in_bits(estimate, data, x, steps)
        return error.mean(), loss_by_time(t, error)

    def describe(self) -> str:
        sigma = ", then the variance of each step" if self.learned_sigma else ""
        return (
            f"DDPM with 1,000 steps, β from 1e-4 to 0.02. It predicts {self.prediction}{sigma}; t "
            "is the step divided by 1,000."
        )

    def check_sampler(self, *, solver: str, n_steps: int, shift: float, eta: float) -> None:
        super().check_sampler(solver=solver, n_steps=n_steps, shift=shift, eta=eta)
        if shift != 1:
            raise UserError(
                f"--shift {shift:g} is for rectified flow; DDPM's steps are evenly spaced"
            )
        if eta and solver != "ddim":
            raise UserError(f"--eta {eta} is for --solver ddim")
        if not 0 <= eta <= 1:
            raise UserError(f"--eta {eta}: must be between 0 and 1")

    def time_steps(
        self, n_steps: int, *, solver: str = "", shift: float = 1.0, start: float = 1.0
    ) -> NoiseSchedule:
        return truncate_schedule(noise_schedule(n_steps), start)

    def state_times(self, steps: NoiseSchedule) -> Float[np.ndarray, "times"]:
        return np.append(steps.step[::-1] / N_STEPS, 0.0)

    def add_noise(
        self, data: Float[Array, "b *s"], noise: Float[Array, "b *s"], steps: NoiseSchedule
    ) -> Float[Array, "b *s"]:
        return diffuse(data, noise, jax.tree.map(lambda table: table[-1], steps))

    def solve(
        self,
        predict: Velocity,
        noise: Float[Array, "b *s"],
        steps: NoiseSchedule,
        fresh_noise: FreshNoise,
        *,
        solver: str,
        eta: float = 0.0,
        clip: bool = False,
        trajectory: bool = False,
    ) -> Solution:
        def denoise(x: Array, schedule: NoiseSchedule) -> Estimate:
            output = predict(x, model_time(schedule.step))
            return interpret_output(
                output,
                x,
                schedule,
                prediction=self.prediction,
                fixed_variance=self.fixed_variance,
                clip=clip,
            )

        if solver == "ddim":
            return ddim(denoise, noise, steps, fresh_noise, eta=eta, trajectory=trajectory)
        return self.solvers[solver](denoise, noise, steps, fresh_noise, trajectory=trajectory)
