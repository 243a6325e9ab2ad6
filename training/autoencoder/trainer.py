"""The trainer of an autoencoder, by the losses beside it."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from PIL import Image

from data.batch import Batch
from data.load import open_dataset
from inference import grids
from methods.rectified_flow import to_float
from networks import perceptual
from networks.autoencoder import AutoencoderKL, Moments, graphdef, mode
from pretrained import autoencoder as pretrained_autoencoder
from pretrained import lpips as pretrained_lpips
from runtime import files, parallel, processes, run_folder
from training import optim
from training import step as training_step
from training.autoencoder.config import (
    DEFAULTS,
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
from training.loop import Loop, RunRecord, flags_as_json
from training.resolve import merge_saved
from training.step import StepReport, TrainState

COMMAND, NAME, FOLDER = "train_vae.py", "vae", "vae"
SHOWN, COLUMNS = 16, 8  # reconstructions of a sheet
DIGITS = VaeConfig()


# --- the run --------------------------------------------------------------------------------------


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
        dataset_name = config.dataset_name or DEFAULTS["dataset_name"]
        run_dir, saved = self._find_run_dir(dataset_name, NAME), None
        if run_dir and config.resume:
            saved = run_folder.read_config(run_dir, command=COMMAND)
            config = merge_saved(config, saved)
        self.source = open_dataset(
            config.dataset_name or DEFAULTS["dataset_name"],
            data_dir=config.data_dir,
            image_column=config.image_column,
            conditioning="none",
            image_size=requested_image_size(config),
            channels=config.channels,
            streaming=config.streaming or DEFAULTS["streaming"],
        )
        self.dataset = self.source.config
        c = self.config = resolve_vae_config(
            config,
            self.dataset,
            n_rows=len(self.source.train),
            n_devices=jax.device_count(),
            platform=jax.default_backend(),
        )
        self.run_dir = run_dir or self._new_run_dir(c.dataset_name, NAME)
        self.model_config = autoencoder_config(c)
        self.dtype = "bfloat16" if c.half_precision else "float32"
        self.mesh = parallel.make_mesh()
        weights = pretrained_lpips.load_lpips(c.lpips) if c.lpips else ()
        self.lpips = parallel.replicate(weights, self.mesh)
        self.init_key, self.train_key = jax.random.split(jax.random.key(c.seed))
        self.set_schedule(
            optim.learning_rate_schedule(
                c.schedule, c.learning_rate, warmup_steps=c.warmup_steps, n_steps=c.n_steps
            )
        )
        self._restore_or_create(self.create_state, resume=bool(saved))

    def make_optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        c = self.config
        autoencoder = optim.clipped_adamw(
            schedule,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
        )
        if not c.gan_weight:
            return autoencoder
        critic = optim.clipped_adamw(  # as in Esser et al. 2021
            schedule, beta1=0.5, beta2=0.9, weight_decay=0.0, clip_norm=c.clip_norm
        )
        return separate_optimizers(autoencoder, critic)

    # --- one step ---------------------------------------------------------------------------------

    def update(
        self, state: TrainState, batch: Any, key: Key[Array, ""]
    ) -> tuple[TrainState, StepReport]:
        """One step, with the critic or without, as is due."""
        c = self.config
        step = self._adversarial if c.gan_weight and self.step >= c.gan_start else self._alone
        return step(state, batch, AutoencoderLossInputs(key, self.lpips))

    @cached_property
    def _alone(self) -> Callable:
        return self._compiled(autoencoder_loss(self.config))

    @cached_property
    def _adversarial(self) -> Callable:
        return self._compiled(adversarial_loss(self.config, parallel.mean_over_devices))

    def _compiled(self, loss: Callable) -> Callable:
        c, optimizer = self.config, self.optimizer
        value_and_grad = parallel.value_and_grad(
            loss, self.graphdef, self.mesh, accumulate_steps=c.accumulate_steps
        )
        read_batch = self.read_batch()

        def step(state, batch, given):
            return training_step.update(
                state,
                batch,
                given.key,
                read_batch=read_batch,
                # An argument: as a constant, a hundred MB of weights would be compiled too.
                value_and_grad=lambda params, batch, key, scale: value_and_grad(
                    params, batch, given._replace(key=key), scale
                ),
                optimizer=optimizer,
                ema_decay=c.ema_decay,
                log_every=c.log_every,
            )

        return jax.jit(step, donate_argnums=0)

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))))[0]

    def _build(self, rngs: nnx.Rngs) -> AutoencoderKL:
        kind = AutoencoderWithCritic if self.config.gan_weight else AutoencoderKL
        return kind(self.model_config, dtype=self.dtype, rngs=rngs)

    def initial_state(self) -> TrainState:
        model = self._build(nnx.Rngs(params=self.init_key))
        loss = (adversarial_loss if self.config.gan_weight else autoencoder_loss)(self.config)
        given = AutoencoderLossInputs(self.train_key, self.lpips)
        metrics = jax.eval_shape(lambda batch: loss(model, batch, given)[1], self.blank_batch())
        return training_step.initial_state(
            nnx.to_pure_dict(nnx.state(model)), self.optimizer, metrics
        )

    def blank_batch(self) -> Batch:
        n, c = self.config.batch_size // jax.process_count(), self.config
        image = np.zeros((n, c.image_size, c.image_size, c.channels), np.uint8)
        return Batch(np.arange(n, dtype=np.int32), image, np.zeros(n, np.int32))

    # --- what comes of it -------------------------------------------------------------------------

    def autoencoder(self, ema: bool = True) -> AutoencoderKL:
        """The live autoencoder, with averaged or raw weights; its latents are not scaled."""
        params = self.state.ema if ema else self.state.params
        # A copy, because the next update gives the buffers of the state away.
        params = jax.tree.map(jnp.copy, without_critic(params))
        return nnx.merge(graphdef(self.model_config, self.dtype), params)

    @cached_property
    def _encode(self) -> Callable:
        definition = graphdef(self.model_config, self.dtype)
        return jax.jit(lambda params, x: nnx.merge(definition, params).encode(to_float(x)))

    @cached_property
    def _reconstruct(self) -> Callable:
        definition = graphdef(self.model_config, self.dtype)

        def reconstruct(params, image):
            model = nnx.merge(definition, params)
            picture = jnp.clip(model.decode(mode(model.encode(to_float(image)))), -1, 1)
            return picture, perceptual.psnr(picture, to_float(image)).mean()

        return jax.jit(reconstruct)

    def reconstruct(self, image: UInt8[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
        """Pictures through their likeliest latents and back, by the averaged weights."""
        params, image = without_critic(self.state.ema), parallel.replicate(image, self.mesh)
        return grids.to_uint8(parallel.fetch_to_host(self._reconstruct(params, image)[0]))

    def evaluate(self) -> dict[str, float]:
        """How well the averaged weights reconstruct the evaluation split: the mean PSNR of its
        pictures, in dB.
        """
        params = without_critic(self.state.ema)
        found = [
            self._reconstruct(params, parallel.shard_batch(batch.image, self.mesh))[1]
            for batch in self.data.eval_batches(self.config.n_eval_batches)
        ]
        return {"psnr": float(np.mean(parallel.fetch_to_host(found)))}

    def latent_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of all numbers of the latents of some training pictures, as
        they are drawn from their distributions.
        """
        params, sums = without_critic(self.state.ema), []
        for step in range(self.config.n_eval_batches):
            image = parallel.shard_batch(self.data.train_batch(step).image, self.mesh)
            sums.append(moments_of(self._encode(params, image)))
        mean, square = np.mean(parallel.fetch_to_host(sums), axis=0)
        return float(mean), float(np.sqrt(square - mean**2))

    def export(self) -> None:
        """Write the autoencoder to `vae/` of the run's folder, as diffusers has them, with the
        scale and shift that give its latents zero mean and unit variance (Rombach et al. 2022,
        appendix G).
        """
        mean, std = self.latent_statistics()
        if not processes.is_first():
            return
        config = dataclasses.replace(self.model_config, scaling_factor=1 / std, shift_factor=mean)
        params = without_critic(jax.device_get(self.state.ema))
        with files.atomic_folder(self.run_dir / FOLDER) as folder:
            pretrained_autoencoder.save_autoencoder(folder, config, params)

    def image_grids(self, *, trajectory: bool = False) -> list[Image.Image]:
        """Held-out pictures, each with its reconstruction below."""
        held_out = self.source.eval
        rows = np.unique(np.linspace(0, len(held_out) - 1, SHOWN).astype(int))
        originals = held_out.images(rows)
        both = np.stack([originals, self.reconstruct(originals)], axis=1)
        parts = np.array_split(both, range(COLUMNS, len(both), COLUMNS))
        shown = np.concatenate([part.swapaxes(0, 1).reshape(-1, *both.shape[2:]) for part in parts])
        return [grids.image_grid(shown, columns=min(COLUMNS, len(both)))]

    def start_message(self, last: int) -> str:
        c, m = self.config, self.model_config
        n_params = sum(x.size for x in jax.tree.leaves(without_critic(self.state.params)))
        side = c.image_size // m.downsampling
        begin = f"resuming at step {self.step}" if self.step else "starting"
        without_lpips = (
            ""
            if c.lpips
            else (
                "\nno weights of LPIPS (--lpips): trained on "
                f"{c.pixel_loss.upper()} and the gradients of pictures"
            )
        )
        return (
            f"an autoencoder of {n_params / 1e6:.3g} M parameters, {self.dtype}, on "
            f"{jax.device_count()} × {jax.devices()[0].device_kind}\n"
            f"{self.dataset.name}: {len(self.source.train)} training pictures of {c.image_size}×"
            f"{c.image_size}×{c.channels}, as latents of {side}×{side}×{m.latent_channels}"
            f"{without_lpips}\n"
            f"{begin}: {last} steps of {c.batch_size} pictures, into {self.run_dir}"
        )

    def end_message(self) -> str:
        run_dir, step = self.run_dir, self.step
        return f"""
Done: step {step}. Everything is in {run_dir}/
  {"vae/":26} the autoencoder, as diffusers has them
  {"reconstructions/final.png":26} held-out pictures, each above its reconstruction
  {"metrics.jsonl":26} losses, PSNR, speed; TensorBoard shows them from the same folder
  {f"checkpoints/{step}/":26} weights, their average and the optimizer
Next:
  python convert_imagenet.py --dataset_name {self.config.dataset_name} \\
      --image_size {self.config.image_size} --vae {run_dir / FOLDER}
  python train_vae.py --resume --run_dir {run_dir} --n_steps {2 * step}"""

    def describe(self) -> RunRecord:
        flags = {**flags_as_json(self.config), "command": COMMAND, "model": NAME}
        return RunRecord(flags, self.run_dir, self.model_config, self.dataset)


@jax.jit
def moments_of(latents: Moments) -> Float[Array, "2"]:
    """Mean, and mean square, of latents as they are drawn."""
    square = jnp.square(latents.mean) + jnp.exp(latents.log_variance)
    return jnp.stack([latents.mean.mean(), square.mean()])
