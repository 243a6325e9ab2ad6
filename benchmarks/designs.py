"""Train every way to condition a transformer on the digits; compare cost and quality.

    python benchmarks/designs.py --out runs/designs

Trains each with the settings of the default run, judges 1,000 of its samples as `digits.py` does,
and times one training step of each in turn, in the same process.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.digits import judge_run
from model import BLOCKS
from runtime import cli
from runtime.flags import flag, required
from train import Trainer
from training.config import TrainConfig

DESIGNS: dict[str, dict[str, Any]] = {
    block: {"model": "DiT-Ti/2", "block": block} for block in BLOCKS
}
DESIGNS["MMDiT"] = {"model": "MMDiT-Ti/2"}
BASELINE = "adaln_zero"


@dataclass(frozen=True)
class DesignsConfig:
    """Train, judge and time every design."""

    out: Path = required(
        "a folder of runs, one for each design; those that are finished are only judged"
    )
    n: int = flag(1000, "the number of samples to judge")
    n_steps: int | None = flag(None, "of training; by default as for the digits")
    n_rounds: int = flag(30, "measured rounds, after one for warming up")


def open_or_train(run_dir: Path, settings: dict, n_steps: int | None) -> Trainer:
    """Return the trainer of a finished run, training or resuming it first if it is not."""
    if run_dir.exists():
        trainer = Trainer.from_run(run_dir)
    else:
        trainer = Trainer(TrainConfig(run_dir=run_dir, n_steps=n_steps, **settings))  # pyright: ignore[reportArgumentType]
    if trainer.step < trainer.config.n_steps:
        start = time.perf_counter()
        trainer.fit()
        print(f"{run_dir} took {time.perf_counter() - start:.0f} s")
    return trainer


def measure_step_times(trainers: dict[str, Trainer], batch: Any, n_rounds: int) -> dict[str, float]:
    """Measure the median time of a step with a batch in seconds.

    The trainers take turns, one step each, so that other load on the machine affects all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(n_rounds + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            jax.block_until_ready(trainer.train_step(batch))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    config = cli.parse_flags(DesignsConfig)
    trainers = {
        name: open_or_train(config.out / name, settings, config.n_steps)
        for name, settings in DESIGNS.items()
    }
    judged = {name: judge_run(trainer, n=config.n) for name, trainer in trainers.items()}
    batch = trainers[BASELINE].data.train_batch(0)
    times = measure_step_times(trainers, batch, config.n_rounds)  # last, because it trains further
    print("\n| block | parameters | step time | requested digit | Fréchet |\n|---|---|---|---|---|")
    results = {}
    for name, trainer in trainers.items():
        n_params = sum(x.size for x in jax.tree.leaves(trainer.state.params))
        row = {"n_params": n_params, "step": times[name] / times[BASELINE], **vars(judged[name])}
        print(
            f"| {name} | {n_params / 1e6:.2f} M | {row['step']:.2f} "
            f"| {row['accuracy']:.1%} | {row['frechet']:.1f} |"
        )
        results[name] = row
    print(json.dumps(results))


if __name__ == "__main__":
    cli.run_command(main)
