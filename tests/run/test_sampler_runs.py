"""A sample is a function of its weights, label, seed and index, however it is batched."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from sampler_cases import (
    DDPM,
    INNER,
    inner_params,  # noqa: F401
    params,  # noqa: F401
    sample,
    sigma_params,  # noqa: F401
)
from tiny_models import CLASSES, SIGMA, weights

from data.batch import EncodedCaption
from inference.sampler import SamplerConfig, StartFrom, WeakModel
from methods import ddpm
from methods.rectified_flow import RectifiedFlow
from model import model_config
from runtime import parallel
from sampling import SOLVERS

DDIM = SamplerConfig("ddim", 3, ddpm.DDPM("v"), eta=0.5)


def one_device():
    return parallel.make_mesh(devices=jax.devices()[:1])


OF_IMAGES = RectifiedFlow(prediction="x0", noise_scale=2.0)
SAMPLERS = {solver: {"sampler": SamplerConfig(solver, 3)} for solver in SOLVERS}
SAMPLERS |= {
    "heun, clean image": {"sampler": SamplerConfig("heun", 3, OF_IMAGES)},
    "sde, clean image": {"sampler": SamplerConfig("sde", 3, OF_IMAGES)},
    "inner guidance": {"config": INNER, "inner_guidance": 1.5},
}


@pytest.mark.parametrize("arguments", SAMPLERS.values(), ids=SAMPLERS)
def test_batches_and_devices_do_not_change_a_sample(inner_params, arguments):
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    sample_with = partial(sample, inner_params, **{"config": INNER} | arguments)
    expected = sample_with(labels).x
    assert expected.shape == (10, 8, 8, 1)
    np.testing.assert_allclose(sample_with(labels, batch_size=4).x, expected, atol=1e-5)
    np.testing.assert_allclose(sample_with(labels, mesh=one_device()).x, expected, atol=1e-5)
    np.testing.assert_allclose(sample_with(labels[:3]).x, expected[:3], atol=1e-5)
    np.testing.assert_allclose(sample_with(labels[4:], first_index=4).x, expected[4:], atol=1e-5)
    assert np.abs(sample_with(labels, seed=6).x - expected).max() > 0.1
    assert np.abs(expected[1] - expected[3]).max() > 0.1  # the same label at another index


@pytest.mark.parametrize("sampler", [DDPM, DDIM], ids=["ddpm", "ddim"])
def test_batches_and_devices_do_not_change_a_sample_of_ddpm(sigma_params, sampler):
    sample_with = partial(sample, sigma_params, config=SIGMA, sampler=sampler)
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    expected = sample_with(labels).x
    # The x0 prediction from predicted noise at the last step has 157 times its rounding error.
    np.testing.assert_allclose(sample_with(labels, batch_size=4).x, expected, atol=1e-3)
    np.testing.assert_allclose(sample_with(labels, mesh=one_device()).x, expected, atol=1e-3)
    assert np.abs(sample_with(labels, seed=6).x - expected).max() > 0.1
    assert np.abs(expected[1] - expected[3]).max() > 0.1


def test_x0_predictions_are_returned_on_request(params, sigma_params):
    for network, config, sampler in (
        (params, CLASSES, SamplerConfig(n_steps=3)),
        (sigma_params, SIGMA, DDPM),
    ):
        sample_with = partial(sample, network, [1, 2, 3], config=config, sampler=sampler)
        x, states, estimates = sample_with(estimates=True, batch_size=2)
        assert states is None and estimates is not None and estimates.shape == (3, 3, 8, 8, 1)
        np.testing.assert_allclose(estimates[-1], x, atol=1e-5)
        assert sample_with(trajectory=True).estimates is None
        np.testing.assert_allclose(sample_with().x, x, atol=1e-3)
        if sampler.clip:
            assert np.abs(estimates).max() <= 1


def test_an_empty_negative_caption_is_the_null():
    shape = {"image_size": 8, "channels": 1, "out_channels": 1, "n_classes": 0}
    text = {"text_length": 5, "text_width": 6, "pooled_width": 4}
    config = model_config("DiT-Nano/8", block="cross_attention", **shape, **text)
    network, rng = weights(config), np.random.default_rng(0)
    tokens, mask = rng.normal(size=(3, 5, 6)).astype("f4"), np.ones((3, 5), bool)
    captions = EncodedCaption(tokens, mask, rng.normal(size=(3, 4)).astype("f4"))
    plain = sample(network, captions, config=config).x
    empty = jax.tree.map(lambda x: np.zeros_like(x[:1]), captions)
    same = sample(network, captions, config=config, negative=empty).x
    np.testing.assert_array_equal(same, plain)
    third = jax.tree.map(lambda x: x[2:], captions)
    other = sample(network, captions, config=config, negative=third).x
    assert np.abs(other - plain).max() > 1e-3


def test_guidance_acts_within_its_interval(params, sigma_params):
    flow = (
        partial(sample, params, [3, 7]),
        SamplerConfig(n_steps=3),
    )  # its times are 1, 2/3 and 1/3
    chain = partial(sample, sigma_params, [3, 7], config=SIGMA), replace(DDIM, n_steps=2)
    for sample_with, sampler in (flow, chain):
        always, never = (
            sample_with(sampler=sampler).x,
            sample_with(sampler=sampler, cfg_scale=1.0).x,
        )
        nowhere = sample_with(sampler=replace(sampler, interval=(0.1, 0.2))).x
        np.testing.assert_allclose(nowhere, never, atol=1e-3)
        early = sample_with(sampler=replace(sampler, interval=(0.6, 1.0))).x
        assert np.abs(early - always).max() > 1e-4 < np.abs(early - never).max()


@pytest.mark.parametrize("solver", ["heun", "sde"])
def test_a_weak_model_guides_by_its_difference(params, solver):
    """A model guided by itself is unguided at any scale; by another, it is led away from that."""
    sample_with = partial(sample, params, [3, 7], sampler=SamplerConfig(solver, 3), cfg_scale=1.0)
    plain = sample_with().x
    itself = WeakModel(params, CLASSES)
    np.testing.assert_allclose(sample_with(weak=itself, weak_scale=3.0).x, plain, atol=1e-5)
    weak = WeakModel(jax.tree.map(lambda x: 0.9 * x, params), CLASSES)
    np.testing.assert_allclose(sample_with(weak=weak, weak_scale=1.0).x, plain, atol=1e-5)
    led = sample_with(weak=weak, weak_scale=3.0).x
    assert np.abs(led - plain).max() > 1e-2
    np.testing.assert_allclose(
        sample_with(weak=weak, weak_scale=3.0, batch_size=8, mesh=one_device()).x, led, atol=1e-5
    )


def test_ddpm_starts_at_the_nearest_step(sigma_params):
    """Even its last step retains a trace of the data."""
    data = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype("f4")
    sampler = replace(DDPM, n_steps=4)  # 0, 333, 666, 999
    sample_with = partial(sample, sigma_params, [1, 2, 3], config=SIGMA, sampler=sampler)
    plain = sample_with(trajectory=True)
    assert plain.trajectory is not None
    schedule = ddpm.noise_schedule()
    for t, step, n_states in ((1.0, 999, 5), (0.6, 666, 4), (0.2, 333, 3)):
        assert sampler.state_times(t)[0] == step / 1000
        result = sample_with(start_from=StartFrom(data, sampler.time_steps(t)), trajectory=True)
        noised = schedule.signal[step] * data + schedule.noise[step] * plain.trajectory[0]
        assert result.trajectory is not None and len(result.trajectory) == n_states
        np.testing.assert_allclose(result.trajectory[0], noised, atol=1e-5)
    nearly = sample_with(start_from=StartFrom(data, sampler.time_steps(1.0))).x
    assert np.abs(nearly - plain.x).mean() < 0.1


def test_a_negative_label_replaces_the_null_label_of_guidance(params):
    plain = sample(params, [3, 7, 1]).x
    np.testing.assert_array_equal(sample(params, [3, 7, 1], negative=[10]).x, plain)
    other = sample(params, [3, 7, 1], negative=[7], batch_size=2).x
    assert np.abs(other[0] - plain[0]).max() > 1e-3
    # Guidance between a label and itself is the conditional model.
    conditional = sample(params, [3, 7, 1], cfg_scale=1.0).x
    np.testing.assert_allclose(other[1], conditional[1], atol=1e-4)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_starting_from_data_at_t_1_is_starting_from_noise(params, shift):
    rng, sampler = np.random.default_rng(0), SamplerConfig(n_steps=3, shift=shift)
    data = rng.uniform(-1, 1, (5, 8, 8, 1)).astype("f4")
    sample_with = partial(sample, params, [1, 2, 3, 4, 5], sampler=sampler, trajectory=True)
    plain = sample_with()
    expected = sample_with(start_from=StartFrom(data, sampler.time_steps(1.0)), batch_size=2)
    np.testing.assert_allclose(expected.x, plain.x, atol=1e-5)
    assert expected.trajectory is not None and plain.trajectory is not None
    half = sample_with(start_from=StartFrom(data, sampler.time_steps(0.5)))
    assert half.trajectory is not None
    noise = plain.trajectory[0]
    np.testing.assert_allclose(half.trajectory[0], (data + noise) / 2, atol=1e-6)
    barely_noised = sample_with(start_from=StartFrom(data, sampler.time_steps(1e-4)))
    np.testing.assert_allclose(barely_noised.x, data, atol=1e-2)
