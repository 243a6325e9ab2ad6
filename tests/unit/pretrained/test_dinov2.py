"""DINOv2 beside transformers' on random weights; the same from every kind of file; its inputs;
files that are no DINOv2.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dinov2_cases import VARIANTS, features_of_torch, original_tensors, torch, write_dinov2
from huggingface_hub import constants
from PIL import Image

from networks.vit import bicubic_matrix
from pretrained import weight_files
from pretrained.dinov2 import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_dinov2,
    read_dinov2,
    vit_inputs,
)
from runtime.errors import UserError
from runtime.image_size import ImageSize

GRIDS = [(5, 5), (3, 3), (7, 2)]  # that of training, a smaller one, and one that is no square
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders and transformers' models, by variant."""
    folders = {variant: tmp_path_factory.mktemp(variant) for variant in VARIANTS}
    return {variant: (path, write_dinov2(path, variant)) for variant, path in folders.items()}


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_transformers(encoders, variant):
    folder, model = encoders[variant]
    vit = load_dinov2(str(folder))
    for rows, columns in GRIDS:
        x = rng.normal(size=(2, 14 * rows, 14 * columns, 3)).astype(np.float32)
        found = jax.jit(lambda x: vit(x))(jnp.asarray(x))
        for ours, theirs in zip(found, features_of_torch(model, x), strict=True):
            assert ours.shape == theirs.shape and theirs.std() > 0.3
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_half_precision_is_near(encoders):
    folder, _ = encoders["plain"]
    x = jnp.asarray(rng.normal(size=(2, 42, 42, 3)), jnp.float32)
    exact, half = load_dinov2(str(folder))(x)[0], load_dinov2(str(folder), "bfloat16")(x)[0]
    assert half.dtype == jnp.bfloat16
    assert np.corrcoef(exact.ravel(), half.astype(jnp.float32).ravel())[0, 1] > 0.999


@pytest.mark.parametrize("n_out, offset", [(16, 0.1), (16, 0.0), (40, 0.1), (5, 0.0)])
def test_positions_are_resized_as_torch_does(n_out, offset):
    """By a size, as transformers; or by a scale that is a little larger, as the original's code."""
    n = 37
    lines = torch.eye(n).reshape(1, n, n, 1)  # each channel is 1 at one position
    size = {"scale_factor": ((n_out + offset) / n, 1.0)} if offset else {"size": (n_out, 1)}
    theirs = torch.nn.functional.interpolate(lines, mode="bicubic", **size)[0, :, :, 0].T
    np.testing.assert_allclose(bicubic_matrix(n, n_out, offset=offset), theirs, atol=1e-5)


def test_sides_are_multiples_of_the_patch(encoders):
    vit = load_dinov2(str(encoders["plain"][0]))
    with pytest.raises(UserError, match="28 × 32 pixels: the patches have 14 × 14"):
        vit(jnp.zeros((1, 28, 32, 3)))


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (100, 60)])
def test_inputs_are_resized_as_pillow_does_and_normalised(size):
    image = rng.uniform(-1, 1, (*size, 3)).astype(np.float32)
    planes = [Image.fromarray(image[..., i]) for i in range(3)]
    small = [np.asarray(p.resize((28, 42), Image.Resampling.BICUBIC)) for p in planes]
    expected = (np.stack(small, -1) / 2 + 0.5 - IMAGENET_MEAN) / np.array(IMAGENET_STD)
    inputs = ImageSize(42, 28)
    np.testing.assert_allclose(vit_inputs(jnp.asarray(image[None]), inputs)[0], expected, atol=1e-4)
    grey = jnp.asarray(image[None, ..., :1])
    coloured = vit_inputs(grey.repeat(3, axis=-1), inputs)
    np.testing.assert_array_equal(vit_inputs(grey, inputs), coloured)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_the_same_from_every_file(encoders, tmp_path, variant, monkeypatch):
    folder, model = encoders[variant]
    expected = read_dinov2(str(folder))
    torch.save(original_tensors(model), tmp_path / "dinov2_vitb14_pretrain.pth")
    places = [folder / "model.safetensors", tmp_path / "dinov2_vitb14_pretrain.pth", tmp_path]
    if variant == "plain":
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir()
        (bin_folder / "config.json").write_bytes((folder / "config.json").read_bytes())
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), bin_folder / "pytorch_model.bin")
        cached = tmp_path / "cache" / "models--facebook--dinov2-base"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / ("0" * 40)).symlink_to(folder)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        places += [bin_folder, "dinov2-base"]
    for place in places:
        found = read_dinov2(str(place))
        assert (found.config, found.hash) == (expected.config, expected.hash)
        assert_equal_trees(found.params, expected.params)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"model_type": "vit"}, "is a vit, not a DINOv2"),
        ({"num_attention_heads": 3}, "3 heads do not divide its 128 channels"),
        ({"hidden_act": "relu"}, "says hidden_act relu"),
        ({"num_hidden_layers": 24}, "says num_hidden_layers 24"),
    ],
)
def test_configs_that_do_not_fit_are_refused(encoders, tmp_path, facts, message):
    folder, _ = encoders["plain"]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | facts))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        read_dinov2(str(tmp_path))


def test_a_folder_of_two_encoders_is_refused_by_their_names(tmp_path):
    for name, x in (("a.pth", torch.zeros(2)), ("b.pth", torch.zeros(2)), ("c.pth", torch.ones(2))):
        torch.save({"cls_token": x}, tmp_path / name)
    with pytest.raises(UserError, match=r"b\.pth and c\.pth hold different .* such as .*c\.pth"):
        read_dinov2(str(tmp_path))
    (tmp_path / "c.pth").unlink()
    assert list(weight_files.read_bare_weights(str(tmp_path), "DINOv2")) == ["cls_token"]


def test_weights_that_are_no_dinov2_are_refused(encoders, tmp_path):
    tensors = original_tensors(encoders["plain"][1])
    path = tmp_path / "x.pth"

    def refused(changed):
        torch.save(changed, path)
        with pytest.raises(UserError) as error:
            read_dinov2(str(path))
        return str(error.value)

    assert "is no DINOv2: it lacks pos_embed" in refused({"x": torch.zeros(3)})
    del tensors["blocks.1.ls1.gamma"]
    message = refused(tensors | {"head.weight": torch.zeros(2)})
    assert "it lacks blocks.1.ls1.gamma; it has no place for head.weight" in message
    with pytest.raises(UserError, match=r"cannot load 'facebook/dinov2-large': it is not a local"):
        read_dinov2("dinov2-large")
    with pytest.raises(UserError, match="dtype float16: must be one of float32, bfloat16"):
        load_dinov2("dinov2-large", "float16")
