"""Inputs and helpers shared by the tests of codec."""

import jax
import numpy as np
import pytest

from inference.codec import Codec
from networks import autoencoder
from networks.autoencoder import AutoencoderConfig
from pretrained import autoencoder as pretrained
from runtime import parallel

RNG = np.random.default_rng(0)
# A VAE that mixes positions and channels, so that nothing can be right by chance.
RANDOM = AutoencoderConfig(
    latent_channels=3,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    pretrained.save_autoencoder(
        folder, RANDOM, autoencoder.init_autoencoder_params(RANDOM, jax.random.key(0))
    )
    return pretrained.load_autoencoder(str(folder))


@pytest.fixture(scope="module")
def on_all(random):
    return Codec(random, parallel.make_mesh())


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)
