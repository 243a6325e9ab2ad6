"""The command in processes of its own: samples of a run, also after a kill."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run
from faults_cases import wait_until
from generate_cases import (
    command,  # noqa: F401
    digits,  # noqa: F401
)
from PIL import Image, ImageSequence

import generate
from generate import GenerateConfig
from runtime.errors import UserError
from train import Trainer
from training.config import TrainConfig


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_bytes(forks, tmp_path):
    folder = tmp_path / "run"
    config = TrainConfig(
        model="DiT-Nano/8", batch_size=8, n_steps=2, eval_save_steps=2, half_precision=False
    )
    Trainer(replace(config, n_eval_batches=1, n_sample_steps=2, run_dir=folder)).fit()
    flags = ["--run", folder, "--n", 200, "--batch_size", 1, "--n_steps", 2, "--out"]

    def holds(path: Path, n: int) -> bool:
        return len([*path.glob("*")]) > n

    def content(path: Path) -> dict[str, bytes]:
        files = path.rglob("*") if path.is_dir() else [path]
        return {file.name: file.read_bytes() for file in files}

    for name, parts in (("a", "b"), ("a.npz", "b.npz.parts")):
        status, _, err = forks.run(*flags, tmp_path / name, command="generate.py")
        assert status == 0, err
        out = tmp_path / name.replace("a", "b")
        process = forks.start(*flags, out, command="generate.py")
        wait_until(partial(holds, tmp_path / parts, 60))
        os.kill(process, signal.SIGKILL)
        assert forks.end()[0] == -signal.SIGKILL
        assert not out.is_file() and not holds(tmp_path / parts, 190)
        status, _, err = forks.run(*flags, out, command="generate.py")
        assert status == 0, err
        assert [*content(out).values()] == [*content(tmp_path / name).values()]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a", "b", "a.npz", "b.npz"}


# --- from a run -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_samples_from_a_run(tmp_path, cache, capsys):
    folder = tmp_path / "run"
    config = TrainConfig(
        model="DiT-Nano/8", batch_size=8, n_steps=4, eval_save_steps=2, half_precision=False
    )
    config = replace(config, n_eval_batches=1, n_sample_steps=2, run_dir=folder)
    Trainer(config).fit()
    before = sorted(folder.rglob("*"))

    command = ["generate.py", "--run", folder, "--labels", "3", "7", "--n", 6, "--n_steps", 4]
    command += ["--out", tmp_path / "a.npz", "--trajectory", tmp_path / "trajectory.gif"]
    done = run(*command, cache=cache)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "a.npz") as arrays:
        averaged, labels = arrays["arr_0"], arrays["arr_1"]
    assert averaged.shape == (6, 8, 8, 1) and averaged.dtype == np.uint8
    assert labels.tolist() == [3, 3, 3, 7, 7, 7]
    with Image.open(tmp_path / "trajectory.gif") as frames:
        assert len(list(ImageSequence.Iterator(frames))) == 5

    flags = GenerateConfig(run=folder, labels=("3", "7"), n=6, n_steps=4, out=tmp_path / "b.npz")
    generate.main(replace(flags, ema=False))
    with np.load(tmp_path / "b.npz") as arrays:
        assert (arrays["arr_0"] != averaged).any()
    generate.main(replace(flags, step=2, out=tmp_path / "grid.png"))
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 100
    assert sorted(folder.rglob("*")) == before  # a reader leaves no trace

    generate.main(replace(flags, fsdp=8, out=tmp_path / "sharded.npz"))
    with np.load(tmp_path / "sharded.npz") as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - averaged).max() <= 1
    with pytest.raises(UserError, match="--fsdp 3 does not divide the 8 devices"):
        generate.main(replace(flags, fsdp=3))

    wrong = run("generate.py", "--run", folder, "--labels", "eleven", cache=cache)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown label 'eleven'") and wrong.stdout == ""
