"""Path, times and losses are the formulas, and every row has independent random numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from losses_cases import Spy, gaussian_images, key, predict_mean_and_variance

from methods.ddpm import DDPM


def sigma_loss(weights, learned):
    batch, _ = gaussian_images(0.3)
    spy = Spy(10, partial(predict_mean_and_variance, weights))
    return DDPM(learned_sigma=learned).loss(spy, batch, key)[0]


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone():
    """The gradient of the mean is that of the squares; the second half has one of its own."""
    weights = (jnp.float32(0.4), jnp.float32(0.2))
    gradient = jax.grad(sigma_loss)(weights, True)
    plain = jax.grad(sigma_loss)(weights, False)
    assert gradient[0] == plain[0] and plain[1] == 0
    h = 0.05
    slope = [sigma_loss((weights[0], weights[1] + d), True) for d in (h, -h)]
    np.testing.assert_allclose(gradient[1], (slope[0] - slope[1]) / (2 * h), rtol=0.02)
    assert abs(gradient[1]) > 1e-4
