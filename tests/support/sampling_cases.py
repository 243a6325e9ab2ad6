"""Inputs and helpers shared by the tests of sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from methods import ddpm
from methods.ddpm import ancestral
from sampling import initial_noise, step_noise

MEAN, STD = 0.3, 0.5
noise = jax.random.normal(jax.random.key(0), (8, 4))


def optimal_denoise(x, schedule, *, learned=False):
    """The optimum for data ~ N(MEAN, STD²): E[noise | x], and the variance of the step before, the
    sum of the posterior's and that of the unknown data.
    """
    variance = (schedule.signal * STD) ** 2 + schedule.noise**2
    epsilon = schedule.noise / variance * (x - schedule.signal * MEAN)
    guess = ddpm.interpret_output(epsilon, x, schedule, prediction="epsilon")
    unknown = schedule.coef_x0**2 * (STD * schedule.noise) ** 2 / variance
    if not learned:
        return guess
    return guess._replace(
        log_variance=jnp.full_like(x, jnp.log(jnp.exp(schedule.log_var_min) + unknown))
    )


def sample_moments(solver, n_steps, **options):
    index = jnp.arange(4000)
    start, fresh_noise = initial_noise(0, index, (8,)), step_noise(0, index, (8,))
    x = np.asarray(solver(n_steps=n_steps, noise=start, fresh_noise=fresh_noise, **options))
    return x.mean(), x.std()


@partial(jax.jit, static_argnames=("n_steps", "learned", "fresh_noise"))
def sample_ancestral(noise, *, fresh_noise, n_steps, learned=False):
    best = partial(optimal_denoise, learned=learned)
    return ancestral(best, noise, ddpm.noise_schedule(n_steps), fresh_noise).x
