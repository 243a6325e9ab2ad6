"""A training run in the order of time: its folder, its batches, its step, and its state.

`Loop.fit` is the run. A subclass gives it its task: `train.Trainer` trains a diffusion transformer,
`training.autoencoder.trainer.VaeTrainer` an autoencoder. Nothing here knows a network or a loss.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import optax
from jaxtyping import Array, Key

from data.batch import Batch
from data.buckets import Buckets
from data.caption_cache import CaptionStore
from data.pipeline import Pipeline
from data.rows import Source
from datasets_config import DatasetConfig
from runtime import parallel, processes
from runtime.checkpoint import PROFILES_ITEM, Checkpoints
from runtime.errors import RunError, UserError
from runtime.signals import catch_stop_signals
from training import device_dataset, optim
from training import step as training_step
from training.resolve import require_even_batches
from training.session import Run, open_session
from training.step import StepReport, TrainState

# A subclass that overrides one of these trains something else, or keeps another state.
TRAINING_METHODS = ("loss", "update", "train_step", "initial_state", "make_optimizer")
LoopType = TypeVar("LoopType", bound="Loop")


def initialize_jax(config: Any) -> None:
    """Join the run's other processes and keep compiled programs for the next start. Call it before
    anything asks JAX for a device.

    Raises:
        UserError: the other processes cannot be joined, or there are no devices.
    """
    processes.join_cluster(
        config.distributed,
        coordinator=config.coordinator,
        n_processes=config.n_processes,
        process_index=config.process_index,
    )
    processes.start_backend()
    parallel.enable_compilation_cache()


def flags_as_json(config: Any) -> dict[str, Any]:
    """Every flag of a config by its name; paths as strings."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()}


class Loop(Run):
    """A run of one task: `fit`, checkpoints, and everything that does not depend on the task.

    A subclass opens the dataset and the devices in its `__init__`, sets the attributes below, and
    implements the abstract methods.

    Attributes:
        config: every flag, resolved.
        source: the opened dataset; `dataset` are the facts about it.
        encoded: the encoded captions of a dataset with captions.
        buckets: of the rows of both splits, if there are any.
        model_config: a dataclass, the shape of the network.
        train_key: the random key that every step's is derived from.
        frozen: weights that are not trained, if there are any: one dictionary, which `update`
            takes last.
        state: weights, averages and optimizer on all devices.
    """

    CONFIG: ClassVar[type[Any]]  # the dataclass of the command's flags
    COMMAND: ClassVar[str]  # the command's file name, recorded in config.json

    source: Source
    dataset: DatasetConfig
    encoded: CaptionStore | None = None
    buckets: Mapping[str, Buckets] | None = None
    model_config: Any
    train_key: Key[Array, ""]
    frozen: tuple[dict[str, Any], ...] = ()
    schedule: optax.Schedule
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState

    def __init__(self, config: Any):
        self.config: Any = config
        self.step = 0
        self.position = 0
        self.damaged: list[int] = []
        self._pipeline: Pipeline | None = None

    @classmethod
    def trainer_path(cls) -> str:
        """Return `module:class` of the class that decides what is trained: the last of its bases,
        or itself, that overrides one of `TRAINING_METHODS`.
        """
        deciding = next(base for base in cls.__mro__ if {*TRAINING_METHODS} & {*vars(base)})
        return f"{deciding.__module__}:{deciding.__qualname__}"

    @classmethod
    def from_run(cls: type[LoopType], run_dir: str | Path) -> LoopType:
        """Open a run's folder at its newest checkpoint, to sample from it or to resume it.

        Raises:
            UserError: the folder is not a run, or has no complete checkpoint yet.
        """
        loop = cls(cls.CONFIG(run_dir=Path(run_dir), resume=True))
        if not loop.step:
            raise UserError(f"'{run_dir}' has no complete checkpoint yet")
        return loop

    # --- the task ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def update(self) -> Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, StepReport]]:
        """The compiled training step: `update(state, batch, key)`. It donates the state."""

    @abstractmethod
    def initial_state(self) -> TrainState:
        """Build the state before the first step. It is traced, so that every device creates only
        its shards.
        """

    @abstractmethod
    def make_optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Build the optimizer for a schedule of the learning rate."""

    @abstractmethod
    def blank_batch(self) -> Batch:
        """This process's part of a batch of zeros."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Evaluate the averaged weights on the evaluation split. Returns metrics by name."""

    @abstractmethod
    def start_message(self, last: int) -> str:
        """Text printed before the first step of a run to step `last`."""

    @abstractmethod
    def end_message(self) -> str:
        """Text printed after the last step."""

    def measurement_is_due(self, last: int) -> bool:
        """Return True if `measure` follows this step of a run to step `last`."""
        return False

    def snapshot_is_due(self, last: int) -> bool:
        """Return True if a snapshot of the averages follows this step of a run to step `last`."""
        if not self.keeps_snapshots:
            return False
        return self.step % self.config.snapshot_every == 0 or self.step == last

    @property
    def averaged_weights(self) -> Any:
        """The averaged weights of the whole network."""
        return self.state.ema

    # --- the run's folder, data and state ---------------------------------------------------------

    def prepare(self) -> None:
        """Open everything that only training needs. Called before a run writes anything.

        Raises:
            UserError: a file is missing, or an image is broken.
        """
        self.open_data()

    def open_data(self) -> Pipeline:
        """Open the pipeline of batches, once. A small dataset is decoded here."""
        if self._pipeline is None:
            c = self.config
            self._pipeline = Pipeline(
                self.source,
                batch_size=c.batch_size,
                seed=c.seed,
                process_index=processes.index(),
                n_processes=processes.count(),
                n_workers=c.n_workers,
                in_memory=True if c.cache_on_device else c.in_memory,
                shuffle_buffer=c.shuffle_buffer,
                caption_store=self.encoded,
                one_batch=c.overfit_batch,
                buckets=self.buckets,
            )
        return self._pipeline

    @property
    def data(self) -> Pipeline:
        """The pipeline of batches."""
        return self.open_data()

    def batches(self, start: int, stop: int) -> Generator[Any]:
        """Inputs of `train_step` for the positions start … stop − 1 in the order of all batches:
        this process's rows or, with `cache_on_device`, the dataset that a step gathers them from.
        """
        if self.config.cache_on_device:
            return device_dataset.batches(self.data, self.mesh, start, stop)
        return self.data.train_batches(start, stop)

    def read_batch(self) -> Callable[[Any, Array], Batch]:
        """Make the traced function from an input of `train_step` and its position to a `Batch`."""
        if not self.config.cache_on_device:
            return lambda batch, position: batch
        return partial(
            device_dataset.gather_batch, batch_size=self.config.batch_size, mesh=self.mesh
        )

    def configured_schedule(self) -> optax.Schedule:
        """The schedule of the learning rate that the flags describe."""
        c = self.config
        return optim.learning_rate_schedule(
            c.schedule,
            c.learning_rate,
            warmup_steps=c.warmup_steps,
            n_steps=c.n_steps,
            decay_from=c.decay_from,
        )

    def set_schedule(self, schedule: optax.Schedule) -> None:
        """Take the learning rate from `schedule`. Only before the first step, which compiles it."""
        self.schedule = schedule
        self.optimizer = self.make_optimizer(schedule)

    def learning_rate(self, n_updates: int) -> float:
        """The learning rate of the update after `n_updates` of them."""
        return np.asarray(self.schedule(n_updates)).item()

    def create_state(self) -> TrainState:
        """Create the state before the first step on all devices."""
        return parallel.create_sharded(self.initial_state, self.mesh)

    def update_for(self, batch: Any) -> Callable[..., tuple[TrainState, StepReport]]:
        """Return the compiled step for the next batch, if not all steps are of one program."""
        return self.update

    def train_step(self, batch: Any) -> StepReport:
        """Dispatch one update with one item of `batches`. The report is still being computed."""
        batch = parallel.shard_batch(batch, self.mesh)
        update = self.update_for(batch)
        self.state, report = update(self.state, batch, self.train_key, *self.frozen)
        self.step += 1
        self.position += 1
        return report

    # --- a run, in the order of time --------------------------------------------------------------

    def fit(self, n_steps: int | None = None) -> None:
        """Train to step `n_steps`, by default the configured one. Leaves metrics, image grids and
        checkpoints in the run's folder.

        Raises:
            RunError: the loss stays non-finite after several rollbacks, or images of the trained
                model are not finite.
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, once a checkpoint is written.
        """
        c = self.config
        last = c.n_steps if n_steps is None else n_steps
        require_even_batches(c, parallel.devices().count)
        self.prepare()
        with catch_stop_signals() as stop, open_session(self, last) as session:
            for notice in self.source.notices:
                session.tracker.message(notice)
            session.tracker.message(self.start_message(last))
            session.begin()
            for batch in session.batches():
                report = self.train_step(batch)
                # Fetch step k's metrics only after step k + 1 is dispatched: fetching them now
                # would idle the device.
                if not session.fetch_pending():
                    continue
                session.add_pending(report, stop)

                leaving = session.is_leaving(stop)
                evaluate = self.step % c.eval_save_steps == 0 or self.step == last
                sample = self.step % c.sample_every_n == 0 and not leaving
                measure = self.measurement_is_due(last) and not leaving
                snapshot = self.snapshot_is_due(last)
                if evaluate or sample or measure or leaving or snapshot:
                    if not session.fetch_pending():
                        continue
                    with session.throughput.paused():
                        if snapshot:
                            session.save_snapshot()
                        if evaluate:
                            session.tracker.log(self.step, self.evaluate())
                        if evaluate or leaving:
                            session.save(required=leaving or self.step == last)
                        if sample:
                            session.save_image_grid(f"{self.step:07d}.png")
                        if measure:
                            session.measure(stop)
                if leaving:
                    break
            else:
                session.save_image_grid("final.png", trajectory=True)
                session.save_figures()
                if session.not_finite:
                    raise RunError(
                        f"the run has ended, but its model is broken: {session.not_finite}; a "
                        "lower --learning_rate may help"
                    )
                session.tracker.message(self.end_message())
        stop.raise_exit()

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step into the run's folder, and wait for it."""
        with open_session(self, self.step) as session:
            session.save(required=True)

    def checkpoint_items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays of a checkpoint, and the notes beside them."""
        notes = {"config": self.describe().as_json(), "data": {"n_rows": self.source.n_train_rows}}
        return training_step.as_items(self.state), notes

    def snapshot_items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The averages to make others of, and what they are averages of."""
        n_updates = int(self.state.n_updates)
        profiles = {"ema_std": list(self.config.ema_std), "n_updates": n_updates}
        return {"power_ema": self.state.power_ema}, {PROFILES_ITEM: profiles}

    def _abstract_items(self) -> dict[str, Any]:
        """Shapes and shardings of a checkpoint's arrays."""
        return training_step.as_items(parallel.abstract_state(self.initial_state, self.mesh))

    def _restore_or_create(self, create: Callable[[], TrainState], *, resume: bool) -> None:
        """Restore the newest checkpoint of a resumed run; without one, create the state."""
        if resume and Checkpoints.exist(self.run_dir):
            self.restore()
        else:
            self.state = create()

    def restore(self, step: int | None = None) -> None:
        """Restore one of the run's checkpoints, by default the newest complete one.

        Raises:
            UserError: there is none, it cannot be read, or the dataset has changed since.
        """
        with Checkpoints(self.run_dir, read_only=True) as checkpoints:
            if step is None:
                step, items, self.damaged = checkpoints.restore_newest(self._abstract_items())
            else:
                items = checkpoints.restore(checkpoints.resolve_step(step), self._abstract_items())
                items["data"] = checkpoints.read_metadata(step, "data")
        saved_rows = items["data"]["n_rows"]
        n_rows = self.source.n_train_rows
        if saved_rows != n_rows:
            raise UserError(
                f"cannot resume: {self.dataset.name} had {saved_rows} training rows, now it has "
                f"{n_rows}; make them the same, or start a new run by --init_from {self.run_dir}"
            )
        self._set_state(training_step.from_items(items))

    def roll_back(self, checkpoints: Checkpoints, step: int, *, position: int) -> None:
        """Restore the checkpoint of `step`, or the initial state if it is 0, and continue with the
        batch at `position`.
        """
        if step:
            items = checkpoints.restore(step, self._abstract_items())
            state = training_step.from_items(items)
        else:
            state = self.create_state()
        moved = parallel.replicate(np.int32(position), self.mesh)
        self._set_state(dataclasses.replace(state, position=moved))

    def _set_state(self, state: TrainState) -> None:
        self.state = state
        self.step = int(state.step)
        self.position = int(state.position)
