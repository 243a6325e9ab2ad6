"""A watch over the other processes of a run, which ends this one when one of them is lost.

A lost process is one that was killed, or whose host or network failed. The others would wait for it
in the next collective, until JAX aborts them with a stack trace of C++. Here each process writes a
sign of life to JAX's key-value store, process 0 reads them, and whoever learns of a loss prints one
line and exits with status 1. The store lives in process 0: losing that one ends the store.

JAX has no public interface to either; where its internals differ, its own abort remains.
"""

import contextlib
import ctypes
import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

BEAT_SECONDS = 2.0
LOST_SECONDS = 15.0  # of silence; the message comes within 30
# Another process may have met the same mistake, and is about to say so itself.
GRACE_SECONDS = 3.0
ALIVE, LOST = "dit/alive/", "dit/lost/"  # keys of the store
GONE = "gone"  # the sign of a process that has left as it should
# Parts of the errors of collectives and of the store when a process is gone.
COLLECTIVE_ERRORS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "barrier")
ONLY_FATAL = 3  # absl's log level
BAD_CAST = b"St8bad_cast"


class PeerWatch:
    """The watch of one process.

    Args:
        client: JAX's client of the key-value store.
        index: of this process.
        count: of all processes.
    """

    def __init__(self, client: Any, index: int, count: int):
        self.client = client
        self.index = index
        self.count = count
        # How to go on, for the end of the message.
        self.advise: Callable[[], str] = lambda: "start all processes again"
        self._awake = self._answered = time.monotonic()  # this process was; the store did
        self._signs: dict[int, tuple[str, float]] = {}
        self._signs |= dict.fromkeys(range(count), ("", self._answered))
        self._stopped = threading.Event()
        self._reporting = threading.Lock()

    def start(self) -> None:
        """Start the threads of the watch, which end with the process.

        Starts none if JAX's client is not as it was: without a sign of life this process would be
        taken for lost.
        """
        try:
            self._set(f"{ALIVE}{self.index}", f"0 {socket.gethostname()}")
            self.client.key_value_dir_get(LOST)
        except (AttributeError, TypeError):
            return
        for loop in (self._beat, self._judge_store):
            threading.Thread(target=loop, daemon=True).start()

    def stop(self) -> None:
        """End the watch, because the process leaves as it should."""
        if not self._stopped.is_set():
            self._stopped.set()
            with contextlib.suppress(RuntimeError):  # the store may have left before
                self._set(f"{ALIVE}{self.index}", GONE)

    def wait_for_verdict(self) -> None:
        """Wait for as long as the loss of a process may take to be noticed, which ends this one."""
        self._stopped.wait(LOST_SECONDS + 3 * BEAT_SECONDS + GRACE_SECONDS)
        while self._reporting.locked():  # by another thread, which ends this process
            time.sleep(1)

    # --- threads ----------------------------------------------------------------------------------

    def _forgive_pause(self) -> None:
        """Begin anew if this process itself was paused, as by a scheduler that suspends a job."""
        now = time.monotonic()
        if now - self._awake > 3 * BEAT_SECONDS:
            self._answered = now
            self._signs = {other: (sign, now) for other, (sign, _) in self._signs.items()}
        self._awake = now

    def _beat(self) -> None:
        """Write this process's sign of life, and read the others' or what process 0 found."""
        n = 0
        while not self._stopped.wait(BEAT_SECONDS):
            n += 1
            self._forgive_pause()
            try:
                self._set(f"{ALIVE}{self.index}", f"{n} {socket.gethostname()}")
                signs = self.client.key_value_dir_get(LOST if self.index else ALIVE)
            except RuntimeError:  # JAX's, of a store that does not answer: see `_judge_store`
                continue
            self._answered = time.monotonic()
            if self.index:
                for _, text in signs:
                    self.report(text)
            else:
                self._judge_signs({int(key.rpartition("/")[2]): value for key, value in signs})

    def _judge_store(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._forgive_pause()
            silent = time.monotonic() - self._answered
            if silent > LOST_SECONDS:
                self.report(describe_lost(0, silent))

    def _judge_signs(self, signs: dict[int, str]) -> None:
        """Find a process whose sign has not changed for too long. Called in process 0."""
        now = time.monotonic()
        for index, sign in signs.items():
            if self._signs[index][0] != sign:
                self._signs[index] = (sign, now)
        for index, (sign, since) in self._signs.items():
            if sign != GONE and now - since > LOST_SECONDS:
                text = describe_lost(index, now - since, host=sign.partition(" ")[2])
                with contextlib.suppress(RuntimeError):
                    self._set(f"{LOST}{index}", text)
                self.report(text)

    def _set(self, key: str, value: str) -> None:
        self.client.key_value_set(key, value, allow_overwrite=True)

    # --- the end ----------------------------------------------------------------------------------

    def report(self, lost: str) -> None:
        """Print that a process is lost, and exit with status 1.

        Args:
            lost: which one, and since when.
        """
        if self._stopped.is_set() or not self._reporting.acquire(blocking=False):
            return
        time.sleep(GRACE_SECONDS)
        sys.stdout.flush()
        os.write(2, f"error: {lost}; {self.advise()}\n".encode())
        if not self.index:  # the others read of it from here
            time.sleep(2 * BEAT_SECONDS)
        os._exit(1)

    def report_store_lost(self) -> NoReturn:
        """Report a loss that JAX noticed: that of process 0, except in process 0 itself."""
        silent = time.monotonic() - self._answered
        lost = describe_lost(0, silent) if self.index else "another process was lost"
        self.report(lost)
        if self._stopped.is_set():  # it waits for the others in order to leave
            os.write(2, f"error: {lost} before all had left the run\n".encode())
            os._exit(1)
        while True:  # another thread is reporting
            time.sleep(1)


def describe_lost(index: int, seconds: float, *, host: str = "") -> str:
    """Describe a lost process: its number, its host and the time of its last sign of life."""
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
    where = f" on {host}" if host else ""
    return (
        f"process {index}{where} has not answered since {since}: it was killed, or its host or "
        "the network failed"
    )


def is_of_collective(error: BaseException) -> bool:
    """Check if an error may come from the loss of a process."""
    chain: BaseException | None = error
    while chain:
        if any(part in str(chain) for part in COLLECTIVE_ERRORS):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def describe_failed_connection(error: BaseException) -> str:
    """Say why the processes of a run could not connect on CPUs. Empty if `error` is another."""
    _, found, reason = str(error).partition("Gloo context initialization failed: ")
    if not found:
        return ""
    reason = reason.partition("\n")[0].rpartition("] ")[2]  # without the line of Gloo's source
    return (
        f"the processes cannot connect to each other: {reason}; the name of every host must lead "
        "to an address that the others reach, not to 127.0.0.1 (`getent hosts $(hostname)`)"
    )


# --- JAX's internals ------------------------------------------------------------------------------


@contextmanager
def replaced_abort(on_lost: Callable[[], NoReturn]) -> Generator[None]:
    """Have a client that JAX makes meanwhile call `on_lost` where it would abort the process.

    jaxlib takes a function for that, but cannot convert its argument to Python: C++ ends by a
    `bad_cast`, before which the function that is set here is called.
    """
    try:
        jaxlib: Any = importlib.import_module("jax._src.lib")
        library, set_log_level = jaxlib._jax, jaxlib.utils.absl_set_min_log_level
        make = library.get_distributed_runtime_client
    except (ImportError, AttributeError):
        yield
        return

    def make_client(*args: Any, **options: Any) -> Any:
        return make(*args, **options, missed_heartbeat_callback=lambda *_: on_lost())

    if not set_terminate(on_lost):
        yield
        return
    library.get_distributed_runtime_client = make_client
    try:
        yield
    finally:
        library.get_distributed_runtime_client = make
    # What the store's client logs of a loss, before it is one line here, are errors.
    set_log_level(ONLY_FATAL)


_kept: list[Any] = []  # C++ holds no references to them


def set_terminate(on_lost: Callable[[], NoReturn]) -> bool:
    """Call `on_lost` when C++ would terminate for a `bad_cast`. Returns False if it cannot."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_handler = library._ZSt13set_terminatePFvvE
        current_type = library.__cxa_current_exception_type
    except (OSError, AttributeError):
        return False
    current_type.restype = ctypes.c_void_p
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    before: list[Any] = []

    @ctypes.CFUNCTYPE(None)
    def handle() -> None:
        kind = current_type()
        # The name of a std::type_info comes after the pointer to its table of functions.
        if kind and ctypes.c_char_p.from_address(kind + 8).value == BAD_CAST:
            on_lost()
        before[0]()

    before.append(ctypes.CFUNCTYPE(None)(set_handler(ctypes.cast(handle, ctypes.c_void_p))))
    _kept.extend((handle, before))
    return True
