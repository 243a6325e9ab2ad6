"""A small dataset in device memory, and the batches that are gathered from it there.

The batches are those of the pipeline. The host only sends the order of an epoch now and then.
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
    """The training split on every device, and the order of its rows in some epochs.

    Args:
        image: all images, or the moments of latents.
        mirrored: the moments of the mirrored images, which flipping latents does not give.
        order: the rows of several whole epochs, one after the other.
        flip: whether the row at each place of `order` is mirrored.
        first_step: a step whose batch begins at `first_place` of `order`.
    """

    image: UInt8[Array, "n h w c"] | Float16[Array, "n h w k"]
    mirrored: Float16[Array, "n h w k"] | None
    label: Int[Array, "n"]
    order: Int[Array, "places"]
    flip: Bool[Array, "places"]
    first_step: Int[Array, ""]
    first_place: Int[Array, ""]


def batches(data: Pipeline, mesh: parallel.Mesh, start: int, stop: int) -> Generator[DeviceDataset]:
    """Yield the dataset that `gather_batch` reads the batches of the steps start … stop − 1 from.
    The arrays are the same objects for as long as their epochs last.
    """
    image, label = data.decode_split("train")
    n, size = len(label), data.batch_size
    n_epochs = 2 + size // n  # those that a batch can lie in, and one more
    image, mirrored = data.source.train.format.split_views(image)
    image, mirrored, label = parallel.replicate((image, mirrored, label), mesh)
    epochs, current = range(0), None
    for step in range(start, stop):
        first, last = step * size // n, (step * size + size - 1) // n
        if last not in epochs or first not in epochs:
            epochs = range(first, first + n_epochs)
            order = np.concatenate([data.epoch_order(epoch) for epoch in epochs]).astype(np.int32)
            flip = np.concatenate([data.epoch_flips(epoch) for epoch in epochs])
            place = np.int32(step * size - first * n)
            order, flip, first_step, first_place = parallel.replicate(
                (order, flip, np.int32(step), place), mesh
            )
            current = DeviceDataset(image, mirrored, label, order, flip, first_step, first_place)
        assert current is not None
        yield current


def gather_batch(
    dataset: DeviceDataset, position: Int[Array, ""], *, batch_size: int, mesh: parallel.Mesh
) -> Any:
    """Gather the batch at `position`, split over all devices. To be traced by `jit`."""
    row = jnp.arange(batch_size, dtype=jnp.int32)
    place = dataset.first_place + (position - dataset.first_step) * batch_size + row
    row, place = parallel.constrain_rows((row, place), mesh)
    index, flip = dataset.order[place], dataset.flip[place]
    image = dataset.image[index]
    flipped = image[:, :, ::-1] if dataset.mirrored is None else dataset.mirrored[index]
    image = jnp.where(flip[:, None, None, None], flipped, image)
    return parallel.constrain_rows(Batch(row, image, dataset.label[index]), mesh)
