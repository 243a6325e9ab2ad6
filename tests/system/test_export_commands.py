"""An exported folder computes what its run computes, describes it, and is never half written."""

from pathlib import Path

import nano  # noqa: F401  (its sizes)
import pytest
from commands import run
from export_cases import trained  # noqa: F401

import export
from inference.trained_model import TrainedModel
from model import model_config
from runtime import parallel


def test_the_card_names_the_vae_of_latents():
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
    trained = TrainedModel("my-dit", run, config, parallel.make_mesh(), lambda: (7, None))
    card = export.model_card("my-dit", run, trained, "DiT", 10**6)
    assert "latents of 32×32×4, which the VAE `us/vae` decodes to images of 256×256" in card
    assert "(SHA-256 of its weights: abc). The VAE's input is x / 0.5 + 0.1." in card


def test_the_command_has_the_given_flags_that_shaped_the_weights():
    run = {"dataset_name": "imagenet", "latents": "my latents", "image_size": 32, "channels": 4}
    run |= {"model": "DiT-B/2", "n_steps": 7, "given_flags": {}}
    assert export.training_command(run) == "python train.py --dataset_name imagenet"
    run["given_flags"] = {"latents": "my latents", "model": "DiT-B/2", "remat": True}
    run["given_flags"] |= {"n_steps": 7, "rope": False, "log_every": 5, "caption": ["a {label}"]}
    assert export.training_command(run) == (
        "python train.py --dataset_name imagenet --latents 'my latents' --model DiT-B/2 --n_steps 7"
        " --norope --caption 'a {label}'"
    )


def test_the_command_of_a_run_that_recorded_no_flags_says_so():
    run = {"dataset_name": "imagenet", "model": "DiT-B/2", "n_steps": 7, "schedule": "linear"}
    assert export.training_command(run) == (
        "python train.py --dataset_name imagenet --model DiT-B/2 --n_steps 7"
        "  # other flags were not recorded"
    )


@pytest.mark.slow
def test_export_writes_a_folder_or_fails_in_one_line(trained, tmp_path, cache):
    out = tmp_path / "out"
    done = run("export.py", "--run", trained.run_dir, "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr
    expected = {"README.md", "config.json", "settings.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in out.iterdir()} == expected
    done = run("export.py", "--run", tmp_path, "--out", out, cache=cache)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: '{tmp_path}' is not a run")
    assert list(Path(tmp_path).iterdir()) == [out]
