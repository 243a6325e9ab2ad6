"""A run with its dataset on the devices is the run without."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from train_cases import TINY, metrics

from runtime.errors import UserError
from train import Trainer


def test_a_run_with_its_dataset_on_the_devices_is_the_same_run(tmp_path, capsys):
    runs = []
    for cached in (False, True):
        config = replace(TINY, cache_on_device=cached, run_dir=tmp_path / str(cached))
        runs.append(Trainer(config))
        runs[-1].fit()
    leaves = zip(*(jax.tree.leaves(run.state) for run in runs), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)
    assert metrics(tmp_path / "False") == metrics(tmp_path / "True")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"streaming": True}, "--cache_on_device holds the whole dataset"),
        ({"in_memory": False}, "--cache_on_device holds the whole dataset"),
        ({"caption": ("a {label}",)}, "--cache_on_device is for class labels"),
        ({"profile": True}, "--profile measures blank batches .*: add --nocache_on_device"),
    ],
)
def test_flags_that_do_not_go_with_cache_on_device_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        Trainer(replace(TINY, cache_on_device=True, **flags))
