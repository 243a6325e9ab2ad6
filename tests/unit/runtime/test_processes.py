"""Missing flags of a cluster are refused; a single process never waits."""

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
