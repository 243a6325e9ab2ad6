"""Images go to latents and back by the VAE's own weights and scale, however they are sharded."""

import jax
import jax.numpy as jnp
import numpy as np
from codec_cases import (
    RANDOM,
    normal,
    on_all,  # noqa: F401
    random,  # noqa: F401
)
from flax import nnx

from inference import codec
from inference.codec import Codec
from networks import autoencoder


def test_decoding_is_the_autoencoders_own_of_unscaled_latents(random, on_all):
    z = normal(5, 4, 6, 3)
    vae = nnx.merge(
        autoencoder.autoencoder_graphdef(RANDOM), jax.tree.map(jnp.asarray, random.params)
    )
    scaled = (z - RANDOM.shift_factor) * RANDOM.scaling_factor
    images = on_all.decode(scaled)
    assert images.shape == (5, 8, 12, 3) and images.dtype == np.float32
    np.testing.assert_allclose(images, vae.decode(jnp.asarray(z)), atol=1e-5)


def test_large_latents_are_decoded_in_tiles(random, on_all, monkeypatch):
    """The result is that of `decode_tiled` on unscaled latents; no tile is larger than TILE."""
    monkeypatch.setattr(codec, "TILE", 6)
    monkeypatch.setattr(codec, "OVERLAP", 2)
    sides, original = [], Codec._decode_whole

    def spied(self, x):
        sides.append(x.shape[1:3])
        return original(self, x)

    monkeypatch.setattr(Codec, "_decode_whole", spied)
    x = normal(9, 6, 10, 3)
    images = on_all.decode(x)
    assert set(sides) == {(6, 6)} and images.shape == (9, 12, 20, 3)
    vae = nnx.merge(
        autoencoder.autoencoder_graphdef(RANDOM), jax.tree.map(jnp.asarray, random.params)
    )
    z = x / RANDOM.scaling_factor + RANDOM.shift_factor
    expected = autoencoder.decode_tiled(
        lambda z: vae.decode(jnp.asarray(z)), z, tile=6, overlap=2, downsampling=2
    )
    np.testing.assert_allclose(images, expected, atol=1e-5)

    sides.clear()
    on_all.decode(x[:, :, :6])
    assert set(sides) == {(6, 6)} and len(sides) == 1  # TILE itself is decoded whole
