"""Losses of an autoencoder: reconstruction and KL, with or without a patch discriminator.

A loss is `loss(model, batch, inputs) -> (loss, metrics)`. The distances themselves are in
`networks.perceptual`; when the discriminator starts is decided by the trainer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from methods.method import to_float
from networks import perceptual
from networks.autoencoder import AutoencoderConfig, AutoencoderKL, sample_latents
from training.autoencoder.config import VaeConfig

CRITIC = "discriminator"  # the critic's name among the model's weights
CRITIC_METRICS = ("gan_loss", "critic_loss", "gan_weight")


class AutoencoderWithCritic(AutoencoderKL):
    """An autoencoder and the patch discriminator (critic) that it is trained against."""

    def __init__(self, config: AutoencoderConfig, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        # Fewer layers for images below 32×32, so that some patches are left to judge.
        n_layers = min(3, max(1, int(np.log2(config.sample_size)) - 2))
        self.discriminator = perceptual.PatchDiscriminator(
            config.in_channels, n_layers=n_layers, dtype=dtype, rngs=rngs
        )


class AutoencoderLossInputs(NamedTuple):
    """Inputs of the loss besides weights and images."""

    key: Key[Array, ""]
    lpips: Any  # weights of LPIPS, or () without


def keys_by_row(key: Key[Array, ""], row: Int[Array, "b"]) -> Key[Array, "b"]:
    """Derive a key for each row from its index in the global batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(row)


# --- the losses -----------------------------------------------------------------------------------


def reconstruction_loss(c: VaeConfig) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Return the distance `loss(reconstruction, image, lpips) -> (loss, metrics)`: pixels, their
    gradients and LPIPS, weighted by the config.
    """

    def loss(reconstruction: Array, image: Array, lpips: Any) -> Any:
        pixel_loss = perceptual.PIXEL_LOSSES[c.pixel_loss]
        metrics = {"pixel_loss": pixel_loss(reconstruction, image).mean()}
        total = metrics["pixel_loss"]
        if c.gradient_weight:
            metrics["gradient_loss"] = perceptual.gradient_l2(reconstruction, image).mean()
            total += c.gradient_weight * metrics["gradient_loss"]
        if lpips:
            metrics["lpips_loss"] = perceptual.lpips(lpips, reconstruction, image).mean()
            total += c.lpips_weight * metrics["lpips_loss"]
        return total, metrics

    return loss


def autoencoder_loss(c: VaeConfig) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Return the loss without the critic: reconstruction + kl_weight · KL.

    The KL is divided by the number of pixel values, as the reconstruction loss is. `kl_weight` thus
    weighs two sums over an image (Rombach et al. 2022, eq. 25), whatever its size.
    """
    distance = reconstruction_loss(c)

    def loss(model: Any, batch: Any, inputs: Any) -> Any:
        image = to_float(batch.image)
        moments = model.encode(image)
        reconstruction = model.decode(sample_latents(moments, keys_by_row(inputs.key, batch.row)))
        total, metrics = distance(reconstruction, image, inputs.lpips)
        metrics["kl"] = perceptual.kl_to_standard_normal(*moments).mean()
        if c.gan_weight:  # before gan_start
            metrics |= dict.fromkeys(CRITIC_METRICS, 0 * total)
        return total + c.kl_weight * metrics["kl"] / image[0].size, metrics

    return loss


def adversarial_loss(
    c: VaeConfig, device_mean: Callable[[Any], Any] = lambda tree: tree
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Return `autoencoder_loss` plus the losses of the critic (Esser et al. 2021, eq. 5–7).

    One backward pass trains both: the autoencoder to reconstruct and to be judged real, the critic
    to tell reconstructions from images.

    Args:
        device_mean: averages the last layer's gradients over all rows of the batch; their ratio is
            the critic's weight.
    """
    distance = reconstruction_loss(c)

    def loss(model: Any, batch: Any, inputs: Any) -> Any:
        image = to_float(batch.image)
        moments = model.encode(image)
        z = sample_latents(moments, keys_by_row(inputs.key, batch.row))
        reconstruction, last_layer_vjp = decode_with_last_layer_vjp(model, z)
        detached = jax.lax.stop_gradient(reconstruction)

        # Both losses are differentiated with respect to the reconstruction here. The chain rule
        # then goes to the last layer for their weight, and once through the whole autoencoder.
        distance_and_gradient = jax.value_and_grad(
            partial(distance, image=image, lpips=inputs.lpips), has_aux=True
        )
        (distance_loss, metrics), distance_gradient = distance_and_gradient(detached)
        generator_and_gradient = jax.value_and_grad(
            lambda x: perceptual.hinge_generator(model.discriminator(x))
        )
        generator_loss, generator_gradient = generator_and_gradient(detached)
        weight = c.gan_weight * perceptual.adaptive_weight(
            device_mean(last_layer_vjp(distance_gradient)),
            device_mean(last_layer_vjp(generator_gradient)),
        )
        gradient = jax.lax.stop_gradient(distance_gradient + weight * generator_gradient)
        critic_loss = perceptual.hinge_critic(
            model.discriminator(image), model.discriminator(detached)
        )

        metrics["kl"] = perceptual.kl_to_standard_normal(*moments).mean()
        metrics |= dict(zip(CRITIC_METRICS, (generator_loss, critic_loss, weight)))
        # Its value is 0; its gradient with respect to the reconstruction is `gradient`.
        surrogate = jnp.vdot(gradient, reconstruction - detached)
        value = jax.lax.stop_gradient(distance_loss + weight * generator_loss)
        kl_loss = c.kl_weight * metrics["kl"] / image[0].size
        return value + surrogate + critic_loss + kl_loss, metrics

    return loss


def decode_with_last_layer_vjp(
    model: AutoencoderKL, z: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b H W c"], Callable[..., Any]]:
    """Decode latents. Also returns the function from a gradient with respect to the images to the
    gradient with respect to the weights of the decoder's last layer.
    """

    def is_last(path: Any, _: Any) -> bool:
        return "decoder" in path and path[-2:] == ("conv_out", "kernel")

    definition, last, rest = nnx.split(model, is_last, ...)
    return jax.vjp(lambda last: nnx.merge(definition, last, rest).decode(z), last)


# --- the optimizer of both ------------------------------------------------------------------------


def separate_optimizers(
    autoencoder: optax.GradientTransformationExtraArgs,
    critic: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Optimize the autoencoder and the critic each on its own, so that the gradient norm of one
    does not clip the other's gradient.
    """

    def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return without_critic(tree), {CRITIC: tree[CRITIC]}

    def init(params: Any) -> Any:
        autoencoder_params, critic_params = split(params)
        return {
            "autoencoder": autoencoder.init(autoencoder_params),
            CRITIC: critic.init(critic_params),
        }

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        autoencoder_updates, critic_updates = split(updates)
        autoencoder_params, critic_params = split(params)
        autoencoder_updates, autoencoder_state = autoencoder.update(
            autoencoder_updates, state["autoencoder"], autoencoder_params, **extra
        )
        critic_updates, critic_state = critic.update(
            critic_updates, state[CRITIC], critic_params, **extra
        )
        merged = dict(autoencoder_updates) | dict(critic_updates)  # type: ignore
        return merged, {"autoencoder": autoencoder_state, CRITIC: critic_state}

    return optax.GradientTransformationExtraArgs(init, update)


def without_critic(params: dict[str, Any]) -> dict[str, Any]:
    """Return the autoencoder's weights among those of both."""
    return {name: x for name, x in params.items() if name != CRITIC}
