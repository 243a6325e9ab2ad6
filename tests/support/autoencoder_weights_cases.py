"""Inputs and helpers shared by the tests of pretrained.autoencoder_weights."""

import jax
import numpy as np
import pytest
from torch_autoencoders import SD

from networks.autoencoder import init_autoencoder_params
from pretrained import autoencoder


@pytest.fixture(scope="module")
def params():
    return init_autoencoder_params(SD, jax.random.key(0))


@pytest.fixture
def folder(params, tmp_path):
    """An autoencoder as we save it."""
    autoencoder.save_autoencoder(tmp_path / "saved", SD, params)
    return tmp_path / "saved"


# --- the hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The hub's cache as it is after downloads, in `place` of the repository us/vae."""
    from huggingface_hub import constants

    cached = tmp_path / "cache" / "models--us--vae"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return cached / "snapshots" / COMMIT


def assert_same(actual, expected):
    """Assert that two trees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
