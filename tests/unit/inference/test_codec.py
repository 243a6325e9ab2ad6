"""Images go to latents and back by the VAE's own weights and scale, however they are sharded."""

import averaging
import jax
import numpy as np
import pytest
from codec_cases import (
    RANDOM,
    RNG,
    normal,
    on_all,  # noqa: F401
    random,  # noqa: F401
)

from inference import codec
from inference.codec import Codec
from pretrained import autoencoder as pretrained
from runtime import parallel


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


def test_the_latents_own_scale_wins_over_the_vaes(random, on_all):
    """A folder of latents may have been scaled otherwise: its model samples as it was trained."""
    other = Codec(random, on_all.mesh, scaling_factor=2.0, shift_factor=1.0)
    z = normal(2, 4, 4, 3)
    expected = on_all.decode((z - RANDOM.shift_factor) * RANDOM.scaling_factor)
    np.testing.assert_allclose(other.decode((z - 1) * 2), expected, atol=1e-5)


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


def test_devices_do_not_change_latents(random, on_all):
    alone = Codec(random, parallel.make_mesh(devices=jax.devices()[:1]))
    images = RNG.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    ours, theirs = (np.asarray(one.encode(images), np.float32) for one in (alone, on_all))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # a float16's last place


def test_the_axes_of_a_trajectory_stay(on_all):
    x = normal(3, 2, 4, 4, 3)
    states = on_all.decode(x)
    assert states.shape == (3, 2, 8, 8, 3)
    for state, latent in zip(states, x, strict=True):
        np.testing.assert_allclose(state, on_all.decode(latent), atol=1e-5)


def test_moments_beyond_float16_are_clipped_not_infinite(tmp_path):
    weights = averaging.params()
    weights["quant"]["bias"][:2] = 1e6, -1e6
    pretrained.save_autoencoder(tmp_path, averaging.config(), weights)
    opened = Codec.open(str(tmp_path), parallel.make_mesh())
    moments = np.asarray(opened.encode(np.zeros((8, 4, 4, 1), np.uint8)))
    assert (
        moments[..., 0].max() == codec.MAX_FLOAT16 and moments[..., 1].min() == -codec.MAX_FLOAT16
    )
