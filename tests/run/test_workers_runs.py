"""Results arrive in order even when worker processes die, and no process is left behind."""

import contextlib
import importlib
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime import workers
from runtime.workers import Worker, WorkerDied, run_ahead


def square(x: int) -> int:
    return x * x


def process(_: object) -> int:
    return os.getpid()


def modules(_: object) -> set[str]:
    return set(sys.modules)


def slow_square(x: int) -> int:
    time.sleep(0.05 * (x % 3))
    return x * x


class Unlucky:
    """Square x, but kill the process over 3 as often as there are files in a folder."""

    def __init__(self, folder: Path, times: int):
        self.folder = folder
        for i in range(times):
            (folder / str(i)).touch()

    def __call__(self, x: int) -> int:
        left = list(self.folder.iterdir())
        if x == 3 and left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return x * x


class Imported:
    """A module, imported where this is unpickled."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self):
        return importlib.import_module, (self.name,)


def names(*modules: Any) -> list[str]:
    return [module.__name__ for module in modules]


class NeedsTwoArguments(Exception):
    def __init__(self, message: str, answer: int):
        super().__init__(message)


def fail(x: int) -> int:
    if x == 2:
        raise KeyError("two")
    if x == 3:
        raise NeedsTwoArguments("three", 3)
    return x


@contextlib.contextmanager
def worker(function):
    process = Worker(function)
    try:
        yield process
    finally:
        process.close()


@pytest.mark.parametrize("caller", [Worker, lambda function: function])
def test_results_arrive_in_the_order_of_the_calls(caller):
    steps = [(3 * i, 3 * i + 1, 3 * i + 2) for i in range(7)]
    results = run_ahead([caller(slow_square) for _ in range(3)], steps)
    assert list(results) == [[x * x for x in step] for step in steps]


def test_the_i_th_call_always_goes_to_the_i_th_worker():
    with contextlib.closing(run_ahead([Worker(process), Worker(process)], [(0, 1)] * 6)) as results:
        pids = list(results)
    assert len({tuple(pair) for pair in pids}) == 1
    assert len({os.getpid(), *pids[0]}) == 3


def test_some_steps_are_submitted_before_their_results_are_used():
    submitted = []
    steps = (submitted.append(step) or [step] for step in range(100))
    with contextlib.closing(run_ahead([square], steps)) as results:
        assert next(results) == [0]
        assert submitted == list(range(1 + workers.STEPS_AHEAD))


def test_an_error_is_raised_at_its_own_step_with_the_workers_traceback():
    results = run_ahead([Worker(fail)], [[i] for i in range(9)])
    assert [next(results), next(results)] == [[0], [1]]
    with pytest.raises(KeyError, match="two") as caught:
        next(results)
    assert "in fail" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_pickled_becomes_a_runtime_error():
    with worker(fail) as call, pytest.raises(RuntimeError, match="NeedsTwoArguments: three"):
        call(3)


def test_a_function_that_cannot_be_loaded_is_an_error(monkeypatch):
    with worker(square) as call:
        call._function = b"no pickle"
        with pytest.raises(Exception, match="pickle"):
            call(1)


def test_a_function_and_its_call_may_need_modules_that_import_each_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, other in (("hen", "egg"), ("egg", "hen")):
        code = f"import importlib, time; time.sleep(0.3); importlib.import_module('{other}')"
        (tmp_path / f"{name}.py").write_text(code)
    with worker(partial(names, Imported("hen"))) as call:
        assert call(Imported("egg")) == ["hen", "egg"]


def test_a_killed_worker_is_replaced(capfd):
    with worker(process) as call:
        first = call(None)
        os.kill(first, signal.SIGKILL)
        assert call(None) != first
    message = "warning: a worker was killed by SIGKILL; another takes its place\n"
    assert capfd.readouterr().err == message


def test_a_call_that_kills_its_worker_is_repeated_and_given_up_the_third_time(tmp_path):
    twice = run_ahead([Worker(Unlucky(tmp_path, 2))], [[i] for i in range(6)])
    assert list(twice) == [[i * i] for i in range(6)]
    thrice = run_ahead([Worker(Unlucky(tmp_path, 3))], [[i] for i in range(6)])
    assert [next(thrice) for _ in range(3)] == [[0], [1], [4]]
    with pytest.raises(WorkerDied, match="killed by SIGKILL, 3 times over the same call") as caught:
        next(thrice)
    assert caught.value.call == 3


def test_a_worker_does_not_import_the_script_that_started_it():
    assert {"jax", "conftest"} <= set(sys.modules)
    with worker(modules) as call:
        assert not {"jax", "conftest"} & call(None)


def test_signals_are_left_to_the_parent():
    with worker(process) as call:
        pid = call(None)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert call(None) == pid


def test_closing_kills_a_worker_during_a_call():
    start = time.monotonic()
    results = run_ahead([Worker(time.sleep)], [[0.0], [60.0]])
    next(results)
    results.close()
    assert time.monotonic() - start < 10
