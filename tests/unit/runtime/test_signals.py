"""A signal asks a run to stop soon; so does losing the terminal, however often it is told."""

import os
import pty
import signal

import pytest

from runtime.signals import StopRequest, catch_stop_signals


@pytest.fixture
def own_handlers():
    """Handlers that do nothing, in place of those that end the process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "end"),
    [
        (signal.SIGTERM, SystemExit(143)),
        (signal.SIGHUP, SystemExit(129)),
        (signal.SIGINT, KeyboardInterrupt()),
    ],
)
def test_the_first_signal_is_a_request(own_handlers, number, end):
    usual = signal.getsignal(number)
    with catch_stop_signals() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop and stop.signal == number
    assert signal.getsignal(number) is usual
    with pytest.raises(type(end)) as ended:
        stop.raise_exit()
    assert str(ended.value) == str(end)


def test_a_lost_terminal_signals_twice(own_handlers):
    """The kernel tells the process, and then its shell does."""
    with catch_stop_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
    assert stop.signal == signal.SIGHUP


def test_nohup_keeps_the_run_going(own_handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with catch_stop_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert StopRequest().raise_exit() is None


def test_output_to_a_terminal_that_is_gone_does_not_fail(own_handlers, capfd):
    """Else the next message would raise before anything is saved."""
    controller, terminal = pty.openpty()
    kept = os.dup(2)
    os.dup2(terminal, 2)
    try:
        with catch_stop_signals() as stop:
            os.close(controller)  # the terminal hangs up
            with pytest.raises(OSError):
                os.write(2, b"lost")
            signal.raise_signal(signal.SIGHUP)
            assert stop and os.write(2, b"nowhere") == 7
    finally:
        os.dup2(kept, 2)
        os.close(terminal)
        os.close(kept)
