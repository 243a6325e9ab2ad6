"""Compare the best learning rates of networks of several widths, with and without `--mup`.

    python benchmarks/widths.py --out widths.png

Trains a DiT of depth 6 with heads of 32 channels on the digits for a few steps, at every width and
rate, as it is and with `--mup` at the smallest width, where the two are the same. Prints the
evaluation loss at the end, a row for each width, and plots it over the rate.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import format_table, make_json_line
from data.batch import Batch
from inference import curves
from model import MODELS, model_graphdef
from runtime import cli, parallel
from runtime.errors import UserError
from runtime.flags import check_values, flag, required
from train import Trainer
from training import step as training_step
from training.config import TrainConfig
from training.step import TrainState

DEPTH, HEAD, PATCH = 6, 32, 2
Losses = dict[float, float]  # by the learning rate


@dataclass(frozen=True)
class WidthsConfig:
    """Compare the best learning rates of networks of several widths."""

    out: Path = required("the figure's file")
    widths: tuple[int, ...] = flag((64, 128, 256), "of the networks, the base width first")
    rates: tuple[float, ...] = flag(
        (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), "learning rates, ascending"
    )
    n_steps: int = flag(150, "of training", above=0)
    batch_size: int = flag(64, "of training", above=0)
    optimizer: str = flag("adamw", "adamw or muon")
    seed: int = flag(0, "of every run", at_least=0)


def open_run(config: WidthsConfig, width: int, *, mup: int) -> Trainer:
    """Open a run without a folder, whose schedule has a peak of 1."""
    name = f"DiT-Width{width}/{PATCH}"
    MODELS[name] = {
        "width": width,
        "depth": DEPTH,
        "n_heads": width // HEAD,
        "patch_size": PATCH,
    }
    return Trainer(
        TrainConfig(
            model=name,
            learning_rate=1.0,
            n_steps=config.n_steps,
            batch_size=config.batch_size,
            optimizer=config.optimizer,  # pyright: ignore[reportArgumentType]
            mup=mup,
            seed=config.seed,
        )
    )


def make_step(trainer: Trainer) -> Callable[..., Any]:
    """Make the compiled step, which takes the rate too: compiling takes longer than training."""
    c = trainer.config
    value_and_grad = parallel.value_and_grad(
        trainer.training_loss(), model_graphdef(trainer.model_config), trainer.mesh
    )

    def step(state: TrainState, batch: Batch, key: Any, rate: Any) -> TrainState:
        optimizer = trainer.make_optimizer(lambda n_updates: rate * trainer.schedule(n_updates))
        return training_step.update(
            state,
            batch,
            key,
            read_batch=trainer.read_batch(),
            value_and_grad=value_and_grad,
            optimizer=optimizer,
            ema_decay=c.ema_decay,
            log_every=c.log_every,
        )[0]

    return jax.jit(step, donate_argnums=0)


def losses_by_rate(config: WidthsConfig, width: int, *, mup: int) -> Losses:
    """Train once for each rate, and return the evaluation losses of the averaged weights."""
    trainer = open_run(config, width, mup=mup)
    start, step, losses = trainer.state, make_step(trainer), {}
    for rate in config.rates:
        began = time.perf_counter()
        state = jax.tree.map(jnp.copy, start)
        with closing(trainer.batches(0, config.n_steps)) as batches:
            for batch in parallel.prefetch_to_device(batches, trainer.mesh):
                state = step(state, batch, trainer.train_key, rate)
        trainer.state = state
        losses[rate] = trainer.evaluate()["eval_loss"]
        row = {"mup": mup, "width": width, "rate": rate, "eval_loss": round(losses[rate], 4)}
        print(json.dumps(row | {"s": round(time.perf_counter() - began, 1)}), flush=True)
    return losses


def best_rate(losses: Losses) -> float:
    """The rate with the lowest loss."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def table(panels: Mapping[str, Mapping[int, Losses]]) -> str:
    """Format a row for each width of each panel."""
    rows = [
        {"": title, "width": str(width)}
        | {f"{rate:.3g}": f"{loss:.4f}" for rate, loss in losses.items()}
        | {"best rate": f"{best_rate(losses):.2g}"}
        for title, widths in panels.items()
        for width, losses in widths.items()
    ]
    return format_table(rows)


def plot(panels: Mapping[str, Mapping[int, Losses]], path: Path) -> None:
    """Plot the losses over the learning rate, a panel for each title, a line for each width."""
    from matplotlib import rc_context

    low = min(x[best_rate(x)] for widths in panels.values() for x in widths.values())
    colours: Sequence[str] = (curves.BLUE, curves.ORANGE, curves.GREEN, curves.GREY)
    with rc_context(curves.STYLE):
        figure = curves.new_figure(height=3.2)
        axes = figure.subplots(1, len(panels), sharey=True)
        for ax, (title, widths) in zip(axes, panels.items(), strict=True):
            for i, (width, losses) in enumerate(widths.items()):
                colour = colours[i % len(colours)]
                ax.plot([*losses], [*losses.values()], "o-", color=colour, label=f"width {width}")
                ax.axvline(best_rate(losses), color=colour, linestyle=":")
            # Higher ones have diverged.
            ax.set(title=title, xlabel="learning rate", xscale="log", ylim=(0.95 * low, 2 * low))
            ax.legend()
        axes[0].set_ylabel("evaluation loss")
        curves.save_figure(figure, path)


def main() -> None:
    config = cli.parse_flags(WidthsConfig)
    check_values(config, vars(config))
    if uneven := [width for width in config.widths if width % HEAD]:
        raise UserError(f"--widths {uneven[0]}: must be a multiple of {HEAD}")
    base = config.widths[0]
    plain = {width: losses_by_rate(config, width, mup=0) for width in config.widths}
    scaled = {
        width: losses_by_rate(config, width, mup=base) if width != base else plain[base]
        for width in config.widths
    }
    panels = {"as it is": plain, f"--mup {base}": scaled}
    print(table(panels))
    plot(panels, config.out)
    print(make_json_line("widths", losses=panels))


if __name__ == "__main__":
    cli.run_command(main)
