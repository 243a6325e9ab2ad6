"""The losses of an autoencoder have the gradient of their parts, on any number of devices."""

import ast
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from flax import nnx
from train_vae_cases import (
    TINY,
    whole,  # noqa: F401
)

from data.batch import Batch
from methods.rectified_flow import to_float
from networks import perceptual
from networks.autoencoder import AutoencoderConfig, Moments, sample_latents
from runtime import files, parallel
from training.autoencoder import losses
from training.autoencoder.config import VaeConfig, largest_norm_groups
from training.autoencoder.losses import AutoencoderLossInputs, AutoencoderWithCritic


def test_every_field_is_read():
    """A flag that nothing reads is a promise that nobody keeps."""
    read = set()
    modules = [f"training/autoencoder/{name}.py" for name in ("config", "losses", "trainer")]
    for module in [*modules, "training/loop.py", "training/session.py"]:
        tree = ast.parse((ROOT / module).read_text())
        tree.body = [
            node for node in tree.body if getattr(node, "name", "") != "validate_vae_config"
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                read |= {node.attr} if owner in ("c", "config") else set()
    assert {field.name for field in fields(VaeConfig)} <= read


# --- the loss -------------------------------------------------------------------------------------

SMALL = AutoencoderConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 8),
    norm_num_groups=2,
    sample_size=16,
    mid_block_add_attention=False,
)
RESOLVED = replace(TINY, pixel_loss="l2", gradient_weight=0.1, kl_weight=1e-2, lpips_weight=1.0)


def noise(n: int = 8) -> Batch:
    """Make a batch of images of noise."""
    image = np.random.default_rng(0).integers(0, 255, (n, 16, 16, 1), dtype=np.uint8)
    row = np.arange(n, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(row, image, row))


@pytest.fixture(scope="module")
def autoencoder_with_critic():
    model = AutoencoderWithCritic(SMALL, dtype="float32", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


@pytest.mark.parametrize("name", ["autoencoder_loss", "adversarial_loss"])
def test_the_gradient_does_not_depend_on_the_number_of_devices(autoencoder_with_critic, name):
    graphdef, params = autoencoder_with_critic
    found = []
    for n in (1, 2):
        mesh = parallel.make_mesh(devices=jax.devices()[:n])
        mean = (parallel.mean_over_devices,) if name == "adversarial_loss" else ()
        loss = getattr(losses, name)(RESOLVED, *mean)
        value_and_grad = jax.jit(parallel.value_and_grad(loss, graphdef, mesh))
        batch = parallel.shard_batch(noise(), mesh)
        inputs = AutoencoderLossInputs(jax.random.key(1), ())
        found.append(jax.device_get(value_and_grad(params, batch, inputs)))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-6)


def test_the_adversarial_gradient_is_the_sum_of_its_parts(autoencoder_with_critic):
    """For the autoencoder: reconstruction, KL, and λ times the generator loss. For the critic: its
    hinge loss. Each is differentiated on its own.
    """
    graphdef, params = autoencoder_with_critic
    batch, c = noise(), RESOLVED
    inputs = AutoencoderLossInputs(jax.random.key(1), ())

    def reconstruct(params):
        model, image = nnx.merge(graphdef, params), to_float(batch.image)
        moments = model.encode(image)
        z = sample_latents(moments, losses.keys_by_row(inputs.key, batch.row))
        return model, image, moments, model.decode(z)

    def without_critic_loss(params):
        return losses.autoencoder_loss(c)(nnx.merge(graphdef, params), batch, inputs)[0]

    def distance(params):
        _, image, _, reconstruction = reconstruct(params)
        return losses.reconstruction_loss(c)(reconstruction, image, ())[0]

    def generator(params):
        model, _, _, reconstruction = reconstruct(params)
        return perceptual.hinge_generator(model.discriminator(reconstruction))

    def critic(params):
        model, image, _, reconstruction = reconstruct(params)
        return perceptual.hinge_critic(
            model.discriminator(image), model.discriminator(reconstruction)
        )

    def adversarial(params):
        return losses.adversarial_loss(c)(nnx.merge(graphdef, params), batch, inputs)

    grads, reported = jax.jit(jax.grad(adversarial, has_aux=True))(params)
    losses_of_parts = (without_critic_loss, distance, generator, critic)
    parts = jax.jit(lambda p: [jax.grad(part)(p) for part in losses_of_parts])(params)
    plain_grads, distance_grads, generator_grads, critic_grads = parts
    last = [tree["decoder"]["conv_out"]["kernel"] for tree in (distance_grads, generator_grads)]
    weight = c.gan_weight * perceptual.adaptive_weight(*last)
    np.testing.assert_allclose(reported["gan_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(
        perceptual.tree_norm(weight * last[1]),
        c.gan_weight * perceptual.tree_norm(last[0]),
        rtol=1e-2,
    )
    for name in params:
        expected = critic_grads[name]
        if name != "discriminator":
            expected = jax.tree.map(
                lambda a, b: a + weight * b, plain_grads[name], generator_grads[name]
            )
        for a, b in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_the_noise_of_a_row_depends_on_its_index_only():
    moments = Moments(jnp.zeros((4, 2, 2, 3)), jnp.zeros((4, 2, 2, 3)))
    key = jax.random.key(0)
    z = sample_latents(moments, losses.keys_by_row(key, jnp.arange(4)))
    part = Moments(*(x[2:] for x in moments))
    of_part = sample_latents(part, losses.keys_by_row(key, jnp.arange(2, 4)))
    np.testing.assert_array_equal(of_part, z[2:])
    assert len(np.unique(np.asarray(z))) == z.size


def test_lpips_is_part_of_the_loss_if_it_has_weights(autoencoder_with_critic):
    graphdef, params = autoencoder_with_critic
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda x: jnp.asarray(np.abs(rng.normal(size=x.shape, scale=0.05)), jnp.float32),
        perceptual.lpips_shapes(),
    )
    loss, model = losses.autoencoder_loss(RESOLVED), nnx.merge(graphdef, params)
    without, _ = loss(model, noise(2), AutoencoderLossInputs(jax.random.key(0), ()))
    total, reported = loss(model, noise(2), AutoencoderLossInputs(jax.random.key(0), weights))
    assert reported["lpips_loss"] > 0
    np.testing.assert_allclose(total - without, reported["lpips_loss"], rtol=1e-3)
    mesh = parallel.make_mesh(devices=jax.devices()[:2])
    loss = losses.adversarial_loss(RESOLVED, parallel.mean_over_devices)
    value_and_grad = parallel.value_and_grad(loss, graphdef, mesh)
    inputs = AutoencoderLossInputs(jax.random.key(0), weights)
    (_, reported), grads = jax.eval_shape(value_and_grad, params, noise(2), inputs)
    assert "lpips_loss" in reported and jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "widths, groups", [((128, 256, 512, 512), 32), ((32, 64), 8), ((8, 12), 1), ((6,), 1)]
)
def test_a_norm_group_has_at_least_four_channels(widths, groups):
    assert largest_norm_groups(widths) == groups


# --- an export is complete or absent --------------------------------------------------------------


def test_a_folder_replaces_another_only_once_it_is_complete(tmp_path):
    def write(content: str, fail: bool = False):
        with files.atomic_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(content)
            if fail:
                raise RuntimeError

    write("old")
    with pytest.raises(RuntimeError):
        write("half", fail=True)
    assert (tmp_path / "x" / "file").read_text() == "old"
    write("new")
    assert (tmp_path / "x" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (tmp_path / ".x.999999999.tmp").mkdir()  # of a process that was killed
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
