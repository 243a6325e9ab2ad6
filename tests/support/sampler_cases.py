"""Inputs and helpers shared by the tests of sampler."""

import pytest
from tiny_models import CLASSES, SIGMA, weights

from inference.sampler import SamplerConfig, sample_images
from methods import ddpm
from runtime import parallel

DDPM = SamplerConfig("ddpm", 3, ddpm.DDPM(), clip=True)


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
