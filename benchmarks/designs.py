"""Train every way to condition a transformer on the digits; compare cost and quality.

    python benchmarks/designs.py --out runs/designs

Trains each with the settings of the default run, judges 1,000 of its samples as `digits.py` does,
and times one training step of each in turn, in the same process.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.digits import judge_run
from benchmarks.timing import make_turn, run_interleaved
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


def time_steps(trainers: dict[str, Trainer], batch: Any, n_rounds: int) -> dict[str, float]:
    """Measure the median seconds of a step with a batch. The trainers take turns."""
    turns = {
        name: make_turn(partial(trainer.train_step, batch)) for name, trainer in trainers.items()
    }
    return {name: times.median for name, times in run_interleaved(turns, n_rounds).items()}


def main() -> None:
    config = cli.parse_flags(DesignsConfig)
    trainers = {
        name: open_or_train(config.out / name, settings, config.n_steps)
        for name, settings in DESIGNS.items()
    }
    judged = {name: judge_run(trainer, n=config.n) for name, trainer in trainers.items()}
    batch = trainers[BASELINE].data.train_batch(0)
    times = time_steps(trainers, batch, config.n_rounds)  # last, because it trains further
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
