"""Inputs and helpers shared by the tests of sampler."""

from dataclasses import replace

import pytest
from tiny_models import CLASSES, SIGMA, weights

from inference.sampler import SamplerConfig, sample_images
from methods import ddpm
from runtime import parallel

DDPM = SamplerConfig("ddpm", 3, ddpm.DDPM(), clip=True)
INNER = replace(CLASSES, inner_head=CLASSES.depth // 2)


@pytest.fixture(scope="module")
def params():
    return weights(CLASSES)


@pytest.fixture(scope="module")
def inner_params(params):
    """The same weights, and an inner head."""
    return params | {"inner": weights(INNER)["inner"]}


@pytest.fixture(scope="module")
def sigma_params():
    return weights(SIGMA)


def sample(params, labels, *, mesh=None, config=CLASSES, **arguments):
    defaults = {"sampler": SamplerConfig(n_steps=3), "cfg_scale": 2.0, "seed": 5}
    mesh = mesh or parallel.make_mesh()
    return sample_images(params, config, labels, mesh=mesh, **(defaults | arguments))
