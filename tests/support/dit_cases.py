"""Inputs and helpers shared by the tests of dit."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_thread():
    """Run torch on one thread: those of small models wait for each other beside other tests."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def assert_same(actual, expected):
    """Assert that two trees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
