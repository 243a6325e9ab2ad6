"""Inputs and helpers shared by the tests of generate."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_model

import generate
from generate import GenerateConfig
from inference.trained_model import TrainedModel

RUN = Path("runs/digits")


@pytest.fixture(scope="module")
def digits():
    return tiny_model()


@pytest.fixture
def command(digits, monkeypatch):
    """Call `generate.main` with these flags, on a model of random weights."""

    def call(trained: TrainedModel = digits, **flags) -> None:
        monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: trained)
        generate.main(GenerateConfig(run=RUN, **flags))

    return call


def arrays(path: Path) -> tuple[np.ndarray, list[int]]:
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"].tolist()
