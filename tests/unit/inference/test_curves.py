"""The plots and the GIF of a run show what its records hold."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from curves_cases import record, write_grids
from PIL import Image, ImageSequence

from inference import curves, progress
from runtime.errors import UserError
from training import display
from training.session import RunSession
from training.tracking import NullTracker, Throughput


def plotted(figure) -> dict[str, list[np.ndarray]]:
    """Points of each curve, by the title above it."""
    return {
        ax.get_title(loc="left"): [line.get_xydata() for line in ax.get_lines()]
        for ax in figure.axes
        if ax.get_title(loc="left")
    }


def test_curves_are_the_record(tmp_path):
    record(tmp_path, end='{"step": 20, "loss": 0.')  # torn by a kill
    lines = plotted(
        curves.plot_curves(curves.read_metrics(tmp_path / "metrics.jsonl"), title="digits")
    )
    assert set(lines) == {"Loss of digits", "Loss by t", "Learning rate"}
    training, held_out = lines["Loss of digits"]
    np.testing.assert_array_equal(training, [[5, 1.5], [10, 0.5], [15, np.nan]])
    np.testing.assert_array_equal(held_out, [[6, 1.4]])
    np.testing.assert_array_equal(lines["Learning rate"][0], [[5, 1e-3], [10, 5e-4], [15, 0]])
    by_t = np.array([line[:, 1] for line in lines["Loss by t"]]).T
    nan = np.nan
    np.testing.assert_array_equal(by_t, [[2, nan, 1], [1, 0.5, 0.25], [nan, nan, nan]])


def test_unrecorded_metrics_are_not_plotted(tmp_path):
    """An autoencoder, for one, has losses of any sign, and none by t."""
    lines = [{"step": step, "loss": 1.0 - step} for step in range(1, 4)]
    assert list(plotted(curves.plot_curves(lines))) == ["Loss"]
    with pytest.raises(UserError, match="no losses are recorded yet"):
        curves.plot_curves([{"step": 4, "eval_loss": 1.0}])
    with pytest.raises(UserError, match=r"cannot read .*metrics.jsonl: No such file"):
        curves.read_metrics(tmp_path / "metrics.jsonl")


def test_a_saved_figure_leaves_nothing_behind(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    curves.save_curves(record(tmp_path), tmp_path / "figures" / curves.CURVES_FILE)
    with Image.open(tmp_path / "figures" / curves.CURVES_FILE) as image:
        assert image.width == curves.WIDTH * curves.DPI
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in (tmp_path / "figures").iterdir()] == [curves.CURVES_FILE]


def frames(path) -> list[np.ndarray]:
    with Image.open(path) as gif:
        return [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(gif)]


def test_the_gif_has_a_frame_for_each_grid(tmp_path):
    """In the order of the steps, without the other images of the folder."""
    names = ["0000050.png", "0000100.png", "0000150.png", "final.png", "batch.png"]
    progress.save_progress_gif(
        write_grids(tmp_path / "samples", *names), tmp_path / "a.gif", last_step=180
    )
    seen = frames(tmp_path / "a.gif")
    assert [abs(frame[-5, 5, 2] - 50 * i) < 8 for i, frame in enumerate(seen)] == [True] * 4


def test_of_many_grids_only_as_many_as_fit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "MAX_FRAMES", 2)
    names = [f"{step:07d}.png" for step in (10, 20, 30, 40)]
    (write_grids(tmp_path / "samples", *names) / names[2]).write_bytes(b"damaged")
    progress.save_progress_gif(tmp_path / "samples", tmp_path / "a.gif")
    seen = frames(tmp_path / "a.gif")
    assert [round(frame[-5, 5, 2] / 50) for frame in seen] == [1, 3]


@pytest.mark.parametrize(
    "last, steps", [(180, [50, 150, 180]), (150, [50, 150]), (100, [50, 150]), (None, [50, 150])]
)
def test_the_final_grid_is_of_the_end_or_left_out(tmp_path, last, steps):
    folder = write_grids(tmp_path / "samples", "0000050.png", "0000150.png", "final.png")
    assert [step for step, _ in progress.find_grids(folder, last)] == steps


def test_a_gif_that_cannot_be_made_is_explained(tmp_path):
    folder = tmp_path / "samples"
    with pytest.raises(UserError, match=r"no grids of samples in .*samples yet"):
        progress.save_progress_gif(folder, tmp_path / "a.gif")
    write_grids(folder, "0000050.png", "0000100.png")
    write_grids(folder, "0000200.png", size=(60, 20))  # with other labels
    progress.save_progress_gif(folder, tmp_path / "a.gif")
    assert {frame.shape for frame in frames(tmp_path / "a.gif")} == {
        frames(tmp_path / "a.gif")[0].shape
    }
    (folder / "0000150.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(UserError, match=r"0000150.png cannot be read"):
        progress.save_progress_gif(folder, tmp_path / "a.gif")


# --- at the end of a run --------------------------------------------------------------------------


class Messages(NullTracker):
    """A tracker that keeps the messages of a run."""

    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def test_no_figure_can_fail_a_run(tmp_path, monkeypatch):
    tracker = Messages()
    run: Any = SimpleNamespace(run_dir=record(tmp_path), GRID_FOLDER="samples", step=15)
    checkpoints: Any = None
    session = RunSession(run, 15, tracker, checkpoints, Throughput())
    session.save_figures()
    assert (tmp_path / "figures" / "curves.png").exists()
    assert len(tracker.lines) == 1
    assert tracker.lines[0].startswith("figures/progress.gif is not saved: there are no ")

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(curves, "save_curves", fail)
    write_grids(tmp_path / "samples", "0000010.png")
    session.save_figures()
    assert tracker.lines[1:] == ["figures/curves.png is not saved: ZeroDivisionError"]
    assert len(frames(tmp_path / "figures" / "progress.gif")) == 1


def test_the_end_message_lists_the_files_that_exist(tmp_path):
    write_grids(tmp_path / "figures", "progress.gif")
    message = display.end_message(tmp_path, 15)
    assert "figures/progress.gif" in message and "curves.png" not in message
    curves.save_curves(record(tmp_path), tmp_path / "figures" / curves.CURVES_FILE)
    message = display.end_message(tmp_path, 15)
    assert "figures/curves.png" in message
