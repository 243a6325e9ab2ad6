"""Train a diffusion transformer with rectified flow, MeanFlow or DDPM.

    python train.py --dataset_name cifar10

or, in a notebook,

    from train import Trainer, TrainConfig
    trainer = Trainer(TrainConfig(dataset_name="digits"))
    trainer.fit()
    trainer.sample(labels=[3, 7])

Start reading here. `training.prepare.prepare` decides everything before a device is used; the
trainer adds devices and the state. The run itself is `training.loop.Loop.fit`; one step is
`training.step.update`.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image

from data.batch import Batch
from evaluation.during_training import TrainingFID
from inference import grids
from inference.codec import Codec
from inference.guidance import untrained_null_error
from inference.sampler import SamplerConfig, sample_images
from inference.spaces import space_of
from methods.method import Loss
from methods.rectified_flow import Flow
from methods.registry import class_path
from model import ModelConfig, model_graphdef
from networks.lora import split_adapter
from networks.power_ema import gamma_of_std
from runtime import cli, parallel, processes, run_folder
from runtime.errors import UserError
from runtime.image_size import ImageSize
from training import adapters, display, flops, mup, optim, warm_start
from training import step as training_step
from training.alignment import (
    Alignment,
    open_encoder,
    require_same_encoder,
    without_alignment,
)
from training.auxiliary import with_auxiliary
from training.config import TrainConfig
from training.loop import Loop, flags_as_json, initialize_jax
from training.lr_range_test import N_STEPS, range_test
from training.muon import muon
from training.prepare import prepare
from training.profiling import profile
from training.resolve import require_same_implementation, sampler_config
from training.routing import with_routing
from training.session import RunRecord
from training.step import PROJECTOR, TrainState
from training.teacher import Teacher, open_teacher, taught_by

__all__ = ["TrainConfig", "TrainState", "Trainer"]
DIGITS = TrainConfig()


class Trainer(Loop):
    """A run that trains a diffusion transformer: dataset, model, optimizer, and their state on all
    devices.
    """

    CONFIG = TrainConfig
    COMMAND = run_folder.TRAIN_COMMAND
    GRID_FOLDER = "samples"

    def __init__(self, config: TrainConfig = DIGITS):
        """Open the dataset, fill in the config, and create or restore the state. Writes nothing
        but the cache of encoded captions, with a progress bar.

        Raises:
            UserError: flags or a dataset that cannot work.
        """
        super().__init__(config)
        prepared = prepare(config, parallel.devices())
        self.config: TrainConfig = prepared.config
        now = {"trainer": self.trainer_path(), "method": class_path(type(prepared.method))}
        for key, path in now.items():
            require_same_implementation(prepared.run_dir, prepared.saved, key, path)
        self.given_flags, self.run_dir = prepared.given_flags, prepared.run_dir
        self.source, self.dataset = prepared.source, prepared.source.config
        self.buckets = prepared.buckets
        self.method, self.conditioning = prepared.method, prepared.conditioning
        if self.buckets and isinstance(self.method, Flow):
            self.method = replace(self.method, area=math.prod(self.dataset.size.sides))
        self.encoded = prepared.conditioning.store
        self.model_config = prepared.network
        # A network, which differs by its shape alone → its programs.
        self._update_of = cache(partial(self._compile_step, None))
        self._eval_loss_of = cache(self._compile_eval_loss)
        self.keeps_snapshots = bool(self.config.ema_std)
        self.null_is_trained = prepared.null_is_trained
        self._open_devices()
        reference = self.config.align
        self.alignment = self._open_alignment(reference, prepared.saved) if reference else None
        self.base = self._open_base(prepared.weights, prepared.saved)
        keys = jax.random.split(jax.random.key(self.config.seed), 3)
        self.init_key, self.train_key, self.eval_key = keys
        self.set_schedule(self.configured_schedule())
        create = partial(self.create_state, prepared.weights)
        self._restore_or_create(create, resume=bool(prepared.saved))

    def _open_devices(self) -> None:
        """Make the mesh, and load the codec of latents onto it."""
        c = self.config
        self.peak = flops.device_peak(
            parallel.devices().kind, self.model_config.dtype, peak_tflops=c.peak_tflops
        )
        self.mesh = parallel.make_mesh(c.fsdp)
        load = partial(Codec.from_encoding, mesh=self.mesh, vae=c.vae)
        self.space = space_of(self.dataset.encoding, load)
        if not c.profile:
            with processes.first_then_others():
                self.space.open()
        self._fid: TrainingFID | None = None
        self.teacher: Teacher | None = None
        if c.teacher:
            self.teacher = open_teacher(
                c.teacher,
                c.teacher_scale,
                network=self.model_config,
                conditioning=self.conditioning,
                space=self.space,
                fsdp=c.fsdp,
            )
            if self.buckets and self.teacher.network.position == "learned":
                raise UserError(
                    f"--teacher {c.teacher}: its positions are learned, for images of one shape; "
                    "train without --buckets"
                )
            self.frozen = ({"frozen": self.teacher.weights},)
            taught = {"teacher": self.teacher.reference, "teacher_scale": self.teacher.scale}
            self._complete_flag("teacher", taught)
            if processes.is_first():
                print(f"--teacher: {self.teacher.reference}, guided at {self.teacher.scale:g}")

    def _open_base(
        self, weights: warm_start.StartingWeights | None, saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Place the frozen weights of adapters (LoRA) on the devices. Empty without adapters."""
        network = self.model_config
        if not network.lora:
            return {}
        if weights is None:  # only a profile may come without a base
            base = adapters.random_base(network, self.mesh)
        else:
            opened = adapters.open_base(weights, network, saved.get("base_hash"))
            base, self.base_hash = parallel.shard_params(opened.params, self.mesh), opened.hash
            self._complete_flag("init_from", {"init_from": weights.reference})
        (others,) = self.frozen or ({},)
        self.frozen = ({**others, "base": base},)
        return base

    def _complete_flag(self, flag: str, values: dict[str, Any]) -> None:
        """Complete a flag, and what follows from it, by what was found: a run by its step."""
        self.config = replace(self.config, **values)
        if self.given_flags and flag in self.given_flags:
            self.given_flags |= values

    def _open_alignment(self, reference: str, saved: Mapping[str, Any]) -> Alignment:
        """Open the encoder of `--align`, and record which it is."""
        c, network = self.config, self.model_config
        encoder = open_encoder(reference, network=network, space=self.space, mesh=self.mesh)
        require_same_encoder(encoder, saved)
        self.frozen = ({"frozen": encoder.weights},)
        self._complete_flag("align", {"align": encoder.reference})
        alignment = Alignment(
            encoder,
            network,
            to_input=self.space.read,
            block=c.align_at,
            weight=c.align_weight,
            end=max(1, round(c.align_until * c.n_steps)),
        )
        if processes.is_first():
            print(f"--align: {encoder.reference}, until step {alignment.end}")
        return alignment

    def make_optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        c = self.config
        return self._clipped_adamw(
            schedule,
            blocks=self.block_optimizer(schedule) if c.optimizer == "muon" else None,
            factors=mup.step_factors(mup.adamw_factor, self.model_config, c.mup),
        )

    def _clipped_adamw(self, schedule: optax.Schedule, **rules: Any) -> Any:
        c = self.config
        return optim.clipped_adamw(
            schedule,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
            moments=c.moments,
            **rules,
        )

    def block_optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Make Muon. Its products are in bfloat16 if the network's are."""
        is_half = self.model_config.dtype == "bfloat16"
        return muon(
            schedule,
            weight_decay=self.config.weight_decay,
            dtype=jnp.bfloat16 if is_half else jnp.float32,
            distribute=partial(parallel.spread_rows, mesh=self.mesh),
            factors=mup.step_factors(mup.muon_factor, self.model_config, self.config.mup),
        )

    def initial_state(self) -> TrainState:
        params = mup.init_params(self.model_config, self.config.mup, self.init_key)
        graphdef, parts, frozen = model_graphdef(self.model_config), {}, []
        if self.alignment:
            graphdef = self.alignment.graphdef
            parts = {PROJECTOR: self.alignment.init_projector(self.init_key)}
            frozen = [self.alignment.encoder.merge()]
        elif self.teacher:
            frozen = [self.teacher.merge()]
        loss = self.training_loss()
        model = nnx.merge(graphdef, params | parts)
        metrics = jax.eval_shape(
            lambda b: loss(model, b, self.train_key, *frozen)[1], self.blank_batch()
        )
        scaled = self.model_config.dtype == "float16"
        if lora := self.model_config.lora:
            params, _ = split_adapter(params, lora)
        return training_step.initial_state(
            params,
            self.optimizer,
            metrics,
            scaled=scaled,
            n_averages=len(self.config.ema_std),
            projector=parts.get(PROJECTOR),
            projector_optimizer=self._clipped_adamw(self.schedule),
        )

    def create_state(self, weights: warm_start.StartingWeights | None = None) -> TrainState:
        """Create the state before the first step, with the weights of `--init_from` if given.

        Args:
            weights: those weights, if they are loaded already.
        """
        state = super().create_state()
        path = self.config.init_from
        if path is None:
            return state
        params, notices = warm_start.fit_weights(
            weights or warm_start.load_starting_weights(path),
            self.model_config,
            self.dataset,
            lambda part: parallel.fetch_to_host(state.params[part]),
        )
        if self.base:
            own = parallel.fetch_to_host(state.params)
            params = adapters.with_fitted_parts(own, params, self.model_config)
        for notice in notices if processes.is_first() else ():
            print(f"--init_from: {notice}")
        # Free the fresh weights first: devices then never hold more than while training.
        n_averages = len(state.power_ema)
        state = replace(state, params=None, ema=None, power_ema=())
        params = parallel.shard_params(params, self.mesh)
        # Copies, because host memory cannot be donated, nor one buffer in two places.
        params = jax.tree.map(jnp.copy, params)
        ema, *power_ema = training_step.copies(params, 1 + n_averages)
        return replace(state, params=params, ema=ema, power_ema=tuple(power_ema))

    def blank_batch(self) -> Batch:
        n, m = self.config.batch_size // processes.count(), self.model_config
        row, image = np.arange(n, dtype=np.int32), self.space.blank_rows(n, m)
        return Batch(row=row, image=image, label=self.conditioning.blank(n))

    # --- one step ---------------------------------------------------------------------------------

    def network_for(self, batch: Any) -> ModelConfig:
        """Return the network at the shape of a batch, of a run with buckets. Its weights are those
        of all shapes.
        """
        if not self.buckets:
            return self.model_config
        height, width = batch.image.shape[1:3]
        return replace(self.model_config, image_size=ImageSize(height, width).written)

    def loss(self, *, label_dropout: float) -> Loss:
        """The method's loss of this config: `loss(model, batch, key) -> (loss, metrics)`.

        Args:
            label_dropout: the probability of replacing a label by the null label; 0 in an
                evaluation.
        """
        null = self.conditioning.null
        options = {} if null is None else {"null": null}
        return partial(
            self.method.loss, label_dropout=label_dropout, to_input=self.space.read, **options
        )

    def training_loss(self, *, is_aligned: bool = True) -> Loss:
        """The loss that a step descends: the method's, taught if there is a teacher, and the
        auxiliary ones, of a network with a route if there is one. With a teacher or an encoder it
        takes that network too.

        Args:
            is_aligned: with the alignment, in a run that has one.
        """
        c = self.config
        loss = self.loss(label_dropout=c.label_dropout)
        loss = with_auxiliary(
            taught_by(self.teacher, loss) if self.teacher else loss,
            inner_weight=c.inner_weight if c.inner_head else 0.0,
            layer_sync=c.layer_sync,
            sync_weight=c.sync_weight,
            alignment=self.alignment if is_aligned else None,
        )
        return with_routing(loss, self.routed_share)

    @property
    def routed_share(self) -> float:
        """The share of an image's tokens that go around the route in a step."""
        return self.config.route_share if self.config.route else 0.0

    @cached_property
    def update(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._compile_step(self.alignment, self.model_config)

    @cached_property
    def update_after_alignment(self) -> Any:
        """The step of a run without `--align`, for the state of this one."""
        return without_alignment(self._compile_step(None, self.model_config))

    def update_for(self, batch: Any) -> Any:
        if self.buckets:
            return self._update_of(self.network_for(batch))
        has_ended = self.alignment and self.step >= self.alignment.end
        return self.update_after_alignment if has_ended else self.update

    def _compile_step(self, alignment: Alignment | None, network: ModelConfig) -> Any:
        c = self.config
        graphdef, frozen_graphdef = model_graphdef(network), None
        if alignment:
            graphdef, frozen_graphdef = alignment.graphdef, alignment.encoder.graphdef
        elif self.teacher:
            theirs = replace(self.teacher.network, image_size=network.image_size)
            frozen_graphdef = model_graphdef(theirs)
        step = partial(
            training_step.update,
            read_batch=self.read_batch(),
            value_and_grad=parallel.value_and_grad(
                self.training_loss(is_aligned=bool(alignment)),
                graphdef,
                self.mesh,
                frozen_graphdef=frozen_graphdef,
                accumulate_steps=c.accumulate_steps,
            ),
            optimizer=self.optimizer,
            ema_decay=c.ema_decay,
            log_every=c.log_every,
            power_gammas=[gamma_of_std(std) for std in c.ema_std],
            projector_optimizer=self._clipped_adamw(self.schedule) if alignment else None,
        )
        return jax.jit(step, donate_argnums=0)

    # --- evaluation -------------------------------------------------------------------------------

    @property
    def eval_loss(self) -> Callable[..., Any]:
        """The compiled `eval_loss(params, batch, key, *frozen)`, in the precision of sampling."""
        return self._eval_loss_of(self.model_config)

    def _compile_eval_loss(self, network: ModelConfig) -> Callable[..., Any]:
        loss = self.loss(label_dropout=0.0)
        graphdef = model_graphdef(replace(network, fp8=False))

        @jax.jit
        def eval_loss(params: Any, batch: Batch, key: Any, frozen: Mapping[str, Any] = {}) -> Any:
            model = nnx.merge(graphdef, parallel.join_trees(params, frozen.get("base", {})))
            if not self.teacher:
                return loss(model, batch, key)[0]
            theirs = replace(self.teacher.network, image_size=network.image_size)
            teacher = nnx.merge(model_graphdef(theirs), frozen["frozen"])
            return taught_by(self.teacher, loss)(model, batch, key, teacher)[0]

        return eval_loss

    def evaluate(self) -> dict[str, float]:
        """Compute the averaged weights' loss on the evaluation split, always with the same t and
        noise.
        """
        losses = []
        for i, batch in enumerate(self.data.eval_batches(self.config.n_eval_batches)):
            batch = parallel.shard_batch(batch, self.mesh)
            key = jax.random.fold_in(self.eval_key, i)
            of_shape = self._eval_loss_of(self.network_for(batch)) if self.buckets else None
            eval_loss = of_shape or self.eval_loss
            losses.append(eval_loss(self.state.ema, batch, key, *self.frozen))
        return {"eval_loss": float(np.mean(parallel.fetch_to_host(losses)))}

    def prepare(self) -> None:
        self.open_fid()
        super().prepare()

    def open_fid(self) -> TrainingFID | None:
        """Open the reference and the features of the FID that is measured while training, once.
        Returns None if none is.

        Raises:
            UserError: the reference or Inception's weights are missing, or do not fit.
        """
        c = self.config
        if not c.fid_every or not c.fid_reference or c.profile:
            return None
        if self._fid is None:
            self._fid = TrainingFID.load(
                c.fid_reference,
                self.mesh,
                space=c.fid_features,
                weights=c.inception,
                n_samples=c.fid_n,
                image_shape=self.space.image_shape(self.model_config),
            )
            warning = self._fid.reference.compare_crop(self.dataset.crop)
            if warning and processes.is_first():
                print(warning)
        return self._fid

    def measurement_is_due(self, last: int) -> bool:
        if self.open_fid() is None:
            return False
        return self.step % self.config.fid_every == 0 or self.step == last

    def measure(
        self, until_stopped: Callable[[Iterable[Any]], Iterator[Any]]
    ) -> dict[str, float] | None:
        """Measure the FID of samples of the averaged weights."""
        fid = self.open_fid()
        if fid is None:
            return {}
        samples = self.fid_samples(fid.n_samples, fid.batch_size)
        distance = fid.measure(until_stopped(samples))
        return None if distance is None else {fid.name: distance}

    def fid_samples(self, n: int, batch_size: int) -> Generator[UInt8[np.ndarray, "_b h w c"]]:
        """Sample n images in batches, cycling through all classes (or through the captions of the
        evaluation split): the samples that `evaluate.py` makes from a checkpoint of this step.
        """
        labels = self.conditioning.all_words(self.source.eval)
        for start in range(0, n, batch_size):
            # The last batch is filled up, so that all batches share one compiled program.
            places = np.minimum(np.arange(start, start + batch_size), n - 1) % len(labels)
            x = self.sample([labels[i] for i in places], first_index=start)
            yield grids.to_uint8(x[: n - start], first=start)

    # --- samples ----------------------------------------------------------------------------------

    def sample(
        self,
        labels: Sequence[int | str] | str,
        *,
        cfg_scale: float | None = None,
        inner_guidance: float = 1.0,
        route_guidance: float = 1.0,
        n_steps: int | None = None,
        seed: int | Sequence[int] = 0,
        ema: bool = True,
        first_index: int = 0,
        trajectory: bool = False,
    ) -> Float[np.ndarray, "*n b h w c"]:
        """Sample images of `labels` (class numbers, class names or captions), in about −1 … 1, from
        the averaged weights. Latents are decoded.

        Args:
            cfg_scale: of classifier-free guidance, by default the config's.
            inner_guidance: scale of guidance by the inner head, of a model with one.
            route_guidance: scale of guidance by the route, of a model with one.
            n_steps: of the solver, by default the config's.
            seed: of all noise, or one seed per image.
            ema: sample from the averaged weights; False from the raw ones.
            first_index: index of the first image; an image's noise depends on seed and index.
            trajectory: return every state from the noise to the result.

        Raises:
            UserError: guidance does not fit the model, or there is no such class.

        Returns float32 (b, h, w, c) or, with `trajectory`, (n_steps + 1, b, h, w, c).
        """
        scale = float(self.config.cfg_scale if cfg_scale is None else cfg_scale)
        if scale != 1 and self.model_config.is_conditional and not self.null_is_trained:
            raise untrained_null_error(str(self.run_dir), scale)
        sampler = self.sampler(n_steps)
        if route_guidance != 1 and self.routed_share:
            sampler = replace(sampler, route_rates=(0.0, self.routed_share))
        samples = sample_images(
            self.weights(ema=ema),
            self.model_config,
            self.conditioning.encode([labels] if isinstance(labels, str) else labels),
            sampler=sampler,
            mesh=self.mesh,
            cfg_scale=scale,
            inner_guidance=inner_guidance,
            route_guidance=route_guidance,
            seed=seed,
            first_index=first_index,
            negative=None if scale == 1 else self.conditioning.null,
            trajectory=trajectory,
            to_images=self.space.to_images,
        )
        return samples.x if samples.trajectory is None else samples.trajectory

    def sampler(self, n_steps: int | None = None) -> SamplerConfig:
        """The solver of this config, with `n_steps` in place of the configured number."""
        c = self.config if n_steps is None else replace(self.config, n_sample_steps=n_steps)
        return sampler_config(c, clip=self.space.is_bounded)

    def weights(self, *, ema: bool) -> Any:
        """The averaged or raw weights of the whole network."""
        return parallel.join_trees(self.base, self.state.ema if ema else self.state.params)

    @property
    def averaged_weights(self) -> Any:
        return self.weights(ema=True)

    def model(self, ema: bool = True) -> nnx.Module:
        """The live model, `model(x, t, label)`, with averaged or raw weights."""
        # A copy, because the next update donates the buffers of the state.
        params = jax.tree.map(jnp.copy, self.weights(ema=ema))
        return nnx.merge(model_graphdef(replace(self.model_config, fp8=False)), params)

    # --- what a run shows and records -------------------------------------------------------------

    def image_grids(self, *, trajectory: bool = False) -> list[Image.Image]:
        """A grid of samples or, with `trajectory`, one for every state from the noise to them."""
        labels = self._grid_labels()
        x = self.sample(labels, trajectory=trajectory)
        names = self.dataset.label_names
        return [display.sample_grid(state, labels, names) for state in (x if trajectory else [x])]

    def first_grids(self) -> dict[str, Image.Image]:
        """With `--overfit_batch`, the images of the batch, arranged as samples of them will be."""
        if not self.config.overfit_batch:
            return {}
        labels = self._grid_labels()
        stored = self.data.first_rows(0, len(labels)).image
        x = self.space.to_images(self.space.means(stored))
        return {"batch.png": display.sample_grid(x, labels, self.dataset.label_names)}

    def _grid_labels(self) -> list[int] | list[str]:
        if self.config.overfit_batch:
            return self.data.batch_labels(0)[: display.ROWS * display.COLUMNS]
        return self.conditioning.grid_words(display.COLUMNS, self.source.eval) * display.ROWS

    def start_message(self, last: int) -> str:
        return display.start_message(
            self.config,
            self.model_config,
            self.source,
            self.space,
            self.conditioning,
            n_params=sum(x.size for x in jax.tree.leaves(self.averaged_weights)),
            n_trained=sum(x.size for x in jax.tree.leaves(self.state.params)),
            step=self.step,
            last=last,
            run_dir=self.run_dir,
        )

    def end_message(self) -> str:
        return display.end_message(self.run_dir, self.step, example=self.conditioning.example)

    @cached_property
    def flops_per_image(self) -> float | None:
        """Training FLOPs per image, or None if those of the block are not known."""
        forward = flops.forward_flops(self.model_config)
        return None if forward is None else self.train_passes * forward

    @property
    def train_passes(self) -> float:
        """FLOPs of a training step, in forward passes of the network on all tokens."""
        of_all = flops.forward_flops(self.model_config)
        of_some = flops.forward_flops(self.model_config, routed_share=self.routed_share)
        share = of_some / of_all if of_some and of_all else 1
        # The gradients of a frozen base's weights are not computed.
        per_forward = flops.TRAIN_PER_FORWARD - bool(self.model_config.lora)
        return per_forward * share + self.eval_passes - 1

    @property
    def eval_passes(self) -> float:
        """FLOPs of the loss alone, in forward passes of the network."""
        passes = 1 + self.method.extra_passes(is_taught=bool(self.teacher))
        forward = flops.forward_flops(self.model_config)
        if not self.teacher or not forward:
            return passes
        of_teacher = flops.forward_flops(self.teacher.network) or 0.0
        return passes + self.teacher.passes * of_teacher / forward

    def utilization(self, images_per_second: float) -> float | None:
        if not self.peak or not self.flops_per_image:
            return None
        per_device = images_per_second / parallel.devices().count
        return flops.mfu(self.flops_per_image * per_device, self.peak)

    def describe(self) -> RunRecord:
        fid = self.open_fid()
        return RunRecord(
            flags_as_json(self.config),
            self.run_dir,
            self.model_config,
            self.dataset,
            extra={
                "given_flags": self.given_flags,
                "method": class_path(type(self.method)),
                "trainer": self.trainer_path(),
                "text_revisions": self.conditioning.revisions,
                **({"full_width": width} if (width := self.conditioning.full_width) else {}),
                "null_is_trained": self.null_is_trained,
                "encoder": self.alignment.encoder.fingerprint if self.alignment else None,
                **({"base_hash": self.base_hash} if self.model_config.lora else {}),
                "yardstick": fid.card if fid else None,
            },
        )


@processes.explain_lost_process
def main() -> None:
    config = cli.parse_flags(TrainConfig)
    initialize_jax(config)
    trainer = Trainer(config)
    if config.lr_range_test:
        n_steps = N_STEPS if config.lr_range_test is True else config.lr_range_test
        _print_once(range_test(trainer, n_steps))
    elif config.profile:
        report = profile(
            trainer,
            eval_loss=trainer.eval_loss,
            sampler_config=trainer.sampler(n_steps=1),
            peak=trainer.peak,
            train_passes=trainer.train_passes,
            eval_passes=trainer.eval_passes,
        )
        _print_once(report)
    else:
        trainer.fit()
    processes.wait_for_all("the end")


def _print_once(report: str) -> None:
    if processes.is_first():
        print(report)


if __name__ == "__main__":
    cli.run_command(main, processes.exit_process)
