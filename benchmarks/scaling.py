"""Measure the cost of scaling on this machine, and compare the plan with measurements.

    python benchmarks/scaling.py

Measures the compile time at depths 28 and 6; a gradient with and without `shard_map`, and over
eight virtual devices; the real step's memory beside the plan's (`benchmarks/planner.py`); and its
time on one device beside the roofline of this processor, whose speed is measured in the same run.
Virtual devices share the same cores: their times show the cost of sharding, not its gain.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from flax import nnx

import model
from benchmarks import planner
from data.batch import Batch
from methods.rectified_flow import RectifiedFlow
from model import init_model_params, model_config, model_graphdef
from runtime import cli, parallel
from runtime.flags import flag
from train import Trainer
from training import profiling
from training.config import TrainConfig

MESHES = {"DDP": (8, 1), "hybrid": (2, 4), "FSDP": (1, 8)}
LOSS = partial(RectifiedFlow().loss, label_dropout=0.1)
LATENTS: dict[str, Any] = {"image_size": 32, "channels": 3, "profile": True}  # no images are read
# The width of DiT-S in two depths, for compile times.
DEPTH_PRESETS = {
    f"DiT-{n}/2": {"width": 384, "depth": n, "n_heads": 6, "patch_size": 2} for n in (6, 28)
}
model.MODELS |= DEPTH_PRESETS


@dataclass(frozen=True)
class ScalingConfig:
    """Measure the cost of scaling."""

    n_rounds: int = flag(5, "measured rounds, after one for warming up; compared steps take turns")
    n_compiles: int = flag(2, "compilations of each depth")


def lower_step(trainer: Trainer) -> Any:
    """Lower a trainer's step, ready to be compiled."""
    jax.block_until_ready(trainer.state)  # creating it must not be timed with the next call
    batch = parallel.shard_batch(trainer.blank_batch(), trainer.mesh)
    return trainer.update.lower(trainer.state, batch, trainer.train_key)


def measure_compile_times(n: int) -> dict[str, float]:
    """Measure the seconds to compile the train step of 28 and of 6 blocks.

    Both by processor time and by the clock, the best of n in turn.
    """
    processor_seconds = {name: [] for name in DEPTH_PRESETS}
    wall_seconds = {name: [] for name in DEPTH_PRESETS}
    for _ in range(n):
        for name in DEPTH_PRESETS:
            lowered = lower_step(Trainer(TrainConfig(model=name, batch_size=8, remat=True)))
            wall_start = time.perf_counter()
            processor_start = time.process_time()
            lowered.compile()
            processor_seconds[name].append(time.process_time() - processor_start)
            wall_seconds[name].append(time.perf_counter() - wall_start)
    shallow, deep = DEPTH_PRESETS
    return {
        "depth_6_s": min(wall_seconds[shallow]),
        "depth_28_s": min(wall_seconds[deep]),
        "ratio_by_clock": min(wall_seconds[deep]) / min(wall_seconds[shallow]),
        "ratio_of_processor_time": min(processor_seconds[deep]) / min(processor_seconds[shallow]),
    }


def time_interleaved(steps: dict[str, Callable[[], Any]], n_rounds: int) -> dict[str, float]:
    """Measure the median seconds of each step.

    They take turns, one step each, so that other load on the machine affects all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(n_rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure_gradient_times(n_rounds: int) -> dict[str, float]:
    """Measure the seconds of a gradient of DiT-Ti/2 on 32×32×4, 16 rows.

    By plain JAX, by ours on one device, and on eight that share the same cores.
    """
    c = model_config("DiT-Ti/2", image_size=32, channels=4, out_channels=4, n_classes=10)
    key = jax.random.key(0)
    n_rows = 16

    def make_batch() -> Batch:
        image = jax.random.randint(key, (n_rows, 32, 32, 4), 0, 256).astype(jnp.uint8)
        return Batch(jnp.arange(n_rows, dtype=jnp.int32), image, jnp.zeros(n_rows, jnp.int32))

    def plain_loss(params, batch):
        return LOSS(nnx.merge(model_graphdef(c), params), batch, key)

    meshes = {"ours": parallel.make_mesh(devices=jax.devices()[:1])}
    meshes |= {name: parallel.make_mesh(fsdp) for name, (_, fsdp) in MESHES.items()}
    gradient = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))
    params, batch = init_model_params(c, key), make_batch()
    steps: dict[str, Callable[[], Any]] = {"plain": lambda: gradient(params, batch)}
    for name, mesh in meshes.items():
        run = jax.jit(parallel.value_and_grad(LOSS, model_graphdef(c), mesh))
        args = (
            parallel.create_sharded(lambda: init_model_params(c, key), mesh),
            parallel.shard_batch(jax.device_get(batch), mesh),
            key,
        )
        steps[name] = lambda run=run, args=args: run(*args)
    return time_interleaved(steps, n_rounds)


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one device, by XLA and by the plan."""

    mesh: str
    remat: bool
    arguments: float
    temporaries: float
    planned_state: float
    planned_temporaries: float

    @property
    def ratio(self) -> float:
        """Planned bytes over XLA's, in total. Outputs reuse the arguments' buffers."""
        planned = self.planned_state + self.planned_temporaries
        return planned / (self.arguments + self.temporaries)


def measure_memory(rows: int = 4) -> list[MemoryRow]:
    """Compare the memory of the real step of DiT-S/2 on 32×32×3 with the plan's."""
    memory_rows = []
    for name, (data, fsdp) in (("DDP", (8, 1)), ("FSDP", (1, 8))):
        for remat in (True, False):
            settings = TrainConfig(
                model="DiT-S/2", batch_size=rows * data * fsdp, fsdp=fsdp, remat=remat, **LATENTS
            )
            trainer = Trainer(settings)
            cost = profiling.step_cost(lower_step(trainer).compile())
            assert cost.argument_bytes and cost.temporary_bytes
            plan = planner.Plan(trainer.model_config, UNKNOWN_DEVICE, data, fsdp, rows)
            memory_rows.append(
                MemoryRow(
                    mesh=name,
                    remat=remat,
                    arguments=cost.argument_bytes,
                    temporaries=cost.temporary_bytes,
                    planned_state=plan.memory.state,
                    planned_temporaries=plan.memory.temporaries,
                )
            )
    return memory_rows


UNKNOWN_DEVICE = planner.Device("unknown", *[1.0] * 9)


def measure_step_time(n_rounds: int, rows: int = 8) -> tuple[planner.Plan, float]:
    """Measure a step of DiT-S/2 on 32×32×3, on all cores as one device.

    Returns:
        The plan of the step, and its measured seconds. The device's speed in the plan is that of a
        large float32 product and of a large copy, which run in turns with the step.
    """
    one = parallel.make_mesh(devices=jax.devices()[:1])
    with patch.object(parallel, "make_mesh", lambda *_, **__: one):
        trainer = Trainer(TrainConfig(model="DiT-S/2", batch_size=rows, **LATENTS))
    batch = trainer.blank_batch()
    n = 2048
    size = 2**26
    matrix = jnp.ones((n, n))
    arrays = [jnp.ones(size)]
    multiply = jax.jit(jnp.matmul)
    rewrite = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: new pages would be timed too

    def copy():
        for _ in range(10):
            arrays[0] = rewrite(arrays[0])
        return arrays[0]

    seconds = time_interleaved(
        {
            "step": lambda: trainer.train_step(batch),
            "multiply": lambda: [multiply(matrix, matrix) for _ in range(10)],
            "copy": copy,
        },
        n_rounds,
    )
    speed = 10 * 2 * n**3 / seconds["multiply"]
    processor = replace(
        UNKNOWN_DEVICE,
        name="this processor",
        flops_per_second=speed,
        peak_flops_per_second=speed,
        memory_bytes_per_second=10 * 2 * 4 * size / seconds["copy"],
    )
    return planner.Plan(trainer.model_config, processor, 1, 1, rows), seconds["step"]


def main() -> None:
    config = cli.parse_flags(ScalingConfig)
    plan, measured = measure_step_time(config.n_rounds)
    device = plan.device
    print(
        f"this processor: {device.flops_per_second / 1e9:.0f} GFLOP/s in a float32 product, "
        f"{device.memory_bytes_per_second / 1e9:.1f} GB/s in a copy\n"
        f"DiT-S/2, {plan.rows} rows, one device: planned {plan.seconds:.2f} s "
        f"(products {plan.arithmetic_seconds:.2f}, memory {plan.memory_seconds:.2f}), "
        f"measured {measured:.2f} s, planned / measured {plan.seconds / measured:.2f}"
    )
    gradients = measure_gradient_times(config.n_rounds)
    print("\n| gradient, 16 rows | s | ratio |\n|---|---|---|")
    for name, seconds in gradients.items():
        print(f"| {name} | {seconds:.3f} | {seconds / gradients['plain']:.2f} |")
    compiled = measure_compile_times(config.n_compiles)
    print("\n" + "\n".join(f"compile {name}: {value:.2f}" for name, value in compiled.items()))
    memory_rows = measure_memory()
    print("\n| DiT-S/2, 4 rows a device | remat | arguments MB | planned | temporaries MB ", end="")
    print("| planned | planned / XLA, together |\n|---|---|---|---|---|---|---|")
    for row in memory_rows:
        amounts = (row.arguments, row.planned_state, row.temporaries, row.planned_temporaries)
        numbers = " | ".join(f"{amount / 1e6:.1f}" for amount in amounts)
        print(f"| {row.mesh} | {'yes' if row.remat else 'no'} | {numbers} | {row.ratio:.2f} |")
    results = {
        "gflops": device.flops_per_second / 1e9,
        "gb_per_s": device.memory_bytes_per_second / 1e9,
        "step_planned_s": plan.seconds,
        "step_measured_s": measured,
        "gradient_s": gradients,
        "compile": compiled,
        "memory": [vars(row) | {"ratio": row.ratio} for row in memory_rows],
    }
    print(json.dumps(results))


if __name__ == "__main__":
    cli.run_command(main)
