"""Costs of a run's compiled steps: FLOPs, bytes, memory, time, MFU, roofline.

`python train.py --profile` measures the steps of training, evaluation and sampling on blank
batches. Figures that the compiler or the table of peaks lacks are None, and n/a in the report.
Nothing here trains or prints; the FLOP counts are those of `flops`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data.batch import Batch
from inference import sampler
from inference.sampler import SamplerConfig
from runtime import parallel
from runtime.image_size import format_shape
from training.flops import TRAIN_PER_FORWARD, Peak, flops_by_module, mfu
from training.loop import Loop


def profile(
    loop: Loop,
    *,
    eval_loss: Any,
    sampler_config: SamplerConfig,
    peak: Peak | None,
    train_passes: float = TRAIN_PER_FORWARD,
    eval_passes: float = 1,
) -> str:
    """Compile and time one step of training, of evaluation and of sampling, and return a report.

    Leaves the loop's weights changed, and a trace of the training step in `profile/` of its folder.

    Args:
        eval_loss: a jitted `eval_loss(params, batch, key, *loop.frozen)`.
        sampler_config: a solver of one step.
        peak: of one device; None if unknown.
        train_passes, eval_passes: FLOPs of a step, in forward passes, if its loss takes more than
            one.
    """
    model, key = loop.model_config, loop.train_key
    batch = parallel.shard_batch(loop.blank_batch(), loop.mesh)
    forward_flops = loop.config.batch_size * sum(flops_by_module(model).values())

    def train(compiled: Any) -> Any:
        loop.state, report = compiled(loop.state, batch, key, *loop.frozen)
        return report

    profiles = [
        profile_step(
            "train",
            loop.update,
            (loop.state, batch, key, *loop.frozen),
            flops=train_passes * forward_flops,
            run=train,
        ),
        profile_step(
            "eval",
            eval_loss,
            (loop.state.ema, batch, key, *loop.frozen),
            flops=eval_passes * forward_flops,
            run=lambda compiled: compiled(loop.state.ema, batch, key, *loop.frozen),
        ),
        _profile_sampling(loop, batch, sampler_config, forward_flops),
    ]
    trace_file = trace(lambda: train(profiles[0].compiled), loop.run_dir / "profile")
    return report(
        model,
        loop.averaged_weights,
        loop.state.params,
        profiles,
        moment_bytes=sum(x.nbytes for x in jax.tree.leaves(loop.state.opt_state)),
        device_kind=parallel.devices().kind,
        n_devices=parallel.devices().count,
        dtype=model.dtype,
        peak=peak,
        trace_file=trace_file,
    )


def _profile_sampling(
    loop: Loop, batch: Batch, sampler_config: SamplerConfig, forward_flops: float
) -> "StepProfile":
    """Profile one step of the solver, guided if the model is conditional."""
    model = loop.model_config
    guide = model.is_conditional and sampler_config.method.is_guidable
    step = partial(
        sampler.sample_batch,
        config=model,
        sampler=sampler_config,
        guide=guide,
        trajectory=False,
    )
    seed, cfg_scale = 0, jnp.float32(2)
    return profile_step(
        "sample, guided" if guide else "sample",
        jax.jit(step),
        (loop.averaged_weights, batch.label, batch.row, seed, cfg_scale),
        flops=(1 + guide) * forward_flops,
        run=lambda compiled: compiled(
            loop.averaged_weights, batch.label, batch.row, seed, cfg_scale
        ),
    )


@dataclass(frozen=True)
class StepCost:
    """XLA's own figures for one compiled step on one device; None where XLA has none.

    XLA counts the body of a scan once, in FLOPs and in bytes.
    """

    flops: float | None = None
    accessed_bytes: float | None = None
    argument_bytes: float | None = None
    output_bytes: float | None = None
    temporary_bytes: float | None = None
    alias_bytes: float | None = None

    @property
    def intensity(self) -> float | None:
        """FLOPs per byte accessed."""
        return self.flops / self.accessed_bytes if self.flops and self.accessed_bytes else None

    @property
    def memory_bytes(self) -> float | None:
        """All memory that the step needs. XLA's own peak leaves out the temporaries on CPU."""
        parts = (self.argument_bytes, self.output_bytes, self.temporary_bytes)
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return sum(known) - (self.alias_bytes or 0)


def step_cost(compiled: Any) -> StepCost:
    """Read XLA's figures of a compiled step, the result of `jitted.lower(…).compile()`."""
    counts = compiled.cost_analysis()  # a dict, a list of one, or None, by backend
    counts = counts[0] if isinstance(counts, list | tuple) and counts else counts
    counts = counts if isinstance(counts, Mapping) else {}
    memory = compiled.memory_analysis()
    return StepCost(
        flops=_positive(counts.get("flops")),
        accessed_bytes=_positive(counts.get("bytes accessed")),
        argument_bytes=getattr(memory, "argument_size_in_bytes", None),
        output_bytes=getattr(memory, "output_size_in_bytes", None),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        alias_bytes=getattr(memory, "alias_size_in_bytes", None),
    )


def _positive(count: float | None) -> float | None:
    return count if count is not None and count > 0 else None  # backends say -1 for "unknown"


def seconds_per_step(
    step: Callable[[], Any], *, min_seconds: float = 2.0, min_steps: int = 2
) -> float:
    """Time a step over a window that ends when the device has finished, after one warm-up step."""
    jax.block_until_ready(step())
    n_steps, result = min_steps, None
    while True:
        start = time.perf_counter()
        for _ in range(n_steps):
            result = step()
        jax.block_until_ready(result)
        seconds = time.perf_counter() - start
        if seconds >= min_seconds:
            return seconds / n_steps
        # Steps are asynchronous: only waiting gives a time. Measure a longer window anew.
        n_steps = math.ceil(n_steps * min(10.0, 1.2 * min_seconds / max(seconds, 1e-9)))


@dataclass(frozen=True)
class StepProfile:
    """Measurements of one kind of step. `flops` is the analytic count over all devices."""

    name: str
    flops: float
    cost: StepCost
    compile_seconds: float
    seconds: float
    compiled: Any = field(repr=False, compare=False)

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds


def profile_step(
    name: str, jitted: Any, args: Sequence[Any], *, flops: float, run: Callable[[Any], Any]
) -> StepProfile:
    """Compile `jitted` for `args` ahead of time, then time it.

    Args:
        name: of the step in the report.
        jitted: a function that `jax.jit` returned.
        args: arrays or shapes; a donated buffer among them is not consumed by compiling.
        flops: analytic FLOPs of one step over all devices.
        run: executes one step of a compiled object and returns its output.
    """
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    seconds = seconds_per_step(lambda: run(compiled))
    return StepProfile(name, flops, step_cost(compiled), compile_seconds, seconds, compiled)


def roofline(profile: StepProfile, peak: Peak | None, *, n_devices: int = 1) -> str:
    """Describe in one sentence the roof that limits the step, and the share of it that is reached
    (Williams et al. 2009).
    """
    speed = profile.flops_per_second / n_devices
    if peak is None:
        return f"n/a: this device's peak is unknown; it reaches {format_si(speed, 'FLOP/s')}."
    peak_speed = format_si(peak.flops_per_second, "FLOP/s")
    reached = f"reaches {speed / peak.flops_per_second:.1%} of {peak_speed}"
    low = profile.cost.intensity
    if low is None or peak.bytes_per_second is None or profile.cost.accessed_bytes is None:
        return f"n/a: bytes or bandwidth are unknown; it {reached}."
    # A scan counted once hides FLOPs and bytes: the true intensity lies between XLA's, which the
    # optimizer outside the loop pulls down, and that of all FLOPs over the bytes that were counted.
    high = max(low, profile.flops / n_devices / profile.cost.accessed_bytes)
    ridge = peak.flops_per_second / peak.bytes_per_second
    span = f"{low:.3g}" if high < 1.1 * low else f"{low:.3g} to {high:.3g}"
    facts = f"{span} FLOPs per byte, the ridge is at {ridge:.3g}"
    if low >= ridge:
        return f"compute-bound: {facts}; it {reached}."
    if high >= ridge:
        return f"undecided: {facts} (a scan is counted once); it {reached}."
    roof = high * peak.bytes_per_second
    return f"memory-bound: {facts}; it {reached}, {speed / roof:.1%} of what memory allows."


def trace(run: Callable[[], Any], folder: Path) -> Path:
    """Record two steps with jax.profiler into `folder`. Returns the file to open.

    Raises:
        RuntimeError: the profiler wrote nothing.
    """
    with jax.profiler.trace(str(folder)):
        for _ in range(2):
            jax.block_until_ready(run())
    for ending in ("*.trace.json.gz", "*.xplane.pb"):
        if files := list(folder.rglob(ending)):
            return max(files, key=lambda file: file.stat().st_mtime)
    raise RuntimeError(f"jax.profiler wrote no trace into {folder}")


def report(
    config: Any,
    weights: Any,
    trained: Any,
    profiles: Sequence[StepProfile],
    *,
    moment_bytes: int,
    device_kind: str,
    n_devices: int,
    dtype: str,
    peak: Peak | None,
    trace_file: Path | None = None,
) -> str:
    """Format the model, the device, the table of steps and the rooflines as text.

    Args:
        weights, trained: all weights of the network, and those that a step changes.
    """
    roof = "n/a (give --peak_tflops)"
    if peak:
        speed = format_si(peak.flops_per_second, "FLOP/s")
        bandwidth = format_si(peak.bytes_per_second, "B/s")
        roof = f"{speed}, {bandwidth} ({peak.source})"
    lines = [
        *_model_lines(config, weights, trained, moment_bytes),
        f"DEVICE\n  {n_devices} × {device_kind}, {dtype}; peak of one: {roof}",
        *_step_lines(profiles, peak, n_devices),
        "ROOFLINE",
        *(f"  {p.name}: {roofline(p, peak, n_devices=n_devices)}" for p in profiles),
    ]
    if trace_file:
        lines += [
            f"TRACE\n  {trace_file}",
            "  open the .trace.json.gz at https://ui.perfetto.dev, or",
            f"  pip install xprof && xprof --logdir {trace_file.parents[3]}",
        ]
    return "\n".join(lines)


def _model_lines(config: Any, weights: Any, trained: Any, moment_bytes: int) -> list[str]:
    """The model's size and its FLOPs by module."""
    (n_params, n_bytes), (n_trained, trained_bytes) = (
        (sum(x.size for x in leaves), sum(x.nbytes for x in leaves))
        for leaves in map(jax.tree.leaves, (weights, trained))
    )
    part = "" if n_trained == n_params else f", {format_si(n_trained, '')} of them trained"
    modules = flops_by_module(config)
    forward = sum(modules.values())
    shares = {**modules, "total": forward}
    return [
        "MODEL",
        f"  width {config.width}, depth {config.depth}, {config.n_heads} heads, "
        f"patch {config.patch_size}, image {format_shape(config.image_shape)}, "
        f"{math.prod(config.grid)} tokens",
        f"  {format_si(n_params, '')} parameters{part}; weights {format_si(n_bytes, 'B')}, "
        f"EMA {format_si(trained_bytes, 'B')}, moments {format_si(moment_bytes, 'B')}",
        "FORWARD FLOPS PER IMAGE (2 per multiply-add; matrix products only)",
        *(f"  {name:26}{format_si(x, 'FLOP'):>12}{x / forward:8.1%}" for name, x in shares.items()),
    ]


def _step_lines(profiles: Sequence[StepProfile], peak: Peak | None, n_devices: int) -> list[str]:
    """A table with one column per step."""

    def column(p: StepProfile) -> list[str]:
        c, speed = p.cost, p.flops_per_second / n_devices
        share = mfu(speed, peak)
        return [
            p.name,
            format_si(p.flops, "FLOP"),
            format_si(c.flops, "FLOP"),
            format_si(c.accessed_bytes, "B"),
            "n/a" if c.intensity is None else f"{c.intensity:.3g} FLOP/B",
            *(format_si(x, "B") for x in (c.argument_bytes, c.output_bytes, c.alias_bytes)),
            *(format_si(x, "B") for x in (c.temporary_bytes, c.memory_bytes)),
            format_si(p.compile_seconds, "s"),
            format_si(p.seconds, "s"),
            format_si(speed, "FLOP/s"),
            "n/a" if share is None else f"{share:.1%}",
        ]

    names = ["", "FLOPs, analytic", "FLOPs, XLA's count", "bytes accessed", "intensity"]
    names += [f"memory: {kind}" for kind in ("arguments", "outputs", "aliased", "temporaries")]
    names += ["memory: together", "compile", "time per step", "achieved, per device", "MFU"]
    rows = zip(names, *(column(p) for p in profiles), strict=True)
    return [
        "STEPS",
        *(f"  {name:24}" + "".join(f"{cell:>16}" for cell in cells) for name, *cells in rows),
        "  Analytic: a backward pass is two forward passes, recomputation not counted.",
        "  XLA's figures: of one device, with the body of a scan counted once.",
    ]


def format_si(value: float | None, unit: str) -> str:
    """Format a value with three digits, an SI prefix and its unit: 12.1 GFLOP. None is n/a."""
    if value is None:
        return "n/a"
    value = float(f"{value:.3g}")  # round first, so that 999.9 becomes 1 k and not 1000
    power = math.floor(math.log10(abs(value)) / 3) if value else 0
    power = max(-3, min(power, 5))
    prefix = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[power]
    return f"{value / 1000**power:.3g} {prefix}{unit}".rstrip()
