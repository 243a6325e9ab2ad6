"""Plots of a run's metrics.jsonl: losses, the loss by t, the learning rate; and of scores over
guidance.

Uses Matplotlib without its global state, and imports it only when something is plotted.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from inference import fonts
from runtime.errors import UserError
from runtime.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_FILE = "curves.png"
WIDTH, HEIGHT, DPI = 8.0, 5.4, 200  # inches; legible at half of its pixels
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9652b", "#2f8f5b", "#8a8a8a"
# Metric → legend and colour in the plot of losses, for the metrics that are recorded.
LOSSES = {
    "loss": ("training, mean since the last point", BLUE),
    "inner_loss": ("of the inner head", GREEN),
    "eval_loss": ("held out", ORANGE),
}
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
    """Read the lines of a metrics.jsonl. Skips a line that a kill has torn.

    Raises:
        UserError: the file cannot be read.
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


def metric_series(
    record: Record, name: str
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n *bins"]]:
    """Steps at which a metric is recorded, and its values; NaN where it was not finite."""
    lines = [line for line in record if name in line]
    steps = np.array([line["step"] for line in lines], np.float64)
    return steps, np.array([line[name] for line in lines], np.float64)


def save_curves(run_dir: Path, path: Path) -> None:
    """Plot the curves of a run into a .png.

    Raises:
        UserError: it has recorded no losses.
    """
    record = read_metrics(run_dir / "metrics.jsonl")
    save_figure(plot_curves(record, title=run_dir.resolve().name), path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write the whole .png or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> "Figure":
    """Create a figure outside pyplot, whose global state would keep it alive."""
    from matplotlib.figure import Figure  # half a second that other commands need not wait for

    return Figure(figsize=(width, height), layout="constrained")


def plot_curves(record: Record, *, title: str = "") -> "Figure":
    """Plot losses above, the loss by t and the learning rate below, as far as they are recorded.

    Raises:
        UserError: no losses are recorded.
    """
    import matplotlib

    if not _is_recorded(record, "loss"):
        raise UserError("no losses are recorded yet")
    lower_row = [name for name in ("loss_by_t", "learning_rate") if _is_recorded(record, name)]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(height=HEIGHT if lower_row else HEIGHT / 2)
        rows = [["loss"] * max(1, len(lower_row)), *([lower_row] if lower_row else [])]
        axes: dict[str, Axes] = figure.subplot_mosaic(rows)  # pyright: ignore
        _plot_losses(axes["loss"], record, title)
        if "loss_by_t" in axes:
            _plot_loss_by_t(figure, axes["loss_by_t"], record)
        if "learning_rate" in axes:
            _plot_learning_rate(axes["learning_rate"], record)
        for ax in axes.values():
            ax.set_xlabel("step")
            ax.set_xlim(left=0)
    return figure


def _is_recorded(record: Record, name: str) -> bool:
    return any(name in line for line in record)


def _plot_losses(ax: "Axes", record: Record, title: str) -> None:
    for name, (label, color) in LOSSES.items():
        steps, values = metric_series(record, name)
        if len(steps):
            marker = "o" if len(steps) <= 40 else None
            ax.plot(steps, values, color=color, marker=marker, ms=3, lw=1.4, label=label)
    lines = ax.get_lines()
    _set_log_scale(ax, [line.get_ydata() for line in lines])
    _set_run_title(ax, title)
    ax.legend(loc="upper right")


def _set_run_title(ax: "Axes", name: str) -> None:
    """Name the run above its losses, if there are fonts for the characters of its name."""
    families = fonts.matplotlib_families(name)
    if name and families:
        ax.set_title(f"Loss of {name}", parse_math=False, family=families)
    else:
        ax.set_title("Loss")


def _plot_loss_by_t(figure: "Figure", ax: "Axes", record: Record) -> None:
    """Plot a line for each bin of t, darker nearer to the noise."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    steps, values = metric_series(record, "loss_by_t")
    n = values.shape[-1]
    edges = np.linspace(0, 1, n + 1)
    # The lightest tenth of the colour map can hardly be seen on white.
    colors = ListedColormap(colormaps["viridis_r"](np.linspace(0.1, 1, n)))
    for i, column in enumerate(values.T):
        ax.plot(steps, column, color=colors(i), lw=1.2)
    _set_log_scale(ax, list(values.T))
    ax.set_title("Loss by t")
    scale = ScalarMappable(BoundaryNorm(edges.tolist(), n), colors)
    bar = figure.colorbar(scale, ax=ax, ticks=[0, 0.5, 1], pad=0.02, aspect=30)
    bar.set_ticklabels(["data, 0", "t = 0.5", "noise, 1"])
    bar.outline.set_visible(False)  # pyright: ignore


def _plot_learning_rate(ax: "Axes", record: Record) -> None:
    steps, values = metric_series(record, "learning_rate")
    ax.plot(steps, values, color=GREEN, lw=1.4)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title("Learning rate")


def plot_scores(
    values: Sequence[float],
    scores: Sequence[Mapping[str, float]],
    label: str = "guidance scale",
) -> "Figure":
    """Plot each score of an evaluation over the guidance scale, or another value, with its
    deviation if it has one.

    Args:
        label: of the values.
        scores: by name, for each value. `NAME_std` is the standard deviation of `NAME`.
    """
    import matplotlib

    order = np.argsort(values)
    rows = [scores[i] for i in order]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    plotted = [name for name in names if not name.endswith("_std")]
    n_columns = min(3, math.ceil(math.sqrt(len(plotted))))
    n_rows = math.ceil(len(plotted) / n_columns)
    x = np.asarray(values, np.float64)[order]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(height=HEIGHT / 2 * n_rows)
        axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        for ax, name in zip(axes, plotted):
            std = [row[f"{name}_std"] for row in rows] if f"{name}_std" in names else None
            y = [row[name] for row in rows]
            ax.errorbar(x, y, std, color=BLUE, marker="o", ms=3, lw=1.4, elinewidth=0.7)
            ax.ticklabel_format(axis="y", useOffset=False)
            ax.set_title(name)
            ax.set_xlabel(label)
        for ax in axes[len(plotted) :]:
            ax.set_visible(False)
    return figure


def _set_log_scale(ax: "Axes", values: Sequence[Any]) -> None:
    """Use a logarithmic axis with plain numbers, if all values are above 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    numbers = np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in values])
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers) or numbers.min() <= 0:
        return
    ax.set_yscale("log")
    ratio = numbers.max() / numbers.min()
    subs = (1,) if ratio > 100 else (1, 2, 5) if ratio > 10 else (1, 2, 3, 4, 6, 8)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
