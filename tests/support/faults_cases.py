"""Inputs and helpers shared by the tests of runtime.faults."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, SMALL, settings
from conftest import UNOPTIMISED
from train_cases import metrics

SAVE_EVERY, SAMPLE_EVERY = 20, 15
EVERY = ["--eval_save_steps", SAVE_EVERY, "--sample_every_n", SAMPLE_EVERY, "--log_every", 5]
FLAGS = [*SMALL, *EVERY, "--n_steps", 200]


class Forks:
    """Runs by tests/forks.py, one at a time."""

    def __init__(self, cache: Path, folder: Path):
        self.out, self.err = folder / "out", folder / "err"
        self.server = subprocess.Popen(
            [sys.executable, "tests/support/forks.py", self.out, self.err],
            cwd=ROOT,
            # A run and another that holds its data elsewhere are compared bit by bit.
            env=os.environ | settings(cache) | {"XLA_FLAGS": UNOPTIMISED},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ended = True

    def _send(self, **request: object) -> int:
        assert self.server.stdin and self.server.stdout
        self.out.write_text("")
        print(json.dumps(request), file=self.server.stdin, flush=True)
        self.ended = False
        return int(self.server.stdout.readline())

    def start(self, *flags: object, n_devices: int = 1, command: str = "train") -> int:
        """Start a run; returns its process id."""
        return self._send(command=command, flags=[*map(str, flags)], n_devices=n_devices)

    def end(self) -> tuple[int, str, str]:
        """Wait for the run; returns its exit status, stdout and stderr."""
        assert self.server.stdout
        status, self.ended = int(self.server.stdout.readline()), True
        return status, self.out.read_text(), self.err.read_text()

    def run(self, *flags: object, **how: Any) -> tuple[int, str, str]:
        """`start` and `end`."""
        self.start(*flags, **how)
        return self.end()

    def digest(self, folder: Path, n_devices: int = 1) -> str:
        """Hash the state that a run would resume with on so many devices."""
        self._send(digest=str(folder), n_devices=n_devices)
        status, out, err = self.end()
        assert status == 0, err
        return out


def children(process: int) -> list[int]:
    """Processes that the threads of `process` have started."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, _, err = server.run(*FLAGS, "--run_dir", folder)
    assert status == 0, err
    return folder


def assert_same_end(forks: Forks, folder: Path, whole: Path) -> None:
    """Both runs have the same metrics and the same final bits, and no temporary files."""
    assert metrics(folder) == metrics(whole)
    assert forks.digest(folder) == forks.digest(whole)
    assert not [*folder.rglob("*tmp*")]


def newest(folder: Path) -> int:
    """The last step with a complete checkpoint, or 0."""
    return max(
        (int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()),
        default=0,
    )


def wait_until(happened: Callable[[], object], seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < last, "condition not met in time"
        time.sleep(0.002)
