"""SIGINT, SIGTERM and SIGHUP as requests to stop soon, so that a run can save before it exits."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedBySignal(KeyboardInterrupt):
    """A Ctrl-C that took effect after everything was saved. A notebook shows one line."""

    def _render_traceback_(self) -> list[str]:  # called by IPython
        return ["stopped, and all is saved; fit() resumes from here"]


class StopRequest:
    """A flag that is true once a signal has arrived; `signal` is its number."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def raise_exit(self) -> None:
        """End as the signal would have ended the process; without a signal, do nothing.

        Raises:
            StoppedBySignal: it was SIGINT.
            SystemExit: it was another signal; the status is 128 + its number.
        """
        if self.signal == signal.SIGINT:
            raise StoppedBySignal
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


def _silence_lost(terminals: list[int]) -> None:
    """Send the output to those that are gone nowhere: writing to them would fail."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextmanager
def catch_stop_signals() -> Generator[StopRequest]:
    """Record the first SIGINT, SIGTERM or SIGHUP in a `StopRequest`; another one acts as usual.

    SIGHUP says that the terminal is gone, as when ssh is cut off. It comes from the kernel and once
    more from the shell, so that another one is ignored; under nohup all are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread receives signals
        return
    old_handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if old_handlers[signal.SIGHUP] == signal.SIG_IGN:
        del old_handlers[signal.SIGHUP]
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal = number
        _silence_lost(terminals)
        with contextlib.suppress(OSError):  # the reader of stderr may be gone, too
            # Not `print`: the signal may have interrupted one, and it is not re-entrant.
            os.write(2, b"\nstopping after this step; once more to exit at once\n")
        restore()
        if signal.SIGHUP in old_handlers:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def restore() -> None:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)

    for number in old_handlers:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
