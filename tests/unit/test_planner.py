"""The plan on paper agrees with the compiled program: bytes held, bytes sent, memory."""

from dataclasses import replace

import jax
import pytest
from planner_cases import CONFIGS, MESHES, SMALL, UNIT

from benchmarks import planner
from benchmarks.planner import Collective, Plan
from model import init_model_params, model_config
from runtime import parallel
from training import flops


def plan(config, mesh, rows=4):
    return Plan(config, UNIT, *MESHES[mesh], rows)


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


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_shards_sum_to_the_whole_and_lie_as_planned(name, fsdp):
    config = CONFIGS[name]
    w = planner.count_weight_bytes(config, fsdp)
    assert fsdp * (w.on_device - w.replicated) + w.replicated == 4 * planner.count_params(config)
    mesh = parallel.make_mesh(fsdp)
    params = parallel.create_sharded(lambda: init_model_params(config, jax.random.key(0)), mesh)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert w.on_device == held


def test_saved_activations_scale_with_tokens_and_blocks():
    config = model_config("DiT-S/2", image_size=32, channels=4, out_channels=4, n_classes=10)
    coarse, fine = (
        planner.count_forward_bytes(config),
        planner.count_forward_bytes(replace(config, image_size=64)),
    )
    assert fine.scores == pytest.approx(16 * coarse.scores, rel=0.02)  # tokens squared
    assert coarse.scores == 2 * 4 * 12 * 6 * 256**2
    assert fine.saved == pytest.approx(4 * coarse.saved, rel=0.02)
    assert fine.read == pytest.approx(4 * coarse.read, rel=0.02)
    block, deeper = (
        planner.count_block_bytes(config),
        planner.count_forward_bytes(replace(config, depth=20)),
    )
    for field in ("read", "saved", "scores"):
        assert getattr(deeper, field) - getattr(coarse, field) == 8 * getattr(block, field)
    half = planner.count_forward_bytes(replace(config, dtype="bfloat16"))
    assert 0.5 < half.saved / coarse.saved < 0.55
    remat = planner.count_forward_bytes(replace(config, remat=True))
    assert coarse.saved / remat.saved > 10 and remat.read == coarse.read
    # Of a block eleven numbers a channel of a token: its input, queries, keys and values, what
    # attention found, two maps back, the MLP's four; and the softmax's sum of each head.
    assert coarse.saved == pytest.approx(12 * 256 * (11 * 384 + 6) * 4, rel=0.02)


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


def test_the_choice_fits_and_is_the_fastest():
    xl, h100 = planner.list_models()["DiT-XL/2", 256], planner.DEVICES["H100"]
    best = planner.choose_plan(xl, h100, 64)
    assert best and best.memory.total <= planner.USABLE_MEMORY * h100.memory_bytes
    assert best.rows * best.n_devices <= planner.LARGEST_BATCH
    others = list(planner.list_fitting_plans(xl, h100, 64))
    assert {plan.fsdp for plan in others} == {1, 8, 64}
    assert best.images_per_second == max(plan.images_per_second for plan in others)
    five = planner.list_models()["MMDiT-5B/2", 256]
    assert {plan.fsdp for plan in planner.list_fitting_plans(five, h100, 64)} == {
        8,
        64,
    }  # DDP does not fit
    assert planner.choose_plan(five, h100, 1) is None
