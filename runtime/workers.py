"""Calls of one function that are made ahead of time by other processes, and their answers in order.

What is called and what comes back is the caller's. A worker is a Python process of its own that
imports what its function needs and never the script that started it: no JAX is loaded again, and a
script or a notebook needs no `__main__` guard.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

STEPS_AHEAD = 3  # steps that are asked for before they are wanted
MAX_ATTEMPTS = 3  # a call that has ended so many workers is given up


class WorkerDied(RuntimeError):
    """The same call has ended a worker `ATTEMPTS` times; `call` is what was asked."""

    def __init__(self, call: Any, how: str):
        super().__init__(f"a worker {how}, {MAX_ATTEMPTS} times over the same call")
        self.call, self.how = call, how


def run_ahead(
    callers: Sequence[Callable[[Any], Any]], steps: Iterable[Sequence[Any]]
) -> Generator[list[Any]]:
    """The answers to each step's calls, in order; the i-th call always goes to the i-th caller.

    Each caller has a thread, so callers may be plain functions. What one raises comes out at its
    own step. Closing the generator closes those that are workers.
    """
    threads = [ThreadPoolExecutor(1) for _ in callers]
    asked: deque[list[Future]] = deque()
    try:
        for calls in steps:
            triples = zip(threads, callers, calls, strict=True)
            asked.append([thread.submit(caller, call) for thread, caller, call in triples])
            if len(asked) > STEPS_AHEAD:
                yield [answer.result() for answer in asked.popleft()]
        while asked:
            yield [answer.result() for answer in asked.popleft()]
    finally:
        for caller in callers:
            if isinstance(caller, Worker):
                caller.close()
        for thread in threads:
            thread.shutdown(cancel_futures=True)


class Worker:
    """A process that answers calls of a function, begun with the first.

    A process that dies is begun anew and asked again, for a call's answer must depend on nothing
    but the call. Signals are left to the parent; the process ends when the parent does, however
    that ended. Only `close` may be called from another thread.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self._function = pickle.dumps(function)
        self._lock, self._closed = threading.Lock(), False
        self._process: subprocess.Popen | None = None
        self._connection: Connection

    def __call__(self, call: Any) -> Any:
        """Raises what the function raises, or `WorkerDied`."""
        how = ""
        for _ in range(MAX_ATTEMPTS):
            if how:
                print(f"warning: a worker {how}; another takes its place", file=sys.stderr)
            try:
                if not self._process:
                    self._begin()
                self._connection.send(call)
                answer, error = self._connection.recv()
            except (EOFError, OSError):
                if not self._process:
                    raise  # it could not be begun at all
                how = self._end()
                continue
            if error:
                raise error
            return answer
        raise WorkerDied(call, how)

    def close(self) -> None:
        """Ends the process at once."""
        with self._lock:
            self._closed = True
            if self._process:
                self._process.kill()
                self._process.wait()

    def _begin(self) -> None:
        self._connection, theirs = Pipe()
        # Ctrl-C in a terminal, or a scheduler's SIGTERM, reaches children too, which inherit the
        # mask of this thread: what happens then is for the parent to say.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with self._lock, theirs:
                if self._closed:
                    raise CancelledError
                end = theirs.fileno()
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(end)], stdin=subprocess.DEVNULL, pass_fds=[end]
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._connection.send(sys.path)
        self._connection.send_bytes(self._function)

    def _end(self) -> str:
        """How the process died."""
        with self._lock:
            if self._closed:
                raise CancelledError
            process, self._process = self._process, None
        assert process
        self._connection.close()
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it has hung up, but goes on
            process.kill()
            code = process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _serve_calls(connection: Connection) -> None:
    """What a worker does."""
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive_until_parent_exits, args=(connection, messages), daemon=True).start()
    sys.path[:] = pickle.loads(messages.get())
    function, error = _result_or_error(pickle.loads, messages.get())
    while True:
        message = messages.get()
        connection.send((None, error) if error else _result_or_error(_call, function, message))


def _call(function: Callable[[Any], Any], message: bytes) -> Any:
    return function(pickle.loads(message))


def _receive_until_parent_exits(connection: Connection, messages: queue.SimpleQueue[bytes]) -> None:
    """Until the parent is gone: then this process ends, whatever it is doing.

    Nothing is unpickled here, for that imports: two threads that import modules which import each
    other are a deadlock.
    """
    try:
        while True:
            messages.put(connection.recv_bytes())
    finally:
        os._exit(1)


def _result_or_error(function: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    """The answer or the error, which can be sent."""
    try:
        return function(*args), None
    except Exception as error:
        error.add_note(f"in worker process {os.getpid()}:\n{traceback.format_exc()}")
        try:
            return None, pickle.loads(pickle.dumps(error))
        except Exception:  # its kind cannot be made anew from its arguments
            return None, RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    with suppress(OSError):  # the parent has gone
        _serve_calls(Connection(int(sys.argv[1])))
