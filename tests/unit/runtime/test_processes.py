"""Missing flags of a cluster are refused; a single process never waits."""

import jax
import pytest

from runtime import processes
from runtime.errors import UserError


@pytest.mark.parametrize(
    "flags", [{"coordinator": "a:1"}, {"n_processes": 2}, {"coordinator": "a:1", "n_processes": 2}]
)
def test_missing_flags_of_a_cluster_are_named(flags):
    with pytest.raises(UserError, match=r"--process_index.* must be given too, or --distributed"):
        processes.join_cluster(**flags)


def test_one_process_is_the_first_and_waits_for_nobody():
    assert processes.is_first() and not processes.is_distributed()
    assert processes.broadcast_from_first(lambda: "word") == "word"
    with processes.first_then_others():
        processes.wait_for_all("nobody")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "here; unset it"),  # what JAX raises without the plugin for CUDA
        (RuntimeError("no libtpu.so (set JAX_PLATFORMS='' to choose)"), r"here \(no libtpu.so\);"),
        (RuntimeError("a\nb " * 200), r"here \(a b .* …\)"),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, error, reason):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    start = processes.start_backend.__wrapped__  # not the cached success of this process
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=f"JAX_PLATFORMS=cuda: .*{reason}") as one_line:
        start()
    assert len(str(one_line.value)) <= 300 and "\n" not in str(one_line.value)
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(UserError, match="JAX cannot start its devices"):
        start()
