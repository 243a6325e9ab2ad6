"""A flow that predicts the clean image has the loss and the samples of the velocity it implies."""

from functools import partial

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_cases import Spy, batch_of, key

from inference.sampler import SamplerConfig, integrate_from_noise
from methods.rectified_flow import RectifiedFlow

MEAN, STD = 0.3, 0.6
CLEAN = partial(closed_forms.clean_image, mean=MEAN, std=STD)
VELOCITY = partial(closed_forms.velocity, mean=MEAN, std=STD)
SHAPE = (4, 4, 1)


def images():
    return np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), np.uint8)


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_the_loss_of_the_clean_image_is_that_of_its_velocity(noise_scale):
    """Of (x − x̂) / t against noise − data, and below t_min with t_min in place of t."""
    batch = batch_of(64, image=images())
    clean = Spy(10, lambda x, t: jnp.sin(3 * x))
    method = RectifiedFlow("uniform", prediction="x0", t_min=0.2, noise_scale=noise_scale)
    loss, _ = method.loss(clean, batch, key)

    velocity = Spy(10)
    RectifiedFlow("uniform", noise_scale=noise_scale).loss(velocity, batch, key)
    np.testing.assert_array_equal(clean.x, velocity.x)
    t = np.float64(velocity.t).reshape(-1, 1, 1, 1)
    assert (t < 0.2).any()
    data, x = np.asarray(batch.image) / 127.5 - 1, np.float64(velocity.x)
    v = (x - data) / t
    predicted = (x - np.sin(3 * x)) / t
    expected = np.square((predicted - v) * t / np.maximum(t, 0.2)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_noise_of_the_loss_has_the_asked_scale():
    batch = batch_of(64, image=images())
    noises = []
    for scale in (1.0, 3.0):
        spy = Spy(10)
        RectifiedFlow("uniform", noise_scale=scale).loss(spy, batch, key)
        t = spy.t.reshape(-1, 1, 1, 1)
        noises.append((spy.x - (1 - t) * (batch.image / 127.5 - 1)) / t)
    np.testing.assert_allclose(noises[1], 3 * noises[0], atol=1e-3)


@partial(jax.jit, static_argnames=("sampler", "predict"))
def samples(sampler, predict):
    return integrate_from_noise(predict, jnp.arange(8), 3, SHAPE, sampler=sampler, trajectory=True)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "sde"])
def test_samples_by_the_clean_image_are_those_by_its_velocity(solver):
    by_velocity = samples(SamplerConfig(solver, 20), VELOCITY)
    by_image = samples(SamplerConfig(solver, 20, RectifiedFlow(prediction="x0")), CLEAN)
    np.testing.assert_allclose(by_image.x, by_velocity.x, atol=1e-5)
    np.testing.assert_allclose(by_image.estimates, by_velocity.estimates, atol=1e-5)


def test_heun_ends_in_the_clean_image_and_is_of_second_order_before():
    method = RectifiedFlow(prediction="x0")
    solution = samples(SamplerConfig("heun", 8, method), CLEAN)
    by_velocity = samples(SamplerConfig("heun", 8), VELOCITY)
    np.testing.assert_allclose(solution.trajectory[:-1], by_velocity.trajectory[:-1], atol=1e-5)
    np.testing.assert_allclose(solution.x, CLEAN(solution.trajectory[-2], 1 / 8), atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "sde"])
def test_noise_of_another_scale_is_data_of_the_inverse_scale(solver):
    """Data / c under noise of scale 1, times c, are the data under noise of scale c."""
    c = 2.0
    scaled = partial(closed_forms.clean_image, mean=MEAN / c, std=STD / c)
    unit = samples(SamplerConfig(solver, 12, RectifiedFlow(prediction="x0")), scaled)
    method = RectifiedFlow(prediction="x0", noise_scale=c)

    def clean(x, t):
        return c * scaled(x / c, t)

    wide = samples(SamplerConfig(solver, 12, method), clean)
    np.testing.assert_allclose(wide.trajectory, c * unit.trajectory, rtol=1e-5, atol=1e-4)
