"""An autoencoder's training does what it says, goes on where it stopped, and is that of one device
on any number of them.
"""

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
from training.autoencoder import trainer as autoencoder_trainer
from training.autoencoder.config import VaeConfig, largest_norm_groups
from training.autoencoder.losses import AutoencoderWithCritic, AutoencoderLossInputs


def test_every_field_is_read():
    """A setting that nothing reads is a promise that nobody keeps."""
    read = set()
    for module in ("train_vae.py", "train_vae_config.py", "train.py", "open_run.py"):
        tree = ast.parse((ROOT / module).read_text())
        tree.body = [node for node in tree.body if getattr(node, "name", "") != "validate"]
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
    """A batch of pictures that show nothing."""
    image = np.random.default_rng(0).integers(0, 255, (n, 16, 16, 1), dtype=np.uint8)
    row = np.arange(n, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(row, image, row))


@pytest.fixture(scope="module")
def adversaries():
    model = AutoencoderWithCritic(SMALL, dtype="float32", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


@pytest.mark.parametrize("name", ["objective", "adversarial"])
def test_any_number_of_devices_has_the_gradient_of_one(adversaries, name):
    graphdef, params = adversaries
    found = []
    for n in (1, 2):
        mesh = parallel.make_mesh(devices=jax.devices()[:n])
        mean = (parallel.mean_over_devices,) if name == "adversarial" else ()
        loss = getattr(autoencoder_trainer, name)(RESOLVED, *mean)
        value_and_grad = jax.jit(parallel.value_and_grad(loss, graphdef, mesh))
        batch = parallel.shard_batch(noise(), mesh)
        given = AutoencoderLossInputs(jax.random.key(1), ())
        found.append(jax.device_get(value_and_grad(params, batch, given)))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-6)


def test_the_adversarial_gradient_is_that_of_its_parts(adversaries):
    """For the autoencoder, of the reconstruction, the KL, and the critic's opinion times λ; for the
    critic, of its hinge loss. Each differentiated by itself.
    """
    graphdef, params = adversaries
    batch, given, c = noise(), AutoencoderLossInputs(jax.random.key(1), ()), RESOLVED

    def pictures(params):
        model, image = nnx.merge(graphdef, params), to_float(batch.image)
        moments = model.encode(image)
        z = sample_latents(moments, losses.keys_by_row(given.key, batch.row))
        return model, image, moments, model.decode(z)

    def plain(params):
        return losses.autoencoder_loss(c)(nnx.merge(graphdef, params), batch, given)[0]

    def near(params):
        _, image, _, picture = pictures(params)
        return losses.reconstruction_loss(c)(picture, image, ())[0]

    def fools(params):
        model, _, _, picture = pictures(params)
        return perceptual.hinge_generator(model.discriminator(picture))

    def tells(params):
        model, image, _, picture = pictures(params)
        return perceptual.hinge_critic(model.discriminator(image), model.discriminator(picture))

    def both(params):
        return losses.adversarial_loss(c)(nnx.merge(graphdef, params), batch, given)

    grads, reported = jax.jit(jax.grad(both, has_aux=True))(params)
    parts = jax.jit(lambda p: [jax.grad(part)(p) for part in (plain, near, fools, tells)])(params)
    of_plain, of_near, of_fools, of_tells = parts
    last = [tree["decoder"]["conv_out"]["kernel"] for tree in (of_near, of_fools)]
    weight = c.gan_weight * perceptual.adaptive_weight(*last)
    np.testing.assert_allclose(reported["gan_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(
        perceptual.tree_norm(weight * last[1]), c.gan_weight * perceptual.tree_norm(last[0]), rtol=1e-2
    )
    for name in params:
        expected = of_tells[name]
        if name != "discriminator":
            expected = jax.tree.map(lambda a, b: a + weight * b, of_plain[name], of_fools[name])
        for a, b in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_each_row_draws_its_own_noise_by_its_place_alone():
    moments = Moments(jnp.zeros((4, 2, 2, 3)), jnp.zeros((4, 2, 2, 3)))
    key = jax.random.key(0)
    z = sample_latents(moments, losses.keys_by_row(key, jnp.arange(4)))
    part = Moments(*(x[2:] for x in moments))
    of_part = sample_latents(part, losses.keys_by_row(key, jnp.arange(2, 4)))
    np.testing.assert_array_equal(of_part, z[2:])
    assert len(np.unique(np.asarray(z))) == z.size


def test_lpips_is_a_part_of_the_distance_where_it_has_weights(adversaries):
    graphdef, params = adversaries
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
    given = AutoencoderLossInputs(jax.random.key(0), weights)
    (_, reported), grads = jax.eval_shape(value_and_grad, params, noise(2), given)
    assert "lpips_loss" in reported and jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "widths, groups", [((128, 256, 512, 512), 32), ((32, 64), 8), ((8, 12), 1), ((6,), 1)]
)
def test_a_group_of_channels_is_no_channel_alone(widths, groups):
    assert largest_norm_groups(widths) == groups


# --- an export is whole or not there --------------------------------------------------------------


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
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
