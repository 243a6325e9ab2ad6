"""Search for a learning rate: `python train.py --lr_range_test` (Smith 2017, §3.3).

Trains fresh weights on the run's own batches, with its loss function and optimizer, while the
learning rate rises exponentially, and reports where the loss falls most steeply. It sets nothing.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float64

from inference import curves
from runtime import files, parallel, processes, run_folder
from runtime.errors import UserError
from training import step as training_step
from training.loop import Loop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "lr_range_test"  # in the run's folder
N_STEPS = 300
MIN_STEPS = 20
MIN_RATE, MAX_RATE = 1e-6, 1e-1
SMOOTHING = 0.9
DIVERGED = 4.0  # times the lowest smoothed loss
WINDOW = 0.1  # share of the test's steps over which the slope of the loss is measured
RULE = "where the loss falls most steeply over the logarithm of the rate"


def range_test(loop: Loop, n_steps: int) -> str:
    """Run the test, save it in `lr_range_test/` of the run's folder, and return a summary.

    Leaves the loop's weights changed, and no run that could be resumed.

    Raises:
        UserError: `n_steps` is too small.
    """
    if n_steps < MIN_STEPS:
        raise UserError(f"--lr_range_test {n_steps}: it needs at least {MIN_STEPS} steps")
    loop.config = replace(loop.config, log_every=1)  # so that the loss is that of one step
    loop.set_schedule(exponential_rates(n_steps))
    with closing(loop.batches(0, n_steps)) as batches:
        placed = parallel.prefetch_to_device(batches, loop.mesh)

        def step(_: int) -> float | None:
            report = jax.device_get(loop.train_step(next(placed)))
            loss = training_step.metrics_line(report)["loss"]
            # A step that is skipped because its loss scale is too large is no divergence.
            return None if math.isnan(loss) and not report.bad_steps else loss

        result = train_with_rising_rate(n_steps, step)
    folder = loop.run_dir / FOLDER
    if processes.is_first():
        run_folder.create_run_folder(folder)
        write_points(result, folder / "points.json")
        curves.save_figure(plot(result), folder / "loss.png")
    return summarize(result, folder)


# --- the result -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeTest:
    """The result of a test: a learning rate and a loss per step, up to where it diverged.

    Args:
        n_steps: the length of the test without divergence.
    """

    n_steps: int
    rates: Float64[np.ndarray, "n"]
    losses: Float64[np.ndarray, "n"]

    @property
    def smoothed(self) -> Float64[np.ndarray, "n"]:
        return smoothed_losses(self.losses)

    @property
    def diverged(self) -> bool:
        return has_diverged(self.losses)

    @property
    def _lowest(self) -> int:
        """The index of the lowest smoothed loss, or −1."""
        return int(np.nanargmin(self.smoothed)) if np.isfinite(self.losses).any() else -1

    @property
    def rate_of_lowest_loss(self) -> float | None:
        """The learning rate with the lowest smoothed loss."""
        return float(self.rates[self._lowest]) if self._lowest >= 0 else None

    @property
    def suggested(self) -> float | None:
        """The learning rate in the middle of the window (a tenth of the test) in which the
        least-squares line of the loss over the logarithm of the rate falls most steeply, up to the
        lowest smoothed loss. None if it falls nowhere.
        """
        # Beyond its lowest point the loss may fall again, from the height of a spike.
        stop = self._lowest + 1
        x, y = np.log10(self.rates[:stop]), self.losses[:stop]
        size = max(3, round(WINDOW * self.n_steps))
        slopes = [slope(x[i : i + size], y[i : i + size]) for i in range(stop - size + 1)]
        if not slopes or min(slopes) >= 0:
            return None
        return float(10 ** x[int(np.argmin(slopes)) :][:size].mean())


def slope(x: Float64[np.ndarray, "n"], y: Float64[np.ndarray, "n"]) -> float:
    """The slope of the least-squares line of y over x."""
    centred = x - x.mean()
    return float(centred @ (y - y.mean()) / (centred @ centred))


def smoothed_losses(losses: Sequence[float] | Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """The exponential moving average up to each step, corrected for its zero start by 1 − βⁿ, as in
    Adam (Kingma & Ba 2015, §3).
    """
    average, averages = 0.0, []
    for i, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average / (1 - SMOOTHING**i))
    return np.array(averages, np.float64)


def has_diverged(losses: Sequence[float] | Float64[np.ndarray, "n"]) -> bool:
    """True if the last loss is not finite, or the smoothed loss is several times its lowest."""
    if len(losses) and not math.isfinite(losses[-1]):
        return True
    smoothed = smoothed_losses(losses)
    return bool(len(smoothed)) and bool(smoothed[-1] > DIVERGED * smoothed.min())


# --- the test -------------------------------------------------------------------------------------


def exponential_rates(n_steps: int) -> Callable[[Any], Any]:
    """A schedule from `MIN_RATE` at the first step to `MAX_RATE` at the last."""

    def rate(step: Any) -> Any:
        return MIN_RATE * (MAX_RATE / MIN_RATE) ** (step / (n_steps - 1))

    return rate


def train_with_rising_rate(n_steps: int, step: Callable[[int], float | None]) -> RangeTest:
    """Take steps until the loss diverges.

    Args:
        step: takes the i-th step at its learning rate. Returns the loss before it, or None if the
            step was skipped.
    """
    rate, rates, losses = exponential_rates(n_steps), [], []
    for i in range(n_steps):
        if (loss := step(i)) is None:
            continue
        rates.append(rate(i))
        losses.append(loss)
        if has_diverged(losses):
            break
    return RangeTest(n_steps, np.array(rates, np.float64), np.array(losses, np.float64))


# --- its record -----------------------------------------------------------------------------------


def write_points(result: RangeTest, path: Path) -> None:
    """Write all points and the suggested rate as JSON. Non-finite numbers become null."""
    facts = {
        "suggested": result.suggested,
        "rule": RULE,
        "least": result.rate_of_lowest_loss,
        "diverged": result.diverged,
        "rates": _as_json(result.rates),
        "losses": _as_json(result.losses),
        "smoothed": _as_json(result.smoothed),
    }
    with files.atomic_file(path) as file:
        file.write(json.dumps(facts, allow_nan=False).encode() + b"\n")


def _as_json(column: Float64[np.ndarray, "n"]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in column.tolist()]


def summarize(result: RangeTest, folder: Path) -> str:
    """Describe the result in one line."""
    end = f"diverged at {result.rates[-1]:.1e}" if result.diverged else "did not diverge"
    figure = folder / "loss.png"
    if result.suggested is None:
        return f"the loss fell at no rate of {MIN_RATE:g} … {MAX_RATE:g} and {end}; see {figure}"
    return (
        f"--learning_rate {result.suggested:.1e} is {RULE}; "
        f"it is lowest at {result.rate_of_lowest_loss:.1e} and {end}; see {figure}"
    )


def plot(result: RangeTest) -> "Figure":
    """Plot losses over learning rates, with the suggested rate marked."""
    import matplotlib

    with matplotlib.rc_context(curves.STYLE):
        figure = curves.new_figure(height=3.6)
        ax = figure.subplots()
        ax.plot(
            result.rates, result.losses, color=curves.GREY, lw=0.6, alpha=0.6, label="each step"
        )
        ax.plot(result.rates, result.smoothed, color=curves.BLUE, lw=1.8, label="smoothed")
        ax.set_xscale("log")
        finite = result.smoothed[np.isfinite(result.smoothed)]
        if len(finite):  # the spike at the end would flatten the rest
            low = result.losses[np.isfinite(result.losses)].min()
            high = finite[: len(finite) // 2]
            ax.set_ylim(low * 0.9 if low > 0 else None, max(high, default=finite[0]) * 1.3)
        if result.suggested:
            label = f"{result.suggested:.1e}: steepest descent"
            ax.axvline(result.suggested, color=curves.ORANGE, lw=1.4, ls="--", label=label)
        if result.rate_of_lowest_loss:
            label = f"{result.rate_of_lowest_loss:.1e}: lowest"
            ax.axvline(result.rate_of_lowest_loss, color=curves.GREY, lw=1.0, ls=":", label=label)
        ax.set_title("Loss as the learning rate rises")
        ax.set_xlabel("learning rate")
        ax.legend(loc="upper left", framealpha=0.9)
    return figure
