"""Inputs and helpers shared by the tests of service."""

import numpy as np
import pytest
from tiny_models import tiny_model

from inference.app import service
from inference.app.service import SampleJob

JOB = SampleJob(labels=("3", "7"), n_images=5, seed=5)


@pytest.fixture(scope="module")
def digits():
    return tiny_model()


def sample(model, job):
    """All images of a job as an array, and their captions."""
    pairs = [pair for batch in service.run_job(model, job) for pair in batch]
    return np.stack([np.asarray(image) for image, _ in pairs]), [caption for _, caption in pairs]
