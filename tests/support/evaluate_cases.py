"""Inputs and helpers shared by the tests of evaluate."""

import json
from dataclasses import replace
from pathlib import Path

import nano  # noqa: F401  (its sizes)
import pytest

import evaluate
from evaluate import EvaluateConfig

PIXELS = {"pixel_frechet", "pixel_kernel", "pixel_kernel_std", "pixel_precision", "pixel_recall"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Statistics of the real digits' pixels."""
    path = tmp_path_factory.mktemp("references") / "digits.npz"
    config = EvaluateConfig(dataset_name="digits", make_reference=path, features="pixels")
    evaluate.main(replace(config, n_features=300))
    return path


def evaluate_pixels(out: Path, **flags) -> dict:
    """The record of an evaluation."""
    evaluate.main(EvaluateConfig(features="pixels", out=out, **flags))
    return json.loads(out.read_text().splitlines()[-1])


def scores(record: dict) -> dict:
    return {name: value for name, value in record.items() if name != "card"}
