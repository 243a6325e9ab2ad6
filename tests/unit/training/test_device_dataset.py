"""Batches gathered on the devices equal those that the host would send."""

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
    """24 colour images, which are mirrored at random."""
    return open_dataset("cifar10", data_dir=make_copy("cifar10", tmp_path_factory.mktemp("cifar")))


@pytest.mark.parametrize("batch_size", [8, 24, 40, 16])
def test_gathered_batches_are_those_of_the_pipeline(source, batch_size):
    """Within an epoch, across epochs, over several, and from a step in the middle."""
    data = Pipeline(source, batch_size=batch_size, seed=1)
    gather = jax.jit(partial(device_dataset.gather_batch, batch_size=batch_size, mesh=MESH))
    for start, stop in ((0, 12), (1001, 1004)):
        expected = data.train_batches(start, stop)
        datasets = device_dataset.batches(data, MESH, start, stop)
        for step, host, dataset in zip(range(start, stop), expected, datasets, strict=True):
            jax.tree.map(np.testing.assert_array_equal, gather(dataset, step), host)


def test_the_host_sends_new_arrays_only_for_new_epochs(source):
    data = Pipeline(source, batch_size=8, seed=1)
    datasets = list(device_dataset.batches(data, MESH, 0, 60))
    assert len({id(x) for x in datasets}) <= 60 * 8 / 24 / 2 + 1
    assert len({id(x.image) for x in datasets}) == 1


def test_a_gathered_batch_is_split_over_the_devices(source):
    data = Pipeline(source, batch_size=16, seed=0)
    dataset = next(device_dataset.batches(data, MESH, 0, 1))
    batch = jax.jit(partial(device_dataset.gather_batch, batch_size=16, mesh=MESH))(dataset, 0)
    assert {len(shard.data) for shard in batch.image.addressable_shards} == {2}
