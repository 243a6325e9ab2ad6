"""A run of train_vae.py leaves its files, resumes bit for bit, and exports what it evaluated."""

import json
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from train_cases import assert_same, metrics
from train_vae_cases import (
    COMMAND,
    TINY,
    whole,  # noqa: F401
)

from data.batch import Batch
from methods.method import to_float
from networks import perceptual
from networks.autoencoder import AutoencoderConfig, most_likely_latents, sample_latents
from pretrained import autoencoder
from runtime import parallel
from runtime.errors import UserError
from train import Trainer
from training.autoencoder import losses
from training.autoencoder.config import VaeConfig
from training.autoencoder.losses import AutoencoderLossInputs, AutoencoderWithCritic
from training.autoencoder.trainer import VaeTrainer
from training.config import TrainConfig


def test_a_run_is_resumed_by_its_own_command_only(whole, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is a run of train_vae.py, not of train.py"):
        Trainer(TrainConfig(run_dir=whole.run_dir, resume=True))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to(whole.run_dir)
    with pytest.raises(UserError, match="nothing to resume"):
        Trainer(TrainConfig(resume=True))
    assert VaeTrainer(VaeConfig(resume=True)).step == 8
    with pytest.raises(UserError, match="cannot resume: kl_weight was 1e-06, not 1"):
        VaeTrainer(VaeConfig(resume=True, kl_weight=1.0))


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_writes_its_metrics_checkpoints_and_grids(whole):
    folder = whole.run_dir
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [3, 6, 6, 8, 8]
    losses_of_critic = {"gan_loss", "critic_loss", "gan_weight"}
    assert {"loss", "pixel_loss", "gradient_loss", "kl", *losses_of_critic} < set(lines[0])
    assert all(lines[0][name] == 0 for name in losses_of_critic)  # before gan_start
    assert all(lines[1][name] != 0 for name in losses_of_critic)
    assert lines[-1].keys() == {"step", "psnr"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"6", "8"}
    with Image.open(folder / "reconstructions" / "final.png") as grid:
        assert min(grid.size) > 256  # large enough to look at
    assert (folder / "reconstructions" / "0000006.png").exists()
    assert not list(folder.glob(".*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["command"] == COMMAND and config["image_size"] == 16


def test_the_export_has_the_averaged_weights_and_latents_of_unit_variance(whole):
    found = autoencoder.load_autoencoder(str(whole.run_dir / "vae"))
    image = whole.source.train.decode(np.arange(48))
    for part, saved in zip(
        jax.tree.leaves(losses.without_critic(whole.state.ema)),
        jax.tree.leaves(found.params),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(part), saved)
    moments = found.model().encode(to_float(jnp.asarray(image)))
    z = (most_likely_latents(moments) - found.config.shift_factor) * found.config.scaling_factor
    variance = jnp.exp(moments.log_variance) * found.config.scaling_factor**2
    assert abs(z.mean()) < 0.2
    assert abs(jnp.sqrt(z.var() + variance.mean()) - 1) < 0.1


def test_a_grid_shows_originals_above_their_reconstructions(whole, monkeypatch):
    monkeypatch.setattr(VaeTrainer, "reconstruct", lambda self, image: 255 - image)
    grid = np.asarray(whole.image_grids()[0].convert("L"), int)
    height = (grid.shape[0] - 4) // 4
    above, below = grid[4 : height - 4], grid[4 + height : 2 * height - 4]
    assert np.median(above + below) == 255


def test_interrupted_and_resumed_is_uninterrupted(whole, tmp_path, monkeypatch, capsys):
    """At a step that is a multiple of no interval, after gan_start."""
    broken = VaeTrainer(replace(TINY, run_dir=tmp_path / "run"))
    honest_step = VaeTrainer.train_step

    def step(self, batch):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest_step(self, batch)

    monkeypatch.setattr(VaeTrainer, "train_step", step)
    with pytest.raises(SystemExit) as exit:
        broken.fit()
    assert exit.value.code == 143
    assert (tmp_path / "run" / "vae" / "config.json").exists()
    monkeypatch.undo()

    resumed = VaeTrainer.from_run(tmp_path / "run")
    assert resumed.step == 5
    resumed.fit()
    assert_same(resumed.state, whole.state)
    assert metrics(resumed.run_dir) == metrics(whole.run_dir)
    one, two = (
        (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
        for folder in (resumed.run_dir, whole.run_dir)
    )
    assert one == two


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kl_weight": -1.0}, "--kl_weight -1.0: must be at least 0"),
        ({"latent_channels": 0}, "--latent_channels 0: must be above 0"),
        ({"shuffle_buffer": 9}, "--shuffle_buffer is for --streaming"),
        (
            {"image_size": 18, "block_out_channels": (8, 8, 8)},
            "18 is not divisible by 4: the 3 levels",
        ),
        ({"batch_size": 9}, "--batch_size 9 is not divisible by the 8 devices"),
        ({"lpips": "nowhere", "image_size": 8}, "at least 16×16"),
        ({"lpips": "nobody/nowhere"}, "it is not a local path"),
        ({"gan_weight": 1.0, "accumulate_steps": 2, "batch_size": 16}, "drop --accumulate_steps"),
        ({"schedule": "sine"}, "unknown schedule"),
        ({"dataset_name": "digit"}, "did you mean 'digits'"),
    ],
)
def test_impossible_flags_are_rejected_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        VaeTrainer(VaeConfig(run_dir=tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()


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
