"""Rectified flow: a straight path from data to noise, and the loss that matches its velocity.

Read in this order: the path, the densities of training times, the inputs that every loss shares,
the loss (Liu et al. 2022; Esser et al. 2024). Time runs from data (t = 0) to noise (t = 1).

An objective is `loss(model, batch, key) -> (loss, metrics)`: the mean over the rows of `batch`, and
means to report beside it. `batch` has `row`, `image` and `label`; a label is any tree of arrays.
Each row has its own random keys, folded from its index in the global batch, so the numbers do not
depend on how rows are spread over devices.

Solvers are in `sampling.py`. Nothing here knows of networks, optimizers or devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

N_TIME_BINS = 10
Metrics = dict[str, Array]
Objective = Callable[[Any, Any, Any], tuple[Array, Metrics]]
# The `image` of a batch → the data that a model sees, given one key for each row.
ToModelInput = Callable[[Array, Key[Array, "b"]], Float[Array, "b h w c"]]
# A density of t on (0, 1) as its quantile function: uniform u → t.
Density = Callable[[Float[Array, "b"]], Float[Array, "b"]]


# --- the path -------------------------------------------------------------------------------------


def interpolate(data: Float[Array, "b *s"], noise: Float[Array, "b *s"], t: Float[Array, "b"]):
    """The straight path: x_t = (1 − t)·data + t·noise, and its velocity dx_t/dt = noise − data (Liu
    et al. 2022, eq. 1).

    Returns (x_t, velocity), both shaped as `data`.
    """
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * data + t * noise, noise - data


# --- densities of training times ------------------------------------------------------------------


def uniform() -> Density:
    """t ~ U(0, 1) (Liu et al. 2022)."""
    return lambda u: u


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """logit t ~ N(mean, std²): more weight mid-path (Esser et al. 2024, eq. 19)."""
    return lambda u: jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))


def heavy_tailed_mode(scale: float = 1.29) -> Density:
    """Heavy tails around a mode at the middle; scale 0 is uniform (Esser et al. 2024, eq. 20 at
    1 − u, so that it rises). `scale` is in −1 … 2 / (π − 2) = 1.75.
    """
    return lambda u: u + scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)


def shift_time(t: Float[Array, "*n"], shift: float) -> Float[Array, "*n"]:
    """More noise for larger images: s·t / (1 + (s − 1)·t) (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


# --- inputs of a loss -----------------------------------------------------------------------------


def to_float(image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Bytes 0 … 255 → −1 … 1, on the device: a quarter of the bytes cross the wire."""
    return image.astype(jnp.float32) / 127.5 - 1


def pixels_to_input(
    image: UInt8[Array, "b h w c"], keys: Key[Array, "b"]
) -> Float[Array, "b h w c"]:
    """The `ToModelInput` of pixels, which needs no random numbers."""
    return to_float(image)


class RowKeys(NamedTuple):
    """One key per row of the batch and per use."""

    time: Key[Array, "b"]
    noise: Key[Array, "b"]
    drop: Key[Array, "b"]
    data: Key[Array, "b"]


def derive_row_keys(key: Key[Array, ""], row: Int[Array, "b"]) -> RowKeys:
    """Keys that depend on the step's key and the row's index in the global batch alone."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 4))(row)
    return RowKeys(time=keys[:, 0], noise=keys[:, 1], drop=keys[:, 2], data=keys[:, 3])


def drop_labels(
    label: PyTree[Array], drop: Bool[Array, "b"], n_classes: int | Int[Array, ""]
) -> PyTree[Array]:
    """Replace the label by the null label in the rows to drop: class `n_classes` or, without
    classes, the empty caption, which is all zeros.
    """

    def drop_rows(x: Array) -> Array:
        return jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(n_classes, x.dtype), x)

    return jax.tree.map(drop_rows, label)


class LossInputs(NamedTuple):
    """Inputs of a loss, except for the times. `keys.time` is left for these."""

    keys: RowKeys
    data: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    label: PyTree[Array]


def sample_loss_inputs(
    batch: Any,
    key: Key[Array, ""],
    *,
    n_classes: int | Int[Array, ""],
    label_dropout: float,
    to_input: ToModelInput = pixels_to_input,
) -> LossInputs:
    """Convert a batch's images to data, sample noise of the same shape, and drop some labels."""
    keys = derive_row_keys(key, batch.row)
    data = to_input(batch.image, keys.data)
    noise = jax.vmap(lambda key: jax.random.normal(key, data.shape[1:]))(keys.noise)
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, label_dropout))(keys.drop)
    return LossInputs(keys, data, noise, drop_labels(batch.label, drop, n_classes))


def loss_by_time(t: Float[Array, "b"], error: Float[Array, "b"]) -> Metrics:
    """The loss in ten equal bins of t, as two means that can be averaged over devices and steps
    before they are divided.

    `binned_loss / bin_share` is the mean loss of a bin.
    """
    bins = jnp.minimum((t * N_TIME_BINS).astype(jnp.int32), N_TIME_BINS - 1)
    one_hot = jax.nn.one_hot(bins, N_TIME_BINS)
    return {"binned_loss": (one_hot * error[:, None]).mean(0), "bin_share": one_hot.mean(0)}


# --- the loss -------------------------------------------------------------------------------------


def rectified_flow_loss(
    *,
    density: Density,
    shift: float = 1.0,
    label_dropout: float = 0.0,
    to_input: ToModelInput = pixels_to_input,
) -> Objective:
    """Match the velocity of the straight path: E |model(x_t, t, label) − (noise − data)|² (Liu et
    al. 2022, eq. 1).

    Args:
        density: of the training times.
        shift: applied to these times by `shift_time`; 1 leaves them alone.
        label_dropout: fraction of rows whose label is replaced by the null label, which
            classifier-free guidance needs (Ho & Salimans 2022, alg. 1).
        to_input: converts a batch's `image` to the data that the model sees.
    """

    def loss(model: Any, batch: Any, key: Any) -> Any:
        keys, data, noise, label = sample_loss_inputs(
            batch,
            key,
            n_classes=model.config.n_classes,
            label_dropout=label_dropout,
            to_input=to_input,
        )
        # The smallest normal number instead of 0, which is no quantile of an unbounded density.
        u = jax.vmap(lambda key: jax.random.uniform(key, minval=jnp.finfo(jnp.float32).tiny))
        t = shift_time(density(u(keys.time)), shift)

        x_t, velocity = interpolate(data, noise, t)
        error = jnp.square(model(x_t, t, label) - velocity).mean((1, 2, 3))
        return error.mean(), loss_by_time(t, error)

    return loss
