"""The curves of a run, from its record: losses, the loss by t, the learning rate.

A record is the lines of a metrics.jsonl. Matplotlib is used without its global state, and imported
when something is drawn.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from runtime.errors import UserError
from runtime.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_FILE = "curves.png"
WIDTH, HEIGHT, DPI = 8.0, 5.4, 200  # inches; legible at half of its pixels
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9652b", "#2f8f5b", "#8a8a8a"
# What is plotted in the first of the curves, as far as it is recorded.
LOSSES = {"loss": ("training, mean since the last point", BLUE), "eval_loss": ("held out", ORANGE)}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
}
Record = list[dict[str, Any]]


def read_metrics(path: Path) -> Record:
    """The lines of a metrics.jsonl, but for one that a kill has torn.

    Raises:
        UserError: there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    record = []
    for line in lines:
        try:
            record.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in record if isinstance(line, dict) and "step" in line]


def series(
    record: Record, name: str
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n *bins"]]:
    """The steps at which a metric is recorded, and its values; NaN where it was not finite."""
    lines = [line for line in record if name in line]
    steps = np.array([line["step"] for line in lines], np.float64)
    return steps, np.array([line[name] for line in lines], np.float64)


def save_curves(run_dir: Path, path: Path) -> None:
    """Draw the curves of a run's folder into a .png.

    Raises:
        UserError: it has recorded no losses.
    """
    save_figure(plot_curves(read_metrics(run_dir / "metrics.jsonl"), title=run_dir.resolve().name), path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the whole .png or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> "Figure":
    """A figure that belongs to nobody, so that drawing leaves nothing behind in a process."""
    from matplotlib.figure import Figure  # half a second that other commands need not wait for

    return Figure(figsize=(width, height), layout="constrained")


def plot_curves(record: Record, *, title: str = "") -> "Figure":
    """Losses above; the loss by t and the learning rate below, as far as they are recorded.

    Raises:
        UserError: there are no losses.
    """
    import matplotlib

    if not len(series(record, "loss")[0]):
        raise UserError("no losses are recorded yet")
    by_t, rates = (len(series(record, name)[0]) > 0 for name in ("loss_by_t", "learning_rate"))
    below = [name for name, found in (("by_t", by_t), ("rate", rates)) if found]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(height=HEIGHT if below else HEIGHT / 2)
        rows = [["loss"] * max(1, len(below)), *([below] if below else [])]
        axes: dict[str, Axes] = figure.subplot_mosaic(rows)  # pyright: ignore
        _losses(axes["loss"], record, title)
        if by_t:
            _loss_by_t(figure, axes["by_t"], record)
        if rates:
            _learning_rate(axes["rate"], record)
        for ax in axes.values():
            ax.set_xlabel("step")
            ax.set_xlim(left=0)
    return figure


def _losses(ax: "Axes", record: Record, title: str) -> None:
    for name, (label, color) in LOSSES.items():
        steps, values = series(record, name)
        if len(steps):
            marker = "o" if len(steps) <= 40 else None
            ax.plot(steps, values, color=color, marker=marker, ms=3, lw=1.4, label=label)
    lines = ax.get_lines()
    _logarithmic(ax, [line.get_ydata() for line in lines])
    ax.set_title(f"Loss of {title}" if title else "Loss")
    ax.legend(loc="upper right")


def _loss_by_t(figure: "Figure", ax: "Axes", record: Record) -> None:
    """A line for each bin of t, as dark as it is near to the noise."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    steps, values = series(record, "loss_by_t")
    n = values.shape[-1]
    edges = np.linspace(0, 1, n + 1)
    # Its lightest tenth would hardly be seen on white.
    colors = ListedColormap(colormaps["viridis_r"](np.linspace(0.1, 1, n)))
    for i, column in enumerate(values.T):
        ax.plot(steps, column, color=colors(i), lw=1.2)
    _logarithmic(ax, list(values.T))
    ax.set_title("Loss by t")
    scale = ScalarMappable(BoundaryNorm(edges.tolist(), n), colors)
    bar = figure.colorbar(scale, ax=ax, ticks=[0, 0.5, 1], pad=0.02, aspect=30)
    bar.set_ticklabels(["data, 0", "t = 0.5", "noise, 1"])
    bar.outline.set_visible(False)  # pyright: ignore


def _learning_rate(ax: "Axes", record: Record) -> None:
    steps, values = series(record, "learning_rate")
    ax.plot(steps, values, color=GREEN, lw=1.4)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title("Learning rate")


def _logarithmic(ax: "Axes", values: Sequence[Any]) -> None:
    """A logarithmic axis with plain numbers, where all values are above 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    found = np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in values])
    found = found[np.isfinite(found)]
    if not len(found) or found.min() <= 0:
        return
    ax.set_yscale("log")
    ratio = found.max() / found.min()
    subs = (1,) if ratio > 100 else (1, 2, 5) if ratio > 10 else (1, 2, 3, 4, 6, 8)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
