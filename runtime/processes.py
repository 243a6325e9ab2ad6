"""Several processes as one run: how they connect, what only process 0 does, what all agree on.

With one process every function here returns at once. Devices and arrays belong to `parallel`.
"""

import atexit
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, wraps
from textwrap import shorten
from typing import NoReturn, ParamSpec

import jax
import numpy as np

from runtime import launchers, peer_watch
from runtime.errors import OneLineError, RunError, UserError
from runtime.peer_watch import PeerWatch

MESSAGE_BYTES = 4096  # of a broadcast text
SEPARATOR = "\x1f"  # of a broadcast error's problem and way out
SHUTDOWN_SECONDS = 20
HEARTBEAT_TIMEOUT_SECONDS = 45  # until JAX aborts a run; `peer_watch` is quicker

P = ParamSpec("P")
_watch: PeerWatch | None = None


def join_cluster(
    detect: bool = False,
    *,
    coordinator: str | None = None,
    n_processes: int | None = None,
    process_index: int | None = None,
) -> None:
    """Connect to the other processes of the run. Must precede the first use of a device.

    Without any argument, or with 1 as `n_processes` alone, the run is one process.

    Args:
        detect: take what is not given from the cluster (SLURM, Open MPI, Kubernetes, Cloud TPU).
        coordinator: host:port of process 0.

    Raises:
        UserError: some arguments are missing, no cluster is detected, or the others do not come;
            or there is no argument, and a launcher has started several tasks.
    """
    flags = {
        "coordinator": coordinator,
        "n_processes": n_processes,
        "process_index": process_index,
    }
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if not detect and len(missing) == len(flags):
        launchers.require_single_task(os.environ)
        return
    if not detect and n_processes == 1 and coordinator is None:
        return
    if not detect and missing:
        raise UserError(f"{', '.join(missing)} must be given too, or --distributed to detect it")
    try:
        # A process that fails does not wait long for the others; the watch tells them.
        with peer_watch.replaced_abort(_report_store_lost):
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
    _start_watch()


def _start_watch() -> None:
    """Watch the other processes until this one leaves."""
    try:
        from jax._src.distributed import global_state
    except ImportError:  # other internals of JAX, whose own abort remains
        return
    global _watch
    if global_state.client is None or (global_state.num_processes or 1) < 2:
        return
    _watch = PeerWatch(global_state.client, global_state.process_id, global_state.num_processes)
    _watch.start()
    atexit.register(_watch.stop)  # before JAX's own, which was registered earlier


def _report_store_lost() -> NoReturn:
    if _watch:
        _watch.report_store_lost()
    os.write(2, b"error: process 0 was lost before the run began; start all processes again\n")
    os._exit(1)


@contextmanager
def recovery_advice(advise: Callable[[], str]) -> Generator[None]:
    """Meanwhile, end the message about a lost process by what `advise` returns; also after an
    exception, which the loss may have caused.
    """
    if _watch is None:
        yield
        return
    before, _watch.advise = _watch.advise, advise
    yield
    _watch.advise = before


def explain_lost_process(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: if it fails because another process is lost or cannot be reached, one line
    says so, and the traceback of the failed collective is not printed.

    Raises:
        RunError: the processes did not connect, though none is lost.
    """

    @wraps(main)
    def call(*args: P.args, **options: P.kwargs) -> None:
        try:
            main(*args, **options)
        except Exception as error:
            is_explained = isinstance(error, OneLineError)
            if _watch and not is_explained and peer_watch.is_of_collective(error):
                _watch.wait_for_verdict()  # which ends the process, if one is lost
                if reason := peer_watch.describe_failed_connection(error):
                    raise RunError(reason) from error
            raise

    return call


@cache
def start_backend() -> None:
    """Start JAX's devices, once in a process.

    Raises:
        UserError: JAX finds none of the platform that JAX_PLATFORMS asks for, or cannot start it.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # no plugin for CUDA: an assertion without text
        reason = shorten(str(error).partition("(set JAX_PLATFORMS")[0], 120, placeholder=" …")
        reason = f" ({reason})" if reason else ""
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms:
            raise UserError(f"JAX cannot start its devices{reason}") from error
        raise UserError(
            f"JAX_PLATFORMS={platforms}: JAX cannot use this platform here{reason}; unset it to "
            "take the best that there is, or install JAX for it: jax[cuda13] or jax[tpu]"
        ) from error


def count() -> int:
    """Return how many processes the run has."""
    start_backend()
    return jax.process_count()


def index() -> int:
    """Return which of them this is, from 0."""
    start_backend()
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
            text = f"-{error.problem}{SEPARATOR}{error.how}".encode()
        buffer[: len(text)] = np.frombuffer(text[:MESSAGE_BYTES], np.uint8)
    received = bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0")
    message = received.decode(errors="replace")
    if message.startswith("-"):
        problem, _, how = message[1:].partition(SEPARATOR)
        raise UserError(problem, how=how)
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
