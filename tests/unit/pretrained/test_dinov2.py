"""DINOv2 beside transformers' on random weights, from every kind of file; inputs; refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dinov2_cases import VARIANTS, write_dinov2
from PIL import Image

from networks.vit import bicubic_matrix
from pretrained import dinov2
from pretrained.dinov2 import load_dinov2, read_dinov2, vit_inputs
from runtime.errors import UserError

GRIDS = [(5, 5), (3, 3), (7, 2)]  # that of training, a smaller one, and one that is no square
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders and transformers' models, by variant."""
    found = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp(variant)
        found[variant] = folder, write_dinov2(folder, variant)
    return found


@pytest.fixture(scope="module")
def original(encoders, tmp_path_factory):
    """The plain encoder as facebookresearch's code names it, with heads of 64 channels… of 8."""
    import torch

    folder, _ = encoders["plain"]
    tensors = dinov2.rename_to_original(dinov2._read_files(str(folder))[2])
    path = tmp_path_factory.mktemp("original") / "dinov2_vits14_pretrain.pth"
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, path)
    return path


def images(rows: int, columns: int) -> np.ndarray:
    return rng.normal(size=(2, 14 * rows, 14 * columns, 3)).astype(np.float32)


def features_of_torch(model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    with torch.no_grad():
        tokens = model(torch.from_numpy(x).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    n = (x.shape[1] // 14) * (x.shape[2] // 14)
    return tokens[:, 0], tokens[:, -n:].reshape(2, x.shape[1] // 14, x.shape[2] // 14, -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_transformers(encoders, variant):
    folder, model = encoders[variant]
    vit = load_dinov2(str(folder))
    for grid in GRIDS:
        x = images(*grid)
        for ours, theirs in zip(vit(jnp.asarray(x)), features_of_torch(model, x), strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
