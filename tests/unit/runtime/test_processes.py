"""Two processes are one run: the same numbers, one record, one end."""

import pytest

from runtime import processes
from runtime.errors import UserError


@pytest.mark.parametrize(
    "how", [{"coordinator": "a:1"}, {"n_processes": 2}, {"coordinator": "a:1", "n_processes": 2}]
)
def test_what_lacks_to_meet_is_said(how):
    with pytest.raises(UserError, match=r"--process_index.* must be given too, or --distributed"):
        processes.join_cluster(**how)


def test_one_process_is_the_first_and_waits_for_nobody():
    assert processes.is_first() and not processes.is_distributed()
    assert processes.broadcast_from_first(lambda: "word") == "word"
    with processes.first_then_others():
        processes.wait_for_all("nobody")
