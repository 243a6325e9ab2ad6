"""The plan on paper agrees with the compiled program: bytes held, bytes sent, memory."""

from dataclasses import replace

import pytest
from planner_cases import SMALL, UNIT, plan

from benchmarks import planner
from benchmarks.planner import Collective
from model import model_config
from training import flops

# --- weights --------------------------------------------------------------------------------------


def test_parameters_are_counted_as_on_paper():
    """adaLN-Zero: 6 d² + 6 d of modulation, 4 d² + 4 d of attention, 8 d² + 5 d of the MLP."""
    d, depth, patch, classes = 1152, 28, 2 * 2 * 4, 1001
    blocks = depth * (18 * d * d + 15 * d)
    outside = (patch * d + d) + (256 * d + d + d * d + d) + classes * d
    final = 2 * d * d + 2 * d + d * patch + patch
    xl = model_config("DiT-XL/2", image_size=32, **planner.XL)
    assert planner.count_params(xl) == blocks + outside + final
    assert planner.count_params(planner.FIVE_BILLION) == pytest.approx(5e9, rel=0.01)


# --- collectives ----------------------------------------------------------------------------------


def test_rings_and_trees():
    gather = Collective("all-gather", 1, 800.0, 8, 8)
    assert gather.sent_bytes == 700 and replace(gather, kind="all-reduce").sent_bytes == 1400
    assert gather.seconds(UNIT) == pytest.approx(700 / 4 + 0.5 + 7 * 0.01)
    hosts = replace(gather, size=32)  # eight cards together outrun the link
    assert hosts.seconds(UNIT) == pytest.approx(775 / 4 + 0.5 + 28 * 0.01 + 3 * 0.1)
    alone = Collective("all-reduce", 10, 80.0, 4, 1)  # one device of each host, one card
    assert alone.seconds(UNIT) == pytest.approx(2 * 60 / 1 + 10 * (0.5 + 2 * 2 * 0.1))


def test_groups_of_collectives():
    w = planner.count_weight_bytes(SMALL, 8)
    gather, scatter, across, alike = planner.list_collectives(w, 4, 8)
    assert (gather.size, gather.n_hosts, scatter.size) == (8, 1, 8)
    assert (across.size, across.n_hosts, across.array_bytes) == (4, 4, w.sharded / 8)
    assert (alike.size, alike.n_hosts) == (32, 4)
    assert gather.array_bytes == 2 * scatter.array_bytes == 2 * w.sharded
    parts = planner.list_collectives(w, 4, 8, accumulate_steps=3)
    assert [p.array_bytes for p in parts] == [
        3 * gather.array_bytes,
        3 * scatter.array_bytes,
        across.array_bytes,
        alike.array_bytes,
    ]
    (summed,) = planner.list_collectives(planner.count_weight_bytes(SMALL, 1), 8, 1)
    assert summed.array_bytes == 4 * planner.count_params(SMALL) and summed.n_hosts == 1


# --- time -----------------------------------------------------------------------------------------


def test_the_roofline_of_a_step():
    p = plan(SMALL, "hybrid")
    forward = sum(flops.flops_by_module(SMALL).values())
    assert p.flops == 3 * 4 * forward
    assert p.arithmetic_seconds == 4 * 4 * forward  # remat: one forward pass more
    assert p.seconds == pytest.approx(p.compute_seconds + p.communication_seconds)
    assert p.hidden_seconds == max(p.compute_seconds, p.communication_seconds)
    assert p.mfu == pytest.approx(p.flops / p.seconds / 2)
    assert p.images_per_second == pytest.approx(4 * 8 / p.seconds)
    plain = replace(p, config=replace(SMALL, remat=False))
    assert plain.arithmetic_seconds == 3 * 4 * forward
    more = replace(p, rows=8)
    assert more.communication_seconds == p.communication_seconds
    assert more.memory.state == p.memory.state
    assert more.memory.activations == 2 * p.memory.activations
    parts = replace(more, accumulate_steps=2)
    assert parts.memory.activations == p.memory.activations
    assert parts.communication_seconds > more.communication_seconds
