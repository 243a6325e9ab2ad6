"""Worker processes that compute the results of a function ahead of their use, in order.

The caller decides what is computed. A worker is a new Python process that imports what its function
needs and never the script that started it: JAX is not loaded again, and neither a script nor a
notebook needs a `__main__` guard.
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

STEPS_AHEAD = 3  # steps submitted before their results are used
MAX_ATTEMPTS = 3  # worker deaths over the same call before it is given up


class WorkerDied(RuntimeError):
    """The same call ended a worker `MAX_ATTEMPTS` times; `call` is its argument."""

    def __init__(self, call: Any, cause: str):
        super().__init__(f"a worker {cause}, {MAX_ATTEMPTS} times over the same call")
        self.call = call
        self.cause = cause


def run_ahead(
    callers: Sequence[Callable[[Any], Any]], steps: Iterable[Sequence[Any]]
) -> Generator[list[Any]]:
    """Yield the results of each step's calls, in order, computed up to `STEPS_AHEAD` steps early.

    The i-th call of every step goes to the i-th caller. Each caller has a thread, so that plain
    functions run in parallel too. Closing the generator closes the callers that are workers.

    Args:
        callers: functions or workers.
        steps: for each step, one argument per caller.

    Raises:
        Exception: what a call raised, at its own step.
    """
    threads = [ThreadPoolExecutor(1) for _ in callers]
    submitted: deque[list[Future[Any]]] = deque()
    try:
        for calls in steps:
            triples = zip(threads, callers, calls, strict=True)
            submitted.append([thread.submit(caller, call) for thread, caller, call in triples])
            if len(submitted) > STEPS_AHEAD:
                yield [future.result() for future in submitted.popleft()]
        while submitted:
            yield [future.result() for future in submitted.popleft()]
    finally:
        for caller in callers:
            if isinstance(caller, Worker):
                caller.close()
        for thread in threads:
            thread.shutdown(cancel_futures=True)


class Worker:
    """A process that calls a function for its parent. The first call starts it.

    If the process dies, a new one is started and the call is repeated: a result must depend on the
    call alone. Signals are left to the parent. The process ends with the parent, however that ends.
    Only `close` may be called from another thread.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self._function = pickle.dumps(function)
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    def __call__(self, call: Any) -> Any:
        """Return `function(call)`.

        Raises:
            Exception: what the function raised.
            WorkerDied: the call ended `MAX_ATTEMPTS` processes.
        """
        cause = ""
        for _ in range(MAX_ATTEMPTS):
            if cause:
                print(f"warning: a worker {cause}; another takes its place", file=sys.stderr)
            try:
                if not self._process:
                    self._start()
                self._connection.send(call)
                result, error = self._connection.recv()
            except (EOFError, OSError):
                if not self._process:
                    raise  # it could not be started at all
                cause = self._wait_for_exit()
                continue
            if error:
                raise error
            return result
        raise WorkerDied(call, cause)

    def close(self) -> None:
        """Kill the process."""
        with self._lock:
            self._closed = True
            if self._process:
                self._process.kill()
                self._process.wait()

    def _start(self) -> None:
        self._connection, child_end = Pipe()
        # Ctrl-C in a terminal and a scheduler's SIGTERM reach children too. They inherit this
        # thread's mask, so that the parent alone decides what a signal does.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with self._lock, child_end:
                if self._closed:
                    raise CancelledError
                descriptor = child_end.fileno()
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(descriptor)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[descriptor],
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._connection.send(sys.path)
        self._connection.send_bytes(self._function)

    def _wait_for_exit(self) -> str:
        """Describe how the process ended, for a message that begins with "a worker"."""
        with self._lock:
            if self._closed:
                raise CancelledError
            process = self._process
            self._process = None
        assert process
        self._connection.close()
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed the connection but still runs
            process.kill()
            code = process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


# --- in the worker process ------------------------------------------------------------------------


def _serve_calls(connection: Connection) -> None:
    """Answer the calls of the parent until it exits."""
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(
        target=_receive_until_parent_exits, args=(connection, messages), daemon=True
    ).start()
    sys.path[:] = pickle.loads(messages.get())
    function, error = _result_or_error(pickle.loads, messages.get())
    while True:
        message = messages.get()
        connection.send((None, error) if error else _result_or_error(_call, function, message))


def _call(function: Callable[[Any], Any], message: bytes) -> Any:
    return function(pickle.loads(message))


def _receive_until_parent_exits(connection: Connection, messages: queue.SimpleQueue[bytes]) -> None:
    """Queue the parent's messages. Once the parent is gone, end this process at once.

    Nothing is unpickled here because that imports: two threads that import modules which import
    each other deadlock.
    """
    try:
        while True:
            messages.put(connection.recv_bytes())
    finally:
        os._exit(1)


def _result_or_error(function: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    """Call a function; return its result or its exception in a form that can be pickled."""
    try:
        return function(*args), None
    except Exception as error:
        error.add_note(f"in worker process {os.getpid()}:\n{traceback.format_exc()}")
        try:
            return None, pickle.loads(pickle.dumps(error))
        except Exception:  # its class cannot be recreated from its arguments
            return None, RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    with suppress(OSError):  # the parent has exited
        _serve_calls(Connection(int(sys.argv[1])))
