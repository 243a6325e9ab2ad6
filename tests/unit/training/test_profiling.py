"""FLOP counts of the papers and of XLA, device peaks, rooflines, and timing."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model
from data.batch import EncodedCaption
from model import BLOCKS, init_model_params, model_config, model_graphdef
from runtime.errors import UserError
from training import flops as training_flops
from training import profiling
from training.flops import Peak, device_peak, flops_by_module
from training.profiling import StepCost, StepProfile, roofline, seconds_per_step, step_cost

DEPTH, ROWS, WIDTH = 8, 64, 32


def config(size, **changes):
    given = {"image_size": 32, "channels": 4, "out_channels": 4, "n_classes": 1000} | changes
    return model_config(f"{size}/2" if "DiT" in size else f"DiT-{size}/2", **given)


def stacked_products(unroll):
    """DEPTH square matrix products in a scan, with their weights and input."""

    def apply(weights, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights, unroll=unroll)[0]

    return jax.jit(apply), (jnp.ones((DEPTH, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH)))


def step_profile(intensity, *, flops=1e12):
    """A step of one second with 1e12 FLOPs by XLA's count and `flops` by the analytic one."""
    xla = StepCost(flops=1e12, accessed_bytes=1e12 / intensity)
    return StepProfile("train", flops, xla, 1.0, 1.0, None)


@pytest.mark.parametrize(("size", "gflops"), [("S", 12.1), ("B", 46.0), ("L", 161), ("XL", 237)])
def test_forward_flops_of_the_paper(size, gflops):
    assert sum(flops_by_module(config(size)).values()) == pytest.approx(gflops * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("block", "gflops"),
    [("in_context", 119.4), ("cross_attention", 137.6), ("adaln", 118.6), ("adaln_zero", 118.6)],
)
def test_forward_flops_of_the_papers_designs(block, gflops):
    """Peebles & Xie 2023, table 4, whose flops are multiply-adds."""
    counted = sum(flops_by_module(config("XL", out_channels=8, block=block)).values()) / 2
    assert counted == pytest.approx(gflops * 1e9, rel=0.005)


CAPTIONS = {"text_length": 24, "text_width": 48, "pooled_width": 32, "n_classes": 0}


@pytest.mark.parametrize("conditioning", [{}, CAPTIONS], ids=["class", "caption"])
@pytest.mark.parametrize("block", [*BLOCKS, "joint", "dual"])
def test_every_design_is_counted_as_xla_counts_it(block, conditioning):
    design = {"block": block} if block in BLOCKS else {"n_dual": 2 * (block == "dual")}
    size = "DiT-Ti" if block in BLOCKS else "MMDiT-Ti"
    c = config(size, unroll=6, image_size="32x16", **design, **conditioning)
    label = jax.ShapeDtypeStruct((2,), jnp.int32)
    if conditioning:
        shapes = ((2, 24, 48), jnp.float16), ((2, 24), jnp.bool), ((2, 32), jnp.float16)
        label = EncodedCaption(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    params = jax.eval_shape(lambda: init_model_params(c, jax.random.key(0)))
    x, t = (
        jax.ShapeDtypeStruct((2, 32, 16, 4), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.float32),
    )
    run = jax.jit(lambda params, *args: nnx.merge(model_graphdef(c), params)(*args))
    xla = step_cost(run.lower(params, x, t, label).compile()).flops
    assert xla and 2 * sum(flops_by_module(c).values()) == pytest.approx(xla, rel=0.06)


def test_modules_scale_like_their_formulas():
    base, finer = flops_by_module(config("B")), flops_by_module(config("B", patch_size=1))
    growth = {module: finer[module] / base[module] for module in base}
    assert growth["attention scores, values"] == 16  # tokens squared
    assert growth["attention projections"] == growth["MLP"] == 4  # tokens
    assert growth["adaLN modulation"] == growth["t and label embedding"] == 1  # once per image
    assert growth["patch embedding"] == growth["final layer"] == 1  # four tokens of a quarter each
    swiglu = flops_by_module(config("B", mlp="swiglu"))["MLP"]
    assert swiglu == base["MLP"]  # 768 is a multiple of 8 · 3: two thirds of the width, thrice


class SubclassedBlock(model.AdaLNZeroBlock):
    """A variant with the products of its base."""


class UncountedBlock(nnx.Module):
    """A block that does not state its products."""


def test_a_subclassed_block_inherits_its_count(monkeypatch):
    design = model.Design(SubclassedBlock, model.AdaptiveFinalLayer)
    monkeypatch.setitem(BLOCKS, "subclassed", design)
    assert flops_by_module(config("S", block="subclassed")) == flops_by_module(config("S"))


@pytest.mark.parametrize(
    ("block", "final"),
    [
        (UncountedBlock, model.AdaptiveFinalLayer),
        (model.AdaLNZeroBlock, UncountedBlock),
    ],
)
def test_flops_without_a_count_are_none_and_a_profile_says_why(block, final, monkeypatch):
    monkeypatch.setitem(BLOCKS, "uncounted", model.Design(block, final))
    assert training_flops.forward_flops(config("S", block="uncounted")) is None
    with pytest.raises(UserError, match="FLOPs of block 'uncounted' are unknown"):
        flops_by_module(config("S", block="uncounted"))


def test_xla_counts_a_scan_once():
    once, one_by_one = (
        step_cost(jitted.lower(*args).compile()).flops
        for jitted, args in (stacked_products(1), stacked_products(DEPTH))
    )
    assert once and one_by_one
    assert one_by_one == pytest.approx(2 * DEPTH * ROWS * WIDTH**2, rel=0.01)
    assert once == pytest.approx(one_by_one / DEPTH, rel=0.05)


@pytest.mark.parametrize("counts", [None, [], {}, [{}], {"flops": -1.0}, [{"utilization": 1.0}]])
def test_cost_without_figures_is_not_an_error(counts):
    compiled = SimpleNamespace(cost_analysis=lambda: counts, memory_analysis=lambda: None)
    assert step_cost(compiled) == StepCost()
    assert StepCost().intensity is None


def test_memory_counts_the_arguments_of_one_device():
    jitted, args = stacked_products(1)
    cost = step_cost(jitted.lower(*args).compile())
    assert cost.argument_bytes == sum(x.nbytes for x in args)
    assert cost.output_bytes == args[1].nbytes
    assert cost.alias_bytes == 0 and cost.temporary_bytes is not None
    together = sum(x.nbytes for x in (*args, args[1])) + cost.temporary_bytes
    assert cost.memory_bytes == together and StepCost().memory_bytes is None


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989, 3350),
        ("NVIDIA H100 80GB HBM3", "float32", 494, 3350),
        ("NVIDIA H100 PCIe", "bfloat16", 756, 2000),
        ("NVIDIA H200", "bfloat16", 989, 4800),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312, 2039),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312, 1555),
        ("NVIDIA L4", "bfloat16", 121, 300),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165, 1008),
        ("TPU v4", "bfloat16", 275, 1228),
        ("TPU v5 lite", "bfloat16", 197, 819),
        ("TPU v5", "bfloat16", 459, 2765),
        ("TPU v5p", "bfloat16", 459, 2765),
        ("TPU v6 lite", "bfloat16", 918, 1640),
    ],
)
def test_peaks_are_found_by_jax_device_kinds(kind, dtype, tflops, gigabytes):
    peak = device_peak(kind, dtype)
    assert peak is not None
    assert (peak.flops_per_second, peak.bytes_per_second) == (tflops * 1e12, gigabytes * 1e9)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "bfloat16"),
        ("NVIDIA L40S", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("TPU v4", "float32"),
    ],
)
def test_a_peak_is_never_guessed(kind, dtype):
    assert device_peak(kind, dtype) is None
    assert training_flops.mfu(1e12, None) is None
    given = device_peak(kind, dtype, peak_tflops=2.0)
    assert given is not None and training_flops.mfu(1e12, given) == 0.5


def test_the_roofline_compares_with_the_ridge():
    device = Peak(2e12, 1e10, "data sheet")  # the ridge is at 200 FLOPs per byte
    assert roofline(step_profile(400), device).startswith("compute-bound: 400")
    assert "50.0% of 2 TFLOP/s" in roofline(step_profile(400), device)
    memory_bound = roofline(step_profile(100), device)
    assert memory_bound.startswith("memory-bound: 100") and "100.0% of what memory" in memory_bound
    # A scan hides work: with eight times the FLOPs over the same bytes nothing is certain.
    assert roofline(step_profile(100, flops=8e12), device).startswith("undecided: 100 to 800")
    assert roofline(step_profile(400), None).startswith("n/a")
    assert roofline(step_profile(400), Peak(2e12, None, "--peak_tflops")).startswith("n/a")
    assert "25.0%" in roofline(step_profile(400), device, n_devices=2)


def test_timing_waits_for_the_device():
    class Result:
        """Like an array of an asynchronous device: returned at once, ready later, in order."""

        finished = 0.0

        def __init__(self):
            self.ready = Result.finished = max(Result.finished, time.perf_counter()) + 0.004

        def block_until_ready(self):
            time.sleep(max(0.0, self.ready - time.perf_counter()))
            return self

    # Without the wait it would be microseconds. No upper bound is tight on a busy machine.
    assert 0.0039 < seconds_per_step(Result, min_seconds=0.05) < 0.04


def test_a_report_of_a_step_on_this_machine(tmp_path):
    jitted, args = stacked_products(1)
    step = profiling.profile_step("train", jitted, args, flops=1e6, run=lambda run: run(*args))
    trace_file = profiling.trace(lambda: step.compiled(*args), tmp_path)
    assert trace_file.stat().st_size and trace_file.is_relative_to(tmp_path)
    text = profiling.report(
        config("S"),
        {"weights": np.broadcast_to(np.float32(0), 32_956_000)},
        {"weights": np.broadcast_to(np.float32(0), 32_956_000)},
        [step, step],
        moment_bytes=800,
        device_kind="cpu",
        n_devices=1,
        dtype="float32",
        peak=None,
        trace_file=trace_file,
    )
    rows = {line[:26].strip(): line[26:].split() for line in text.splitlines()}
    assert rows["MFU"] == ["n/a", "n/a"]
    assert rows["total"] == ["12.1", "GFLOP", "100.0%"]
    assert "33 M parameters; weights 132 MB, EMA 132 MB, moments 800 B" in text
    assert str(trace_file) in text and f"--logdir {tmp_path}" in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100


def test_units_keep_three_digits():
    values = {0.0: "0 s", 0.012346: "12.3 ms", 999.9: "1 ks", 12.1e9: "12.1 Gs"}
    assert {value: profiling.format_si(value, "s") for value in values} == values
    assert profiling.format_si(None, "s") == "n/a"
