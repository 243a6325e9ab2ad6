"""Images go to latents and back by the VAE's own weights and scale, however they are sharded."""

import averaging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_cases import (
    RANDOM,
    RNG,
    normal,
    on_all,  # noqa: F401
    random,  # noqa: F401
)
from flax import nnx

from inference import codec
from inference.codec import Codec
from networks import autoencoder
from runtime import parallel


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


@pytest.mark.parametrize("channels", [1, 3])
def test_encoding_gives_the_known_moments_of_the_autoencoder(tmp_path, channels):
    """Decoding them, scaled as a model sees them, gives back their images."""
    opened = Codec.open(str(averaging.save(tmp_path, channels)), parallel.make_mesh())
    images = RNG.integers(0, 256, (8, 16, 16, channels), dtype=np.uint8)
    moments = np.asarray(opened.encode(images))
    assert moments.dtype == np.float16 and moments.shape == (8, 8, 8, 4 * channels)
    mean, log_variance = np.split(moments.astype(np.float32), 2, axis=-1)
    np.testing.assert_allclose(mean, averaging.encode_means(images), atol=1e-3)
    assert (log_variance == averaging.LOG_VARIANCE).all()

    scaled = (averaging.encode_means(images) - averaging.SHIFT) * averaging.SCALE
    expected = averaging.decode_means(averaging.encode_means(images))
    np.testing.assert_allclose(opened.decode(scaled.astype(np.float32)), expected, atol=1e-4)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 20])
def test_neither_batches_nor_devices_change_an_image(random, on_all, monkeypatch, n):
    alone = Codec(random, parallel.make_mesh(devices=jax.devices()[:1]))
    x = normal(n, 4, 4, 3)
    expected = alone.decode(x)
    np.testing.assert_allclose(on_all.decode(x), expected, atol=1e-5)
    monkeypatch.setattr(codec, "DECODED_PER_DEVICE", 2)
    for one in (alone, on_all):
        np.testing.assert_allclose(one.decode(x), expected, atol=1e-5)
    for i in range(n):
        np.testing.assert_allclose(alone.decode(x[i : i + 1]), expected[i : i + 1], atol=1e-5)
