"""Losses of an autoencoder have their closed forms; LPIPS equals an independent one in torch."""

import math
import pickle
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from perceptual_cases import (
    folder,  # noqa: F401
    random_images,
    rng,
    states,  # noqa: F401
    torch,  # noqa: F401
)

from networks import perceptual
from pretrained import lpips, torch_file
from runtime.errors import UserError

# --- pixels and latents ---------------------------------------------------------------------------


def test_the_kl_is_the_mean_of_the_log_ratio_over_samples():
    mean, log_variance = rng.normal(size=(2, 1, 2, 2, 3)).astype(np.float32)
    noise = rng.normal(size=(200_000, 2, 2, 3))
    z = mean + np.exp(log_variance / 2) * noise
    ratio = 0.5 * (z**2 - noise**2 - log_variance).sum((1, 2, 3))
    expected, error = ratio.mean(), ratio.std() / math.sqrt(len(ratio))
    found = perceptual.kl_to_standard_normal(jnp.asarray(mean), jnp.asarray(log_variance))[0]
    assert abs(found - expected) < 4 * error
    nothing = jnp.zeros((1, 2, 2, 3))
    assert perceptual.kl_to_standard_normal(nothing, nothing)[0] == 0


def test_psnr_of_a_known_error_and_of_none():
    a = jnp.zeros((2, 4, 4, 1))
    # 0.2 on −1 … 1 is a tenth of the range: 20 dB.
    np.testing.assert_allclose(perceptual.psnr(a, a + 0.2), 20, rtol=1e-5)
    np.testing.assert_allclose(perceptual.psnr(a, a), 100)


def test_the_gradient_term_sees_edges_and_no_constant():
    a = random_images(1, 8)
    np.testing.assert_allclose(perceptual.gradient_l2(a, a + 0.5), 0, atol=1e-12)
    edge = (
        jnp.zeros((1, 8, 8, 1)).at[:, 4:].set(1.0)
    )  # one row of differences of seven, each a unit high
    np.testing.assert_allclose(perceptual.gradient_l2(edge, 0 * edge), 1 / 7, rtol=1e-5)


def test_lpips_that_is_not_whole_is_refused_in_one_line(folder, states, torch, tmp_path):
    with pytest.raises(UserError, match=r"no weights for linear.0, of shape \(64,\)"):
        lpips.load_lpips(str(folder / "vgg16-397923af.pth"))
    with pytest.raises(UserError, match=r"LPIPS '.*': it holds no .*safetensors"):
        lpips.load_lpips(str(tmp_path))
    shutil.copy(folder / "vgg16-397923af.pth", tmp_path)
    torch.save({"lin0.model.1.weight": torch.rand(1, 7, 1, 1)}, tmp_path / "z.pth")
    with pytest.raises(UserError, match=r"shape \(7,\) for linear.0"):
        lpips.load_lpips(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot load LPIPS 'nobody/has-this': .* local path"):
        lpips.load_lpips("nobody/has-this")


def test_lpips_from_safetensors_in_one_file(folder, states, tmp_path):
    from safetensors.torch import save_file

    save_file(states[0] | states[1], tmp_path / "all.safetensors")
    one, two = lpips.load_lpips(str(tmp_path / "all.safetensors")), lpips.load_lpips(str(folder))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


# --- files of torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_read_without_torch(torch, tmp_path, zipped):
    whole = torch.arange(24.0).reshape(4, 6)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    saved = {
        "state": model.state_dict(),  # an OrderedDict with metadata
        "view": whole[1:3, ::2].T,  # strides, an offset, a shared storage
        "whole": whole,
        "half": torch.tensor([1.5, -2.0]).half(),
        "brain": torch.tensor([1.5, -2.0]).bfloat16(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "epoch": 3,
    }
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = torch_file.read_torch_file(tmp_path / "x.pth")
    assert set(found) == {
        *(f"state.{name}" for name in model.state_dict()),
        *(set(saved) - {"state", "epoch"}),
    }
    np.testing.assert_array_equal(found["view"], saved["view"].numpy())
    np.testing.assert_array_equal(found["brain"].astype(np.float32), [1.5, -2])
    assert found["half"].dtype == np.float16 and found["empty"].shape == (0, 3)
    assert found["scalar"] == 7 and found["scalar"].dtype == np.int64
    np.testing.assert_array_equal(found["state.0.weight"], model[0].weight.detach().numpy())


class Harmful:
    def __init__(self, call, *words):
        self.call, self.words = call, words

    def __reduce__(self):
        return self.call, self.words


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [print, eval, exec, getattr, __import__])
def test_a_file_that_would_call_something_is_refused(torch, tmp_path, capsys, zipped, call):
    bad = {"weight": torch.ones(1), "x": Harmful(call, "print('harm')")}
    torch.save(bad, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"refused: it asks for '__builtin__.{call.__name__}'"):
        torch_file.read_torch_file(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        pickle.dumps({"a": 1}),
        b"\x80\x02}q\x00.",
        b"\x80\x02cos\nsystem\n(U\x04truetR.",
    ],
)
def test_what_is_no_torch_file_is_refused(tmp_path, data):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.pth"):
        torch_file.read_torch_file(tmp_path / "x.pth")


def test_a_damaged_torch_file_is_refused(torch, tmp_path):
    torch.save({"a": torch.ones(100)}, path := tmp_path / "x.pth")
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:  # with a storage that is too short for its tensor
        for name, content in parts.items():
            new.writestr(name, content[:80] if name.endswith("data/0") else content)
    with pytest.raises(UserError, match="reaches beyond its numbers"):
        torch_file.read_torch_file(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"x\.pth"):
        torch_file.read_torch_file(path)
    with pytest.raises(UserError, match="No such file"):
        torch_file.read_torch_file(tmp_path / "y.pth")


# --- PatchGAN -------------------------------------------------------------------------------------


def test_hinge_losses_at_their_corners():
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 1.0])
    # Real ones above 1 and fakes below −1 cost nothing; else the distance to there counts.
    np.testing.assert_allclose(perceptual.hinge_critic(real, fake), 0.5 * (1 / 2 + 2 / 2))
    np.testing.assert_allclose(perceptual.hinge_generator(fake), 0.5)


def test_the_critic_pulls_as_hard_as_the_reconstruction_whatever_its_scale():
    w = jax.random.normal(jax.random.key(0), (3, 3, 4, 3))
    reconstruction_grads = jax.grad(lambda w: jnp.square(w).sum())(w)

    def pull(scale):
        gan_grads = jax.grad(lambda w: scale * jnp.sin(w).sum())(w)
        return perceptual.tree_norm(gan_grads) * perceptual.adaptive_weight(
            reconstruction_grads, gan_grads
        )

    np.testing.assert_allclose(pull(1.0), perceptual.tree_norm(reconstruction_grads), rtol=1e-4)
    np.testing.assert_allclose(pull(10.0), pull(1.0), rtol=1e-4)
    nothing = jnp.zeros_like(w)
    assert perceptual.adaptive_weight(reconstruction_grads, nothing, max_weight=50.0) == 50


@pytest.mark.parametrize("size, n_layers", [(32, 3), (16, 2), (8, 1)])
def test_a_patch_logit_depends_on_its_surroundings_and_no_other_image(size, n_layers):
    critic = perceptual.PatchDiscriminator(
        3, width=8, n_layers=n_layers, dtype="float32", rngs=nnx.Rngs(0)
    )
    a = random_images(2, size)
    judge = jax.jit(critic.__call__)
    both = judge(a)
    assert both.shape[1] > 1 and both.shape[3] == 1
    np.testing.assert_allclose(judge(a[:1])[0], both[0], atol=1e-6)
    moved = np.abs(jax.jit(jax.grad(lambda x: critic(x)[0, 0, 0, 0]))(a)).sum((1, 2, 3))
    assert moved[0] > 0 and moved[1] == 0
