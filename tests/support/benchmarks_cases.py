"""Inputs and helpers shared by the tests of benchmarks."""

import importlib.util

import pytest

from model import model_config

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")),
    reason="the peer needs torch and diffusers: pip install --group bench",
)


NANO = model_config(
    "DiT-Ti/4", image_size=16, channels=4, out_channels=4, n_classes=10, width=32, depth=2
)


# --- the peer -------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Run torch on one thread: its threads spin while waiting, for minutes beside other tests."""
    import torch

    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
