"""diffusers' weights become ours and ours diffusers', to the bit; what does not fit is named."""

import jax.numpy as jnp
from autoencoder_weights_cases import (
    assert_same,
    folder,  # noqa: F401
    hub,  # noqa: F401
    params,  # noqa: F401
)

from pretrained import autoencoder


def test_a_loaded_autoencoder_runs(folder, params):
    loaded = autoencoder.load_autoencoder(str(folder), dtype="bfloat16")
    assert_same(loaded.params, params)
    assert loaded.id == str(folder) and loaded.revision is None
    image = jnp.zeros((1, 8, 8, 3))
    assert loaded.model().decode(loaded.model().encode(image).mean).shape == image.shape
