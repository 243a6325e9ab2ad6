"""The peer of the benchmarks is the model it is compared with, and turns are timed fairly."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from benchmarks_cases import (
    NANO,
    needs_torch,
    one_thread,  # noqa: F401
)

from benchmarks import peer, timing
from model import JOINT
from runtime.errors import UserError


@needs_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fp32", "autocast"])
def test_the_peer_learns(one_thread, kind):
    """Its loss on one batch falls: the timed step does train."""
    import torch

    torch.manual_seed(0)
    model = peer.build_torch_model(NANO).train()
    step = peer.make_train_step(
        model,
        NANO,
        peer.PEERS[kind],
        device="cpu",
        batch_size=8,
        remat=False,
        learning_rate=3e-3,
    )
    losses = [float(step()) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:5])


def test_a_missing_peer_gives_its_reason(monkeypatch):
    def start_peer(config):
        return peer.Peer("fp32", "step", config, platform="cpu", batch_size=1, remat=False)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for block in ("adaln", JOINT):
        with pytest.raises(peer.PeerMissing, match=f"'{block}'"):
            start_peer(replace(NANO, block=block))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(peer.PeerMissing, match=r"torch and diffusers .*--group bench"):
        start_peer(NANO)


# --- times ----------------------------------------------------------------------------------------


def test_turns_are_taken_in_rounds_without_counting_the_first():
    order = []

    def turn(name, seconds):
        return lambda: order.append(name) or peer.Cost(seconds.pop(0), 8.0)

    times = timing.run_interleaved(
        {"a": turn("a", [100.0, 1.0, 2.0, 6.0]), "b": turn("b", [100.0, 3.0, 4.0, 6.0])}, 3
    )
    assert "".join(order) == "abbaabba"
    assert times["a"].seconds == (1.0, 2.0, 6.0)
    assert (times["a"].median, times["a"].min) == (2.0, 1.0)
    assert times["a"].times_as_fast_as(times["b"]) == 2.0  # of 3, 2 and 1
    assert times["a"].cpu_median == 8.0
    with pytest.raises(UserError, match="--rounds 0"):
        timing.run_interleaved({}, 0)


def test_the_fastest_torch_is_the_one_that_is_beaten_by_least():
    cells = timing.format_ratios({"fp32": 1.5, "autocast": 0.9}, ["fp32", "autocast", "compiled"])
    assert cells == {
        "× fp32": "1.5",
        "× autocast": "0.9",
        "× compiled": "n/a",
        "× fastest torch": "0.9",
    }


def test_a_table_leaves_out_empty_columns():
    rows = [{"name": "a", "s": "1.5", "MFU": "n/a"}, {"name": "longer", "s": "n/a", "MFU": "n/a"}]
    assert timing.format_table(rows).splitlines() == [
        "| name   |   s |",
        "| ------ | --: |",
        "| a      | 1.5 |",
        "| longer | n/a |",
    ]
