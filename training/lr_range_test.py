"""Which learning rate? `python train.py --lr_range_test` (Smith 2017, §3.3).

Trains fresh weights on the run's own batches, with its objective and optimizer, while the rate
rises exponentially, and tells where the loss fell most steeply. Nothing is set by it.
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
from training import tracking
from training.loop import Loop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "lr_range_test"  # of a run
N_STEPS, LEAST_STEPS = 300, 20
LOWEST, HIGHEST = 1e-6, 1e-1
SMOOTHING = 0.9
DIVERGED = 4.0  # times the best smoothed loss
WINDOW = 0.1  # of the steps of the test, in which the fall of the loss is measured
RULE = "where the loss falls most steeply over the logarithm of the rate"


@dataclass(frozen=True)
class RangeTest:
    """What came of it: a rate and a loss for each step, as far as it went.

    Args:
        n_steps: that it would have had.
    """

    n_steps: int
    rates: Float64[np.ndarray, "n"]
    losses: Float64[np.ndarray, "n"]

    @property
    def smoothed(self) -> Float64[np.ndarray, "n"]:
        return smoothed(self.losses)

    @property
    def diverged(self) -> bool:
        return diverged(self.losses)

    @property
    def _least(self) -> int:
        return int(np.nanargmin(self.smoothed)) if np.isfinite(self.losses).any() else -1

    @property
    def least(self) -> float | None:
        """The rate at which the smoothed loss is least."""
        return float(self.rates[self._least]) if self._least >= 0 else None

    @property
    def suggested(self) -> float | None:
        """The rate in the middle of the window (of a tenth of the test) in which the least-squares
        line of the loss over the logarithm of the rate falls most steeply, up to where the smoothed
        loss is least. None if it falls nowhere.
        """
        # What is beyond the least may fall again, from the height of a spike.
        last = self._least + 1
        x, y = np.log10(self.rates[:last]), self.losses[:last]
        size = max(3, round(WINDOW * self.n_steps))
        slopes = [slope(x[i : i + size], y[i : i + size]) for i in range(last - size + 1)]
        if not slopes or min(slopes) >= 0:
            return None
        return float(10 ** x[int(np.argmin(slopes)) :][:size].mean())


def slope(x: Float64[np.ndarray, "n"], y: Float64[np.ndarray, "n"]) -> float:
    """Of the least-squares line of y over x."""
    centred = x - x.mean()
    return float(centred @ (y - y.mean()) / (centred @ centred))


def smoothed(losses: Sequence[float] | Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """The exponential average so far, without the bias of its start: divided by 1 − βⁿ, as Adam
    does (Kingma & Ba 2015, §3).
    """
    average, found = 0.0, []
    for i, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average / (1 - SMOOTHING**i))
    return np.array(found, np.float64)


def diverged(losses: Sequence[float] | Float64[np.ndarray, "n"]) -> bool:
    """Whether the last loss is not finite, or the smoothed one is several times its best."""
    if len(losses) and not math.isfinite(losses[-1]):
        return True
    so_far = smoothed(losses)
    return bool(len(so_far)) and bool(so_far[-1] > DIVERGED * so_far.min())


def exponential(n_steps: int) -> Callable[[Any], Any]:
    """The rate at each step: the first is the lowest, the last the highest."""

    def rate(step):
        return LOWEST * (HIGHEST / LOWEST) ** (step / (n_steps - 1))

    return rate


def rising(n_steps: int, step: Callable[[int], float | None]) -> RangeTest:
    """Take steps until the loss diverges. `step(i)` takes the i-th, at its rate, and tells the loss
    before it, or None of a step that was left out.
    """
    rate, rates, losses = exponential(n_steps), [], []
    for i in range(n_steps):
        if (loss := step(i)) is None:
            continue
        rates.append(rate(i))
        losses.append(loss)
        if diverged(losses):
            break
    return RangeTest(n_steps, np.array(rates, np.float64), np.array(losses, np.float64))


# --- of a run -------------------------------------------------------------------------------------


def range_test(loop: Loop, n_steps: int) -> str:
    """Run the test, save it in `lr_range_test/` of the run's folder, and return a summary.

    Leaves the loop's weights changed, and no run that could be resumed.

    Raises:
        UserError: `n_steps` is too small.
    """
    if n_steps < LEAST_STEPS:
        raise UserError(f"--lr_range_test {n_steps}: needs at least {LEAST_STEPS} steps")
    loop.config = replace(loop.config, log_every=1)  # so that the loss is that of one step
    loop.set_schedule(exponential(n_steps))
    with closing(loop.batches(0, n_steps)) as batches:
        placed = parallel.prefetch_to_device(batches, loop.mesh)

        def step(_: int) -> float | None:
            report = jax.device_get(loop.train_step(next(placed)))
            loss = tracking.metrics_line(report)["loss"]
            # A loss scale that is still too large leaves a step out, and is no divergence.
            return None if math.isnan(loss) and not report.bad_steps else loss

        found = rising(n_steps, step)
    folder = loop.run_dir / FOLDER
    if processes.is_first():
        run_folder.create_run_folder(folder)
        write(found, folder / "points.json")
        curves.save_figure(draw(found), folder / "loss.png")
    return said(found, folder)


def write(found: RangeTest, path: Path) -> None:
    """All points, and what follows from them."""
    columns = {name: getattr(found, name).tolist() for name in ("rates", "losses", "smoothed")}
    columns = {name: [x if math.isfinite(x) else None for x in v] for name, v in columns.items()}
    facts = {"suggested": found.suggested, "rule": RULE, "least": found.least}
    facts |= {"diverged": found.diverged}
    with files.atomic_file(path) as file:
        file.write(json.dumps(facts | columns, allow_nan=False).encode() + b"\n")


def said(found: RangeTest, folder: Path) -> str:
    """One line."""
    end = f"diverged at {found.rates[-1]:.1e}" if found.diverged else "did not diverge"
    where = f"see {folder / 'loss.png'}"
    if found.suggested is None:
        return f"the loss fell at no rate of {LOWEST:g} … {HIGHEST:g} and {end}; {where}"
    least = f"is least at {found.least:.1e} and {end}"
    return f"--learning_rate {found.suggested:.1e} is {RULE}; it {least}; {where}"


def draw(found: RangeTest) -> "Figure":
    """Losses over rates, with the suggested rate marked."""
    import matplotlib

    with matplotlib.rc_context(curves.STYLE):
        figure = curves.new_figure(height=3.6)
        ax = figure.subplots()
        ax.plot(found.rates, found.losses, color=curves.GREY, lw=0.6, alpha=0.6, label="each step")
        ax.plot(found.rates, found.smoothed, color=curves.BLUE, lw=1.8, label="smoothed")
        ax.set_xscale("log")
        finite = found.smoothed[np.isfinite(found.smoothed)]
        if len(finite):  # the spike at the end would flatten all the rest
            low, high = found.losses[np.isfinite(found.losses)].min(), finite[: len(finite) // 2]
            ax.set_ylim(low * 0.9 if low > 0 else None, max(high, default=finite[0]) * 1.3)
        if found.suggested:
            label = f"{found.suggested:.1e}: steepest descent"
            ax.axvline(found.suggested, color=curves.ORANGE, lw=1.4, ls="--", label=label)
        if found.least:
            label = f"{found.least:.1e}: least"
            ax.axvline(found.least, color=curves.GREY, lw=1.0, ls=":", label=label)
        ax.set_title("Loss as the learning rate rises")
        ax.set_xlabel("learning rate")
        ax.legend(loc="upper left", framealpha=0.9)
    return figure
