"""Inputs and helpers shared by the tests of perceptual."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from networks import perceptual
from pretrained import lpips

rng = np.random.default_rng(0)


def random_images(n: int, size: int, channels: int = 3) -> jax.Array:
    return jnp.asarray(rng.uniform(-1, 1, (n, size, size, channels)), jnp.float32)


# --- LPIPS ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def states(torch):
    """Random weights as the two published files have them: torchvision's VGG-16, and the linear
    maps. Scaled so that features keep their size from layer to layer.
    """
    torch.manual_seed(0)
    vgg16, n_in = {}, 3
    for index, n_out in zip(
        lpips.CONVOLUTION_INDICES, [n for group in perceptual.VGG16 for n in group]
    ):
        scale = (2 / (9 * n_in)) ** 0.5
        vgg16[f"features.{index}.weight"] = torch.randn(n_out, n_in, 3, 3) * scale
        vgg16[f"features.{index}.bias"] = torch.randn(n_out) * 0.1
        n_in = n_out
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, group[-1], 1, 1)
        for i, group in enumerate(perceptual.VGG16)
    }
    return vgg16, linear


@pytest.fixture(scope="module")
def folder(torch, states, tmp_path_factory):
    """The two files, one in each of torch's formats."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(states[0], folder / "vgg16-397923af.pth", _use_new_zipfile_serialization=False)
    torch.save(states[1], folder / "vgg.pth")
    return folder
