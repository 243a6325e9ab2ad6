"""A run leaves what it promises, resumes bit for bit, and fails with one line."""

import json
import signal
import time
from dataclasses import replace

import nano  # noqa: F401  (its preset)
import numpy as np
import pytest
from commands import NANO, SMALL, run, start
from hub_copies import make_copy
from PIL import Image, ImageSequence
from train_cases import (
    TINY,
    assert_same,
    break_weights,
    whole,  # noqa: F401
)

from runtime.errors import UserError
from train import Trainer


@pytest.mark.slow
def test_a_run_of_ddpm_resumes_bit_for_bit_and_samples(tmp_path, cache, capsys):
    config = replace(TINY, objective="ddpm", learned_sigma=True, min_snr_gamma=5.0)
    whole = Trainer(replace(config, run_dir=tmp_path / "whole"))
    whole.fit()
    assert whole.model_config.out_channels == 2
    Trainer(replace(config, run_dir=tmp_path / "run")).fit(7)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.step == 7 and resumed.config.solver == "ddpm"
    resumed.fit()
    assert_same(resumed.state, whole.state)
    assert resumed.sample([3, 7], trajectory=True, n_steps=4).shape == (5, 2, 8, 8, 1)

    words = ["generate.py", "--run", tmp_path / "run", "--n", 2, "--labels", "3", "7"]
    samples = [tmp_path / f"{name}.npz" for name in ("ddpm", "ddim")]
    done = run(*words, "--out", samples[0], "--x0", tmp_path / "x0.gif", cache=cache)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "x0.gif") as frames:
        assert len(list(ImageSequence.Iterator(frames))) == 2  # one per step
    done = run(*words, "--out", samples[1], "--solver", "ddim", "--eta", "0.5", cache=cache)
    assert done.returncode == 0, done.stderr
    with np.load(samples[0]) as a, np.load(samples[1]) as b:
        assert a["arr_0"].shape == (2, 8, 8, 1) and (a["arr_0"] != b["arr_0"]).any()
    wrong = run(*words, "--solver", "heun", cache=cache)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --solver heun is not for a model trained by DDPM")


@pytest.mark.slow
def test_the_command_trains_by_ddpm(tmp_path, cache):
    words = [NANO, *SMALL, "--n_steps", 3, "--run_dir", tmp_path / "run"]
    done = run(*words, "--objective", "ddpm", "--prediction", "v", "--solver", "ddim", cache=cache)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["objective"], config["prediction"], config["solver"]) == ("ddpm", "v", "ddim")
    assert config["time_density"] is None
    wrong = run(NANO, *SMALL, "--objective", "ddpm", "--time_shift", 3, cache=cache)
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "error: --time_shift is for --objective rectified_flow or meanflow; this is ddpm\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130)],
)
def test_a_signal_saves_and_ends_the_run(tmp_path, cache, number, code):
    flags = ["--n_steps", 100_000, "--eval_save_steps", 100_000, "--log_every", 1]
    process = start(NANO, *SMALL, *flags, "--run_dir", tmp_path / "run", cache=cache)
    for line in process.stdout:  # type: ignore[union-attr]
        if line.startswith("step"):
            break
    process.send_signal(number)
    sent = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - sent < 30
    assert "Traceback" not in err
    assert len(list((tmp_path / "run/checkpoints").glob("[0-9]*"))) == 1


@pytest.mark.slow
def test_a_bad_row_ends_the_run_with_its_number_and_a_checkpoint(tmp_path, capsys):
    folder = make_copy("cifar10", tmp_path / "data", n=64)
    config = replace(
        TINY, dataset_name="cifar10", data_dir=folder, in_memory=False, n_workers=0, n_steps=8
    )
    trainer = Trainer(replace(config, run_dir=tmp_path / "run"))
    bad = int(trainer.data.batch_rows(3)[2])
    honest_batches = trainer.data.train_batches

    def batches(start, stop):
        yield from honest_batches(start, 3)
        raise UserError(f"dataset 'cifar10', split 'train', row {bad}, column 'img': broken")

    trainer.data.train_batches = batches
    with pytest.raises(UserError, match=f"row {bad}, column 'img'"):
        trainer.fit()
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"3"}


def test_bad_data_after_a_bad_step_saves_nothing(tmp_path, capsys):
    trainer = Trainer(replace(TINY, run_dir=tmp_path / "run"))
    break_weights(trainer)
    honest_batches = trainer.data.train_batches

    def batches(start, stop):
        yield from honest_batches(start, 1)
        raise UserError("row 5 is broken")

    trainer.data.train_batches = batches
    with pytest.raises(UserError, match="row 5 is broken"):
        trainer.fit()
    assert "step 1 is not saved: its loss or gradient is not finite" in capsys.readouterr().out
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n_stepz", "5"], "error: unknown flag --n_stepz; did you mean --n_steps?"),
        (["--batch_size", "many"], "error: --batch_size 'many': expected a whole number"),
        (["--dataset_name", "mnits"], "error: unknown dataset 'mnits'; did you mean 'mnist'?"),
    ],
)
def test_a_wrong_flag_ends_with_one_line(tmp_path, cache, flags, message):
    done = run("train.py", *flags, "--run_dir", tmp_path / "run", cache=cache)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_profile_prints_its_figures(tmp_path, cache):
    """Those of larger models are counted by `tests/unit/training/test_profiling.py`."""
    flags = ["--profile", "--model", "DiT-Ti/2", "--image_size", 32, "--channels", 4]
    flags += ["--batch_size", 1, "--run_dir", tmp_path / "run"]
    done = run("train.py", *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "1.87 M parameters" in done.stdout and "809 MFLOP" in done.stdout
    assert "MFU                                  n/a" in done.stdout
    assert list((tmp_path / "run/profile").rglob("*.trace.json.gz"))
