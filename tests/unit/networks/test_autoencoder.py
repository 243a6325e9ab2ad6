"""The autoencoder is diffusers', latents are a normal distribution, tiles make the whole."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoder_cases import decoder, encoder, fresh, key, latents
from torch_autoencoders import SD

from networks import autoencoder
from networks.autoencoder import AutoencoderConfig, Moments
from runtime.errors import UserError

# scaling_factor and shift_factor of Stable Diffusion 1 and 2, SDXL, SD3 and FLUX.
PUBLISHED = [(0.18215, 0.0), (0.13025, 0.0), (1.5305, 0.0609), (0.3611, 0.1159)]


def test_a_group_norm_is_the_formula_in_float32():
    x = 100 + jax.random.normal(key, (2, 4, 6, 12))
    norm = autoencoder.GroupNorm(12, 3)
    groups = np.float64(x).reshape(2, 4 * 6, 3, 4)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    np.testing.assert_allclose(norm(x), expected, atol=1e-4)
    half = x.astype(jnp.bfloat16)
    exact = norm(half.astype(jnp.float32)).astype(jnp.bfloat16)
    assert norm(half).dtype == jnp.bfloat16 and (norm(half) == exact).all()


def test_the_parameters_of_stable_diffusion_are_counted():
    config = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    tree = jax.eval_shape(partial(autoencoder.init_autoencoder_params, config), key)
    assert sum(x.size for x in jax.tree.leaves(tree)) == 83_653_863
    assert config.downsampling == 8


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"block_out_channels": (8, 0)}, "block_out_channels 0: must be above 0"),
        ({"block_out_channels": (8, 30)}, "30: not divisible by norm_num_groups 4"),
        ({"latent_channels": 0}, "latent_channels 0: must be above 0"),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0: must be above 0"),
        ({"shift_factor": float("nan")}, "shift_factor nan: must be finite"),
    ],
)
def test_a_config_out_of_range_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        replace(SD, **fields)


def test_other_precisions_are_refused():
    with pytest.raises(UserError, match="unknown dtype 'float16'; did you mean 'bfloat16'"):
        autoencoder.autoencoder_graphdef(SD, "float16")


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 25, 40, 3), "multiples of 2, not 25×40"),
        ((1, 24, 40, 1), "images of 3 channels, not 1"),
    ],
)
def test_an_image_of_an_unsuitable_shape_is_refused(shape, message):
    with pytest.raises(UserError, match=message):
        encoder(SD)(fresh(SD), jnp.zeros(shape))


def test_latents_of_another_number_of_channels_are_refused():
    with pytest.raises(UserError, match="latents of 4 channels, not 16"):
        decoder(SD)(fresh(SD), jnp.zeros((1, 3, 5, 16)))


# --- latents --------------------------------------------------------------------------------------


def test_samples_have_the_moments():
    mean = jnp.asarray([-2.0, 0.0, 3.0]).reshape(1, 1, 1, 3)
    log_variance = jnp.log(jnp.asarray([0.25, 1.0, 4.0])).reshape(1, 1, 1, 3)
    moments = Moments(*(jnp.broadcast_to(x, (4, 100, 100, 3)) for x in (mean, log_variance)))
    samples = np.float64(autoencoder.sample_latents(moments, jax.random.split(key, 4))).reshape(
        -1, 3
    )
    n = len(samples)
    deviation = np.array([0.5, 1, 2])
    assert (np.abs(samples.mean(0) - [-2, 0, 3]) < 4 * deviation / np.sqrt(n)).all()
    np.testing.assert_allclose(samples.std(0), deviation, rtol=4 / np.sqrt(2 * n))
    assert len(np.unique(samples[:, 1])) > 0.9 * n  # each position and image has its own noise
    assert (autoencoder.most_likely_latents(moments) == moments.mean).all()


@pytest.mark.parametrize("scaling_factor, shift_factor", PUBLISHED)
def test_unscale_undoes_scale(scaling_factor, shift_factor):
    facts = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    z = 5 * latents(SD)
    scaled = autoencoder.scale_latents(z, **facts)
    np.testing.assert_allclose(
        autoencoder.unscale_latents(scaled, **facts), z, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(scaled, (np.float64(z) - shift_factor) * scaling_factor, rtol=1e-5)


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [5, 8])
def test_a_single_tile_is_the_undivided_result(tile):
    decode = partial(decoder(SD), fresh(SD))
    z = np.asarray(latents(SD))
    tiled = autoencoder.decode_tiled(decode, z, tile=tile, overlap=2, downsampling=2)
    np.testing.assert_array_equal(tiled, decode(z))


@pytest.mark.parametrize(
    "height, width, tile, overlap", [(7, 19, 6, 2), (16, 9, 8, 7), (9, 9, 3, 0)]
)
def test_tiles_of_a_decoder_of_single_positions_make_the_whole(height, width, tile, overlap):
    """Every pixel is covered, and weights add up to one, however the tiles lie."""
    shapes = set()

    def decode(z):
        shapes.add(z.shape)
        return np.repeat(np.repeat(z, 4, axis=1), 4, axis=2)

    z = np.asarray(latents(SD, height=height, width=width))
    tiled = autoencoder.decode_tiled(decode, z, tile=tile, overlap=overlap, downsampling=4)
    np.testing.assert_allclose(tiled, decode(z), atol=1e-6)
    assert len(shapes) == 2  # of a tile, and of the whole


def test_one_tile_fades_linearly_into_the_next():
    left, right = autoencoder.tile_axis(10, 6, 2, 2)
    assert (left[0], right[0]) == (0, 4)
    np.testing.assert_allclose(left[1], [1] * 8 + [0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(right[1], left[1][::-1])


def test_overlap_brings_tiles_of_a_real_decoder_near_the_whole():
    """With a pattern that repeats, so that norms and attention see the same in every tile: what
    differs then is how convolutions end at a tile's border. (With other images tiles differ more.)
    """
    decode = partial(decoder(SD), fresh(SD))
    z = np.tile(latents(SD, height=4, width=4)[:1], (1, 12, 12, 1))
    whole = np.asarray(decode(z))
    error = {}
    for overlap in (0, 8):
        tiled = autoencoder.decode_tiled(decode, z, tile=24, overlap=overlap, downsampling=2)
        error[overlap] = np.sqrt(np.mean((tiled - whole) ** 2)) / whole.std()
    assert error[8] < 0.2 and error[8] < error[0] / 2


@pytest.mark.parametrize("tile, overlap", [(4, 4), (0, 0), (4, -1)])
def test_an_overlap_out_of_range_is_refused(tile, overlap):
    with pytest.raises(UserError, match=f"tiles of {tile} latents cannot overlap by {overlap}"):
        autoencoder.decode_tiled(
            lambda z: z,
            np.zeros((1, 8, 8, 4), np.float32),
            tile=tile,
            overlap=overlap,
            downsampling=1,
        )
