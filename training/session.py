"""A run while `Loop.fit` is in it: its log, checkpoints, clock, pending step, and recovery.

A session trains nothing. Of several processes only process 0 writes metrics and images.
"""

import dataclasses
import errno
import shlex
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Bool
from PIL import Image

from data import bad_rows
from data.pipeline import Pipeline
from data.rows import Source
from datasets_config import DatasetConfig
from inference import curves, grids, progress
from inference.grids import NotFiniteError
from runtime import files, parallel, processes, run_folder
from runtime.checkpoint import SNAPSHOTS_FOLDER, Checkpoints, DiskFullError
from runtime.errors import RunError, UserError
from runtime.signals import StopRequest
from training import step as training_step
from training import wandb_sink
from training.step import StepReport
from training.tracking import NullTracker, Sink, Throughput, Tracker

MAX_ROLLBACKS = 3
FIGURES = "figures"  # a subfolder of the run's folder


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's `config.json`.

    Args:
        flags: every flag of the command, as JSON.
        run_dir: the run's folder.
        model_config: a dataclass, the shape of the network.
        dataset: facts about the dataset.
        extra: further entries of the task.
    """

    flags: Mapping[str, Any]
    run_dir: Path
    model_config: Any
    dataset: DatasetConfig
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.flags,
            "run_dir": str(self.run_dir),
            "model_config": dataclasses.asdict(self.model_config),
            "dataset": dataclasses.asdict(self.dataset),
            **self.extra,
        }


class Run(ABC):
    """The part of `training.loop.Loop` that a session uses.

    Attributes:
        config: every flag, resolved.
        source: the opened dataset.
        step: updates so far.
        position: batches so far; more than steps after a rollback.
        damaged: steps of checkpoints that could not be restored.
        keeps_snapshots: whether the run saves averages to make others of.
    """

    GRID_FOLDER: ClassVar[str]  # of image grids in the run's folder, and their TensorBoard tag

    config: Any
    source: Source
    run_dir: Path
    mesh: parallel.Mesh
    step: int
    position: int
    damaged: list[int]
    keeps_snapshots: bool = False

    @property
    @abstractmethod
    def data(self) -> Pipeline:
        """The pipeline of batches."""

    @abstractmethod
    def batches(self, start: int, stop: int) -> Generator[Any]:
        """Inputs of the steps at the positions start … stop − 1 in the order of all batches."""

    @abstractmethod
    def learning_rate(self, n_updates: int) -> float:
        """The learning rate of the update after `n_updates` of them."""

    @abstractmethod
    def describe(self) -> RunRecord:
        """The record that is written to `config.json`."""

    @abstractmethod
    def checkpoint_items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays of a checkpoint, and the notes beside them."""

    @abstractmethod
    def snapshot_items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays of a snapshot, and the notes beside them."""

    @abstractmethod
    def roll_back(self, checkpoints: Checkpoints, step: int, *, position: int) -> None:
        """Restore the checkpoint of `step`, or the initial state if it is 0, and continue with the
        batch at `position`.
        """

    @abstractmethod
    def image_grids(self, *, trajectory: bool = False) -> list[Image.Image]:
        """Grids of images made by the averaged weights. The last one is the result; with
        `trajectory`, those before it lead there, for tasks that have such steps.
        """

    # Hooks that a task may leave as they are.

    def first_grids(self) -> dict[str, Image.Image]:
        """Grids to save before the first step, by file name."""
        return {}

    def measure(
        self, until_stopped: Callable[[Iterable[Any]], Iterator[Any]]
    ) -> dict[str, float] | None:
        """Compute metrics that take too long for an evaluation. Returns None if interrupted.

        Args:
            until_stopped: cuts off an iterable of batches when the run has to stop.
        """
        return {}

    def utilization(self, images_per_second: float) -> float | None:
        """Model FLOPs utilization (MFU) at this speed of all devices, or None if unknown."""
        return None

    def export(self) -> None:  # noqa: B027  (a hook, not abstract)
        """Write files to be kept beside every checkpoint."""


@contextmanager
def open_session(run: Run, last: int) -> Generator["RunSession"]:
    """Lock the run's folder, write its config.json, and open its log and its checkpoints.

    Args:
        last: the step that the run ends at.
    """
    with ExitStack() as stack:
        stack.enter_context(processes.recovery_advice(lambda: _how_to_resume(run.run_dir)))
        processes.broadcast_from_first(lambda: _claim_folder(run, stack))
        c = run.config
        checkpoints = stack.enter_context(
            Checkpoints(run.run_dir, keep=c.keep_checkpoints, keep_every=c.keep_every)
        )
        checkpoints.set_aside(run.damaged)
        run.damaged = []
        snapshots = None
        if run.keeps_snapshots:
            snapshots = Checkpoints(run.run_dir, folder=SNAPSHOTS_FOLDER)
            stack.enter_context(snapshots)
        tracker = stack.enter_context(_open_tracker(run, last))
        yield RunSession(run, last, tracker, checkpoints, Throughput(), snapshots)


def _how_to_resume(run_dir: Path) -> str:
    step = Checkpoints.newest_on_disk(run_dir)
    found = "there is no checkpoint yet" if step is None else f"the last checkpoint is step {step}"
    run = shlex.quote(str(run_dir))
    return f"{found}: start all processes again with --resume --run_dir {run}"


def _claim_folder(run: Run, stack: ExitStack) -> str:
    run_folder.create_run_folder(run.run_dir)
    stack.enter_context(run_folder.exclusive_writer(run.run_dir))
    files.remove_leftovers(run.run_dir)
    if run.source.bad_rows is not None:
        bad_rows.write_record(run.run_dir, run.source)
    run_folder.write_config(run.run_dir, run.describe().as_json())
    return ""


def _open_tracker(run: Run, last: int) -> Tracker | NullTracker:
    if not processes.is_first():
        return NullTracker()
    return Tracker(run.run_dir, start_step=run.step, n_steps=last, sinks=_sinks(run))


def _sinks(run: Run) -> list[Sink]:
    """The places besides its folder that the run is logged to."""
    if not (project := run.config.wandb_project):
        return []
    settings = run.describe().as_json()
    return [
        wandb_sink.WandbSink(run.run_dir, project=project, settings=settings, is_new=not run.step)
    ]


class PendingStep(NamedTuple):
    """A step that was dispatched, and whose metrics were not fetched yet.

    Args:
        position: the place of its batch in the order of all batches.
        stop: whether any process had been signalled to stop when it was dispatched.
    """

    step: int
    position: int
    report: StepReport
    stop: Bool[Array, ""]


@dataclass
class RunSession:
    """Everything that `Loop.fit` holds open, and what is known of the steps so far.

    Args:
        last: the step that the run ends at.
        snapshots: of the averages, if the run keeps them.
        pending: the step that was dispatched last, until its metrics are fetched.
        finite: whether the loss and gradient of the step fetched last were finite.
        stop_signalled: whether any process had been signalled to stop by then.
        rollbacks: one entry for each, for the error message.
        not_finite: why the last grid of images was not saved, if it was not.
    """

    run: Run
    last: int
    tracker: Tracker | NullTracker
    checkpoints: Checkpoints
    throughput: Throughput
    snapshots: Checkpoints | None = None
    pending: PendingStep | None = None
    finite: bool = True
    stop_signalled: bool = False
    rollbacks: list[str] = field(default_factory=list)
    not_finite: str = ""

    # --- steps ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Open the sinks, remove snapshots of later steps than the run's, which are trained anew,
        and save the grids that come before the first step.
        """
        self.tracker.begin()
        self._remove_snapshots_after(self.run.step)
        folder = self.run.run_dir / self.run.GRID_FOLDER
        for name, grid in self.run.first_grids().items():
            if processes.is_first():
                with self._reporting_full_disk(folder / name):
                    grids.save_png(grid, folder / name)

    def batches(self) -> Iterator[Any]:
        """Placed batches up to the last step, from the run's position on; after a rollback, from
        its new position. Bad data ends the run, but first its state is saved.
        """
        run = self.run
        while run.step < self.last:
            n_rollbacks = len(self.rollbacks)
            stop = run.position + self.last - run.step
            with closing(run.batches(run.position, stop)) as batches:
                try:
                    for batch in parallel.prefetch_to_device(batches, run.mesh):
                        yield batch
                        if len(self.rollbacks) > n_rollbacks:
                            break
                except UserError:
                    self.fetch_pending()  # so that a non-finite step is not saved
                    self.save(required=True)
                    raise

    def add_pending(self, report: StepReport, stop: StopRequest) -> None:
        """Keep the report of the step that was just dispatched, to be fetched later."""
        any_stop = parallel.any_across_processes(bool(stop), self.run.mesh)
        self.pending = PendingStep(self.run.step, self.run.position - 1, report, any_stop)

    def fetch_pending(self) -> bool:
        """Fetch the pending step's metrics and log them if due. Returns False after a rollback.

        Raises:
            RunError: there were too many rollbacks.
        """
        if self.pending is None:
            return True
        step, position, report, any_stop = self.pending
        self.pending = None
        n_bad, any_stop = jax.device_get((report.bad_steps, any_stop))
        self.finite = not n_bad
        self.stop_signalled = bool(any_stop)
        config = self.run.config
        if n_bad >= config.nan_patience:
            self._roll_back(step, position)
            return False
        self.throughput.step(config.batch_size)
        self.tracker.advance(step)
        if step % config.log_every == 0 or step == self.last:
            report = jax.device_get(report)
            rate = self.run.learning_rate(step - 1 - report.skipped)
            line = training_step.metrics_line(report) | {"learning_rate": rate}
            self.tracker.log(step, line | self._speed())
        return True

    def is_leaving(self, stop: StopRequest) -> bool:
        """Return True if the run ends here because of a signal. Several processes decide by the
        step that was fetched last, so that all of them end at the same step.
        """
        if not processes.is_distributed():
            return bool(stop)
        if self.stop_signalled and not stop:
            stop.signal = signal.SIGTERM
        return self.stop_signalled

    def _roll_back(self, step: int, position: int) -> None:
        """Restore the last checkpoint, or the initial state, and skip the batches since then (as
        Chowdhery et al. 2022, §5.1, do after a spike of the loss).
        """
        run = self.run
        self._finish_saving()
        back = self.checkpoints.latest_step() or 0
        self.rollbacks.append(f"step {step} (back to step {back})")
        problem = f"the loss or its gradient is not finite at step {step}"
        if len(self.rollbacks) > MAX_ROLLBACKS:
            raise RunError(
                f"{problem}, after {MAX_ROLLBACKS} rollbacks: {'; '.join(self.rollbacks[:-1])}; "
                f"the last good checkpoint is step {back}; the batch is rows "
                f"{run.data.batch_rows(position).tolist()} of the training split; start again with "
                "a lower --learning_rate"
            )
        self.tracker.message(
            f"{problem} ({run.config.nan_patience} in a row): rolling back to step {back}; the "
            "batches since then are skipped"
        )
        run.roll_back(self.checkpoints, back, position=position + 1)
        self._remove_snapshots_after(back)
        self.tracker.rewind(back)
        self.finite = True

    def _speed(self) -> dict[str, float]:
        """Images per second, seconds per step and, where the device's peak is known, MFU."""
        speed = self.throughput.take()
        if speed:
            mfu = self.run.utilization(speed["images_per_second"])
            if mfu is not None:
                speed["mfu"] = mfu
        return speed

    # --- between steps ----------------------------------------------------------------------------

    def save(self, *, required: bool = False) -> None:
        """Write a checkpoint of this step, unless it is non-finite. A full disk is only reported
        unless the checkpoint is `required`: there may be room for the next.
        """
        run = self.run
        self._finish_saving()
        if not self.finite:
            self.tracker.message(
                f"step {run.step} is not saved: its loss or gradient is not finite"
            )
            return
        with nullcontext() if required else self._reporting_failed_save(self.checkpoints):
            self.checkpoints.save(run.step, *run.checkpoint_items())
            self._export(required)

    def save_snapshot(self) -> None:
        """Write the averages of this step. A full disk is only reported: others can be made of the
        snapshots that there are.
        """
        if self.snapshots is None:
            return
        self._finish_saving()
        with self._reporting_failed_save(self.snapshots):
            self.snapshots.save(self.run.step, *self.run.snapshot_items())

    def _remove_snapshots_after(self, step: int) -> None:
        if self.snapshots is not None:
            self._finish_saving()
            self.snapshots.remove_after(step)

    def _export(self, required: bool) -> None:
        try:
            self.run.export()
        except UserError as error:
            if required:
                raise
            self.tracker.message(f"{error}; training continues")

    def save_image_grid(self, name: str, *, trajectory: bool = False) -> None:
        """Save a grid of the run's images into their folder and TensorBoard and, with
        `trajectory`, a GIF of the states that lead there. Images that are not finite are reported
        and not saved: a model may be too young for its guidance, and become sound later.
        """
        run = self.run
        folder = run.run_dir / run.GRID_FOLDER
        try:
            images = run.image_grids(trajectory=trajectory)
        except NotFiniteError as error:
            self.not_finite = f"step {run.step}: {run.GRID_FOLDER}/{name} is not saved: {error}"
            self.tracker.message(self.not_finite)
            return
        self.not_finite = ""
        if not processes.is_first():
            return
        with self._reporting_full_disk(folder / name):
            grids.save_png(images[-1], folder / name)
            if len(images) > 1:
                grids.save_gif(images, folder / "trajectory.gif")
            self.tracker.image(run.step, run.GRID_FOLDER, images[-1])

    def measure(self, stop: StopRequest) -> None:
        """Log the run's slow metrics. If it is signalled to stop meanwhile, or its images are not
        finite, they are left out.
        """
        try:
            metrics = self.run.measure(partial(self._until_stopped, stop=stop))
        except NotFiniteError as error:
            self.tracker.message(f"step {self.run.step} is not measured: {error}")
            return
        if metrics is None:
            self.tracker.message(f"step {self.run.step} is not measured: the run is stopping")
            return
        self.tracker.log(self.run.step, metrics)

    def _until_stopped(self, batches: Iterable[Any], *, stop: StopRequest) -> Iterator[Any]:
        for batch in batches:
            if bool(parallel.any_across_processes(bool(stop), self.run.mesh)):
                return
            yield batch

    def save_figures(self) -> None:
        """Save the figures that need nothing but the log and the grids. They never fail a run."""
        if not processes.is_first():
            return
        run, folder = self.run, self.run.run_dir / FIGURES
        self._save_figure(
            folder / curves.CURVES_FILE, lambda path: curves.save_curves(run.run_dir, path)
        )
        self._save_figure(
            folder / progress.PROGRESS_FILE,
            lambda path: progress.save_progress_gif(
                run.run_dir / run.GRID_FOLDER, path, last_step=run.step
            ),
        )

    def _save_figure(self, path: Path, save: Callable[[Path], None]) -> None:
        try:
            save(path)
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.tracker.message(f"{FIGURES}/{path.name} is not saved: {reason}")

    def _finish_saving(self) -> None:
        """Wait for the last snapshot and checkpoint. If one fails, the message names its own step.

        A checkpoint is written after all earlier snapshots, so that a run that is killed resumes
        with those before its checkpoint.
        """
        for folder in filter(None, (self.snapshots, self.checkpoints)):
            with self._reporting_failed_save(folder):
                folder.wait()

    @contextmanager
    def _reporting_failed_save(self, folder: Checkpoints) -> Generator[None]:
        try:
            yield
        except DiskFullError as error:
            self.tracker.message(f"step {folder.saving} is not saved, training continues: {error}")

    @contextmanager
    def _reporting_full_disk(self, path: Path) -> Generator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.tracker.message(f"no space left for {path}; training continues")
