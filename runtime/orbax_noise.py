"""Silence for what Orbax prints about failures that it also raises.

A read or write that Orbax gives up leaves threads, futures and coroutines behind. Each prints a
traceback of its own: at once, when its event loop has been closed, or when it is garbage-collected.
The hooks that they print through belong to the whole process, so they are replaced at the
first use of a checkpoint folder, and let everything through that is not Orbax's.
"""

import functools
import gc
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

COROUTINES = r"Store\._get_array_metadatas|_read_array_\S+|async_serialize_\S+"
NEVER_AWAITED = f"coroutine '({COROUTINES})' was never awaited"


@functools.cache  # once in a process
def silence_orbax() -> None:
    """Silence Orbax until the process ends, which is how long its threads report a failure."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
    warnings.filterwarnings("ignore", NEVER_AWAITED, RuntimeWarning)
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        setattr(module, name, _pass_others(getattr(module, name)))


def release_failed_calls(error: BaseException | None) -> None:
    """Collect what a failed call left behind, while it is silenced.

    The error's traceback holds the frames of the call, and these its coroutines and futures.
    """
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Filter of the logger that reports futures whose exception was never retrieved."""
    text = logging.Formatter().format(record)  # with the traceback
    return not any(name in text for name in ("OCDBT", "TensorStore", "orbax"))


def _pass_others(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a hook for uncaught exceptions: it is called for all but those of Orbax."""

    def call(unhandled: Any) -> None:
        trace = "".join(traceback.format_tb(unhandled.exc_traceback))
        code = getattr(getattr(unhandled, "object", None), "cr_code", None)
        trace += code.co_filename if code else ""
        # TensorStore's threads call back into a closed loop; that traceback names neither of them.
        is_loop_closed = "Event loop is closed" in str(unhandled.exc_value)
        if not is_loop_closed and "orbax" not in trace and "tensorstore" not in trace:
            hook(unhandled)

    return call
