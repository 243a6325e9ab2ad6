"""Run the project's commands as a user would, each in its own process."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import FAST

ROOT = Path(__file__).parents[2]
NANO = "tests/support/nano.py"
SMALL = ["--model", "DiT-Nano/8", "--batch_size", "8", "--n_eval_batches", "1"]
SMALL += ["--n_sample_steps", "2", "--warmup_steps", "2", "--nohalf_precision"]
CONVERT = "convert_imagenet.py"
DIGITS_AT_16 = ["--dataset_name", "digits", "--image_size", "16", "--rows_per_file", "500"]
DIGITS_AT_16 += ["--n_workers", "0"]


def settings(cache: Path, n_devices: int = 1, fast_compile: bool = True) -> dict[str, str]:
    """Environment of a command on so many virtual devices. `cache` holds the session's compiled
    programs.
    """
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    return {
        "XLA_FLAGS": f"{flags} {FAST}" if fast_compile else flags,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    *words: object,
    cache: Path,
    n_devices: int = 1,
    fast_compile: bool = True,
    within: Sequence[str] = (),
) -> subprocess.Popen:
    """Start a command in the environment of `settings`, by the words `within` before it."""
    return subprocess.Popen(
        [*within, sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | settings(cache, n_devices, fast_compile),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *words: object, cache: Path, n_devices: int = 1, fast_compile: bool = True
) -> subprocess.CompletedProcess:
    """`start` a command and wait for its end."""
    process = start(*words, cache=cache, n_devices=n_devices, fast_compile=fast_compile)
    out, err = process.communicate(timeout=900)
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
        subprocess.run(["umount", str(folder)], check=True)


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
