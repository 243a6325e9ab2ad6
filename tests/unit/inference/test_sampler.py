"""A sample is a function of its weights, label, seed and index, however it is batched."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from tiny_models import CLASSES, DIGITS, SIGMA, weights

from data.batch import EncodedCaption
from inference.labels import label_ids, spread_evenly
from inference.sampler import SamplerConfig, StartFrom, sample_images
from methods import ddpm
from model import model_config
from runtime import parallel
from runtime.errors import UserError

DDPM = SamplerConfig("ddpm", 3, prediction="epsilon", clip=True)
DDIM = SamplerConfig("ddim", 3, prediction="v", eta=0.5)


@pytest.fixture(scope="module")
def params():
    return weights(CLASSES)


@pytest.fixture(scope="module")
def sigma_params():
    return weights(SIGMA)


def sample(params, labels, *, mesh=None, config=CLASSES, **arguments):
    defaults = {"sampler": SamplerConfig(n_steps=3), "cfg_scale": 2.0, "seed": 5}
    mesh = mesh or parallel.make_mesh()
    return sample_images(params, config, labels, mesh=mesh, **(defaults | arguments))


def test_batches_and_devices_do_not_change_a_sample(params):
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    expected = sample(params, labels).x
    assert expected.shape == (10, 8, 8, 1)
    np.testing.assert_allclose(sample(params, labels, batch_size=4).x, expected, atol=1e-5)
    one = parallel.make_mesh(devices=jax.devices()[:1])
    np.testing.assert_allclose(sample(params, labels, mesh=one).x, expected, atol=1e-5)
    np.testing.assert_allclose(sample(params, labels[:3]).x, expected[:3], atol=1e-5)
    np.testing.assert_allclose(sample(params, labels[4:], first_index=4).x, expected[4:], atol=1e-5)
    assert np.abs(sample(params, labels, seed=6).x - expected).max() > 0.1
    assert np.abs(expected[1] - expected[3]).max() > 0.1  # the same label at another index


@pytest.mark.parametrize("sampler", [DDPM, DDIM], ids=["ddpm", "ddim"])
def test_batches_and_devices_do_not_change_a_sample_of_ddpm(sigma_params, sampler):
    sample_with = partial(sample, sigma_params, config=SIGMA, sampler=sampler)
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    expected = sample_with(labels).x
    # The x0 prediction from predicted noise at the last step has 157 times its rounding error.
    np.testing.assert_allclose(sample_with(labels, batch_size=4).x, expected, atol=1e-3)
    one = parallel.make_mesh(devices=jax.devices()[:1])
    np.testing.assert_allclose(sample_with(labels, mesh=one).x, expected, atol=1e-3)
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


def test_a_sample_with_its_own_seed_does_not_depend_on_the_others(params, sigma_params):
    """It equals the one sampled alone with that seed."""
    labels, seeds = [3, 7, 3, 1, 3], [17, 42, 3, 17, 17]
    for network, arguments in (
        (params, {}),
        (sigma_params, {"config": SIGMA, "sampler": DDPM}),
    ):
        samples = sample(network, labels, seed=seeds, **arguments).x
        for size in (2, 5):
            again = sample(network, labels[::-1], seed=seeds[::-1], batch_size=size, **arguments).x
            np.testing.assert_allclose(again[::-1], samples, atol=1e-3 if arguments else 1e-5)
        for label, seed, one_sample in zip(labels, seeds, samples):
            alone = sample(network, [label], seed=seed, **arguments).x
            np.testing.assert_allclose(alone[0], one_sample, atol=1e-3 if arguments else 1e-5)
        np.testing.assert_array_equal(samples[0], samples[4])
        assert np.abs(samples[0] - samples[2]).max() > 0.1


def test_a_negative_label_replaces_the_null_label_of_guidance(params):
    plain = sample(params, [3, 7, 1]).x
    np.testing.assert_array_equal(sample(params, [3, 7, 1], negative=[10]).x, plain)
    other = sample(params, [3, 7, 1], negative=[7], batch_size=2).x
    assert np.abs(other[0] - plain[0]).max() > 1e-3
    # Guidance between a label and itself is the conditional model.
    conditional = sample(params, [3, 7, 1], cfg_scale=1.0).x
    np.testing.assert_allclose(other[1], conditional[1], atol=1e-4)


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


def test_ddpm_starts_at_the_nearest_step(sigma_params):
    """Even its last step retains a trace of the data."""
    data = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype("f4")
    sampler = replace(DDPM, n_steps=4)  # 0, 333, 666, 999
    sample_with = partial(sample, sigma_params, [1, 2, 3], config=SIGMA, sampler=sampler)
    plain = sample_with(trajectory=True)
    assert plain.trajectory is not None
    schedule = ddpm.noise_schedule()
    for t, step, n_states in ((1.0, 999, 5), (0.6, 666, 4), (0.2, 333, 3)):
        assert sampler.nearest_start(t) == step / 1000
        result = sample_with(start_from=StartFrom(data, sampler.time_steps(t)), trajectory=True)
        noised = schedule.signal[step] * data + schedule.noise[step] * plain.trajectory[0]
        assert result.trajectory is not None and len(result.trajectory) == n_states
        np.testing.assert_allclose(result.trajectory[0], noised, atol=1e-5)
    nearly = sample_with(start_from=StartFrom(data, sampler.time_steps(1.0))).x
    assert np.abs(nearly - plain.x).mean() < 0.1


def test_a_scale_of_one_is_the_conditional_model(params):
    plain = sample(params, [3, 7], cfg_scale=1.0).x
    nearly = sample(params, [3, 7], cfg_scale=1.0 + 1e-6).x
    np.testing.assert_allclose(plain, nearly, atol=1e-4)


def test_the_trajectory_ends_in_the_sample(params):
    result = sample(params, [1, 2, 3], trajectory=True, batch_size=2)
    assert result.trajectory is not None and result.trajectory.shape == (4, 3, 8, 8, 1)
    np.testing.assert_array_equal(result.trajectory[-1], result.x)
    assert abs(result.trajectory[0].std() - 1) < 0.2


@pytest.mark.parametrize(
    "words, names, ids",
    [
        ([3, "7"], DIGITS, [3, 7]),
        (["ship", "0"], ["cat", "ship"], [1, 0]),
        (["1"], ["1", "0"], [0]),  # a name wins over a number
        (["2"], [], [2]),
    ],
)
def test_labels_are_names_or_numbers(words, names, ids):
    assert label_ids(words, names, len(names) or 3) == ids


def test_a_label_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="unknown label 'catt'; did you mean 'cat'"):
        label_ids(["catt"], ["cat", "ship"], 2)
    with pytest.raises(UserError, match="unknown label '10'"):
        label_ids([10], DIGITS, 10)
    with pytest.raises(UserError, match="label '3': the model has no classes"):
        label_ids(["3"], [], 0)


def test_labels_get_equal_shares():
    assert spread_evenly([3, 7], 5).tolist() == [3, 3, 3, 7, 7]
    assert spread_evenly([3, 7, 9], 2).tolist() == [3, 7]


@pytest.mark.parametrize(
    "arguments", [{"seed": 2**40}, {"seed": -1}, {"cfg_scale": float("inf")}, {"cfg_scale": -1e39}]
)
def test_numbers_out_of_range_are_refused(params, arguments):
    with pytest.raises(
        UserError, match="must be finite" if "cfg_scale" in arguments else "must be in 0 …"
    ):
        sample(params, [1], **arguments)
    with pytest.raises(UserError, match="no labels"):
        sample(params, [])


def test_a_sampler_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="unknown solver 'rk4'"):
        SamplerConfig(solver="rk4")
    with pytest.raises(UserError, match="must be at least 1"):
        replace(SamplerConfig(), n_steps=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"solver": "ddpm"}, "--solver ddpm is not for a model trained by rectified flow"),
        ({"prediction": "v"}, "--solver euler is not for a model trained by DDPM, which takes"),
        ({"solver": "ddpm", "prediction": "v", "n_steps": 1001}, "1001; DDPM has 1000"),
        ({"solver": "ddpm", "prediction": "v", "eta": 0.5}, "--eta 0.5 is for --solver ddim"),
        ({"eta": 0.5}, "--eta 0.5 is for --solver ddim"),
        ({"solver": "ddpm", "prediction": "eps"}, "unknown prediction 'eps'"),
        ({"shift": 0.0}, "--shift 0: must be above 0"),
        ({"solver": "ddpm", "prediction": "v", "shift": 3.0}, "--shift 3 is for rectified flow"),
        ({"interval": (0.7, 0.3)}, "--interval 0.7 0.3: must be two times in 0 … 1"),
        ({"interval": (0.7, 1.3)}, "--interval 0.7 1.3: must be two times in 0 … 1"),
        ({"solver": "ddim", "prediction": "v", "eta": 1.5}, "--eta 1.5: must be between 0 and 1"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**arguments)


def test_unfit_guidance_is_refused(params):
    with pytest.raises(UserError, match="--guided_channels 3: the model has 1 channels"):
        sample(params, [1], sampler=SamplerConfig(guided_channels=3))
    with pytest.raises(UserError, match="--guided_channels 1: has no effect without guidance"):
        sample(params, [1], sampler=SamplerConfig(guided_channels=1), cfg_scale=1.0)
    with pytest.raises(UserError, match="--interval: has no effect without guidance"):
        sample(params, [1], sampler=SamplerConfig(interval=(0.1, 0.2)), cfg_scale=1.0)
    with pytest.raises(UserError, match="--negative_prompt: has no effect without guidance"):
        sample(params, [1], negative=[3], cfg_scale=1.0)
    one = sample(params, [1], sampler=SamplerConfig(n_steps=3, guided_channels=1)).x
    np.testing.assert_allclose(one, sample(params, [1]).x, atol=1e-6)
