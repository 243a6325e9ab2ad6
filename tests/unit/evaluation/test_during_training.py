"""The Fréchet distance measured during training, apart from a run."""

import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from during_training_cases import digits  # noqa: F401

from evaluation import metrics
from evaluation.during_training import TrainingFID
from runtime import parallel
from runtime.errors import UserError


def test_missing_weights_are_reported(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match=r"x\.pth"):
        TrainingFID.load(
            tmp_path / "fid.npz",
            parallel.make_mesh(),
            space="inception",
            weights=str(tmp_path / "x.pth"),
            n_samples=4,
            image_shape=(8, 8, 3),
        )


def test_a_distance_needs_all_its_samples(digits):
    fid = TrainingFID.load(
        digits,
        parallel.make_mesh(),
        space="pixels",
        weights=None,
        n_samples=20,
        image_shape=(8, 8, 1),
    )
    some = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8)
    assert fid.measure(iter([some[:19]])) is None
    statistics = metrics.RunningStatistics(64)
    statistics.update(some.reshape(20, 64).astype(np.float32) / 255)
    expected = metrics.frechet_distance(statistics.statistics(), fid.reference.pool)
    assert fid.measure(iter([some[:3], some[3:]])) == pytest.approx(expected, rel=1e-5)
