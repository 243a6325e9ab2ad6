"""How fast are pictures drawn? Guided Euler sampling, beside the same loop in torch.

    python benchmarks/sample.py                # 50 steps: minutes a round on a CPU
    python benchmarks/sample.py --n_steps 5    # the same loop, a tenth as long

What is timed is `Trainer.sample`, from labels to pictures on the host: one compiled program. Each
is compared with torch in the same precision. On a GPU that a peer shares, set
XLA_PYTHON_CLIENT_PREALLOCATE=false.
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
    format_table,
    make_json_line,
    make_turn,
    require_known,
    run_interleaved,
    skip_if_impossible,
)
from runtime import cli
from train import Trainer
from training import flops as training_flops
from training import profiling
from training.config import TrainConfig

CFG_SCALE = 2.0


@dataclass(frozen=True)
class SampleConfig:
    """Time guided sampling.

    Args:
        model: presets such as DiT-S/2.
        n: pictures, drawn as one batch.
        n_steps: of Euler's method.
        precision: of matrix products: fp32, bf16.
        image_size: pixels, or latents, to a side.
        channels: of the pictures.
        rounds: that count, after one that does not.
        peer: torch, as fp32, autocast, fp32+compile or autocast+compile; none for no peer.
    """

    model: tuple[str, ...] = ("DiT-S/2",)
    n: int = 16
    n_steps: int = 50
    precision: tuple[str, ...] = ("fp32", "bf16")
    image_size: int = 32
    channels: int = 4
    rounds: int = 4
    peer: tuple[str, ...] | None = ("fp32", "autocast")


def compile_our_sampling(trainer: Trainer, config: SampleConfig, precision: str) -> Contestant:
    """Sampling of a trainer, compiled and done once."""
    labels = [i % trainer.model_config.n_classes for i in range(config.n)]

    def sample() -> Any:
        return trainer.sample(labels, cfg_scale=CFG_SCALE, n_steps=config.n_steps)

    start = time.perf_counter()
    sample()
    facts = {"by": f"ours {precision}", "precision": precision}
    return Contestant(
        make_turn(sample), trainer.model_config, facts | {"first_s": time.perf_counter() - start}
    )


def start_torch_sampling(
    kind: str, m: Any, config: SampleConfig, stack: contextlib.ExitStack
) -> Contestant:
    """A peer of the model, which ends with `stack`."""
    how = {"platform": jax.default_backend(), "batch_size": config.n}
    peer = Peer(kind, "sample", m, n_steps=config.n_steps, cfg_scale=CFG_SCALE, **how)
    stack.enter_context(contextlib.closing(peer))
    precision = "bf16" if PEERS[kind].autocast else "fp32"
    facts = {"by": f"torch {kind}", "kind": kind, "precision": precision}
    return Contestant(peer.turn, m, facts | {"first_s": peer.first_seconds})


def time_sampling(config: SampleConfig, model: str) -> list[dict[str, Any]]:
    """What is found of one model, in every precision."""
    found: list[Contestant] = []
    with contextlib.ExitStack() as stack:
        for precision in config.precision:
            with skip_if_impossible(f"{model}, {precision}"):
                shape: dict[str, Any] = {"image_size": config.image_size}
                shape |= {"channels": config.channels, "batch_size": config.n}
                trainer = build_trainer(TrainConfig(model=model, **shape), precision)
                found.append(compile_our_sampling(trainer, config, precision))
        for kind in (config.peer or ()) if found else ():
            with skip_if_impossible(f"{model}, torch {kind}"):
                found.append(start_torch_sampling(kind, found[0].model, config, stack))
        times = run_interleaved({entry.facts["by"]: entry.turn for entry in found}, config.rounds)
    return [
        {"model": model, "n": config.n, "n_steps": config.n_steps}
        | entry.facts
        | summarize_sampling(entry, found, times, config)
        for entry in found
    ]


def summarize_sampling(
    entry: Contestant, found: list[Contestant], times: dict[str, Times], config: SampleConfig
) -> dict[str, Any]:
    """What follows from the times; peers count in the same precision only."""
    own, forward = (
        times[entry.facts["by"]],
        sum(training_flops.flops_by_module(entry.model).values()),
    )
    flops = 2 * forward * config.n * config.n_steps  # guidance asks the model twice
    return {
        "median_s": own.median,
        "min_s": own.min,
        "seconds": own.seconds,
        "flops_per_second": flops / own.median / jax.device_count(),
        "times_as_fast_as": {
            peer.facts["kind"]: own.times_as_fast_as(times[peer.facts["by"]])
            for peer in found
            if "kind" in peer.facts and peer.facts["precision"] == entry.facts["precision"]
        },
    }


def format_sampling_row(row: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, str]:
    """A line of the table, by column."""
    return {
        "pictures × steps": f"{row['model']}, {row['n']} × {row['n_steps']}",
        "by": row["by"],
        "s": format_number(row["median_s"]),
        "min": format_number(row["min_s"]),
        "s / solver step": format_number(row["median_s"] / row["n_steps"]),
        "FLOP/s": profiling.si(row["flops_per_second"], ""),
        "first": profiling.si(row["first_s"], "s"),
    } | {f"× {kind}": format_number(row["times_as_fast_as"].get(kind)) for kind in kinds}


def main() -> None:
    config = cli.parse_flags(SampleConfig)
    require_known("precision", config.precision, PRECISIONS)
    require_known("peer", config.peer, PEERS)
    rows = [row for model in config.model for row in time_sampling(config, model)]
    print(format_table([format_sampling_row(row, config.peer or ()) for row in rows]))
    print("first: with compilation. × torch: times as fast, in the same precision.")
    print(make_json_line("sample", rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
