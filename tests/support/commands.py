"""Run the project's commands as a user would, each in its own process."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
from conftest import FAST

ROOT = Path(__file__).parents[2]
NANO = "tests/support/nano.py"
SMALL = ["--model", "DiT-Nano/8", "--batch_size", "8", "--n_eval_batches", "1"]
SMALL += ["--n_sample_steps", "2", "--warmup_steps", "2", "--nohalf_precision"]
CONVERT = "convert_imagenet.py"
DIGITS_AT_16 = ["--dataset_name", "digits", "--image_size", "16", "--rows_per_file", "500"]
DIGITS_AT_16 += ["--n_workers", "0"]

# What a command's imports do not read: a test's name, and what scikit-learn, PyTorch, diffusers and
# tensorboardX set in the process of the tests when these import them.
UNREAD = {"PYTEST_CURRENT_TEST", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
UNREAD |= {"TORCHINDUCTOR_CACHE_DIR", "CRC32C_SW_MODE"}

_server: "ForkServer | None" = None


def settings(cache: Path, n_devices: int = 1, xla_flags: str = FAST) -> dict[str, str]:
    """Environment of a command on so many virtual devices. `cache` holds the session's compiled
    programs.
    """
    return {
        "XLA_FLAGS": f"{xla_flags} --xla_force_host_platform_device_count={n_devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Fork:
    """A command of a `ForkServer`, used as a `subprocess.Popen`."""

    def __init__(self, words: list[str], report: TextIO):
        self.args, self._report = words, report
        self.returncode: int | None = None
        self.pid = int(report.readline())
        self.stdout: TextIO | None = None
        self.stderr: TextIO | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self._report:
                self.returncode = int(self._report.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        assert self.stdout and self.stderr
        with self.stdout, self.stderr, ThreadPoolExecutor() as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # else its streams would be waited for
                raise
            return texts[0].result(), texts[1].result()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process of forks.py, which spares each command two seconds of imports. It ends with the
    process that has started it.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "tests/support/forks.py", str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def can_start(self, words: Sequence[str], environment: dict[str, str]) -> bool:
        """Return True if the command's imports would read the environment that the server's read.
        A benchmark is no such command: it measures its process.
        """
        names = {*environment, *self.environment} - {"XLA_FLAGS"} - UNREAD
        is_same = all(environment.get(name) == self.environment.get(name) for name in names)
        is_measured = any(word.startswith("benchmarks/") for word in words[:2])
        return is_same and words[0].endswith(".py") and not is_measured

    def start(
        self, words: list[str], *, xla_flags: str, leads_group: bool, out: int, err: int
    ) -> Fork:
        """Start a command that writes to the files `out` and `err`, which are closed here."""
        report, theirs = os.pipe()
        request = {"words": words, "XLA_FLAGS": xla_flags, "leads_group": leads_group}
        files = [out, err, theirs]
        socket.send_fds(self.connection, [json.dumps(request).encode() + b"\n"], files)
        for file in files:
            os.close(file)
        return Fork(words, os.fdopen(report))


def fork_server(environment: dict[str, str]) -> ForkServer:
    """Return the server of this process, which starts in the environment of the first call."""
    global _server
    _server = _server or ForkServer(environment)
    return _server


def start(
    *words: object,
    cache: Path,
    n_devices: int = 1,
    xla_flags: str = FAST,
    within: Sequence[str] = (),
) -> subprocess.Popen[str] | Fork:
    """Start a command in the environment of `settings`, by the words `within` before it."""
    texts = [*map(str, words)]
    environment = os.environ | settings(cache, n_devices, xla_flags)
    server = fork_server(environment)
    if not within and server.can_start(texts, environment):
        (stdout, out), (stderr, err) = os.pipe(), os.pipe()
        flags = environment["XLA_FLAGS"]
        fork = server.start(texts, xla_flags=flags, leads_group=False, out=out, err=err)
        fork.stdout, fork.stderr = os.fdopen(stdout), os.fdopen(stderr)
        return fork
    return subprocess.Popen(
        [*within, sys.executable, *texts],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words: object, cache: Path, **options: Any) -> subprocess.CompletedProcess:
    """`start` a command and wait for its end."""
    process = start(*words, cache=cache, **options)
    out, err = process.communicate(timeout=900)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def convert(*flags: object, cache: Path, n_devices: int = 1) -> subprocess.CompletedProcess:
    """Encode the digits to latents: 8 × 8 of two channels with the VAE of averaging.py."""
    return run(CONVERT, *DIGITS_AT_16, *flags, cache=cache, n_devices=n_devices)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a new folder as a disk. Skips the test where that needs more rights."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        # Lazily, since a thread of Orbax may hold a file of it for a moment longer.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free_bytes: int = 0) -> Path:
    """Fill the disk but for `free_bytes`; returns the file that does."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:  # others write too: the free space is not known beforehand
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - free_bytes)
    return filler


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """Make two hosts with a link between them, 10.9.0.1 and 10.9.0.2, each its own name, as network
    namespaces; returns the words before a command that run it on each. Skips the test where that
    needs more rights.
    """
    hosts = [f"dit-{os.getpid()}-{i}" for i in (1, 2)]
    link = ["link", "add", "up0", "netns", hosts[0], "type", "veth", "peer", "up0", "netns"]
    wanted = [["netns", "add", host] for host in hosts] + [[*link, hosts[1]]]
    for i, host in enumerate(hosts, start=1):
        wanted += [["-n", host, "addr", "add", f"10.9.0.{i}/24", "dev", "up0"]]
        wanted += [["-n", host, "link", "set", device, "up"] for device in ("lo", "up0")]
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
    try:
        for words in wanted:
            if not shutil.which("ip") or subprocess.run(["ip", *words]).returncode:
                pytest.skip("network namespaces need root and iproute2")
        yield [
            ["ip", "netns", "exec", host, *named, f"10.9.0.{i}"]
            for i, host in enumerate(hosts, start=1)
        ]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], check=False)


def free_port() -> int:
    """Find a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
