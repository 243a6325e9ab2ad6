"""Runs the project's commands as a person would: in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NANO = "tests/nano.py"
SMALL = ["--model", "DiT-Nano/8", "--batch_size", "8", "--n_eval_batches", "1"]
SMALL += ["--n_sample_steps", "2", "--warmup_steps", "2"]


def environment(folder: Path, n_devices: int = 1) -> dict[str, str]:
    """Compiled programs are shared between the processes of a test session."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(*words: object, cache: Path, n_devices: int = 1) -> subprocess.Popen:
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(cache, n_devices),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words: object, cache: Path, n_devices: int = 1) -> subprocess.CompletedProcess:
    process = start(*words, cache=cache, n_devices=n_devices)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
