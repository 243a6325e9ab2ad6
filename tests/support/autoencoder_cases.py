"""Inputs and helpers shared by the tests of autoencoder."""

from functools import cache

import jax
from flax import nnx

from networks import autoencoder

key = jax.random.key(0)


def sample_images(config, *, height=24, width=40):
    shape = (2, height, width, config.in_channels)
    return jax.random.uniform(key, shape, minval=-1, maxval=1)


def latents(config, *, height=3, width=5):
    return jax.random.normal(key, (2, height, width, config.latent_channels))


@cache
def encoder(config, dtype="float32"):
    graphdef = autoencoder.autoencoder_graphdef(config, dtype)
    return jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x))


@cache
def decoder(config, dtype="float32"):
    graphdef = autoencoder.autoencoder_graphdef(config, dtype)
    return jax.jit(lambda params, z: nnx.merge(graphdef, params).decode(z))


@cache
def fresh(config):
    return autoencoder.init_autoencoder_params(config, key)
