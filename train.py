"""Train a diffusion transformer with rectified flow, or by DDPM.

    python train.py --dataset_name cifar10

or, in a notebook,

    from train import Trainer, TrainConfig
    trainer = Trainer(TrainConfig(dataset_name="digits"))
    trainer.fit()
    trainer.sample(labels=[3, 7])

Start reading here: `Trainer.fit` is a run in the order of time; one step is `train_state.update`.
"""

import dataclasses
import math
from collections.abc import Generator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import UInt8
from PIL import Image

from data import caption_cache, text_encoders
from data.batch import Batch
from data.caption_cache import CaptionStore
from data.load import open_source
from data.pipeline import Pipeline
from data.rows import Source
from evaluation.during_training import TrainingFID
from inference import grids
from inference import labels as inference_labels
from inference.codec import Codec
from inference.sampler import Labels, SamplerConfig
from inference.sampler import sample_images as sample_images
from methods import rectified_flow
from model import ModelConfig, graphdef, init_params
from runtime import cli, parallel, processes, run_folder
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.signals import stopping
from training import device_dataset, display, flops, optim, warm_start
from training import step as training_step
from training.config import DEFAULTS, SHOWN_DEFAULTS, TrainConfig
from training.loop import begin, settings
from training.lr_range_test import N_STEPS, range_test
from training.profiling import profile
from training.resolve import (
    merge_saved,
    network,
    objective,
    reader,
    require_even_batches,
    require_same_latents,
    resolve,
    with_subject,
)
from training.session import open_session
from training.step import TrainState

__all__ = ["TrainConfig", "TrainState", "Trainer"]
DIGITS = TrainConfig()


class Trainer:
    """A data set, a model, its optimizer, and their state on all devices."""

    CONFIG: Any = TrainConfig
    COMMAND = run_folder.TRAIN
    SHOWS = "samples"  # the folder of `sheets`

    def __init__(self, config: TrainConfig = DIGITS):
        """Open the data, fill in the settings, create the state or restore it. Writes nothing, but
        captions that are not encoded yet are (into their cache, with a progress bar).

        Raises:
            UserError: settings or data that cannot work.
        """
        run_dir = self._folder(config, with_subject(config).dataset_name, config.model)
        config, saved = self._taken_up(config, run_dir)
        start = None
        if config.init_from and not saved:
            start = warm_start.read(config.init_from)
            config = warm_start.filled(config, start)
        self.source = _source(config)
        self.dataset = self.source.config
        if saved:
            require_same_latents(self.dataset.encoding, saved)
        platform, n_devices = jax.default_backend(), jax.device_count()
        n_rows = len(self.source.train)
        c = self.config = resolve(
            config, self.dataset, n_rows=n_rows, n_devices=n_devices, platform=platform
        )
        if not saved:  # a finished run may be sampled on any number of devices
            require_even_batches(c, n_devices)
        self.run_dir = run_dir or Path(
            processes.broadcast_from_first(lambda: str(run_folder.new(c.dataset_name, c.model)))
        )
        self.encoded = None
        if c.conditioning == "text":
            with processes.first_then_others():
                self.encoded = self._encode_captions(saved.get("text_revisions"))
        self.model_config = self._network(
            saved.get("model_config") or (vars(start.config) if start else {})
        )
        self.peak = flops.peak(
            jax.devices()[0].device_kind, self.model_config.dtype, peak_tflops=c.peak_tflops
        )
        self.mesh = parallel.make_mesh(c.fsdp)
        self.codec = None
        if self.dataset.encoding and not c.profile:
            with processes.first_then_others():
                self.codec = Codec.of(self.dataset.encoding, self.mesh, vae=c.vae)
        self.init_key, self.train_key, self.eval_key = jax.random.split(jax.random.key(c.seed), 3)
        how = {"warmup_steps": c.warmup_steps, "n_steps": c.n_steps}
        self.follow(optim.learning_rate_schedule(c.schedule, c.learning_rate, **how))
        self.step, self.position, self.damaged = 0, 0, []
        if saved and Checkpoints.exist(self.run_dir):
            self.restore()
        else:
            self.state = self._fresh_state(start)

    @classmethod
    def from_run(cls, run_dir: str | Path) -> Self:
        """The trainer of a run's folder at its newest checkpoint: to sample or to go on with.

        Raises:
            UserError: the folder is not a run, or has no complete checkpoint yet.
        """
        trainer = cls(cls.CONFIG(run_dir=Path(run_dir), resume=True))
        if not trainer.step:
            raise UserError(f"'{run_dir}' has no complete checkpoint yet")
        return trainer

    def _taken_up(self, config: TrainConfig, run_dir: Path | None) -> tuple[TrainConfig, Any]:
        """The settings and, of a run that goes on, those that it was saved with."""
        if not run_dir or not config.resume:
            return with_subject(config), {}
        saved = run_folder.read_config(run_dir)
        fsdp = math.gcd(saved["fsdp"], jax.device_count()) if config.fsdp is None else config.fsdp
        return with_subject(merge_saved(dataclasses.replace(config, fsdp=fsdp), saved)), saved

    def _network(self, before: dict[str, Any]) -> ModelConfig:
        """What is trained; `before` is the network it starts from, or goes on with."""
        config = network(self.config, self.dataset)
        if self.config.init_from:
            config = warm_start.beyond_flags(config, before)
        if e := self.encoded:
            widths = {"text_width": e.width, "pooled_width": e.pooled}
            config = dataclasses.replace(config, text_length=e.length, **widths)
        return config

    def follow(self, schedule: optax.Schedule) -> None:
        """Take the learning rate from it. Only before the first step, which compiles it."""
        c, self.schedule = self.config, schedule
        self.optimizer = optim.optimizer(
            schedule,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
        )

    def _folder(self, config: Any, dataset_name: str, model: str | None) -> Path | None:
        """The run's folder, where it is said or exists: the same in all processes."""

        def find() -> str:
            if config.resume and not config.run_dir:
                return str(run_folder.newest(dataset_name, model, command=self.COMMAND))
            if config.run_dir and not config.resume:
                run_folder.require_new(Path(config.run_dir))
            return str(config.run_dir or "")

        found = processes.broadcast_from_first(find)
        return Path(found) if found else None

    def _encode_captions(self, revisions: Sequence[str] | None) -> CaptionStore:
        c, splits = self.config, (self.source.train, self.source.eval)
        folder = c.caption_cache or caption_cache.default_folder(c.dataset_name, c.data_dir)
        texts = [words for split in splits for several in split.captions for words in several]
        if c.profile:
            texts = texts[: caption_cache.SHARD]  # a profile reads none of them
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
            in_memory=True if c.cache_on_device else c.in_memory,
            shuffle_buffer=c.shuffle_buffer,
            encoded=self.encoded,
            one_batch=c.overfit_batch,
        )

    @cached_property
    def yardstick(self) -> TrainingFID | None:
        """What this run's pictures are measured by on the way, if they are.

        Raises:
            UserError: the reference or Inception's weights are not there, or do not fit.
        """
        c, encoding, codec = self.config, self.dataset.encoding, self.codec
        if not c.fid_every or not c.fid_reference or c.profile:
            return None
        side = encoding.image_size if encoding else c.image_size
        channels = codec.config.out_channels if codec else c.channels
        return TrainingFID.open(
            c.fid_reference,
            self.mesh,
            space=c.fid_features,
            weights=c.inception,
            n=c.fid_n,
            shape=(side, side, channels),
        )

    def batches(self, start: int, stop: int) -> Generator[Any]:
        """What `train_step` takes, from one place in the order of all batches to another: this
        process's rows or, with `cache_on_device`, what they are drawn from.
        """
        if self.config.cache_on_device:
            return device_dataset.batches(self.data, self.mesh, start, stop)
        return self.data.train_batches(start, stop)

    # --- one step ---------------------------------------------------------------------------------

    def train_step(self, batch: Any) -> dict[str, Any]:
        """One asynchronous update with one of `batches`, and its unread report."""
        batch = parallel.place(batch, self.mesh)
        self.state, report = self.update(self.state, batch, self.train_key)
        self.step, self.position = self.step + 1, self.position + 1
        return report

    def objective(self, **how: Any) -> rectified_flow.Objective:
        """What is trained for, `loss(model, batch, key) -> (loss, metrics)`, as the settings say. A
        subclass may return another; `how` is for `objectives.draw`: `label_dropout`, which is 0 in
        an evaluation, and `read`.
        """
        return objective(self.config, **how)

    def _loss(self, *, label_dropout: float) -> rectified_flow.Objective:
        return self.objective(label_dropout=label_dropout, read=reader(self.dataset.encoding))

    @cached_property
    def update(self):
        c = self.config
        loss = self._loss(label_dropout=c.label_dropout)
        draw = partial(device_dataset.draw_batch, batch_size=c.batch_size, mesh=self.mesh)
        step = partial(
            training_step.update,
            draw=draw if c.cache_on_device else lambda batch, position: batch,
            value_and_grad=parallel.value_and_grad(
                loss,
                graphdef(self.model_config),
                self.mesh,
                accumulate_steps=c.accumulate_steps,
            ),
            optimizer=self.optimizer,
            ema_decay=c.ema_decay,
            log_every=c.log_every,
        )
        return jax.jit(step, donate_argnums=0)

    @cached_property
    def eval_loss(self):
        loss = self._loss(label_dropout=0.0)
        model = partial(nnx.merge, graphdef(self.model_config))
        return jax.jit(lambda params, batch, key: loss(model(params), batch, key)[0])

    def _initial_state(self) -> TrainState:
        params = init_params(self.model_config, self.init_key)
        c = self.config
        loss = self._loss(label_dropout=c.label_dropout)
        model = nnx.merge(graphdef(self.model_config), params)
        metrics = jax.eval_shape(lambda b: loss(model, b, self.train_key)[1], self.blank_batch())
        scaled = self.model_config.dtype == "float16"
        return training_step.first_state(params, self.optimizer, metrics, scaled=scaled)

    def _fresh_state(self, start: warm_start.Source | None = None) -> TrainState:
        """The state before the first step, with the weights of `init_from` if there is one."""
        state = parallel.create(self._initial_state, self.mesh)
        path = getattr(self.config, "init_from", None)  # which autoencoders do without
        if path is None:
            return state
        params, notices = warm_start.fitted(
            start or warm_start.read(path),
            self.model_config,
            self.dataset,
            lambda part: parallel.fetch(state.params[part]),
        )
        for notice in notices if processes.is_first() else ():
            print(f"--init_from: {notice}")
        # The fresh ones go first: devices then never hold more than while training.
        state = dataclasses.replace(state, params=None, ema=None)
        params = parallel.shard(params, self.mesh)
        # Copies: what may lie in the host's memory cannot be donated, nor one buffer for two.
        params = jax.tree.map(jnp.copy, params)
        return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))

    def blank_batch(self) -> Batch:
        """This process's part of a batch, with nothing in it."""
        n, m = self.config.batch_size // jax.process_count(), self.model_config
        # Of latents, means and log-variances.
        k, dtype = (2, np.float16) if self.dataset.encoding else (1, np.uint8)
        image = np.zeros((n, m.image_size, m.image_size, k * m.channels), dtype)
        label = self.encoded.blank(n) if self.encoded else np.zeros(n, np.int32)
        return Batch(row=np.arange(n, dtype=np.int32), image=image, label=label)

    # --- a run, in the order of time --------------------------------------------------------------

    def fit(self, n_steps: int | None = None) -> None:
        """Train to step `n_steps`, by default the configured one, leaving metrics, pictures and
        checkpoints in the run's folder.

        Raises:
            RunError: the loss stays not finite, also after returns to the last checkpoint.
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, once all is saved.
        """
        c, last = self.config, self.config.n_steps if n_steps is None else n_steps
        require_even_batches(c, jax.device_count())
        # Now: a missing file or a bad picture must end this before anything is written.
        _ = self.yardstick, self.data
        with stopping() as stop, open_session(self, last) as run:
            run.tracker.message(self.greeting(last))
            run.begin()
            for batch in run.batches():
                report = self.train_step(batch)
                # Step k's numbers are read only after step k + 1 is dispatched: reading them now
                # would idle the device.
                if not run.read():
                    continue
                run.dispatched(report, stop)

                leaving = run.asked_to_stop(stop)
                evaluate = self.step % c.eval_save_steps == 0 or self.step == last
                sample = self.step % c.sample_every_n == 0 and not leaving
                measure = self.measures(last) and not leaving
                if evaluate or sample or measure or leaving:
                    if not run.read():
                        continue
                    with run.throughput.paused():
                        if evaluate:
                            run.tracker.log(self.step, self.evaluate())
                        if evaluate or leaving:
                            run.save(required=leaving or self.step == last)
                        if sample:
                            run.show(f"{self.step:07d}.png")
                        if measure:
                            run.measure(stop)
                if leaving:
                    break
            else:
                run.show("final.png", gif=True)
                run.draw_records()
                run.tracker.message(self.farewell())
        stop.leave()

    def evaluate(self) -> dict[str, float]:
        """The averaged weights' loss on the evaluation split, always at the same (t, noise)."""
        losses = []
        for i, batch in enumerate(self.data.eval_batches(self.config.n_eval_batches)):
            batch = parallel.place(batch, self.mesh)
            losses.append(
                self.eval_loss(self.state.ema, batch, jax.random.fold_in(self.eval_key, i))
            )
        return {"eval_loss": float(np.mean(parallel.fetch(losses)))}

    def sample(
        self,
        labels: Sequence[int | str] | str,
        *,
        cfg_scale: float | None = None,
        n_steps: int | None = None,
        seed: int | Sequence[int] = 0,
        ema: bool = True,
        first: int = 0,
        trajectory: bool = False,
    ) -> np.ndarray:
        """Pictures of `labels` (numbers, names or captions), in about −1 … 1, from the averaged
        weights. Latents are decoded. The noise of each is that of its place, counted from `first`,
        and of the seed; or of a seed of its own.

        Returns float32 (b, h, w, c) or, with `trajectory`, every state from the noise to the
        result, (n_steps + 1, b, h, w, c).
        """
        scale = self.config.cfg_scale if cfg_scale is None else cfg_scale
        solution = sample_images(
            self.state.ema if ema else self.state.params,
            self.model_config,
            self._told(labels),
            sampler=self.sampler(n_steps),
            mesh=self.mesh,
            cfg_scale=float(scale),
            seed=seed,
            first=first,
            trajectory=trajectory,
            codec=self.codec,
        )
        return solution.x if solution.trajectory is None else solution.trajectory

    def measures(self, last: int) -> bool:
        """Whether pictures are measured after this step."""
        if self.yardstick is None:
            return False
        return self.step % self.config.fid_every == 0 or self.step == last

    def pictures(self, n: int, batch_size: int) -> Generator[UInt8[np.ndarray, "_b h w c"]]:
        """n pictures in batches, of every class by turns (or of every caption of the evaluation
        split), just as `evaluate.py` draws them from a checkpoint of this step.
        """
        labels: Sequence[int | str] = range(max(1, self.model_config.n_classes))
        if self.encoded:
            labels = [several[0] for several in self.source.eval.captions]
        for start in range(0, n, batch_size):
            # The last batch is filled up, so that all are one compiled program.
            places = np.minimum(np.arange(start, start + batch_size), n - 1) % len(labels)
            x = self.sample([labels[i] for i in places], first=start)
            yield grids.to_uint8(x[: n - start])

    def sampler(self, n_steps: int | None = None) -> SamplerConfig:
        """How this run's pictures are drawn, in the configured number of steps if none is said."""
        c = self.config
        return SamplerConfig(
            c.solver,
            c.n_sample_steps if n_steps is None else n_steps,
            shift=c.sample_shift or 1.0,
            prediction=c.prediction,
            clip=not self.dataset.encoding,
        )

    def sheets(self, *, trajectory: bool = False) -> list[Image.Image]:
        """What a person is shown of a run: a sheet of samples or, with `trajectory`, all states on
        its way from noise.
        """
        labels = display.labels(self)
        x = self.sample(labels, trajectory=trajectory)
        names = self.dataset.label_names
        return [display.sheet(state, labels, names) for state in (x if trajectory else [x])]

    def greeting(self, last: int) -> str:
        return display.greeting(self, last)

    def farewell(self) -> str:
        return display.farewell(self)

    @cached_property
    def flops_per_image(self) -> float | None:
        """Of training, where they can be counted."""
        if self.model_config.block not in flops.COUNTED:
            return None
        forward = sum(flops.flops_by_module(self.model_config).values())
        return flops.TRAIN_PER_FORWARD * forward

    def export(self) -> None:
        """What is written beside every checkpoint: nothing."""

    def _told(self, labels: Sequence[int | str] | str) -> Labels:
        """What the model is told of pictures with these labels or captions."""
        labels = [labels] if isinstance(labels, str) else labels
        if not self.encoded or not len(labels):
            names, n_classes = self.dataset.label_names, self.model_config.n_classes
            return inference_labels.label_ids(labels, names, n_classes)
        words = [str(label) for label in labels]
        if all(word in self.encoded for word in words):
            return self.encoded(self.encoded.ids(words))
        towers, revisions = self.config.text_towers, self.encoded.revisions
        return text_encoders.encode(words, towers, revisions, length=self.encoded.length)

    def model(self, ema: bool = True) -> nnx.Module:
        """The live model, `model(x, t, label)`, with averaged or raw weights."""
        # A copy, because the next update gives the buffers of the state away.
        params = jax.tree.map(jnp.copy, self.state.ema if ema else self.state.params)
        return nnx.merge(graphdef(self.model_config), params)

    def save(self) -> None:
        """Write a checkpoint of this step into the run's folder, and wait for it."""
        with open_session(self, self.step) as run:
            run.save(required=True)

    def items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds: arrays, and notes about them."""
        notes = {"config": self.describe(), "data": {"n_rows": len(self.source.train)}}
        return training_step.as_items(self.state), notes

    def restore(self, step: int | None = None) -> None:
        """Take the state of one of the run's checkpoints, by default the newest that is whole.

        Raises:
            UserError: there is none, it cannot be read, or the data have changed since.
        """
        like = training_step.as_items(parallel.abstract(self._initial_state, self.mesh))
        with Checkpoints(self.run_dir, read_only=True) as checkpoints:
            if step is None:
                step, items, self.damaged = checkpoints.restore_newest(like)
            else:
                items = checkpoints.restore(checkpoints.pick(step), like)
            position, n_rows = checkpoints.note(step, "data"), len(self.source.train)
        if position["n_rows"] != n_rows:
            raise UserError(
                f"cannot resume: {self.dataset.name} had {position['n_rows']} training rows, "
                f"now it has {n_rows}"
            )
        self._take(training_step.from_items(items))

    def go_back(self, checkpoints: Checkpoints, step: int, *, position: int) -> None:
        """Take the state of a checkpoint, or of the start, and go on with other batches from
        there.
        """
        if step:
            like = training_step.as_items(parallel.abstract(self._initial_state, self.mesh))
            state = training_step.from_items(checkpoints.restore(step, like))
        else:
            state = self._fresh_state()
        moved = parallel.replicate(np.int32(position), self.mesh)
        self._take(dataclasses.replace(state, position=moved))

    def _take(self, state: TrainState) -> None:
        self.state, self.step, self.position = state, int(state.step), int(state.position)

    def describe(self) -> dict[str, Any]:
        """What `config.json` holds: every setting, the model's shape and the facts of the data."""
        return settings(self.config) | {
            "run_dir": str(self.run_dir),
            "model_config": dataclasses.asdict(self.model_config),
            "dataset": dataclasses.asdict(self.dataset),
            "text_revisions": self.encoded.revisions if self.encoded else (),
            "yardstick": self.yardstick.card if self.yardstick else None,
        }


def _source(c: TrainConfig) -> Source:
    return open_source(
        c.dataset_name,
        data_dir=c.data_dir,
        image_column=c.image_column,
        label_column=c.label_column,
        conditioning=c.conditioning,
        caption_column=c.caption_column,
        templates=c.caption or (),
        image_size=c.image_size,
        channels=None if c.profile else c.channels,  # a profile reads no pictures
        streaming=c.streaming or DEFAULTS["streaming"],
        latents_dir=c.latents,
    )


def main() -> None:
    config = cli.parse(TrainConfig, filled=SHOWN_DEFAULTS)
    begin(config)
    trainer = Trainer(config)
    if config.profile or config.lr_range_test:
        n_steps = N_STEPS if config.lr_range_test is True else config.lr_range_test
        report = range_test(trainer, n_steps) if n_steps else profile(trainer)
        if processes.is_first():
            print(report)
    else:
        trainer.fit()
    processes.wait_for_all("the end")


if __name__ == "__main__":
    cli.run(main, processes.leave)
