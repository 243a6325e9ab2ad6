"""Train a diffusion transformer with rectified flow.

    python train.py --dataset_name cifar10

or, in a notebook,

    from train import Trainer, TrainConfig
    trainer = Trainer(TrainConfig(dataset_name="digits"))
    trainer.fit()
    trainer.sample(labels=[3, 7])

Start reading here: `update` is one step, `Trainer.fit` is a run in the order of time.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Key

import captions
import cli
import generate
import images
import optim
import parallel
import profiling
import run_folder
import showcase
import text
import tracking
from captions import CaptionStore
from checkpoint import Checkpoints
from errors import RunError, UserError
from interrupts import stopping
from model import graphdef, init_params
from pipeline import Batch, Pipeline
from sources import open_source
from tracking import Throughput, Tracker
from train_config import (
    DEFAULTS,
    FILLED,
    TrainConfig,
    network,
    objective,
    require_even_batches,
    resolve,
    take_up,
)
from train_profile import profile

__all__ = ["TrainConfig", "TrainState", "Trainer"]
DIGITS = TrainConfig()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint needs to go on bit for bit."""

    step: Array
    params: Any
    ema: Any
    opt_state: Any
    window: dict[str, Array]  # sums of the metrics over the steps since the last log line


def update(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    value_and_grad: Callable,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    log_every: int,
) -> tuple[TrainState, dict[str, Any]]:
    """One step: gradients, clipped AdamW, EMA. Returns the new state and the step's report."""
    step_key = jax.random.fold_in(key, state.step)
    (loss, metrics), grads = value_and_grad(state.params, batch, step_key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optim.update_ema(state.ema, params, optim.ema_decay_at(state.step, ema_decay))

    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads), "steps": jnp.ones(())}
    first = state.step % log_every == 0
    window = jax.tree.map(lambda w, m: jnp.where(first, 0, w) + m, state.window, metrics)
    report = {
        "finite": jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"]),
        "window": window,
        "param_norm": optax.tree.norm(params),
        "update_norm": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, ema, opt_state, window), report


@dataclass
class Run:
    """What `fit` holds open, and the step whose report it has not read yet."""

    tracker: Tracker
    checkpoints: Checkpoints
    throughput: Throughput
    unread: tuple[int, dict[str, Any]] | None = None


class Trainer:
    """A data set, a model, its optimizer, and their state on all devices."""

    def __init__(self, config: TrainConfig = DIGITS):
        """Open the data, fill in the settings, create the state or restore it. Writes nothing, but
        captions that are not encoded yet are (into their cache, with a progress bar).

        Raises:
            UserError: settings or data that cannot work.
        """
        dataset_name = config.dataset_name or DEFAULTS["dataset_name"]
        run_dir, saved = config.run_dir and Path(config.run_dir), None
        if config.resume:
            run_dir = run_dir or run_folder.newest(dataset_name, config.model)
            saved = run_folder.read_config(run_dir)
            config = take_up(config, saved)
        elif run_dir:
            run_folder.require_new(run_dir)
        self.source = open_source(
            config.dataset_name or dataset_name,
            data_dir=config.data_dir,
            image_column=config.image_column,
            label_column=config.label_column,
            conditioning=config.conditioning,
            caption_column=config.caption_column,
            templates=config.caption or (),
            image_size=config.image_size,
            channels=None if config.profile else config.channels,  # a profile reads no pictures
        )
        self.dataset = self.source.config
        platform, n_devices = jax.default_backend(), jax.device_count()
        n_rows = len(self.source.train)
        c = self.config = resolve(
            config, self.dataset, n_rows=n_rows, n_devices=n_devices, platform=platform
        )
        if not saved:  # a finished run may be sampled on any number of devices
            require_even_batches(c, n_devices)
        self.run_dir = run_dir or run_folder.new(c.dataset_name, c.model)
        self.model_config = network(c, self.dataset, platform)
        self.encoded = None
        if c.conditioning == "text":
            self.encoded = self._encode_captions(saved["text_revisions"] if saved else None)
            self.model_config = dataclasses.replace(
                self.model_config,
                text_length=self.encoded.length,
                text_width=self.encoded.width,
                pooled_width=self.encoded.pooled,
            )
        self.peak = profiling.peak(
            jax.devices()[0].device_kind, self.model_config.dtype, peak_tflops=c.peak_tflops
        )
        self.mesh = parallel.make_mesh(c.fsdp)
        self.init_key, self.train_key, self.eval_key = jax.random.split(jax.random.key(c.seed), 3)
        self.schedule = optim.learning_rate_schedule(
            c.schedule, c.learning_rate, warmup_steps=c.warmup_steps, n_steps=c.n_steps
        )
        self.optimizer = optim.optimizer(
            self.schedule,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
        )
        if saved and Checkpoints.exist(self.run_dir):
            self.restore()
        else:
            self.step = 0
            self.state = parallel.create(self._initial_state, self.mesh)

    @classmethod
    def from_run(cls, run_dir: str | Path) -> "Trainer":
        """The trainer of a run's folder at its newest checkpoint: to sample or to go on with.

        Raises:
            UserError: the folder is not a run, or has no complete checkpoint yet.
        """
        # On fewer devices than it was trained on, fewer share the weights.
        fsdp = math.gcd(run_folder.read_config(Path(run_dir))["fsdp"], jax.device_count())
        trainer = cls(TrainConfig(run_dir=Path(run_dir), resume=True, fsdp=fsdp))
        if not trainer.step:
            raise UserError(f"'{run_dir}' has no complete checkpoint yet")
        return trainer

    def _encode_captions(self, revisions: Sequence[str] | None) -> CaptionStore:
        c, splits = self.config, (self.source.train, self.source.eval)
        folder = c.caption_cache or captions.default_folder(c.dataset_name, c.data_dir)
        texts = [words for split in splits for several in split.captions for words in several]
        if c.profile:
            texts = texts[: captions.SHARD]  # a profile reads none of them
        how = {"revisions": revisions, "most": c.text_length}
        return CaptionStore.open(folder, texts, c.text_towers, **how)

    @cached_property
    def data(self) -> Pipeline:
        """The batches. A small set is decoded here, once."""
        c = self.config
        return Pipeline(
            self.source,
            batch_size=c.batch_size,
            seed=c.seed,
            process_index=jax.process_index(),
            n_processes=jax.process_count(),
            n_workers=c.n_workers,
            in_memory=c.in_memory,
            encoded=self.encoded,
        )

    # --- one step ---------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One asynchronous update with this process's rows of a batch, and its unread report."""
        batch = parallel.place(batch, self.mesh)
        self.state, report = self.update(self.state, batch, self.train_key)
        self.step += 1
        return report

    @cached_property
    def update(self):
        loss = objective(self.config, label_dropout=self.config.label_dropout)
        step = partial(
            update,
            value_and_grad=parallel.value_and_grad(loss, graphdef(self.model_config), self.mesh),
            optimizer=self.optimizer,
            ema_decay=self.config.ema_decay,
            log_every=self.config.log_every,
        )
        return jax.jit(step, donate_argnums=0)

    @cached_property
    def eval_loss(self):
        loss = objective(self.config, label_dropout=0.0)
        model = partial(nnx.merge, graphdef(self.model_config))
        return jax.jit(lambda params, batch, key: loss(model(params), batch, key)[0])

    def _initial_state(self) -> TrainState:
        params = init_params(self.model_config, self.init_key)
        loss = objective(self.config, label_dropout=self.config.label_dropout)
        model = nnx.merge(graphdef(self.model_config), params)
        metrics = jax.eval_shape(lambda b: loss(model, b, self.train_key)[1], self.blank_batch())
        window = {name: jnp.zeros(metric.shape) for name, metric in metrics.items()}
        window |= {name: jnp.zeros(()) for name in ("loss", "grad_norm", "steps")}
        # The average starts as a copy: one buffer in two places of the state cannot be donated.
        ema = jax.tree.map(jnp.copy, params)
        opt_state = self.optimizer.init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state, window)

    def blank_batch(self) -> Batch:
        """This process's part of a batch, with nothing in it."""
        n, m = self.config.batch_size // jax.process_count(), self.model_config
        image = np.zeros((n, m.image_size, m.image_size, m.channels), np.uint8)
        label = self.encoded.blank(n) if self.encoded else np.zeros(n, np.int32)
        return Batch(row=np.arange(n, dtype=np.int32), image=image, label=label)

    # --- a run, in the order of time --------------------------------------------------------------

    def fit(self, n_steps: int | None = None) -> None:
        """Train to step `n_steps`, by default the configured one, leaving metrics, pictures and
        checkpoints in the run's folder.

        Raises:
            RunError: the loss is not finite.
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, once all is saved.
        """
        c, last = self.config, self.config.n_steps if n_steps is None else n_steps
        require_even_batches(c, jax.device_count())
        _ = self.data  # decoded now: a bad picture must end this before anything is written
        with stopping() as stop, self._open(last) as run:
            run.tracker.message(showcase.greeting(self, last))
            for batch in self._batches(run, last):
                report = self.train_step(batch)
                # Step k's numbers are read only after step k + 1 is dispatched: reading them now
                # would idle the device.
                self._read(run)
                run.unread = self.step, report

                evaluate = self.step % c.eval_save_steps == 0 or self.step == last
                sample = self.step % c.sample_every_n == 0 and not stop
                if evaluate or sample or stop:
                    self._read(run)
                    with run.throughput.paused():
                        if evaluate:
                            run.tracker.log(self.step, self.evaluate())
                        if evaluate or stop:
                            self._save(run)
                        if sample:
                            self._show(run, f"{self.step:07d}.png")
                if stop:
                    break
            else:
                self._show(run, "final.png", gif=True)
                run.tracker.message(showcase.farewell(self))
        stop.leave()

    def evaluate(self) -> dict[str, float]:
        """The averaged weights' loss on the evaluation split, always at the same (t, noise)."""
        losses = []
        for i, batch in enumerate(self.data.eval_batches(self.config.n_eval_batches)):
            batch = parallel.place(batch, self.mesh)
            losses.append(
                self.eval_loss(self.state.ema, batch, jax.random.fold_in(self.eval_key, i))
            )
        return {"eval_loss": float(np.mean(jax.device_get(losses)))}

    def sample(
        self,
        labels: Sequence[int | str] | str,
        *,
        cfg_scale: float | None = None,
        n_steps: int | None = None,
        seed: int = 0,
        ema: bool = True,
        trajectory: bool = False,
    ) -> np.ndarray:
        """Pictures of `labels` (numbers, names or captions), in about −1 … 1, from the averaged
        weights.

        Returns float32 (b, h, w, c) or, with `trajectory`, every state from the noise to the
        result, (n_steps + 1, b, h, w, c).
        """
        c = self.config
        n_steps = c.n_sample_steps if n_steps is None else n_steps
        solution = generate.sample(
            self.state.ema if ema else self.state.params,
            self.model_config,
            self._told(labels),
            sampler=generate.Sampler(c.solver, n_steps, c.sample_shift),
            mesh=self.mesh,
            cfg_scale=float(c.cfg_scale if cfg_scale is None else cfg_scale),
            seed=seed,
            trajectory=trajectory,
        )
        return solution.x if solution.trajectory is None else solution.trajectory

    def _told(self, labels: Sequence[int | str] | str) -> generate.Labels:
        """What the model is told of pictures with these labels or captions."""
        labels = [labels] if isinstance(labels, str) else labels
        if not self.encoded or not len(labels):
            names, n_classes = self.dataset.label_names, self.model_config.n_classes
            return generate.label_ids(labels, names, n_classes)
        words = [str(label) for label in labels]
        if all(word in self.encoded for word in words):
            return self.encoded(self.encoded.ids(words))
        towers, revisions = self.config.text_towers, self.encoded.revisions
        return text.encode(words, towers, revisions, length=self.encoded.length)

    def model(self, ema: bool = True) -> nnx.Module:
        """The live model, `model(x, t, label)`, with averaged or raw weights."""
        # A copy, because the next update gives the buffers of the state away.
        params = jax.tree.map(jnp.copy, self.state.ema if ema else self.state.params)
        return nnx.merge(graphdef(self.model_config), params)

    def save(self) -> None:
        """Write a checkpoint of this step into the run's folder, and wait for it."""
        with self._open(self.step) as run:
            self._save(run)

    def restore(self, step: int | None = None) -> None:
        """Take the state of one of the run's checkpoints, the newest by default.

        Raises:
            UserError: there is none, it cannot be read, or the data have changed since.
        """
        like = parallel.abstract(self._initial_state, self.mesh)
        with Checkpoints(self.run_dir, read_only=True) as checkpoints:
            step = checkpoints.pick(step)
            position, n_rows = checkpoints.note(step, "data"), len(self.source.train)
            if position["n_rows"] != n_rows:
                raise UserError(
                    f"cannot resume: {self.dataset.name} had {position['n_rows']} training rows, "
                    f"now it has {n_rows}"
                )
            self.state = from_items(checkpoints.restore(step, as_items(like)))
        self.step = step

    # --- what happens on the way ------------------------------------------------------------------

    @contextmanager
    def _open(self, last: int) -> Iterator[Run]:
        """The run's folder, locked, with its configuration written."""
        run_folder.make(self.run_dir)
        with (
            run_folder.locked(self.run_dir),
            Checkpoints(self.run_dir, keep=self.config.keep_checkpoints) as checkpoints,
            Tracker(self.run_dir, start_step=self.step, n_steps=last) as tracker,
        ):
            run_folder.write_config(self.run_dir, self.describe())
            yield Run(tracker, checkpoints, Throughput())

    def describe(self) -> dict[str, Any]:
        """What `config.json` holds: every setting, the model's shape and the facts of the data."""
        settings = {
            name: str(v) if isinstance(v, Path) else v for name, v in vars(self.config).items()
        }
        return settings | {
            "run_dir": str(self.run_dir),
            "model_config": dataclasses.asdict(self.model_config),
            "dataset": dataclasses.asdict(self.dataset),
            "text_revisions": self.encoded.revisions if self.encoded else (),
        }

    def _batches(self, run: Run, last: int) -> Iterator[Batch]:
        """The batches up to step `last`. Bad data ends the run, but what it has is saved first."""
        with closing(self.data.train_batches(self.step, last)) as batches:
            try:
                yield from batches
            except UserError:
                self._read(run)  # or a step that went wrong would be saved
                self._save(run)
                raise

    def _read(self, run: Run) -> None:
        """Wait for the unread step, stop if it went wrong, log it if it is its turn."""
        if run.unread is None:
            return
        (step, report), run.unread = run.unread, None
        if not report["finite"]:
            raise RunError(
                f"the loss or its gradient is not finite at step {step}; "
                f"the last good checkpoint is step {run.checkpoints.latest()}; "
                f"the batch's rows of the training split are {self.data.rows(step - 1).tolist()}"
            )
        run.throughput.step(self.config.batch_size)
        run.tracker.advance(step)
        if step % self.config.log_every == 0:
            rate = np.asarray(self.schedule(step - 1)).item()
            line = tracking.summary(jax.device_get(report)) | {"learning_rate": rate}
            run.tracker.log(step, line | self._rates(run))

    def _rates(self, run: Run) -> dict[str, float]:
        """Images per second, seconds per step and, where the device's peak is known, MFU."""
        rates = run.throughput.take()
        if rates and self.peak and self.model_config.block in profiling.COUNTED:
            forward = sum(profiling.flops_by_module(self.model_config).values())
            per_device = rates["images_per_second"] / jax.device_count()
            flops_per_second = profiling.TRAIN_PER_FORWARD * forward * per_device
            rates["mfu"] = flops_per_second / self.peak.flops_per_second
        return rates

    def _save(self, run: Run) -> None:
        notes = {"config": self.describe(), "data": {"n_rows": len(self.source.train)}}
        run.checkpoints.save(self.step, as_items(self.state), notes)

    def _show(self, run: Run, name: str, *, gif: bool = False) -> None:
        """A sheet of samples in samples/ and TensorBoard and, with `gif`, its way from noise."""
        labels, folder = showcase.labels(self), self.run_dir / "samples"
        states = self.sample(labels, trajectory=True) if gif else [self.sample(labels)]
        sheets = [showcase.sheet(x, labels, self.dataset.label_names) for x in states]
        images.save_png(sheets[-1], folder / name)
        if gif:
            images.save_gif(sheets, folder / "trajectory.gif")
        run.tracker.image(self.step, "samples", sheets[-1])


def as_items(state: TrainState) -> dict[str, Any]:
    """A state as the items of a checkpoint."""
    optimizer = {"step": state.step, "opt_state": state.opt_state, "window": state.window}
    return {"params": state.params, "ema": state.ema, "optimizer": optimizer}


def from_items(items: dict[str, Any]) -> TrainState:
    """The inverse of `as_items`."""
    return TrainState(params=items["params"], ema=items["ema"], **items["optimizer"])


def main() -> None:
    config = cli.parse(TrainConfig, filled=FILLED)
    # Compiled programs are kept for the next start. Here, because importing must not change JAX.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dit-jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    trainer = Trainer(config)
    if config.profile:
        print(profile(trainer))
    else:
        trainer.fit()


if __name__ == "__main__":
    cli.run(main)
