"""Exit statuses and messages of `cli.run_command` in real processes."""

import os
import subprocess
import sys

import pytest
from commands import ROOT

SCRIPT = """
import errno, os, sys
from dataclasses import dataclass
from runtime import cli
from runtime.errors import RunError, UserError

@dataclass(frozen=True)
class Config:
    '''Fail.

    Args:
        end: the way to end.
    '''
    end: str = "well"
    ema: bool = True

def main():
    config = cli.parse_flags(Config)
    print("ran", config.ema, flush=True)
    if config.end == "full":
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    if config.end == "wrapped":
        raise ValueError("RESOURCE_EXHAUSTED: write: " + os.strerror(errno.EDQUOT))
    ends = {"user": UserError("two\\nlines"), "run": RunError("nan"), "bug": ValueError("bug")}
    ends |= {"ctrl-c": KeyboardInterrupt(), "exit": SystemExit(143)}
    if config.end in ends:
        raise ends[config.end]

assert "jax" not in sys.modules
cli.run_command(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "script.py"
    path.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(*argv):
        done = subprocess.run(
            [sys.executable, path, *argv], capture_output=True, text=True, env=environment
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_exit_statuses_of_a_real_process(script):
    assert script("--ema", "False") == (0, "ran False\n", "")
    assert script("--emma") == (2, "", "error: unknown flag --emma; did you mean --ema?\n")
    assert script("--end", "user") == (2, "ran True\n", "error: two lines\n")
    assert script("--end", "run") == (1, "ran True\n", "error: nan\n")
    assert script("--end", "ctrl-c") == (130, "ran True\n", "")
    assert script("--end", "exit") == (143, "ran True\n", "")
    status, _, err = script("--end", "bug")
    assert status == 1 and err.startswith("Traceback") and err.endswith("ValueError: bug\n")


@pytest.mark.parametrize("end", ["full", "wrapped"])
def test_a_full_disk_is_one_line(script, end):
    status, _, err = script("--end", end)
    assert status == 2 and err.startswith("error: no space left on ") and err.count("\n") == 1


def test_a_closed_pipe_on_stdout_prints_nothing():
    code = (
        "from runtime import cli; cli.run_command(lambda: [print('more') for _ in range(100_000)])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1
