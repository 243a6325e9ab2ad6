"""What is drawn on the devices is what the host would have sent."""

from functools import partial

import jax
import numpy as np
import pytest
from hub_copies import make_copy

from data.load import open_dataset
from data.pipeline import Pipeline
from runtime import parallel
from training import device_dataset

MESH = parallel.make_mesh()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """24 coloured pictures, which are mirrored at random."""
    return open_dataset("cifar10", data_dir=make_copy("cifar10", tmp_path_factory.mktemp("cifar")))


@pytest.mark.parametrize("batch_size", [8, 24, 40, 16])
def test_batches_drawn_on_devices_are_the_pipelines(source, batch_size):
    """Within epochs, across them, and of several; also from a step in the middle."""
    data = Pipeline(source, batch_size=batch_size, seed=1)
    draw = jax.jit(partial(device_dataset.gather_batch, batch_size=batch_size, mesh=MESH))
    for start, stop in ((0, 12), (1001, 1004)):
        expected = data.train_batches(start, stop)
        drawn = device_dataset.batches(data, MESH, start, stop)
        for step, host, held in zip(range(start, stop), expected, drawn, strict=True):
            jax.tree.map(np.testing.assert_array_equal, draw(held, step), host)


def test_the_host_sends_something_new_only_with_new_epochs(source):
    data = Pipeline(source, batch_size=8, seed=1)
    held = list(device_dataset.batches(data, MESH, 0, 60))
    assert len({id(x) for x in held}) <= 60 * 8 / 24 / 2 + 1
    assert len({id(x.image) for x in held}) == 1


def test_a_drawn_batch_lies_split_over_the_devices(source):
    data = Pipeline(source, batch_size=16, seed=0)
    held = next(device_dataset.batches(data, MESH, 0, 1))
    batch = jax.jit(partial(device_dataset.gather_batch, batch_size=16, mesh=MESH))(held, 0)
    assert {len(shard.data) for shard in batch.image.addressable_shards} == {2}
