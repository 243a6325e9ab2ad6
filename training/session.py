"""A run while a trainer's `fit` is in it: its record, its checkpoints, its clock, the step that is
not read yet, and what happens when a step goes wrong.

It trains nothing; of several processes the first one alone writes records and pictures.
"""

import errno
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from data.batch import Batch
from inference import curves, grids, progress
from runtime import files, parallel, processes, run_folder
from runtime.checkpoint import Checkpoints, DiskFullError
from runtime.errors import RunError, UserError
from runtime.signals import Stop
from training import display, tracking, wandb_sink
from training.tracking import NullTracker, Sink, Throughput, Tracker

if TYPE_CHECKING:
    from train import Trainer

MOST_ROLLBACKS = 3
FIGURES = "figures"  # of a run, a folder


@contextmanager
def open_session(trainer: "Trainer", last: int) -> Iterator["RunSession"]:
    """The run's folder, locked, with its configuration written."""
    with ExitStack() as stack:
        processes.broadcast_from_first(lambda: _take(trainer, stack))
        keep = trainer.config.keep_checkpoints
        checkpoints = stack.enter_context(Checkpoints(trainer.run_dir, keep=keep))
        checkpoints.set_aside(trainer.damaged)
        trainer.damaged = []
        tracker = NullTracker()
        if processes.is_first():
            how = {"start_step": trainer.step, "n_steps": last, "sinks": _sinks(trainer)}
            tracker = Tracker(trainer.run_dir, **how)
        run = RunSession(trainer, last, stack.enter_context(tracker), checkpoints, Throughput())
        yield run


def _sinks(trainer: "Trainer") -> list[Sink]:
    """Where it is recorded besides."""
    if not (project := trainer.config.wandb_project):
        return []
    about = {"settings": trainer.describe(), "fresh": not trainer.step}
    return [wandb_sink.Sink(trainer.run_dir, project=project, **about)]


def _take(trainer: "Trainer", stack: ExitStack) -> str:
    run_folder.make(trainer.run_dir)
    stack.enter_context(run_folder.locked(trainer.run_dir))
    files.tidy(trainer.run_dir)
    run_folder.write_config(trainer.run_dir, trainer.describe())
    return ""


@dataclass
class RunSession:
    """What `fit` holds open, and what it knows of the steps so far."""

    trainer: "Trainer"
    last: int
    tracker: Tracker | NullTracker
    checkpoints: Checkpoints
    throughput: Throughput
    unread: tuple[int, int, dict[str, Any]] | None = None  # a step, its batch, its report
    finite: bool = True  # the step that was read last
    stop_was_asked: bool = False  # of any process, when that step was dispatched
    saving: int = 0  # the step of the last checkpoint, which may still be being written
    rollbacks: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """What comes before the first step."""
        t = self.trainer
        self.tracker.begin()
        if t.config.overfit_batch:
            sheet, path = display.batch_sheet(t), t.run_dir / t.SHOWS / "batch.png"
            if processes.is_first():
                with self._full_disk_is_said(path):
                    grids.save_png(sheet, path)

    def batches(self) -> Iterator[Batch]:
        """Those up to the last step, from the trainer's position on, wherever that is moved to. Bad
        data ends the run, but what it has is saved first.
        """
        t = self.trainer
        while t.step < self.last:
            n_rollbacks, stop = len(self.rollbacks), t.position + self.last - t.step
            with closing(t.batches(t.position, stop)) as batches:
                try:
                    for batch in parallel.prefetch(batches, t.mesh):
                        yield batch
                        if len(self.rollbacks) > n_rollbacks:
                            break
                except UserError:
                    self.read()  # or a step that went wrong would be saved
                    self.save(required=True)
                    raise

    def dispatched(self, report: dict[str, Any], stop: Stop) -> None:
        """Keep a step's report to be read later."""
        report["stop"] = parallel.any_process(bool(stop), self.trainer.mesh)
        self.unread = self.trainer.step, self.trainer.position - 1, report

    def read(self) -> bool:
        """Wait for the unread step and log it if it is its turn. False if it was one bad step too
        many, and the trainer is back at its last checkpoint.

        Raises:
            RunError: that has happened too often.
        """
        if self.unread is None:
            return True
        (step, position, report), self.unread = self.unread, None
        n_bad, stop = jax.device_get((report["bad_steps"], report["stop"]))
        self.finite, self.stop_was_asked = not n_bad, bool(stop)
        if n_bad >= self.trainer.config.nan_patience:
            self._roll_back(step, position)
            return False
        self.throughput.step(self.trainer.config.batch_size)
        self.tracker.advance(step)
        if step % self.trainer.config.log_every == 0:
            report = jax.device_get(report)
            rate = np.asarray(self.trainer.schedule(step - 1 - report["skipped"])).item()
            line = tracking.summary(report) | {"learning_rate": rate}
            self.tracker.log(step, line | self._rates())
        return True

    def asked_to_stop(self, stop: Stop) -> bool:
        """Several processes go by the step that was read last, so that all leave at the same, and
        as the one that was asked does.
        """
        if not processes.is_distributed():
            return bool(stop)
        if self.stop_was_asked and not stop:
            stop.signal = signal.SIGTERM
        return self.stop_was_asked

    def save(self, *, required: bool = False) -> None:
        """A checkpoint of this step, if it was a good one. Unless it is `required`, a full disk is
        only said: there may be room for the next.
        """
        t = self.trainer
        self._finish_saving()
        if not self.finite:
            self.tracker.message(f"step {t.step} is not saved: it went wrong")
            return
        self.saving = t.step
        with nullcontext() if required else self._unsaved_is_said():
            self.checkpoints.save(t.step, *t.items())
            self._export(required)

    def _export(self, required: bool) -> None:
        try:
            self.trainer.export()
        except UserError as error:
            if required:
                raise
            self.tracker.message(f"{error}; training goes on")

    def show(self, name: str, *, gif: bool = False) -> None:
        """A sheet of the trainer's pictures in their folder and TensorBoard and, with `gif`, the
        way there.
        """
        t = self.trainer
        sheets, folder = t.sheets(trajectory=gif), t.run_dir / t.SHOWS
        if not processes.is_first():
            return
        with self._full_disk_is_said(folder / name):
            grids.save_png(sheets[-1], folder / name)
            if len(sheets) > 1:
                grids.save_gif(sheets, folder / "trajectory.gif")
            self.tracker.image(t.step, t.SHOWS, sheets[-1])

    def measure(self, stop: Stop) -> None:
        """The distance of the trainer's pictures to real ones. It takes long: if the run is asked
        to stop meanwhile, it is left out.
        """
        t = self.trainer
        yardstick = t.yardstick
        if yardstick is None:
            return
        batches = t.pictures(yardstick.n, yardstick.batch_size)
        found = yardstick.distance(self._until_asked_to_stop(batches, stop))
        if found is None:
            self.tracker.message(f"step {t.step} is not measured: the run was asked to stop")
            return
        self.tracker.log(t.step, {yardstick.name: found})

    def _until_asked_to_stop(self, batches: Iterable[Any], stop: Stop) -> Iterator[Any]:
        for batch in batches:
            if bool(parallel.any_process(bool(stop), self.trainer.mesh)):
                return
            yield batch

    def draw_records(self) -> None:
        """The figures that need nothing but what is recorded. They never fail a run."""
        t, folder = self.trainer, self.trainer.run_dir / FIGURES
        if not processes.is_first():
            return
        figures: dict[str, Callable[[Path], None]] = {
            curves.NAME: lambda path: curves.save(t.run_dir, path),
            progress.NAME: lambda path: progress.save(t.run_dir / t.SHOWS, path, last=t.step),
        }
        for name, draw in figures.items():
            try:
                draw(folder / name)
            except Exception as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
                self.tracker.message(f"{FIGURES}/{name} is not drawn: {reason}")

    def _finish_saving(self) -> None:
        """Wait for the last checkpoint: if it fails, that is said under its own step."""
        with self._unsaved_is_said():
            self.checkpoints.wait()

    @contextmanager
    def _unsaved_is_said(self) -> Iterator[None]:
        try:
            yield
        except DiskFullError as error:
            self.tracker.message(f"step {self.saving} is not saved, training goes on: {error}")

    @contextmanager
    def _full_disk_is_said(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.tracker.message(f"no space left for {path}; training goes on")

    def _roll_back(self, step: int, position: int) -> None:
        """To the last checkpoint, or to the start; the batches since then are left out (as
        Chowdhery et al. 2022, §5.1, do after a spike of the loss).
        """
        t = self.trainer
        self._finish_saving()
        back = self.checkpoints.latest() or 0
        self.rollbacks.append(f"step {step} (back to step {back})")
        rows = t.data.rows(position).tolist()
        problem = f"the loss or its gradient is not finite at step {step}"
        if len(self.rollbacks) > MOST_ROLLBACKS:
            raise RunError(
                f"{problem}, after {MOST_ROLLBACKS} returns to a checkpoint: "
                f"{'; '.join(self.rollbacks[:-1])}; the last good checkpoint is step {back}; the "
                f"batch's rows of the training split are {rows}"
            )
        self.tracker.message(
            f"{problem}, nor at the {t.config.nan_patience - 1} before it: going back to step "
            f"{back}, leaving out the batches since then"
        )
        t.go_back(self.checkpoints, back, position=position + 1)
        self.tracker.rewind(back)
        self.finite = True

    def _rates(self) -> dict[str, float]:
        """Images per second, seconds per step and, where the device's peak is known, MFU."""
        t, rates = self.trainer, self.throughput.take()
        if rates and t.peak and t.flops_per_image:
            per_device = rates["images_per_second"] / jax.device_count()
            rates["mfu"] = t.flops_per_image * per_device / t.peak.flops_per_second
        return rates
