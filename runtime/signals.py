"""Ctrl-C and SIGTERM as a wish to stop soon, so that a run can save before it leaves."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A Ctrl-C that was waited for until all was saved. A notebook shows the one line."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return ["stopped, and all is saved; fit() goes on from here"]


class Stop:
    """True once a signal has asked to stop."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def leave(self) -> None:
        """End as the signal would have: `Stopped`, or SystemExit with 128 + its number."""
        if self.signal == signal.SIGINT:
            raise Stopped
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Inside, the first SIGINT or SIGTERM only sets the `Stop`; a second one acts as ever."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        # Not `print`, which this may have interrupted and which cannot be entered twice.
        os.write(2, b"\nstopping after this step; once more to leave at once\n")
        restore()

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    for number in old:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
