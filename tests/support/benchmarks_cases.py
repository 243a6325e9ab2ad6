"""Inputs and helpers shared by the tests of benchmarks."""

import importlib.util

import pytest

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")),
    reason="the peer needs torch and diffusers: pip install --group bench",
)
