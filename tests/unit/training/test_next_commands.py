"""The commands under "Next:" can be pasted, whatever a person's folders are called."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latents_cases import ENCODING

import convert_imagenet
from data.latents import LatentDataset
from training import display, session
from training.autoencoder.trainer import VaeTrainer

FOLDERS = ["runs/digits", "my runs/a b", "it's", "$HOME/x", "a;b", "猫"]


def next_commands(message: str) -> list[list[str]]:
    """The words that a shell takes from each command."""
    commands = message.partition("Next:\n")[2].replace("\\\n", "")
    return [shlex.split(line) for line in commands.splitlines()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_runs_are_quoted(folder):
    message = display.end_message(Path(folder), 15, example='--prompts "…"')
    generate, figures, train = next_commands(message)
    assert generate[:6] == ["python", "generate.py", "--run", folder, "--prompts", "…"]
    assert figures == ["python", "figures.py", "--run", folder]
    assert train[4:] == [folder, "--n_steps", "30"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_autoencoder_s_dataset_and_weights_are_quoted(folder):
    config = {"dataset_name": f"folder:{folder}", "data_dir": Path(folder), "image_column": "a b"}
    trainer: Any = SimpleNamespace(
        run_dir=Path(folder),
        step=3,
        config=SimpleNamespace(image_size=16, crop="letterbox", **config),
    )
    convert, train = next_commands(VaeTrainer.end_message(trainer))
    given = dict(zip(convert[2::2], convert[3::2]))
    assert given == {
        "--dataset_name": f"folder:{folder}",
        "--data_dir": folder,
        "--image_column": "a b",
        "--image_size": "16",
        "--crop": "letterbox",
        "--vae": f"{folder}/vae",
    }
    assert train[3:5] == ["--run_dir", folder]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_latents_is_quoted(folder):
    numbers = (0.0, 1.0)
    dataset = LatentDataset(ENCODING, numbers, numbers, {"train": 3}, {"train": 1}, {"train": []})
    (train,) = next_commands(convert_imagenet.closing_words(dataset, Path(folder)))
    assert train == ["python", "train.py", "--latents", folder]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_to_resume_after_the_loss_of_a_process_is_quoted(folder, tmp_path):
    advice = shlex.split(session._how_to_resume(tmp_path / folder))
    assert advice[-3:] == ["--resume", "--run_dir", str(tmp_path / folder)]
