"""Several processes as one run: how they meet, what only the first does, what all must agree on.

With one process nothing here costs anything. Devices are `parallel`'s.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
import numpy as np

from runtime.errors import UserError

MESSAGE_BYTES = 4096
SHUTDOWN_SECONDS = 20
HEARTBEAT_TIMEOUT_SECONDS = 45  # until a process counts as dead and the others end


def join_cluster(
    detect: bool = False,
    *,
    coordinator: str | None = None,
    n_processes: int | None = None,
    process_index: int | None = None,
) -> None:
    """Meet the other processes of the run. Call it before anything asks JAX for a device.

    Args:
        detect: learn from the cluster (SLURM, Open MPI, Kubernetes, Cloud TPU) what is not said.
        coordinator: host:port of process 0.

    Raises:
        UserError: no cluster is detected, or the others do not come.
    """
    by_hand = {
        "coordinator": coordinator,
        "n_processes": n_processes,
        "process_index": process_index,
    }
    lacking = [f"--{name}" for name, value in by_hand.items() if value is None]
    if not detect and len(lacking) == len(by_hand):
        return
    if not detect and lacking:
        raise UserError(f"{', '.join(lacking)} must be said too, or --distributed to detect it")
    try:
        # A process that fails does not wait long for the others, who are told that it has gone.
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


def is_distributed() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes pictures and metrics."""
    return jax.process_index() == 0


def broadcast_from_first(function: Callable[[], str]) -> str:
    """What `function` returns in the first process, in all of them.

    Raises:
        UserError: it raised one in the first process, in all of them.
    """
    if not is_distributed():
        return function()
    from jax.experimental import multihost_utils

    said = np.zeros(MESSAGE_BYTES, np.uint8)
    if is_first():
        try:
            words = b"+" + function().encode()
        except UserError as error:
            words = b"-" + str(error).encode()
        said[: len(words)] = np.frombuffer(words[:MESSAGE_BYTES], np.uint8)
    said = bytes(multihost_utils.broadcast_one_to_all(said)).rstrip(b"\0").decode(errors="replace")
    if said.startswith("-"):
        raise UserError(said[1:])
    return said[1:]


@contextmanager
def first_then_others() -> Iterator[None]:
    """Inside, the first process is alone; the others follow when it is through."""
    if is_distributed() and not is_first():
        wait_for_all("in turn")
    try:
        yield
    finally:
        if is_distributed() and is_first():
            wait_for_all("in turn")


def wait_for_all(name: str) -> None:
    """Until every process has come here."""
    if is_distributed():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def exit_process(status: int) -> NoReturn:
    """Exit. After a failure the others are not waited for: they learn of it and end too."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
