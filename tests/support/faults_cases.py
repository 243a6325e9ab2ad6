"""Inputs and helpers shared by the tests of runtime.faults."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import NANO, SMALL, Fork, fork_server, settings
from conftest import UNOPTIMISED
from train_cases import metrics

DIGEST = "tests/support/digest.py"
SAVE_EVERY, SAMPLE_EVERY = 20, 15
EVERY = ["--eval_save_steps", SAVE_EVERY, "--sample_every_n", SAMPLE_EVERY, "--log_every", 5]
FLAGS = [*SMALL, *EVERY, "--n_steps", 200]


class Forks:
    """Commands, one at a time, whose output can be read while they run."""

    def __init__(self, cache: Path, folder: Path):
        self.out, self.err = folder / "out", folder / "err"
        self.cache = cache
        self.process: Fork | None = None

    def start(self, *flags: object, n_devices: int = 1, command: str = NANO) -> int:
        """Start a command, which leads a process group; returns its process id."""
        assert not self.process, "one at a time"
        # A run and another that holds its data elsewhere are compared bit by bit.
        xla_flags = settings(self.cache, n_devices, UNOPTIMISED)["XLA_FLAGS"]
        out, err = (os.open(p, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for p in (self.out, self.err))
        words = [command, *map(str, flags)]
        self.process = fork_server(os.environ | settings(self.cache)).start(
            words, xla_flags=xla_flags, leads_group=True, out=out, err=err
        )
        return self.process.pid

    def end(self) -> tuple[int, str, str]:
        """Wait for the command; returns its exit status, stdout and stderr."""
        assert self.process
        status, self.process = self.process.wait(), None
        return status, self.out.read_text(), self.err.read_text()

    def leave_nothing(self) -> None:
        """Kill what has been started and not ended."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.end()

    def run(self, *flags: object, **how: Any) -> tuple[int, str, str]:
        """`start` and `end`."""
        self.start(*flags, **how)
        return self.end()

    def digest(self, folder: Path, n_devices: int = 1) -> str:
        """Hash the state that a run would resume with on so many devices."""
        status, out, err = self.run(folder, n_devices=n_devices, command=DIGEST)
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
