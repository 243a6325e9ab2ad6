"""Several processes as one run: how they connect, what only process 0 does, what all agree on.

With one process every function here returns at once. Devices and arrays belong to `parallel`.
"""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn

import jax
import numpy as np

from runtime.errors import UserError

MESSAGE_BYTES = 4096  # of a broadcast text
SHUTDOWN_SECONDS = 20
HEARTBEAT_TIMEOUT_SECONDS = 45  # a process silent for so long counts as dead; the others exit


def join_cluster(
    detect: bool = False,
    *,
    coordinator: str | None = None,
    n_processes: int | None = None,
    process_index: int | None = None,
) -> None:
    """Connect to the other processes of the run. Must precede the first use of a device.

    Without any argument the run is one process.

    Args:
        detect: take what is not given from the cluster (SLURM, Open MPI, Kubernetes, Cloud TPU).
        coordinator: host:port of process 0.

    Raises:
        UserError: some arguments are missing, no cluster is detected, or the others do not come.
    """
    flags = {
        "coordinator": coordinator,
        "n_processes": n_processes,
        "process_index": process_index,
    }
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if not detect and len(missing) == len(flags):
        return
    if not detect and missing:
        raise UserError(f"{', '.join(missing)} must be given too, or --distributed to detect it")
    try:
        # A process that fails does not wait long for the others; the coordinator tells them.
        jax.distributed.initialize(
            coordinator,
            n_processes,
            process_index,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot join the other processes: {reason} (where no cluster is detected, pass "
            "--coordinator HOST:PORT --n_processes N --process_index I)"
        ) from error


def count() -> int:
    """Return how many processes the run has."""
    return jax.process_count()


def index() -> int:
    """Return which of them this is, from 0."""
    return jax.process_index()


def is_distributed() -> bool:
    """Return True if the run has several processes."""
    return count() > 1


def is_first() -> bool:
    """Return True in process 0, the one that writes samples and metrics."""
    return index() == 0


def broadcast_from_first(function: Callable[[], str]) -> str:
    """Call `function` in process 0 and return its result in all processes.

    The result is cut to `MESSAGE_BYTES`.

    Raises:
        UserError: in all processes, if `function` raised one in process 0.
    """
    if not is_distributed():
        return function()
    from jax.experimental import multihost_utils

    buffer = np.zeros(MESSAGE_BYTES, np.uint8)
    if is_first():
        try:
            text = b"+" + function().encode()
        except UserError as error:
            text = b"-" + str(error).encode()
        buffer[: len(text)] = np.frombuffer(text[:MESSAGE_BYTES], np.uint8)
    received = bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0")
    message = received.decode(errors="replace")
    if message.startswith("-"):
        raise UserError(message[1:])
    return message[1:]


def broadcast_text(function: Callable[[], str]) -> str:
    """Call `function` in process 0 and return its result, of any length, in all processes.

    Raises:
        UserError: in all processes, if `function` raised one in process 0.
    """
    text = b""

    def call_and_measure() -> str:
        nonlocal text
        text = function().encode()
        return str(len(text))

    size = int(broadcast_from_first(call_and_measure))
    if is_distributed() and size:
        from jax.experimental import multihost_utils

        buffer = np.frombuffer(text, np.uint8) if is_first() else np.zeros(size, np.uint8)
        text = bytes(multihost_utils.broadcast_one_to_all(buffer))
    return text.decode()


@contextmanager
def first_then_others() -> Generator[None]:
    """Run the body in process 0 alone, then in all other processes."""
    if is_distributed() and not is_first():
        wait_for_all("first_then_others")
    try:
        yield
    finally:
        if is_distributed() and is_first():
            wait_for_all("first_then_others")


def wait_for_all(name: str) -> None:
    """Wait until every process has called this with the same name."""
    if is_distributed():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def exit_process(status: int) -> NoReturn:
    """Exit with `status`. After a failure, do not wait for the others: they detect it and exit."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
