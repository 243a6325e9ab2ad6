"""Compare what a step is worth and what it costs: AdamW, Muon, a route, and both, on the digits.

    python benchmarks/optimizers.py --out runs/optimizers --figure curves.png

Trains each with the settings of the default run, times one training step of each in turn in the
same process, and plots the validation loss against steps and against seconds. A repeated command
goes on where it was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.designs import measure_step_times, open_or_train
from benchmarks.timing import format_table, make_json_line
from inference import curves
from runtime import cli
from runtime.flags import flag, required
from train import Trainer

MUON = {"optimizer": "muon", "learning_rate": 1e-2}
ROUTE = {"route": (1, -1)}
VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Muon": MUON,
    "AdamW, route": ROUTE,
    "Muon, route": MUON | ROUTE,
}
COLORS = {
    "AdamW": curves.BLUE,
    "Muon": curves.ORANGE,
    "AdamW, route": curves.GREEN,
    "Muon, route": curves.GREY,
}


@dataclass(frozen=True)
class OptimizersConfig:
    """Train, time and plot every variant."""

    out: Path = required("a folder of runs, one for each variant")
    figure: Path | None = flag(None, "a .png of the validation loss")
    n_steps: int | None = flag(None, "of training; by default as for the digits")
    eval_every: int = flag(75, "steps between evaluations", above=0)
    n_rounds: int = flag(30, "measured rounds, after one for warming up")


def plot(trainers: dict[str, Trainer], seconds: dict[str, float]) -> Any:
    """Plot the validation loss against steps, and against steps times seconds a step."""
    with matplotlib.rc_context(curves.STYLE):
        figure = curves.new_figure(height=curves.HEIGHT / 2)
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for name, trainer in trainers.items():
            record = curves.read_metrics(trainer.run_dir / "metrics.jsonl")
            steps, losses = curves.metric_series(record, "eval_loss")
            style = {"color": COLORS[name], "marker": "o", "ms": 3, "lw": 1.4, "label": name}
            by_step.plot(steps, losses, **style)
            by_time.plot(steps * seconds[name], losses, **style)
        by_step.set(title="Validation loss", xlabel="step", yscale="log")
        by_time.set(xlabel="seconds of training steps")
        by_time.legend()
    return figure


def main() -> None:
    config = cli.parse_flags(OptimizersConfig)
    trainers = {
        name: open_or_train(
            config.out / "-".join(name.replace(",", "").split()),
            flags | {"eval_save_steps": config.eval_every},
            config.n_steps,
        )
        for name, flags in VARIANTS.items()
    }
    final = {name: trainer.evaluate()["eval_loss"] for name, trainer in trainers.items()}
    seconds = measure_step_times(trainers, config.n_rounds)  # last, because it trains further
    if config.figure:
        curves.save_figure(plot(trainers, seconds), config.figure)
    rows = [
        {
            "variant": name,
            "validation loss": f"{final[name]:.4f}",
            "ms a step": f"{1e3 * seconds[name]:.1f}",
            "of AdamW's": f"{seconds[name] / seconds['AdamW']:.2f}",
            "FLOPs a step": f"{trainer.train_passes / trainers['AdamW'].train_passes:.2f}",
        }
        for name, trainer in trainers.items()
    ]
    print(format_table(rows))
    print(make_json_line("optimizers", final=final, seconds=seconds))


if __name__ == "__main__":
    cli.run_command(main)
