"""A small dataset that lies in device memory, and the batches that are drawn from it there.

They are the pipeline's own batches; the host's part is the order of an epoch, now and then.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float16, Int, UInt8

from data.batch import Batch
from data.pipeline import Pipeline
from runtime import parallel


class DeviceDataset(NamedTuple):
    """The training set on every device, and where some epochs have their rows."""

    image: UInt8[Array, "n h w c"] | Float16[Array, "n h w k"]
    mirrored: Float16[Array, "n h w k"] | None  # the other view of latents, which no flip can make
    label: Int[Array, "n"]
    order: Int[Array, "places"]  # rows, of whole epochs one after the other
    flip: Bool[Array, "places"]
    first_step: Int[Array, ""]  # whose batch begins at `first_place`
    first_place: Int[Array, ""]


def batches(data: Pipeline, mesh: parallel.Mesh, start: int, stop: int) -> Generator[DeviceDataset]:
    """What the batches of the steps start … stop − 1 are drawn from by `draw`: the same arrays for
    as long as the epochs last.
    """
    image, label = data.images("train")
    n, size = len(label), data.batch_size
    n_epochs = 2 + size // n  # those that a batch can lie in, and one more
    encoding, mirrored = data.source.config.encoding, None
    if encoding and encoding.mirrored:
        image, mirrored = np.split(image, 2, axis=-1)
    image, mirrored, label = parallel.replicate((image, mirrored, label), mesh)
    epochs, now = range(0), None
    for step in range(start, stop):
        first, last = step * size // n, (step * size + size - 1) // n
        if last not in epochs or first not in epochs:
            epochs = range(first, first + n_epochs)
            order = np.concatenate([data.order(epoch) for epoch in epochs]).astype(np.int32)
            flip = np.concatenate([data.flips(epoch) for epoch in epochs])
            place = np.int32(step * size - first * n)
            changing = parallel.replicate((order, flip, np.int32(step), place), mesh)
            now = DeviceDataset(image, mirrored, label, *changing)
        assert now is not None
        yield now


def gather_batch(
    resident: DeviceDataset, position: Int[Array, ""], *, batch_size: int, mesh: parallel.Mesh
) -> Any:
    """Inside `jit`: the batch of the step `position`, split over all devices."""
    row = jnp.arange(batch_size, dtype=jnp.int32)
    place = resident.first_place + (position - resident.first_step) * batch_size + row
    row, place = parallel.constrain_rows((row, place), mesh)
    index, flip = resident.order[place], resident.flip[place]
    image = resident.image[index]
    other = image[:, :, ::-1] if resident.mirrored is None else resident.mirrored[index]
    image = jnp.where(flip[:, None, None, None], other, image)
    return parallel.constrain_rows(Batch(row, image, resident.label[index]), mesh)
