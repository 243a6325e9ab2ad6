"""A run of train_vae.py leaves its files, resumes bit for bit, and exports what it evaluated."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from commands import ROOT, run, start
from train_cases import metrics
from train_vae_cases import COMMAND

from training.autoencoder.config import VaeConfig

FLAGS = [
    "--block_out_channels",
    "8,8",
    "--noattention",
    "--batch_size",
    "8",
    "--n_eval_batches",
    "1",
]


# --- the command line -----------------------------------------------------------------------------


def test_a_run_ended_by_sigterm_is_resumed(tmp_path, cache):
    folder = tmp_path / "run"
    words = [COMMAND, *FLAGS, "--run_dir", folder, "--n_steps", "400", "--log_every", "1"]
    process = start(*words, cache=cache)
    until = time.time() + 120
    while not (folder / "metrics.jsonl").exists() or not metrics(folder):
        assert process.poll() is None and time.time() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err
    assert "no LPIPS weights (--lpips): training on L2 and image gradients" in out
    step = metrics(folder)[-1]["step"]
    assert (folder / "vae/config.json").exists()
    resume = [COMMAND, "--resume", "--run_dir", folder, "--n_steps", step + 2]
    result = run(*resume, cache=cache)
    assert result.returncode == 0, result.stderr
    assert f"resuming at step {step}" in result.stdout and "PSNR" in result.stdout
    assert f"--image_size 16 --vae {folder}/vae" in result.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--kl_wait", "1"], "unknown flag --kl_wait; did you mean --kl_weight?"),
        (["--pixel_loss", "l3"], "unknown pixel_loss 'l3' (one of: l1, l2)"),
    ],
)
def test_a_wrong_flag_ends_in_one_line(tmp_path, cache, flags, message):
    result = run(COMMAND, *flags, "--run_dir", tmp_path / "run", cache=cache)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_help_lists_every_flag():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, COMMAND, "--help"], cwd=ROOT, env=environment, capture_output=True
    )
    page = result.stdout.decode()
    assert result.returncode == 0
    assert all(f"\n  --{field.name}  (" in page for field in fields(VaeConfig))
