"""Images go to latents and back by the VAE's own weights and scale, however they are sharded."""

from dataclasses import replace

import averaging
import pytest

from data import latents
from inference.codec import Codec
from pretrained import autoencoder as pretrained
from runtime import parallel
from runtime.errors import UserError


def test_the_latents_vae_is_known_by_its_weights(latent_digits, vae, tmp_path):
    mesh, encoding = parallel.make_mesh(), latents.read_latent_dataset(latent_digits).encoding
    moved = averaging.save(tmp_path / "moved")
    for opened in (
        Codec.from_encoding(encoding, mesh),
        Codec.from_encoding(encoding, mesh, vae=str(moved)),
    ):
        assert opened.hash == encoding.vae_hash
        assert (opened.scaling_factor, opened.shift_factor) == (averaging.SCALE, averaging.SHIFT)

    weights = averaging.params()
    weights["post_quant"]["bias"][0] += 1e-3
    pretrained.save_autoencoder(tmp_path / "other", averaging.config(), weights)
    with pytest.raises(
        UserError, match=r"is not the one that the latents of digits were made with"
    ):
        Codec.from_encoding(encoding, mesh, vae=str(tmp_path / "other"))
    unknown = replace(encoding, vae_hash="")  # of a model that others trained
    assert Codec.from_encoding(unknown, mesh, vae=str(tmp_path / "other")).hash != encoding.vae_hash
    with pytest.raises(
        UserError, match="not recorded which VAE made these latents: name it by --vae"
    ):
        Codec.from_encoding(replace(unknown, vae=""), mesh)
    gone = replace(encoding, vae=str(tmp_path / "gone"))
    with pytest.raises(
        UserError, match=r"gone'.*; if the VAE has moved, name its new place by --vae"
    ):
        Codec.from_encoding(gone, mesh)
    with pytest.raises(UserError, match=r"nowhere") as error:
        Codec.from_encoding(encoding, mesh, vae=str(tmp_path / "nowhere"))
    assert "has moved" not in str(error.value)
