"""The loss of a process is noticed by its silence, or by the store that was lost with it."""

from types import SimpleNamespace

import pytest

from runtime import peer_watch
from runtime.peer_watch import (
    GONE,
    PeerWatch,
    describe_failed_connection,
    describe_lost,
    is_of_collective,
)


class Store:
    """JAX's key-value store, in memory."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, *, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


class LostStore(Store):
    """A store that does not answer."""

    def key_value_set(self, key, value, *, allow_overwrite):
        raise RuntimeError("UNAVAILABLE")


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(peer_watch.time, "monotonic", lambda: self.now)


@pytest.fixture
def reports(monkeypatch):
    """The texts that would have ended the process."""
    found = []
    monkeypatch.setattr(PeerWatch, "report", lambda self, text: found.append(text))
    return found


def test_a_process_whose_sign_stays_the_same_is_lost(monkeypatch, reports):
    clock, watch = Clock(monkeypatch), PeerWatch(Store(), 0, 3)
    for beat in range(20):
        clock.now += 2
        sign_of_two = "3 node-2" if beat > 3 else f"{beat} node-2"
        watch._judge_signs({0: f"{beat} node-0", 1: f"{beat} node-1", 2: sign_of_two})
        if reports:
            break
    assert clock.now - 100 < 30
    assert reports[0].startswith("process 2 on node-2 has not answered since ")
    assert watch.client.values[peer_watch.LOST + "2"] == reports[0]  # for the others


def test_a_process_that_has_left_is_not_lost(monkeypatch, reports):
    clock, watch = Clock(monkeypatch), PeerWatch(Store(), 0, 2)
    for beat in range(100):
        clock.now += 2
        watch._judge_signs({0: f"{beat} node-0", 1: GONE})
    assert reports == []


def test_a_process_that_never_gave_a_sign_is_lost(monkeypatch, reports):
    clock, watch = Clock(monkeypatch), PeerWatch(Store(), 0, 2)
    clock.now += peer_watch.LOST_SECONDS + 1
    watch._judge_signs({0: "1 node-0"})
    assert reports[0].startswith("process 1 has not answered")


def test_a_pause_of_the_whole_job_is_forgiven(monkeypatch, reports):
    clock, watch = Clock(monkeypatch), PeerWatch(Store(), 0, 2)
    watch._judge_signs({0: "1 node-0", 1: "1 node-1"})
    clock.now += 3600
    watch._forgive_pause()
    watch._judge_signs({0: "2 node-0", 1: "1 node-1"})
    assert reports == []


def test_stopping_tells_the_others(reports):
    watch = PeerWatch(Store(), 1, 2)
    watch.stop()
    assert watch.client.values == {peer_watch.ALIVE + "1": GONE}
    watch.wait_for_verdict()  # returns at once
    PeerWatch(LostStore(), 1, 2).stop()


def test_a_loss_is_reported_though_the_store_is_lost_too(monkeypatch, reports):
    clock, watch = Clock(monkeypatch), PeerWatch(LostStore(), 0, 2)
    clock.now += peer_watch.LOST_SECONDS + 1
    watch._judge_signs({0: "1 node-0"})
    assert reports[0].startswith("process 1 has not answered")


def test_without_the_store_as_it_is_known_there_is_no_watch(monkeypatch):
    started = []
    thread = SimpleNamespace(start=lambda: started.append(1))
    monkeypatch.setattr(peer_watch.threading, "Thread", lambda **_: thread)
    PeerWatch(object(), 0, 2).start()
    assert not started
    PeerWatch(Store(), 0, 2).start()
    assert len(started) == 2


def test_a_report_is_one_line_with_the_advice(monkeypatch, capfd):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(peer_watch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(peer_watch.os, "_exit", leave)
    watch = PeerWatch(Store(), 1, 2)
    watch.advise = lambda: "the last checkpoint is step 40: start again"
    with pytest.raises(SystemExit, match="1"):
        watch.report(describe_lost(0, 5))
    err = capfd.readouterr().err
    assert err.startswith("error: process 0 has not answered since ")
    assert err.endswith("the last checkpoint is step 40: start again\n") and err.count("\n") == 1
    assert len(err) <= 300
    watch.report("a second thread is silent")
    assert capfd.readouterr().err == ""


def test_a_report_that_has_begun_is_awaited(monkeypatch):
    """Process 0 stays for a while after its report, and must not print the failed collective."""
    for name in ("LOST_SECONDS", "BEAT_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(peer_watch, name, 0)
    watch = PeerWatch(Store(), 0, 2)
    watch.wait_for_verdict()  # nobody reports: it returns
    watch._reporting.acquire()

    def leave(seconds):
        raise SystemExit

    monkeypatch.setattr(peer_watch.time, "sleep", leave)
    with pytest.raises(SystemExit):
        watch.wait_for_verdict()


def test_only_errors_of_collectives_wait_for_a_verdict():
    assert is_of_collective(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
    cause = RuntimeError("DEADLINE_EXCEEDED: barrier timed out")
    wrapped = ValueError("a checkpoint failed")
    wrapped.__cause__ = cause
    assert is_of_collective(wrapped)
    assert not is_of_collective(ValueError("operands could not be broadcast together"))


def test_processes_that_cannot_connect_are_told_of_the_names_of_hosts():
    error = RuntimeError(
        "UNKNOWN: Gloo context initialization failed: [external/gloo/transport/tcp/pair.cc:152]"
        " timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:31643\nmore"
    )
    line = describe_failed_connection(error)
    assert line.startswith(
        "the processes cannot connect to each other: timed out connecting: SO_ERROR: Connection "
        "refused, remote=[127.0.0.1]:31643; "
    )
    assert "not to 127.0.0.1" in line and len(line) < 300
    assert describe_failed_connection(ValueError("Gloo AllGather failed")) == ""


def test_a_process_that_waits_to_leave_ends_when_the_store_is_lost(monkeypatch, capfd):
    """It waited for ever: a watch that was stopped reports nothing."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(peer_watch.os, "_exit", leave)
    watch = PeerWatch(Store(), 1, 2)
    watch.stop()
    with pytest.raises(SystemExit) as end:
        watch.report_store_lost()
    assert end.value.code == 1
    err = capfd.readouterr().err
    assert err.startswith("error: process 0 has not answered") and err.count("\n") == 1
