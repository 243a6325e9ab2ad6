"""A flag is what its annotation says, or one clear line before anything has run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import cli

SCRIPT = """
import errno, os, sys
from dataclasses import dataclass
import cli
from errors import RunError, UserError

@dataclass(frozen=True)
class Config:
    '''Fail.

    Args:
        how: the way to end.
    '''
    how: str = "well"
    ema: bool = True

def main():
    config = cli.parse(Config)
    print("ran", config.ema, flush=True)
    if config.how == "full":
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    if config.how == "wrapped":
        raise ValueError("RESOURCE_EXHAUSTED: write: " + os.strerror(errno.EDQUOT))
    ends = {"user": UserError("two\\nlines"), "run": RunError("nan"), "bug": ValueError("bug")}
    ends |= {"ctrl-c": KeyboardInterrupt(), "exit": SystemExit(143)}
    if config.how in ends:
        raise ends[config.how]

assert "jax" not in sys.modules
cli.run(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "script.py"
    path.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent)}

    def call(*argv):
        done = subprocess.run(
            [sys.executable, path, *argv], capture_output=True, text=True, env=environment
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_exit_statuses_of_a_real_process(script):
    assert script("--ema", "False") == (0, "ran False\n", "")
    assert script("--emma") == (2, "", "error: unknown flag --emma; did you mean --ema?\n")
    assert script("--how", "user") == (2, "ran True\n", "error: two lines\n")
    assert script("--how", "run") == (1, "ran True\n", "error: nan\n")
    assert script("--how", "ctrl-c") == (130, "ran True\n", "")
    assert script("--how", "exit") == (143, "ran True\n", "")
    status, _, err = script("--how", "bug")
    assert status == 1 and err.startswith("Traceback") and err.endswith("ValueError: bug\n")


@pytest.mark.parametrize("how", ["full", "wrapped"])
def test_a_full_disk_is_one_line(script, how):
    status, _, err = script("--how", how)
    assert status == 2 and err.startswith("error: no space left on ") and err.count("\n") == 1


def test_a_reader_that_leaves_is_not_talked_about():
    code = "import cli; cli.run(lambda: [print('more') for _ in range(100_000)])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(cli.__file__).parent,
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1
