"""A run of `train_vae.py`: the autoencoder's update, its evaluation, and its export.

The run itself is `training.loop.Loop.fit`; the losses are in `training.autoencoder.losses`.
"""

import dataclasses
import shlex
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from PIL import Image

from data import bad_rows
from data.batch import Batch
from data.load import open_dataset
from inference import grids
from methods.method import to_float
from networks import perceptual
from networks.autoencoder import AutoencoderKL, Moments, autoencoder_graphdef, most_likely_latents
from pretrained import autoencoder as pretrained_autoencoder
from pretrained import lpips as pretrained_lpips
from runtime import files, parallel, processes, run_folder
from runtime.errors import UserError
from runtime.image_size import ImageSize, format_shape
from training import optim
from training import step as training_step
from training.autoencoder.config import (
    VaeConfig,
    autoencoder_config,
    requested_image_size,
    resolve_vae_config,
)
from training.autoencoder.losses import (
    AutoencoderLossInputs,
    AutoencoderWithCritic,
    adversarial_loss,
    autoencoder_loss,
    separate_optimizers,
    without_critic,
)
from training.flag_groups import DEFAULT_DATASET
from training.loop import Loop, flags_as_json
from training.prepare import find_run_dir, leave_out_bad_rows, new_run_dir
from training.resolve import merge_saved, require_same_implementation
from training.session import RunRecord
from training.step import StepReport, TrainState

COMMAND = VaeConfig.COMMAND
MODEL_NAME = "vae"  # in config.json and in the name of a new run folder
EXPORT_FOLDER = "vae"  # in the run folder
GRID_IMAGES = 16  # images in a grid of reconstructions
GRID_COLUMNS = 8
DIGITS = VaeConfig()


class VaeTrainer(Loop):
    """A run that trains an autoencoder: dataset, networks, optimizers, and their state on all
    devices.
    """

    CONFIG = VaeConfig
    COMMAND = COMMAND
    GRID_FOLDER = "reconstructions"

    def __init__(self, config: VaeConfig = DIGITS):
        """Open the dataset, fill in the config, and create or restore the state. Writes nothing.

        Raises:
            UserError: flags or a dataset that cannot work.
        """
        super().__init__(config)
        if config.lpips and Path(config.lpips).expanduser().exists():
            config = dataclasses.replace(
                config, lpips=str(Path(config.lpips).expanduser().resolve())
            )
        dataset_name = config.dataset_name or DEFAULT_DATASET
        run_dir = find_run_dir(config, dataset_name, MODEL_NAME)
        saved = None
        if run_dir and config.resume:
            saved = run_folder.read_config(run_dir, command=COMMAND)
            require_same_implementation(run_dir, saved, "trainer", self.trainer_path())
            config = merge_saved(config, saved)
        self.source = open_dataset(
            config.dataset_name or DEFAULT_DATASET,
            data_dir=config.data_dir,
            image_column=config.image_column,
            conditioning="none",
            image_size=requested_image_size(config),
            channels=config.channels,
            crop=config.crop,
            streaming=bool(config.streaming),
            train_split=config.train_split,
            eval_split=config.eval_split,
        )
        self.dataset = self.source.config
        resolve = partial(
            resolve_vae_config,
            config,
            self.dataset,
            n_devices=parallel.devices().count,
            platform=parallel.devices().platform,
        )
        checked = resolve(n_rows=len(self.source.train))
        self.source = leave_out_bad_rows(checked, self.source, run_dir)
        c = self.config = resolve(n_rows=len(self.source.train))  # without the bad rows
        self.run_dir = run_dir or new_run_dir(c.dataset_name, MODEL_NAME)
        self.model_config = autoencoder_config(c)
        self.dtype = "bfloat16" if c.half_precision else "float32"
        self.mesh = parallel.make_mesh()
        weights = pretrained_lpips.load_lpips(c.lpips) if c.lpips else ()
        self.lpips = parallel.replicate(weights, self.mesh)
        self.init_key, self.train_key = jax.random.split(jax.random.key(c.seed))
        self.set_schedule(self.configured_schedule())
        self._restore_or_create(self.create_state, resume=bool(saved))

    def make_optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        c = self.config
        autoencoder = optim.clipped_adamw(
            schedule,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
            moments=c.moments,
        )
        if not c.gan_weight:
            return autoencoder
        critic = optim.clipped_adamw(  # as in Esser et al. 2021
            schedule,
            beta1=0.5,
            beta2=0.9,
            weight_decay=0.0,
            clip_norm=c.clip_norm,
            moments=c.moments,
        )
        return separate_optimizers(autoencoder, critic)

    # --- one step ---------------------------------------------------------------------------------

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: TrainState, batch: Any, key: Key[Array, ""]
    ) -> tuple[TrainState, StepReport]:
        """Update the autoencoder and, from `gan_start` on, the critic."""
        c = self.config
        with_critic = c.gan_weight and self.step >= c.gan_start
        step = self._adversarial_step if with_critic else self._autoencoder_step
        return step(state, batch, AutoencoderLossInputs(key, self.lpips))

    @cached_property
    def _autoencoder_step(self) -> Callable[..., Any]:
        return self._compile_step(autoencoder_loss(self.config))

    @cached_property
    def _adversarial_step(self) -> Callable[..., Any]:
        return self._compile_step(adversarial_loss(self.config, parallel.mean_over_devices))

    def _compile_step(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        c, optimizer = self.config, self.optimizer
        value_and_grad = parallel.value_and_grad(
            loss, self.graphdef, self.mesh, accumulate_steps=c.accumulate_steps
        )
        read_batch = self.read_batch()

        def step(state: Any, batch: Any, inputs: Any) -> Any:
            return training_step.update(
                state,
                batch,
                inputs.key,
                read_batch=read_batch,
                # LPIPS's weights are an argument: as a constant, 100 MB would be compiled in.
                value_and_grad=lambda params, batch, key, scale: value_and_grad(
                    params, batch, inputs._replace(key=key), scale
                ),
                optimizer=optimizer,
                ema_decay=c.ema_decay,
                log_every=c.log_every,
            )

        return jax.jit(step, donate_argnums=0)

    @cached_property
    def graphdef(self) -> nnx.GraphDef[Any]:
        """The structure of the networks that are trained, with the critic if there is one."""
        return nnx.split(nnx.eval_shape(lambda: self._build_model(nnx.Rngs(0))))[0]

    def _build_model(self, rngs: nnx.Rngs) -> AutoencoderKL:
        model_class = AutoencoderWithCritic if self.config.gan_weight else AutoencoderKL
        return model_class(self.model_config, dtype=self.dtype, rngs=rngs)

    def initial_state(self) -> TrainState:
        model = self._build_model(nnx.Rngs(params=self.init_key))
        make_loss = adversarial_loss if self.config.gan_weight else autoencoder_loss
        loss = make_loss(self.config)
        inputs = AutoencoderLossInputs(self.train_key, self.lpips)
        metrics = jax.eval_shape(lambda batch: loss(model, batch, inputs)[1], self.blank_batch())
        return training_step.initial_state(
            nnx.to_pure_dict(nnx.state(model)), self.optimizer, metrics
        )

    def blank_batch(self) -> Batch:
        c = self.config
        n = c.batch_size // processes.count()
        sides = ImageSize.parse(c.image_size).sides
        image = np.zeros((n, *sides, c.channels), np.uint8)
        return Batch(np.arange(n, dtype=np.int32), image, np.zeros(n, np.int32))

    # --- evaluation and export --------------------------------------------------------------------

    def autoencoder(self, ema: bool = True) -> AutoencoderKL:
        """Return the live autoencoder, with averaged or raw weights. Its latents are not scaled."""
        params = self.state.ema if ema else self.state.params
        # A copy, because the next update donates the state's buffers.
        params = jax.tree.map(jnp.copy, without_critic(params))
        return nnx.merge(autoencoder_graphdef(self.model_config, self.dtype), params)

    @cached_property
    def _encode(self) -> Callable[..., Any]:
        definition = autoencoder_graphdef(self.model_config, self.dtype)
        return jax.jit(lambda params, x: nnx.merge(definition, params).encode(to_float(x)))

    @cached_property
    def _reconstruct(self) -> Callable[..., Any]:
        definition = autoencoder_graphdef(self.model_config, self.dtype)

        def reconstruct(params: Any, image: Any) -> tuple[Array, Array]:
            model = nnx.merge(definition, params)
            latents = most_likely_latents(model.encode(to_float(image)))
            reconstruction = jnp.clip(model.decode(latents), -1, 1)
            return reconstruction, perceptual.psnr(reconstruction, to_float(image)).mean()

        return jax.jit(reconstruct)

    def reconstruct(self, image: UInt8[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
        """Encode images to their most likely latents and decode them, with the averaged weights."""
        params = without_critic(self.state.ema)
        reconstruction, _ = self._reconstruct(params, parallel.replicate(image, self.mesh))
        return grids.to_uint8(parallel.fetch_to_host(reconstruction), kind="reconstruction")

    def evaluate(self) -> dict[str, float]:
        """Compute the mean PSNR of the averaged weights on the evaluation split, in dB."""
        params = without_critic(self.state.ema)
        psnrs = [
            self._reconstruct(params, parallel.shard_batch(batch.image, self.mesh))[1]
            for batch in self.data.eval_batches(self.config.n_eval_batches)
        ]
        return {"psnr": float(np.mean(parallel.fetch_to_host(psnrs)))}

    def latent_statistics(self) -> tuple[float, float]:
        """Estimate the mean and standard deviation of sampled latents over all channels, from the
        first training batches.
        """
        params = without_critic(self.state.ema)
        moments = []
        for step in range(self.config.n_eval_batches):
            image = parallel.shard_batch(self.data.train_batch(step).image, self.mesh)
            moments.append(mean_and_mean_square(self._encode(params, image)))
        mean, square = np.mean(parallel.fetch_to_host(moments), axis=0)
        return float(mean), float(np.sqrt(square - mean**2))

    def export(self) -> None:
        """Write the autoencoder to `vae/` in the run folder, in the format of diffusers. Its scale
        and shift give the latents zero mean and unit variance (Rombach et al. 2022, appendix G).
        """
        mean, std = self.latent_statistics()
        if not np.isfinite((mean, std)).all():
            raise UserError(f"step {self.step} is not exported: its latents are not finite")
        if not processes.is_first():
            return
        config = dataclasses.replace(self.model_config, scaling_factor=1 / std, shift_factor=mean)
        params = without_critic(jax.device_get(self.state.ema))
        with files.atomic_folder(self.run_dir / EXPORT_FOLDER) as folder:
            pretrained_autoencoder.save_autoencoder(folder, config, params)

    def image_grids(self, *, trajectory: bool = False) -> list[Image.Image]:
        """Make one grid of images of the evaluation split, each above its reconstruction."""
        split = self.source.eval
        rows = np.unique(np.linspace(0, len(split) - 1, GRID_IMAGES).astype(int))
        originals = split.decode(rows)
        pairs = np.stack([originals, self.reconstruct(originals)], axis=1)
        # Per line of the grid: first all originals, then all reconstructions.
        lines = np.array_split(pairs, range(GRID_COLUMNS, len(pairs), GRID_COLUMNS))
        images = np.concatenate(
            [line.swapaxes(0, 1).reshape(-1, *pairs.shape[2:]) for line in lines]
        )
        return [grids.image_grid(images, columns=min(GRID_COLUMNS, len(pairs)))]

    def start_message(self, last: int) -> str:
        c, m = self.config, self.model_config
        n_params = sum(x.size for x in jax.tree.leaves(without_critic(self.state.params)))
        size = ImageSize.parse(c.image_size)
        latent_shape = (*(side // m.downsampling for side in size.sides), m.latent_channels)
        begin = f"resuming at step {self.step}" if self.step else "starting"
        lines = [
            f"an autoencoder of {n_params / 1e6:.3g} M parameters, {self.dtype}, on "
            f"{parallel.devices().count} × {parallel.devices().kind}",
            f"{self.dataset.name}: {len(self.source.train)} training images of "
            f"{format_shape((*size.sides, c.channels))}, as latents of "
            f"{format_shape(latent_shape)}",
            f"{bad_rows.summary(self.source)}{begin}: {last} steps of {c.batch_size} images, into "
            f"{self.run_dir}",
        ]
        if not c.lpips:
            losses = f"{c.pixel_loss.upper()} and image gradients"
            lines.insert(2, f"no LPIPS weights (--lpips): training on {losses}")
        return "\n".join(lines)

    def end_message(self) -> str:
        c, run_dir, step = self.config, self.run_dir, self.step
        dataset = ["--dataset_name", c.dataset_name]
        dataset += ["--data_dir", str(c.data_dir)] if c.data_dir else []
        dataset += ["--image_column", c.image_column] if c.image_column else []
        size = f"--image_size {c.image_size}"
        size += " --crop letterbox" if c.crop == "letterbox" else ""
        vae, run = (shlex.quote(str(path)) for path in (run_dir / EXPORT_FOLDER, run_dir))
        return f"""
Done: step {step}. Everything is in {run_dir}/
  {"vae/":26} the autoencoder, in the format of diffusers
  {"reconstructions/final.png":26} held-out images, each above its reconstruction
  {"metrics.jsonl":26} losses, PSNR, speed; TensorBoard reads them from the same folder
  {f"checkpoints/{step}/":26} weights, averaged weights and optimizer
Next:
  python convert_imagenet.py {shlex.join(dataset)} \\
      {size} --vae {vae}
  python train_vae.py --resume --run_dir {run} --n_steps {2 * step}"""

    def describe(self) -> RunRecord:
        flags = {**flags_as_json(self.config), "command": COMMAND, "model": MODEL_NAME}
        extra = {"trainer": self.trainer_path()}
        return RunRecord(flags, self.run_dir, self.model_config, self.dataset, extra)


@jax.jit
def mean_and_mean_square(latents: Moments) -> Float[Array, "2"]:
    """Return the mean and the mean square of samples from the latents' distributions."""
    square = jnp.square(latents.mean) + jnp.exp(latents.log_variance)
    return jnp.stack([latents.mean.mean(), square.mean()])
