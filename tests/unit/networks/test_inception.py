"""FID's Inception beside an independent one in torch, on random weights; images as other tools
prepare them; weights that are not its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_cases import (
    file,  # noqa: F401
    loaded,  # noqa: F401
    of_torch,  # noqa: F401
    ours,  # noqa: F401
    state,  # noqa: F401
    torch,  # noqa: F401
    two_sets,  # noqa: F401
    wave_images,
)
from PIL import Image

from evaluation import features
from evaluation.features import rebatch
from networks import inception
from pretrained import inception as pretrained
from runtime import parallel
from runtime.errors import UserError


def test_the_network_has_as_many_weights_as_the_paper_s():
    kernels = list(pretrained.kernel_shapes().values())
    assert len(kernels) == 94
    n_channels = sum(shape[-1] for shape in kernels)
    # Of torchvision's Inception-v3 without its classes and without its auxiliary head.
    assert sum(map(np.prod, kernels)) + 2 * n_channels == 21_785_568


def test_regrouping_keeps_every_image_in_order():
    image = wave_images(20, 2, 2)
    parts = list(rebatch(iter([image[:1], image[1:9], image[9:9], image[9:]]), 6))
    assert [len(part) for part in parts] == [6, 6, 6, 2]
    np.testing.assert_array_equal(np.concatenate(parts), image)


# --- images as other tools prepare them -----------------------------------------------------------

SIZES = [(32, 32), (7, 12), (300, 640)]


@pytest.mark.parametrize("size", SIZES)
def test_images_for_pytorch_fid(torch, size):
    image = wave_images(2, *size)
    x = torch.from_numpy(image).permute(0, 3, 1, 2) / 255
    expected = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).numpy() * 2 - 1
    np.testing.assert_allclose(
        inception.prepare_like_pytorch_fid(jnp.asarray(image)), expected, atol=1e-4
    )


@pytest.mark.parametrize("size", SIZES)
def test_images_for_the_graph_of_2015(size):
    image = wave_images(1, *size).astype(np.float64)

    def line(x, axis):
        """TensorFlow 1: position i of the output is position i · n / 299 of the input."""
        n = x.shape[axis]
        position = np.arange(299) * n / 299
        low = np.floor(position).astype(int)
        high, share = np.minimum(low + 1, n - 1), (position - low).reshape([-1, *[1] * (3 - axis)])
        return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share

    expected = (line(line(image, 1), 2) - 128) / 128
    found = inception.prepare_like_adm(jnp.asarray(image.astype(np.uint8)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_images_for_clean_fid(size):
    image = wave_images(1, *size)
    planes = [Image.fromarray(image[0, ..., i].astype(np.float32)) for i in range(3)]
    planes = [np.asarray(p.resize((299, 299), Image.Resampling.BICUBIC)) for p in planes]
    expected = (np.clip(np.stack(planes, -1), 0, 255)[None] - 128) / 128
    found = inception.prepare_like_clean_fid(jnp.asarray(image))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_grey_images_are_repeated_in_three_channels():
    grey = jnp.asarray(wave_images(1, 9, 9, 1))
    np.testing.assert_array_equal(
        inception.prepare_like_adm(grey), inception.prepare_like_adm(jnp.repeat(grey, 3, axis=-1))
    )


def test_a_preparation_that_does_not_exist_is_named(loaded):
    with pytest.raises(UserError, match="unknown preparation 'clean'; did you mean 'clean_fid'"):
        features.build_inception_extractor(loaded, parallel.make_mesh(), preparation="clean")


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_the_same_from_every_file(state, loaded, tmp_path):
    from safetensors.torch import save_file

    counters = {name for name in state if name.endswith("tracked")}
    save_file({n: x for n, x in state.items() if n not in counters}, tmp_path / "x.safetensors")
    again = pretrained.load_inception(str(tmp_path))
    assert again.hash == loaded.hash
    shapes = jax.tree.map(lambda x: x.shape, inception.inception_shapes())
    assert jax.tree.map(np.shape, again.params) == shapes
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_weight_counts(state, loaded):
    tensors = {n: x.numpy() for n, x in state.items() if not n.endswith("tracked")}
    for name in ("Mixed_5b.branch_pool.bn.running_mean", "Mixed_7c.branch3x3_2b.bn.weight"):
        changed = pretrained.fold_batch_norms(tensors | {name: tensors[name] + 1})
        differ = jax.tree.map(lambda a, b: bool((a != b).any()), changed, loaded.params)
        paths = [path for path, is_other in jax.tree_util.tree_leaves_with_path(differ) if is_other]
        places = {".".join(str(key.key) for key in path[:-1]) for path in paths}
        assert places == {name.rpartition(".bn.")[0]}


def test_weights_of_another_inception_are_refused_by_name(torch, state, tmp_path):
    path = tmp_path / "x.pth"

    def refused(tensors):
        torch.save(tensors, path)
        with pytest.raises(UserError, match="do not fit FID's Inception of 2015") as error:
            pretrained.load_inception(str(path))
        return str(error.value)

    few = {n: x for n, x in state.items() if n.startswith(("fc", "Conv2d"))}
    theirs = {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1000)}
    message = refused(few | theirs)
    assert "it has no place for AuxLogits.fc.bias" in message
    assert "fc.weight (1000, 2048), not (1008, 2048)" in message
    assert "it lacks Mixed_5b.branch1x1.bn.bias" in message
    with pytest.raises(UserError, match=r"cannot load Inception 'nobody/has-this': .* local path"):
        pretrained.load_inception("nobody/has-this")
