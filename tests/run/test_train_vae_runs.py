"""A run of train_vae.py leaves its files, resumes bit for bit, and exports what it evaluated."""

import json
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from train_cases import assert_same, metrics
from train_vae_cases import (
    COMMAND,
    TINY,
    whole,  # noqa: F401  # noqa: F401
)

from methods.rectified_flow import to_float
from networks.autoencoder import most_likely_latents
from pretrained import autoencoder
from runtime.errors import UserError
from train import Trainer
from training.autoencoder import losses
from training.autoencoder.config import VaeConfig
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
    assert [line["step"] for line in lines] == [3, 6, 6, 8]
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
        ({"kl_weight": -1.0}, "--kl_weight -1.0: must not be below 0"),
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
