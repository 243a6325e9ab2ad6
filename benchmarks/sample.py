"""Time guided Euler sampling, beside the same loop in torch.

    python benchmarks/sample.py                # 50 steps: minutes a round on a CPU
    python benchmarks/sample.py --n_steps 5    # the same loop, a tenth as long

Times `Trainer.sample`, from labels to images on the host, which is one compiled program. On a GPU
that a peer shares, set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.peer import PEERS, Peer
from benchmarks.step import PRECISIONS, Contestant, build_trainer
from benchmarks.timing import (
    Times,
    format_number,
    format_ratios,
    format_table,
    make_json_line,
    make_turn,
    require_known,
    run_interleaved,
    skip_if_impossible,
)
from model import ModelConfig
from runtime import cli
from runtime.flags import flag
from train import Trainer
from training import flops as training_flops
from training import profiling
from training.config import TrainConfig

CFG_SCALE = 2.0


@dataclass(frozen=True)
class SampleConfig:
    """Time guided sampling."""

    model: tuple[str, ...] = flag(("DiT-S/2",), "presets such as DiT-S/2")
    n: int = flag(16, "images, sampled as one batch")
    n_steps: int = flag(50, "of Euler's method")
    precision: tuple[str, ...] = flag(("fp32", "bf16"), "of matrix products: fp32, bf16")
    image_size: int = flag(32, "pixels, or latents, to a side")
    channels: int = flag(4, "of the images")
    rounds: int = flag(4, "measured rounds, after one for warming up")
    peer: tuple[str, ...] | None = flag(
        tuple(PEERS), f"torch, as some of {', '.join(PEERS)}; none for no peer"
    )


def compile_our_sampling(trainer: Trainer, config: SampleConfig, precision: str) -> Contestant:
    """Compile a trainer's sampling and run it once."""
    labels = [i % trainer.model_config.n_classes for i in range(config.n)]

    def sample() -> Any:
        return trainer.sample(labels, cfg_scale=CFG_SCALE, n_steps=config.n_steps)

    start = time.perf_counter()
    sample()
    facts = {
        "by": f"ours {precision}",
        "precision": precision,
        "first_s": time.perf_counter() - start,
    }
    return Contestant(make_turn(sample), trainer.model_config, facts)


def start_torch_sampling(
    kind: str, m: ModelConfig, config: SampleConfig, stack: contextlib.ExitStack
) -> Contestant:
    """Start a peer of the model, which ends with `stack`."""
    peer = Peer(
        kind,
        "sample",
        m,
        platform=jax.default_backend(),
        batch_size=config.n,
        n_steps=config.n_steps,
        cfg_scale=CFG_SCALE,
    )
    stack.enter_context(contextlib.closing(peer))
    facts = {
        "by": f"torch {kind}",
        "kind": kind,
        "precision": "bf16" if PEERS[kind].autocast else "fp32",
        "first_s": peer.first_seconds,
    }
    return Contestant(peer.turn, m, facts)


def time_sampling(config: SampleConfig, model: str) -> list[dict[str, Any]]:
    """Time the sampling of one model in every precision, and its peers."""
    contestants: list[Contestant] = []
    with contextlib.ExitStack() as stack:
        for precision in config.precision:
            with skip_if_impossible(f"{model}, {precision}"):
                train_config = TrainConfig(
                    model=model,
                    image_size=config.image_size,
                    channels=config.channels,
                    batch_size=config.n,
                )
                trainer = build_trainer(train_config, precision)
                contestants.append(compile_our_sampling(trainer, config, precision))
        for kind in (config.peer or ()) if contestants else ():
            with skip_if_impossible(f"{model}, torch {kind}"):
                contestants.append(start_torch_sampling(kind, contestants[0].model, config, stack))
        turns = {contestant.facts["by"]: contestant.turn for contestant in contestants}
        times = run_interleaved(turns, config.rounds)
    return [
        {"model": model, "n": config.n, "n_steps": config.n_steps}
        | contestant.facts
        | summarize_sampling(contestant, contestants, times, config)
        for contestant in contestants
    ]


def summarize_sampling(
    contestant: Contestant,
    contestants: list[Contestant],
    times: dict[str, Times],
    config: SampleConfig,
) -> dict[str, Any]:
    """Derive results from the times."""
    own = times[contestant.facts["by"]]
    forward = sum(training_flops.flops_by_module(contestant.model).values())
    flops = 2 * forward * config.n * config.n_steps  # guidance calls the model twice
    return {
        "median_s": own.median,
        "min_s": own.min,
        "seconds": own.seconds,
        "cpu_s": own.cpu_median,
        "flops_per_second": flops / own.median / jax.device_count(),
        "times_as_fast_as": {
            peer.facts["kind"]: own.times_as_fast_as(times[peer.facts["by"]])
            for peer in contestants
            if "kind" in peer.facts
        },
    }


def format_sampling_row(row: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, str]:
    """Format one row of the table, by column."""
    return {
        "images × steps": f"{row['model']}, {row['n']} × {row['n_steps']}",
        "by": row["by"],
        "s": format_number(row["median_s"]),
        "min": format_number(row["min_s"]),
        "CPU s": format_number(row["cpu_s"]),
        "s / solver step": format_number(row["median_s"] / row["n_steps"]),
        "FLOP/s": profiling.format_si(row["flops_per_second"], ""),
        "first": profiling.format_si(row["first_s"], "s"),
    } | format_ratios(row["times_as_fast_as"], kinds)


def main() -> None:
    config = cli.parse_flags(SampleConfig)
    require_known("precision", config.precision, PRECISIONS)
    require_known("peer", config.peer, PEERS)
    rows = [row for model in config.model for row in time_sampling(config, model)]
    print(format_table([format_sampling_row(row, config.peer or ()) for row in rows]))
    print("CPU s: of all cores together. first: with compilation.")
    print("×: how many times as fast as this kind of torch.")
    print(make_json_line("sample", rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
