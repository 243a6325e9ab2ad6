"""Losses of an autoencoder: reconstruction and KL, alone or against a critic of patches."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from methods.rectified_flow import to_float
from networks import perceptual
from networks.autoencoder import AutoencoderConfig, AutoencoderKL, sample
from training.autoencoder.config import VaeConfig

CRITIC = "discriminator"  # its weights' name beside the autoencoder's
OF_CRITIC = ("gan_loss", "critic_loss", "gan_weight")  # metrics


# --- the loss -------------------------------------------------------------------------------------


class AutoencoderWithCritic(AutoencoderKL):
    """An autoencoder and the critic that it is trained against, side by side."""

    def __init__(self, config: AutoencoderConfig, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        # As many halvings as leave it some patches to judge: three from 32 pixels to a side on.
        n_layers = min(3, max(1, int(np.log2(config.sample_size)) - 2))
        self.discriminator = perceptual.PatchDiscriminator(
            config.in_channels, n_layers=n_layers, dtype=dtype, rngs=rngs
        )


class LossInputs(NamedTuple):
    """What a step's loss is given besides weights and pictures."""

    key: Key[Array, ""]
    lpips: Any  # weights, or ()


def row_keys(key: Key[Array, ""], row: Int[Array, "b"]) -> Key[Array, "b"]:
    """A key for each row, from its index in the global batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(row)


def reconstruction_loss(c: VaeConfig) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """`loss(picture, image, lpips) -> (loss, metrics)`: how far pictures are from others."""

    def loss(picture, image, lpips):
        metrics = {"pixel_loss": perceptual.PIXEL_LOSSES[c.pixel_loss](picture, image).mean()}
        total = metrics["pixel_loss"]
        if c.gradient_weight:
            metrics["gradient_loss"] = perceptual.gradient_l2(picture, image).mean()
            total += c.gradient_weight * metrics["gradient_loss"]
        if lpips:
            metrics["lpips_loss"] = perceptual.lpips(lpips, picture, image).mean()
            total += c.lpips_weight * metrics["lpips_loss"]
        return total, metrics

    return loss


def objective(c: VaeConfig) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """`loss(model, batch, given) -> (loss, metrics)` without a critic. The KL is divided by the
    number of pixel values, as the reconstruction is, so that `kl_weight` is that of two sums over
    a picture (Rombach et al. 2022, eq. 25) and not a matter of its size.
    """
    distance = reconstruction_loss(c)

    def loss(model, batch, given):
        image = to_float(batch.image)
        moments = model.encode(image)
        picture = model.decode(sample(moments, row_keys(given.key, batch.row)))
        total, metrics = distance(picture, image, given.lpips)
        metrics["kl"] = perceptual.kl(*moments).mean()
        if c.gan_weight:  # it has not started yet
            metrics |= dict.fromkeys(OF_CRITIC, 0 * total)
        return total + c.kl_weight * metrics["kl"] / image[0].size, metrics

    return loss


def adversarial(
    c: VaeConfig, device_mean: Callable[[Any], Any] = lambda tree: tree
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """`objective` with a critic (Esser et al. 2021, eq. 5–7): the autoencoder's weights are led to
    a smaller distance and to pictures that the critic takes for real, the critic's to tell them
    from real ones, both at once.

    Args:
        device_mean: of the gradients that weigh the critic: over all rows of the batch.
    """
    distance = reconstruction_loss(c)

    def loss(model, batch, given):
        image = to_float(batch.image)
        moments = model.encode(image)
        z = sample(moments, row_keys(given.key, batch.row))
        picture, pull = decoded(model, z)
        fixed = jax.lax.stop_gradient(picture)

        # Both are differentiated here, by the picture, and the chain rule goes on from there: once
        # to the last layer for their weight, once through all of the autoencoder.
        near = jax.value_and_grad(partial(distance, image=image, lpips=given.lpips), has_aux=True)
        (reconstruction, metrics), to_near = near(fixed)
        fools = jax.value_and_grad(lambda x: perceptual.hinge_generator(model.discriminator(x)))
        gan, to_fool = fools(fixed)
        weight = c.gan_weight * perceptual.adaptive_weight(
            device_mean(pull(to_near)), device_mean(pull(to_fool))
        )
        direction = jax.lax.stop_gradient(to_near + weight * to_fool)
        critic = perceptual.hinge_critic(model.discriminator(image), model.discriminator(fixed))

        metrics["kl"] = perceptual.kl(*moments).mean()
        metrics |= dict(zip(OF_CRITIC, (gan, critic, weight)))
        led = jnp.vdot(direction, picture - fixed)  # 0, with the gradient that was asked for
        total = jax.lax.stop_gradient(reconstruction + weight * gan)
        return total + led + critic + c.kl_weight * metrics["kl"] / image[0].size, metrics

    return loss


def decoded(
    model: AutoencoderKL, z: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b H W c"], Callable]:
    """The pictures, and what a gradient in them is in the weights of the decoder's last layer."""

    def is_last(path, _):
        return "decoder" in path and path[-2:] == ("conv_out", "kernel")

    definition, last, rest = nnx.split(model, is_last, ...)
    return jax.vjp(lambda last: nnx.merge(definition, last, rest).decode(z), last)


def separate_optimizers(
    autoencoder: optax.GradientTransformationExtraArgs,
    critic: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for each of two opponents: the gradient of one must not clip the other's."""

    def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return without_critic(tree), {CRITIC: tree[CRITIC]}

    def init(params):
        a, b = split(params)
        return {"autoencoder": autoencoder.init(a), CRITIC: critic.init(b)}

    def update(updates, state, params=None, **extra):
        (a, b), (params_a, params_b) = split(updates), split(params)
        a, state_a = autoencoder.update(a, state["autoencoder"], params_a, **extra)
        b, state_b = critic.update(b, state[CRITIC], params_b, **extra)
        return dict(a) | dict(b), {"autoencoder": state_a, CRITIC: state_b}  # type: ignore

    return optax.GradientTransformationExtraArgs(init, update)


def without_critic(params: dict[str, Any]) -> dict[str, Any]:
    """The autoencoder's weights among those of a state."""
    return {name: x for name, x in params.items() if name != CRITIC}
