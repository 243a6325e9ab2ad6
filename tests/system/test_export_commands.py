"""What a run leaves for others: the same network, a card that says how to use it, nothing half
written.
"""

from pathlib import Path

import nano  # noqa: F401  (its sizes)
import pytest
from commands import run
from export_cases import trained  # noqa: F401

import export
from model import model_config


def test_latents_need_their_vae():
    encoding = {
        **dict.fromkeys(("dataset_name", "source", "precision"), ""),
        "image_size": 256,
        "shape": [32, 32, 4],
        "vae": "us/vae",
        "vae_hash": "abc",
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
        "mirrored": False,
        "captions": False,
    }
    run = {"dataset": {"encoding": encoding}, "model": "DiT-B/2", "dataset_name": "imagenet"}
    run |= {"ema": True, "step": 7, "n_steps": 7, "objective": "rectified_flow"}
    config = model_config("DiT-B/2", image_size=32, channels=4, out_channels=4, n_classes=1000)
    card = export.model_card("my-dit", run, config, "DiT", 10**6)
    assert "latents of 32×32×4, which the VAE `us/vae` decodes to pictures of 256×256" in card
    assert "(SHA-256 of its weights: abc). To the VAE go x / 0.5 + 0.1." in card


@pytest.mark.parametrize("objective", [{}, {"objective": "rectified_flow"}])
def test_the_command_names_latents_and_not_their_shape(objective):
    """The first runs had no choice of an objective."""
    run = {"dataset_name": "imagenet", "latents": "my latents", "image_size": 32, "channels": 4}
    said = export.training_command(run | {"model": "DiT-B/2", "n_steps": 7} | objective)
    assert said == (
        "python train.py --dataset_name imagenet --latents 'my latents' --model DiT-B/2 --n_steps 7"
    )


@pytest.mark.slow
def test_the_command_writes_a_folder_or_ends_in_one_line(trained, tmp_path, cache):
    out = tmp_path / "out"
    done = run("export.py", "--run", trained.run_dir, "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr
    expected = {"README.md", "config.json", "settings.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in out.iterdir()} == expected
    done = run("export.py", "--run", tmp_path, "--out", out, cache=cache)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: '{tmp_path}' is not a run")
    assert list(Path(tmp_path).iterdir()) == [out]
