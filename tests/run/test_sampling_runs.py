"""On Gaussian data the flow is known in closed form: the solvers follow it, at their order. The
solvers of DDPM equal an independent implementation of the papers' algorithms.
"""

from functools import partial

import jax
import numpy as np
from sampling_cases import MEAN, STD, optimal_denoise, sample_ancestral, sample_moments

from methods import ddpm
from methods.ddpm import ddim


@partial(jax.jit, static_argnames=("n_steps", "fresh_noise"))
def sample_ddim(noise, *, fresh_noise, n_steps):
    return ddim(optimal_denoise, noise, ddpm.noise_schedule(n_steps), fresh_noise).x


def test_the_optimal_prediction_samples_gaussian_data():
    """With all the steps; DDIM, which adds no noise, also with few."""
    np.testing.assert_allclose(sample_moments(sample_ancestral, 1000), [MEAN, STD], atol=0.01)
    np.testing.assert_allclose(sample_moments(sample_ddim, 1000), [MEAN, STD], atol=0.01)
    np.testing.assert_allclose(sample_moments(sample_ddim, 100), [MEAN, STD], atol=0.02)
