"""Images go to latents and back by the VAE's own weights and scale, however they are sharded."""

import averaging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from inference import codec
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


def test_decoding_is_the_autoencoders_own_of_unscaled_latents(random, on_all):
    z = normal(5, 4, 6, 3)
    vae = nnx.merge(
        autoencoder.autoencoder_graphdef(RANDOM), jax.tree.map(jnp.asarray, random.params)
    )
    scaled = (z - RANDOM.shift_factor) * RANDOM.scaling_factor
    images = on_all.decode(scaled)
    assert images.shape == (5, 8, 12, 3) and images.dtype == np.float32
    np.testing.assert_allclose(images, vae.decode(jnp.asarray(z)), atol=1e-5)


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


def test_moments_beyond_float16_are_clipped_not_infinite(tmp_path):
    weights = averaging.params()
    weights["quant"]["bias"][:2] = 1e6, -1e6
    pretrained.save_autoencoder(tmp_path, averaging.config(), weights)
    opened = Codec.open(str(tmp_path), parallel.make_mesh())
    moments = np.asarray(opened.encode(np.zeros((8, 4, 4, 1), np.uint8)))
    assert (
        moments[..., 0].max() == codec.MAX_FLOAT16 and moments[..., 1].min() == -codec.MAX_FLOAT16
    )
