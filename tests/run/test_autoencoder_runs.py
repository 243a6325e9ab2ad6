"""The autoencoder is diffusers', latents are a normal distribution, tiles make the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoder_cases import decoder, encoder, fresh, key, latents, sample_images
from torch_autoencoders import CONFIGS, SD, nchw, nhwc, params_of, torch_autoencoder

from networks import autoencoder
from networks.autoencoder import AutoencoderConfig


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_is_close(name):
    """Within 3 % of the spread of the float32 result, and the result is float32."""
    config = CONFIGS[name]
    params = params_of(torch_autoencoder(config), config)
    image, z = sample_images(config), latents(config)
    exact = *encoder(config)(params, image), decoder(config)(params, z)
    half = *encoder(config, "bfloat16")(params, image), decoder(config, "bfloat16")(params, z)
    for x, y in zip(exact, half, strict=True):
        assert y.dtype == jnp.float32
        assert 0 < np.sqrt(np.mean((x - y) ** 2)) < 0.03 * np.std(x)


def test_half_precision_keeps_its_weights():
    gradient = jax.grad(lambda params: decoder(SD, "bfloat16")(params, latents(SD)).sum())
    grads = gradient(fresh(SD))["decoder"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads["levels"]))


def test_every_weight_is_used():
    """A gradient reaches each: those of attention's keys' bias cannot matter to a softmax."""

    def loss(params):
        moments = encoder(SD)(params, sample_images(SD))
        return (
            decoder(SD)(
                params,
                autoencoder.sample_latents(moments, jax.random.split(key, len(moments.mean))),
            )
            ** 3
        ).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(fresh(SD))):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert name.endswith("attention.k.bias") or (jnp.abs(leaf) > 1e-9).any(), name


def test_fresh_weights_keep_latents_and_images_in_scale():
    """Training from scratch starts with latents and images that are neither tiny nor huge."""
    config = AutoencoderConfig(block_out_channels=(32, 64, 64), layers_per_block=2)
    moments = encoder(config)(fresh(config), sample_images(config))
    decoded = decoder(config)(fresh(config), latents(config))
    for x in (*moments, decoded):
        assert 0.02 < float(x.std()) < 2


@pytest.fixture
def one_thread():
    """Threads of models this small wait for one another, for long where tests run side by side."""
    torch = pytest.importorskip("torch")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_and_decoding_are_those_of_diffusers(name):
    config, theirs = CONFIGS[name], torch_autoencoder(CONFIGS[name])
    params = params_of(theirs, config)
    image, z = sample_images(config), latents(config)
    expected = theirs.encode(nchw(image)).latent_dist
    found = encoder(config)(params, image)
    assert found.mean.shape == (
        2,
        24 // config.downsampling,
        40 // config.downsampling,
        z.shape[-1],
    )
    np.testing.assert_allclose(found.mean, nhwc(expected.mean), rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.log_variance, nhwc(expected.logvar), rtol=0, atol=2e-5)
    decoded = decoder(config)(params, z)
    np.testing.assert_allclose(decoded, nhwc(theirs.decode(nchw(z)).sample), rtol=0, atol=2e-5)


def test_log_variances_are_clipped_as_published():
    params = jax.tree.map(jnp.zeros_like, fresh(SD))
    bias = jnp.asarray([0.0] * 4 + [-100.0, 100.0, -30.5, 1.0])
    params["quant"]["bias"] = bias
    moments = encoder(SD)(params, sample_images(SD))
    assert moments.log_variance[0, 0, 0].tolist() == [-30, 20, -30, 1]


def test_fresh_weights_are_a_function_of_the_seed():
    again = autoencoder.init_autoencoder_params(SD, key)
    other = autoencoder.init_autoencoder_params(SD, jax.random.key(1))
    same = jax.tree.map(lambda x, y: (x == y).all(), fresh(SD), again)
    assert all(jax.tree.leaves(same))
    kernels = [fresh(SD)["decoder"]["conv_in"]["kernel"], other["decoder"]["conv_in"]["kernel"]]
    assert not (kernels[0] == kernels[1]).any()
