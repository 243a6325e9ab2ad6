"""Diffusion in discrete steps (Ho et al. 2020): the schedule of noise, and a step in closed form.

A picture at a step is √ᾱ·data + √(1 − ᾱ)·noise; step 0 is almost the data, the last almost noise. A
`Chain` holds what is to be known of its steps. The formulas here take it at one step, or at a step
for each picture. They know nothing of models, losses or random numbers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from methods.rectified_flow import Objective, ToModelInput, loss_by_time, sample_loss_inputs, pixels_to_input
from sampling import FreshNoise, Solution, scan_steps

N_STEPS = 1000
BETAS = 1e-4, 2e-2  # of the first step and the last, between them linear (Ho et al. 2020, §4)
BYTE_STEP = 2 / 255  # between two of a byte's values in −1 … 1
Table = Any  # NumPy's array over steps, or JAX's of some of them


# --- the schedule ---------------------------------------------------------------------------------


class NoiseSchedule(NamedTuple):
    """Steps in order from data to noise, each field an array over them; or what that is at some.

    "Before" is the step before in the chain, nearer to the data; before the first are the data.
    """

    step: Table  # 0 … N_STEPS − 1: what a model is told
    signal: Table  # √ᾱ
    noise: Table  # √(1 − ᾱ)
    signal_before: Table
    noise_before: Table  # 0 before the first
    of_data: Table  # the data's weight in the posterior's mean
    of_x: Table  # x's
    most: Table  # log β: the variance of a step if data are pure noise
    least: Table  # log β̃: if all data are one picture


def noise_schedule(n_steps: int = N_STEPS) -> NoiseSchedule:
    """All steps, or `n_steps` of them from first to last in even strides; of one, the last.

    Where steps are left out, β of the rest follows from their ᾱ (Nichol & Dhariwal 2021, eq. 19).
    The arrays are float64.
    """
    first = 0 if n_steps > 1 else N_STEPS - 1
    step = np.round(np.linspace(first, N_STEPS - 1, n_steps)).astype(np.int32)
    alpha_bar = np.cumprod(1 - np.linspace(*BETAS, N_STEPS))[step]
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    # 0 at the first step, and of 0 there is no logarithm: the second's in its place, as in N & D.
    variance[0] = variance[1] if n_steps > 1 else beta[0]
    return NoiseSchedule(
        step=step,
        signal=np.sqrt(alpha_bar),
        noise=np.sqrt(1 - alpha_bar),
        signal_before=np.sqrt(before),
        noise_before=np.sqrt(1 - before),
        of_data=np.sqrt(before) * beta / (1 - alpha_bar),
        of_x=np.sqrt(alpha_bar / before) * (1 - before) / (1 - alpha_bar),
        most=np.log(beta),
        least=np.log(variance),
    )


def truncate_schedule(chain: NoiseSchedule, t: float) -> NoiseSchedule:
    """The chain from the data to that of its steps which is nearest to a model's t."""
    n = np.abs(chain.step / N_STEPS - t).argmin() + 1
    return NoiseSchedule(*(table[:n] for table in chain))


def gather_steps(chain: NoiseSchedule, k: Int[Array, "b"], n_axes: int) -> NoiseSchedule:
    """The chain at a k-th step for each picture, for arrays with so many axes."""
    shape = (-1, *[1] * (n_axes - 1))
    return jax.tree.map(lambda table: jnp.asarray(table)[k].reshape(shape), chain)


def model_time(step: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """A step as a model's t, in 0 … 1: times a `time_scale` of 1000 it is the step again."""
    return step / N_STEPS


# --- one step -------------------------------------------------------------------------------------


def diffuse(data: Float[Array, "*s"], noise: Float[Array, "*s"], at: NoiseSchedule) -> Float[Array, "*s"]:
    """x = √ᾱ·data + √(1 − ᾱ)·noise (Ho et al. 2020, eq. 4)."""
    return at.signal * data + at.noise * noise


def posterior_mean(
    data: Float[Array, "*s"], x: Float[Array, "*s"], at: NoiseSchedule
) -> Float[Array, "*s"]:
    """The mean of the step before, where data and x are known (Ho et al. 2020, eq. 7)."""
    return at.of_data * data + at.of_x * x


def step_noise_std(log_variance: Float[Array, "*s"], at: NoiseSchedule) -> Float[Array, "*s"]:
    """The standard deviation of the noise that a step adds, which at the first step is none."""
    return jnp.where(at.noise_before > 0, jnp.exp(log_variance / 2), 0.0)


class Prediction(NamedTuple):
    """What a model is trained to say, what that makes the data, and a squared error's weight that
    makes it one of the data (Hang et al. 2023, §3.3), as a function of SNR = ᾱ / (1 − ᾱ).
    """

    target: Callable[[Array, Array, NoiseSchedule], Array]  # of (data, noise)
    data: Callable[[Array, Array, NoiseSchedule], Array]  # of (what the model says, x)
    weight: Callable[[Array], Array]


PREDICTIONS = {
    "epsilon": Prediction(  # Ho et al. 2020, §3.2
        target=lambda data, noise, at: noise,
        data=lambda said, x, at: (x - at.noise * said) / at.signal,
        weight=lambda snr: 1 / snr,
    ),
    "x0": Prediction(
        target=lambda data, noise, at: data,
        data=lambda said, x, at: said,
        weight=lambda snr: jnp.ones_like(snr),
    ),
    "v": Prediction(  # Salimans & Ho 2022, appendix D
        target=lambda data, noise, at: at.signal * noise - at.noise * data,
        data=lambda said, x, at: at.signal * x - at.noise * said,
        weight=lambda snr: 1 / (snr + 1),
    ),
}


def min_snr_weight(prediction: str, gamma: float, at: NoiseSchedule) -> Float[Array, "*s"]:
    """The weight of a squared error that counts as one of the data with weight min(SNR, γ) (Hang et
    al. 2023, eq. 10).
    """
    snr = jnp.square(at.signal / at.noise)
    return jnp.minimum(snr, gamma) * PREDICTIONS[prediction].weight(snr)


class Estimate(NamedTuple):
    """Of the data, and of the log-variance of the step before."""

    data: Float[Array, "*s c"]
    log_variance: Float[Array, "*s c"]


def interpret_output(
    said: Float[Array, "*s o"],
    x: Float[Array, "*s c"],
    at: NoiseSchedule,
    *,
    prediction: str,
    clip: bool = False,
) -> Estimate:
    """What a model says at x, read.

    Args:
        said: as many channels as x has, and the variance is β̃; or twice as many, and the second
            half tells where it lies: −1 is β̃, 1 is β, straight in the logarithm between (Nichol &
            Dhariwal 2021, eq. 15).
        clip: the data to −1 … 1, where pictures are.
    """
    n_channels = x.shape[-1]
    data = PREDICTIONS[prediction].data(said[..., :n_channels], x, at)
    data = jnp.clip(data, -1, 1) if clip else data
    if said.shape[-1] == n_channels:
        return Estimate(data, jnp.broadcast_to(at.least, x.shape).astype(x.dtype))
    share = (said[..., n_channels:] + 1) / 2
    return Estimate(data, share * at.most + (1 - share) * at.least)


# --- the variational bound ------------------------------------------------------------------------


def bound_in_bits(
    guess: Estimate, data: Float[Array, "b h w c"], x: Float[Array, "b h w c"], at: NoiseSchedule
) -> Float[Array, "b"]:
    """A step's term of the variational bound in bits per dimension: the divergence of the step that
    a guess makes from the posterior, at the first step the cost of the bytes (Ho et al. 2020, eq. 5
    and 13).
    """
    mean = posterior_mean(guess.data, x, at)
    divergence = gaussian_kl(posterior_mean(data, x, at), at.least, mean, guess.log_variance)
    cost = -log_likelihood(data, mean, guess.log_variance)
    return jnp.where(at.noise_before > 0, divergence, cost).mean((1, 2, 3)) / math.log(2)


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
    """Of bytes in −1 … 1 under a Gaussian: the log of its mass within half a level of each. What is
    beyond the ends belongs to them (Ho et al. 2020, eq. 13).
    """
    per_std = jnp.exp(-log_variance / 2)

    def mass_below(y):
        return jax.scipy.special.ndtr(y * per_std)

    # By symmetry always on the lower side, where a float can tell small masses from each other.
    distance = -jnp.abs(data - mean)
    inside = mass_below(distance + BYTE_STEP / 2) - mass_below(distance - BYTE_STEP / 2)
    below = mass_below(data - mean + BYTE_STEP / 2)
    above = mass_below(mean - data + BYTE_STEP / 2)
    mass = jnp.where(data < -0.999, below, jnp.where(data > 0.999, above, inside))
    return jnp.log(jnp.maximum(mass, 1e-12))


Denoiser = Callable[[Float[Array, "b *s"], NoiseSchedule], Estimate]  # x at a step


# --- down a chain ---------------------------------------------------------------------------------


def run_reverse_process(step, noise: Float[Array, "b *s"], chain: NoiseSchedule, trajectory: bool) -> Solution:
    """Apply `step(x, at) -> (x, estimate of the data)` from the chain's last step to its first."""
    places = jax.tree.map(lambda table: jnp.asarray(table)[::-1], chain)
    return scan_steps(step, noise, places, trajectory)


def ancestral(read: Denoiser, noise, chain: NoiseSchedule, renew: FreshNoise, *, trajectory: bool = False):
    """Draw each step from the posterior of the estimated data (Ho et al. 2020, alg. 2)."""

    def step(x, at):
        data, log_variance = read(x, at)
        mean = posterior_mean(data, x, at)
        return mean + step_noise_std(log_variance, at) * renew(at.step), data

    return run_reverse_process(step, noise, chain, trajectory)


def ddim(
    read: Denoiser, noise, chain: NoiseSchedule, renew: FreshNoise, *, eta: float = 0.0, trajectory: bool = False
) -> Solution:
    """The same marginals with less fresh noise: η = 0 adds none, η = 1 as much as `ancestral` does
    where no variance is learned (Song et al. 2021, eq. 12 and 16).
    """

    def step(x, at):
        data, _ = read(x, at)
        epsilon = (x - at.signal * data) / at.noise
        sigma = eta * step_noise_std(at.least, at)
        kept = jnp.sqrt(jnp.maximum(at.noise_before**2 - sigma**2, 0))
        x = at.signal_before * data + kept * epsilon
        return x + sigma * renew(at.step) if eta else x, data

    return run_reverse_process(step, noise, chain, trajectory)


DDPM_SOLVERS = {"ddpm": ancestral, "ddim": ddim}  # of a chain
BOUND_WEIGHT = 1e-3  # of the variational bound, the sum over all steps


def ddpm_loss(
    *,
    prediction: str = "epsilon",
    learned_sigma: bool = False,
    min_snr_gamma: float = 0.0,
    label_dropout: float = 0.0,
    read: ToModelInput = pixels_to_input,
) -> Objective:
    """Match the noise of a step drawn from all alike: E |model(x, t, label) − noise|² (Ho et al.
    2020, eq. 14).

    Args:
        prediction: what else to match, of `diffusion.PREDICTIONS`.
        learned_sigma: the model has twice the channels, and the second half learns each step's
            variance from the variational bound, which leaves the first half alone (Nichol &
            Dhariwal 2021, eq. 16 with λ = 0.001, in bits per dimension as in their code; of latents
            the first step is taken for one of bytes, as in DiT's).
        min_snr_gamma: above 0, `diffusion.min_snr` weighs the squared errors of the steps.
        label_dropout, read: as in `rectified_flow_loss`.
    """
    steps, target = noise_schedule(), PREDICTIONS[prediction].target

    def loss(model, batch, key):
        how = {"label_dropout": label_dropout, "read": read}
        keys, data, noise, label = sample_loss_inputs(batch, key, n_classes=model.config.n_classes, **how)
        k = jax.vmap(lambda key: jax.random.randint(key, (), 0, N_STEPS))(keys.time)
        t, at = model_time(k), gather_steps(steps, k, data.ndim)

        x = diffuse(data, noise, at)
        said, place = jnp.split(model(x, t, label), [data.shape[-1]], axis=-1)
        squares = jnp.square(said - target(data, noise, at))
        if min_snr_gamma:
            squares *= min_snr_weight(prediction, min_snr_gamma, at)
        error = squares.mean((1, 2, 3))
        if learned_sigma:
            said = jnp.concatenate([jax.lax.stop_gradient(said), place], axis=-1)
            guess = interpret_output(said, x, at, prediction=prediction)
            error += BOUND_WEIGHT * N_STEPS * bound_in_bits(guess, data, x, at)
        return error.mean(), loss_by_time(t, error)

    return loss
