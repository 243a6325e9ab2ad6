"""Inputs and helpers shared by the tests of evaluation.during_training."""

from dataclasses import replace

import nano  # noqa: F401  (its sizes)
import pytest

import evaluate
from evaluate import EvaluateConfig


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Statistics of the real digits' pixels."""
    path = tmp_path_factory.mktemp("references") / "digits.npz"
    config = EvaluateConfig(dataset_name="digits", make_reference=path, features="pixels")
    evaluate.main(replace(config, n_features=0))
    return path
