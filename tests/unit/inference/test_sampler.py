"""A sample is a function of its weights, label, seed and index, however it is batched."""

from dataclasses import replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sampler_cases import (
    DDPM,
    INNER,
    inner_params,  # noqa: F401
    params,  # noqa: F401
    sample,
    sigma_params,  # noqa: F401
)
from tiny_models import DIGITS, SIGMA

from inference.labels import label_ids, spread_evenly
from inference.sampler import SamplerConfig
from methods import ddpm
from model import model_graphdef
from runtime.errors import UserError
from sampling import initial_noise

DDPM_V = ddpm.DDPM("v")


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
        (["1", 1], ["1", "0"], [0, 1]),  # a name is a string, an id an integer
        (["3", "10"], ["1", "3", "10"], [1, 2]),
        (["2"], [], [2]),
    ],
)
def test_labels_are_names_or_numbers(words, names, ids):
    assert label_ids(words, names, len(names) or 3) == ids


def test_a_label_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="unknown label 'catt'; did you mean 'cat'"):
        label_ids(["catt"], ["cat", "ship"], 2)
    with pytest.raises(UserError, match="unknown label '2'"):  # never the class 10
        label_ids(["2"], ["1", "3", "10"], 3)
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
        ({"method": DDPM_V}, "--solver euler is not for a model trained by DDPM, which takes"),
        ({"solver": "ddpm", "method": DDPM_V, "n_steps": 1001}, "1001; DDPM has 1000"),
        ({"solver": "ddpm", "method": DDPM_V, "eta": 0.5}, "--eta 0.5 is for --solver ddim"),
        ({"eta": 0.5}, "--eta 0.5 is for --solver ddim"),
        ({"shift": 0.0}, "--shift 0: must be above 0"),
        ({"solver": "ddpm", "method": DDPM_V, "shift": 3.0}, "--shift 3 is for rectified flow"),
        ({"interval": (0.7, 0.3)}, "--interval 0.7 0.3: must be two times in 0 … 1"),
        ({"interval": (0.7, 1.3)}, "--interval 0.7 1.3: must be two times in 0 … 1"),
        ({"solver": "ddim", "method": DDPM_V, "eta": 1.5}, "--eta 1.5: must be between 0 and 1"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**arguments)


def test_a_prediction_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="unknown prediction 'eps'"):
        ddpm.DDPM(prediction="eps")


def test_inner_guidance_leads_away_from_the_inner_head(inner_params):
    """Under classifier-free guidance it acts first, on the prediction for each label."""
    model = nnx.merge(model_graphdef(INNER), inner_params)
    labels, w, scale = jnp.asarray([3, 7]), 1.7, 2.0
    sampler = SamplerConfig(n_steps=4, inner_interval=(0.5, 1.0))

    def guided_by_inner(x, t, label):
        final, inner = model(x, jnp.full(2, t), label, inner=True)
        return inner + w * (final - inner) if t >= 0.5 else final

    x = initial_noise(5, jnp.arange(2), (8, 8, 1))
    times = np.linspace(1, 0, 5)
    for t, s in pairwise(times):
        cond, null = (guided_by_inner(x, t, y) for y in (labels, jnp.full(2, 10)))
        x = x + (s - t) * (null + scale * (cond - null))
    found = sample(
        inner_params, [3, 7], config=INNER, sampler=sampler, inner_guidance=w, cfg_scale=scale
    )
    np.testing.assert_allclose(found.x, x, atol=1e-4)


def test_a_scale_of_one_leaves_the_inner_head_out(inner_params):
    plain = sample(inner_params, [3, 7], config=INNER).x
    np.testing.assert_array_equal(
        sample(inner_params, [3, 7], config=INNER, inner_guidance=1.0).x, plain
    )
    without_head = {name: part for name, part in inner_params.items() if name != "inner"}
    np.testing.assert_array_equal(sample(without_head, [3, 7]).x, plain)
    nearly = sample(inner_params, [3, 7], config=INNER, inner_guidance=1.0 + 1e-6).x
    np.testing.assert_allclose(nearly, plain, atol=1e-4)


def test_unfit_inner_guidance_is_refused(params, inner_params):
    with pytest.raises(UserError, match=r"--inner_guidance 1\.5: the model has no inner head"):
        sample(params, [1], inner_guidance=1.5)
    with pytest.raises(UserError, match="--inner_guidance nan: must be finite"):
        sample(inner_params, [1], config=INNER, inner_guidance=float("nan"))
    with pytest.raises(UserError, match="--inner_interval: has no effect without --inner_guidance"):
        sample(inner_params, [1], config=INNER, sampler=SamplerConfig(inner_interval=(0.3, 1.0)))
    with pytest.raises(UserError, match=r"--inner_interval 1 0\.3: must be two times in 0 … 1"):
        SamplerConfig(inner_interval=(1.0, 0.3))


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
