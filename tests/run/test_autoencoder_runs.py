"""The autoencoder is diffusers', latents are a normal distribution, tiles make the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoder_cases import decoder, encoder, fresh, key, latents, sample_images
from torch_autoencoders import CONFIGS, SD, params_of, torch_autoencoder

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
