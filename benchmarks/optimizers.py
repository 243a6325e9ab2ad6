"""Compare what a step is worth and what it costs: AdamW, Muon, a route, and both, on the digits.

    python benchmarks/optimizers.py --out runs/optimizers --figure curves.png
    python benchmarks/optimizers.py --model DiT-S/2

The first trains each with the settings of the default run, times one training step of each in turn
in the same process, and plots the validation loss against steps and against seconds; repeated, it
goes on where it was stopped. The second only times the steps, of a preset on random images.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.designs import open_or_train, time_steps
from benchmarks.step import build_trainer, make_random_batch
from benchmarks.timing import format_table, make_json_line
from inference import curves
from runtime import cli
from runtime.errors import UserError
from runtime.flags import check_values, flag
from train import Trainer
from training.config import TrainConfig

MUON = {"optimizer": "muon", "learning_rate": 1e-2}
ROUTE = {"route": (1, -1)}
BASELINE = "AdamW"
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "Muon": MUON,
    "AdamW, route": ROUTE,
    "Muon, route": MUON | ROUTE,
}
COLORS = (curves.BLUE, curves.ORANGE, curves.GREEN, curves.GREY)


@dataclass(frozen=True)
class OptimizersConfig:
    """Train, time and plot every variant."""

    out: Path | None = flag(None, "a folder of runs, one for each variant")
    figure: Path | None = flag(None, "a .png of the validation loss", only_with=("out", None))
    n_steps: int | None = flag(
        None, "of training; by default as for the digits", above=0, only_with=("out", None)
    )
    eval_every: int = flag(75, "steps between evaluations", above=0, only_with=("out", None))
    model: str | None = flag(None, "time the steps of this preset, and train nothing")
    batch_size: int = flag(16, "images of a step", above=0, only_with=("model", None))
    image_size: int = flag(32, "pixels, or latents, to a side", only_with=("model", None))
    channels: int = flag(4, "of the images", only_with=("model", None))
    precision: str = flag(
        "bf16", "of matrix products", choices=("fp32", "bf16"), only_with=("model", None)
    )
    n_rounds: int = flag(30, "measured rounds, after one for warming up", above=0)


def plot(trainers: dict[str, Trainer], seconds: dict[str, float]) -> Any:
    """Plot the validation loss against steps, and against steps times seconds a step."""
    with matplotlib.rc_context(curves.STYLE):
        figure = curves.new_figure(height=curves.HEIGHT / 2)
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for (name, trainer), color in zip(trainers.items(), COLORS, strict=True):
            record = curves.read_metrics(trainer.run_dir / "metrics.jsonl")
            steps, losses = curves.metric_series(record, "eval_loss")
            by_step.plot(steps, losses, color=color, marker="o", ms=3, lw=1.4)
            by_time.plot(
                steps * seconds[name], losses, color=color, marker="o", ms=3, lw=1.4, label=name
            )
        by_step.set(title="Validation loss", xlabel="step")
        by_time.set(xlabel="seconds of training steps")
        by_time.legend()
    return figure


def train_all(config: OptimizersConfig, out: Path) -> dict[str, Trainer]:
    """Return the trainers of finished runs of all variants, training them if need be."""
    return {
        name: open_or_train(
            out / "-".join(name.replace(",", "").split()),
            flags | {"eval_save_steps": config.eval_every},
            config.n_steps,
        )
        for name, flags in VARIANTS.items()
    }


def build_all(config: OptimizersConfig, model: str) -> dict[str, Trainer]:
    """Build untrained trainers of all variants for a preset; they read no images."""
    base = TrainConfig(
        model=model,
        batch_size=config.batch_size,
        image_size=config.image_size,
        channels=config.channels,
    )
    return {
        name: build_trainer(replace(base, **flags), config.precision)
        for name, flags in VARIANTS.items()
    }


def main() -> None:
    config = cli.parse_flags(OptimizersConfig)
    check_values(config, vars(config))
    losses: dict[str, float] = {}
    if config.out and not config.model:
        trainers = train_all(config, config.out)
        losses = {name: trainer.evaluate()["eval_loss"] for name, trainer in trainers.items()}
        batch = trainers[BASELINE].data.train_batch(0)
    elif config.model and not config.out:
        trainers = build_all(config, config.model)
        batch = make_random_batch(trainers[BASELINE])
    else:
        raise UserError("pass --out to train on the digits, or --model to time a preset's steps")
    seconds = time_steps(trainers, batch, config.n_rounds)  # last, because it trains further
    if config.figure:
        curves.save_figure(plot(trainers, seconds), config.figure)
    rows = [
        {
            "variant": name,
            "validation loss": f"{losses[name]:.4f}" if losses else "n/a",
            "ms a step": f"{1e3 * seconds[name]:.1f}",
            "of AdamW's": f"{seconds[name] / seconds[BASELINE]:.2f}",
            "FLOPs of the network": f"{trainer.train_passes / trainers[BASELINE].train_passes:.2f}",
        }
        for name, trainer in trainers.items()
    ]
    print(format_table(rows))
    print(make_json_line("optimizers", losses=losses, seconds=seconds))


if __name__ == "__main__":
    cli.run_command(main)
