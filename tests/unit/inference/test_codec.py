"""Images go to latents and back by the VAE's own weights and scale, however they are sharded."""

from dataclasses import replace

import averaging
import jax
import numpy as np
from codec_cases import (
    RANDOM,
    RNG,
    normal,
    on_all,  # noqa: F401
    random,  # noqa: F401
)
from latents_cases import ENCODING

from inference import codec
from inference.codec import Codec
from pretrained import autoencoder as pretrained
from runtime import parallel


def test_the_latents_own_scale_wins_over_the_vaes(random, on_all):
    """A folder of latents may have been scaled otherwise: its model samples as it was trained."""
    other = Codec(random, on_all.mesh, scaling_factor=2.0, shift_factor=1.0)
    z = normal(2, 4, 4, 3)
    expected = on_all.decode((z - RANDOM.shift_factor) * RANDOM.scaling_factor)
    np.testing.assert_allclose(other.decode((z - 1) * 2), expected, atol=1e-5)


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


def test_a_vae_of_another_scale_is_warned_of_where_its_weights_are_not_known(tmp_path, capsys):
    folder, mesh = averaging.save(tmp_path), parallel.make_mesh()
    own = {"scaling_factor": averaging.SCALE, "shift_factor": averaging.SHIFT}
    unknown = replace(ENCODING, vae_hash="", **own)
    Codec.from_encoding(unknown, mesh, vae=str(folder))
    assert not capsys.readouterr().err
    other = Codec.from_encoding(replace(unknown, scaling_factor=0.18215), mesh, vae=str(folder))
    assert other.scaling_factor == 0.18215
    warning = capsys.readouterr().err
    assert f"its latents are {averaging.SCALE:g} and {averaging.SHIFT:g}, those of" in warning
    assert "0.18215" in warning and warning.count("\n") == 1
    known = replace(unknown, scaling_factor=0.18215, vae_hash=Codec.open(str(folder), mesh).hash)
    Codec.from_encoding(known, mesh, vae=str(folder))
    assert not capsys.readouterr().err
