"""Time the train step by model, batch, precision, remat and unroll, beside the torch peer.

    python benchmarks/step.py
    python benchmarks/step.py --model DiT-XL/2 --batch_size 64 128 --peer autocast+compile
    python benchmarks/step.py --model DiT-XL/2 --batch_size 32 --remat true false --plan_only

Times `Trainer.update`: gradients, AdamW, the average of the weights and the metrics, on one batch
of random images. All variants of one model and batch take turns, with their peers and with a large
matrix product, whose speed is the reference of "of matmul". On a GPU that a peer shares, set
XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.peer import PEERS, Cost, Peer
from benchmarks.timing import (
    Times,
    format_number,
    format_percent,
    format_ratios,
    format_table,
    make_json_line,
    make_turn,
    require_known,
    run_interleaved,
    skip_if_impossible,
)
from model import ModelConfig
from runtime import cli, parallel
from runtime.flags import flag
from train import Trainer
from training import flops as training_flops
from training import profiling
from training.config import TrainConfig


class Precision(NamedTuple):
    """The flag of training, and the type of the operands of matrix products."""

    half_precision: Any
    dtype: Any


PRECISIONS = {
    "fp32": Precision(False, jnp.float32),
    "bf16": Precision("bf16", jnp.bfloat16),
    "fp8": Precision("fp8", jnp.bfloat16),  # what is not in eight bits
}


@dataclass(frozen=True)
class StepConfig:
    """Time the train step."""

    model: tuple[str, ...] = flag(("DiT-S/2",), "presets such as DiT-S/2")
    batch_size: tuple[int, ...] = flag((16,), "images of a step")
    precision: tuple[str, ...] = flag(("fp32", "bf16"), "of matrix products: fp32, bf16, fp8")
    remat: tuple[bool, ...] | None = flag(
        None,
        "recompute blocks in the backward pass, of ours and of the peer; by default as in training",
    )
    unroll: tuple[int, ...] | None = flag(
        None, "blocks compiled side by side; by default as in training"
    )
    image_size: int = flag(32, "pixels, or latents, to a side")
    channels: int = flag(4, "of the images")
    rounds: int = flag(4, "measured rounds, after one for warming up")
    steps_per_turn: int = flag(
        1, "dispatched one after the other before waiting; on a GPU more than one"
    )
    peer: tuple[str, ...] | None = flag(
        tuple(PEERS), f"torch, as some of {', '.join(PEERS)}; none for no peer"
    )
    plan_only: bool = flag(
        False,
        "compile and take no step, without weights or peers, so that models may be larger than "
        "this machine",
    )


class Contestant(NamedTuple):
    """One that takes turns, its model, and its results besides the times."""

    turn: Callable[[], Cost]
    model: ModelConfig
    facts: dict[str, Any]


def make_matmul_turn(precision: str) -> tuple[Callable[[], Cost], float]:
    """Make a turn of products of large random matrices; returns it and the FLOPs of one product.

    Results are float32.
    """
    side = 2048 if jax.default_backend() == "cpu" else 8192
    keys = jax.random.split(jax.random.key(0))
    dtype = PRECISIONS[precision].dtype
    a, b = (jax.random.normal(key, (side, side), dtype) for key in keys)
    dot = jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32))
    return make_turn(lambda: dot(a, b), n=8), 2.0 * side**3


def build_trainer(config: TrainConfig, precision: str, *, unroll: int | None = None) -> Trainer:
    """Build a trainer that reads no images; flags that are None have training's defaults."""
    half_precision = PRECISIONS[precision].half_precision
    # A profile reads no images, so they may have any shape.
    trainer = Trainer(replace(config, half_precision=half_precision, profile=True))
    if unroll:
        m = trainer.model_config
        trainer.model_config = replace(m, unroll=min(unroll, m.depth))
    jax.block_until_ready(trainer.state)
    return trainer


def make_random_batch(trainer: Trainer) -> Any:
    """Make a batch on the device. It is not blank: a GPU multiplies zeros faster."""
    rng = np.random.default_rng(0)
    blank = trainer.blank_batch()
    image = rng.integers(0, 256, blank.image.shape, np.uint8)
    label = rng.integers(0, trainer.model_config.n_classes, len(image), np.int32)
    return parallel.shard_batch(blank._replace(image=image, label=label), trainer.mesh)


def compile_our_step(trainer: Trainer, precision: str, *, n: int, plan_only: bool) -> Contestant:
    """Compile a trainer's update and, unless it is only planned, run it once."""
    batch = make_random_batch(trainer)
    start = time.perf_counter()
    compiled = trainer.update.lower(trainer.state, batch, trainer.train_key).compile()
    compile_seconds = time.perf_counter() - start

    def step() -> Any:
        trainer.state, report = compiled(trainer.state, batch, trainer.train_key)
        return report

    if not plan_only:
        jax.block_until_ready(step())
    m = trainer.model_config
    facts = describe_model(m) | {
        "by": f"ours {precision}{', remat' if m.remat else ''}, unroll {m.unroll}",
        "precision": precision,
        "n_params": sum(x.size for x in jax.tree.leaves(trainer.state.params)),
        "compile_s": compile_seconds,
        "planned_bytes": profiling.step_cost(compiled).memory_bytes,
        "device_bytes": read_memory_stats().get("peak_bytes_in_use"),
    }
    return Contestant(make_turn(step, n=n), m, facts)


def describe_model(m: ModelConfig) -> dict[str, Any]:
    """Return the results that follow from a model's config."""
    forward = sum(training_flops.flops_by_module(m).values())
    flops = training_flops.TRAIN_PER_FORWARD * forward
    return {"remat": m.remat, "unroll": m.unroll, "train_flops_per_image": flops}


def read_memory_stats() -> dict[str, int]:
    """Read the allocator's statistics; there are none on a CPU."""
    return jax.devices()[0].memory_stats() or {}


def start_torch_step(
    kind: str, m: ModelConfig, stack: contextlib.ExitStack, *, batch_size: int, n: int
) -> Contestant:
    """Start a peer of the model, which ends with `stack`; n steps make a turn."""
    peer = Peer(
        kind,
        "step",
        m,
        platform=jax.default_backend(),
        batch_size=batch_size,
        n=n,
        remat=m.remat,
    )
    stack.enter_context(contextlib.closing(peer))
    facts = describe_model(m) | {
        "by": f"torch {kind}{', remat' if m.remat else ''}",
        "kind": kind,
        "precision": "bf16" if PEERS[kind].autocast else "fp32",
        "n_params": peer.n_params,
        "compile_s": peer.first_seconds if PEERS[kind].compile else None,
        "planned_bytes": None,
        "device_bytes": peer.memory_bytes,
    }
    return Contestant(peer.turn, m, facts)


def list_contestants(
    config: StepConfig, model: str, batch_size: int, stack: contextlib.ExitStack
) -> list[Contestant]:
    """List ours in every variant, and a peer of each kind for each remat.

    Those that do not fit into memory or cannot run here are left out.
    """
    contestants: list[Contestant] = []
    variants = product(config.precision, config.remat or [None], config.unroll or [None])
    for precision, remat, unroll in variants:
        subject = f"{model} × {batch_size}, {precision}, remat {remat}, unroll {unroll}"
        with skip_if_impossible(subject):
            train_config = TrainConfig(
                model=model,
                batch_size=batch_size,
                remat=remat,  # pyright: ignore[reportArgumentType]
                image_size=config.image_size,
                channels=config.channels,
            )
            # The trainer is not bound to a name: one that does not fit must free its memory
            # before the next.
            contestants.append(
                compile_our_step(
                    build_trainer(train_config, precision, unroll=unroll),
                    precision,
                    n=config.steps_per_turn,
                    plan_only=config.plan_only,
                )
            )
    if config.plan_only:
        return contestants
    models = {contestant.model.remat: contestant.model for contestant in contestants}
    for m, kind in product(models.values(), config.peer or ()):
        with skip_if_impossible(f"{model} × {batch_size}, torch, {kind}"):
            contestants.append(
                start_torch_step(kind, m, stack, batch_size=batch_size, n=config.steps_per_turn)
            )
    return contestants


def time_training_step(config: StepConfig, model: str, batch_size: int) -> list[dict[str, Any]]:
    """Time all variants of one model and batch, and their peers."""
    with contextlib.ExitStack() as stack:
        contestants = list_contestants(config, model, batch_size, stack)
        asked = dict.fromkeys(contestant.facts["precision"] for contestant in contestants)
        products = {precision: make_matmul_turn(precision) for precision in asked}
        turns = {precision: turn for precision, (turn, _) in products.items()}
        turns |= {contestant.facts["by"]: contestant.turn for contestant in contestants}
        times = run_interleaved(turns, config.rounds)
    # The best time of a product beside the median of a step: a peak is what can be reached.
    peaks = {name: flops / times[name].min for name, (_, flops) in products.items()}
    return [
        {"model": model, "batch_size": batch_size}
        | contestant.facts
        | summarize_step(contestant.facts, times[contestant.facts["by"]], batch_size, peaks)
        | {"times_as_fast_as": compare_with_peers(contestant, contestants, times)}
        for contestant in contestants
    ]


def plan_training_step(config: StepConfig, model: str, batch_size: int) -> list[dict[str, Any]]:
    """Compile all variants of one model and batch, for the compiler's figures alone."""
    with (
        mock.patch.object(parallel, "create_sharded", parallel.abstract_state),
        contextlib.ExitStack() as stack,
    ):
        contestants = list_contestants(config, model, batch_size, stack)
    untimed = dict.fromkeys(
        [
            "median_s",
            "min_s",
            "cpu_s",
            "images_per_second",
            "flops_per_second",
            "of_matmul",
            "of_data_sheet",
        ]
    )
    return [
        {"model": model, "batch_size": batch_size, "times_as_fast_as": {}}
        | contestant.facts
        | untimed
        for contestant in contestants
    ]


def compare_with_peers(
    contestant: Contestant, contestants: list[Contestant], times: dict[str, Times]
) -> dict[str, float]:
    """Compare with each peer of the same remat: above 1, this one is faster."""
    own = times[contestant.facts["by"]]
    return {
        peer.facts["kind"]: own.times_as_fast_as(times[peer.facts["by"]])
        for peer in contestants
        if "kind" in peer.facts and peer.facts["remat"] == contestant.facts["remat"]
    }


def summarize_step(
    facts: dict[str, Any], times: Times, batch_size: int, peaks: dict[str, float]
) -> dict[str, Any]:
    """Derive results from times and the FLOPs of an image; recomputation is not counted."""
    rate = facts["train_flops_per_image"] * batch_size / jax.device_count() / times.median
    dtype = PRECISIONS[facts["precision"]].dtype.__name__
    data_sheet_peak = training_flops.device_peak(jax.devices()[0].device_kind, dtype)
    return {
        "median_s": times.median,
        "min_s": times.min,
        "seconds": times.seconds,
        "cpu_s": times.cpu_median,
        "images_per_second": batch_size / times.median,
        "flops_per_second": rate,
        "matmul_flops_per_second": peaks[facts["precision"]],
        "of_matmul": rate / peaks[facts["precision"]],
        "of_data_sheet": training_flops.mfu(rate, data_sheet_peak),
    }


def format_step_row(row: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, str]:
    """Format one row of the table, by column."""
    si = profiling.format_si
    return {
        "model × batch": f"{row['model']} × {row['batch_size']}",
        "by": row["by"],
        "s / step": format_number(row["median_s"]),
        "min": format_number(row["min_s"]),
        "CPU s": format_number(row["cpu_s"]),
        "images/s": format_number(row["images_per_second"]),
        "FLOP/s": si(row["flops_per_second"], ""),
        "of matmul": format_percent(row["of_matmul"]),
        "of data sheet": format_percent(row["of_data_sheet"]),
        "plan": si(row["planned_bytes"], "B"),
        "peak": si(row["device_bytes"], "B"),
        "compile": si(row["compile_s"], "s"),
    } | format_ratios(row["times_as_fast_as"], kinds)


def main() -> None:
    config = cli.parse_flags(StepConfig)
    require_known("precision", config.precision, PRECISIONS)
    require_known("peer", config.peer, PEERS)
    # With the cache, a compile time might be the time to read a file.
    jax.config.update("jax_enable_compilation_cache", False)
    run_one = plan_training_step if config.plan_only else time_training_step
    rows = []
    for model, batch_size in product(config.model, config.batch_size):
        rows += run_one(config, model, batch_size)
        print(f"{model} × {batch_size}: done", file=sys.stderr)
    print(format_table([format_step_row(row, config.peer or ()) for row in rows]))
    print("of matmul: of a large matrix product in the same rounds. plan: memory as XLA plans it.")
    print("peak: peak memory so far; of torch on a CPU, that of the whole process.")
    print("CPU s: of all cores together. ×: how many times as fast as this kind of torch.")
    print(make_json_line("step", rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
