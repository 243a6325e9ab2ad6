"""A run that is measured on its way is the run that it would have been, and its numbers are those
of `evaluate.py`.
"""

import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from during_training_cases import digits  # noqa: F401

from evaluation import metrics
from evaluation.during_training import TrainingFID
from runtime import parallel
from runtime.errors import UserError


def test_weights_that_are_not_there_are_refused(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    how = {"space": "inception", "weights": str(tmp_path / "x.pth"), "n": 4, "shape": (8, 8, 3)}
    with pytest.raises(UserError, match=r"x\.pth"):
        TrainingFID.load(tmp_path / "fid.npz", parallel.make_mesh(), **how)


def test_a_distance_needs_all_its_pictures(digits):
    how = {"space": "pixels", "weights": None, "n": 20, "shape": (8, 8, 1)}
    yardstick = TrainingFID.load(digits, parallel.make_mesh(), **how)
    some = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8)
    assert yardstick.measure(iter([some[:19]])) is None
    moments = metrics.RunningStatistics(64)
    moments.update(some.reshape(20, 64).astype(np.float32) / 255)
    expected = metrics.frechet_distance(moments.statistics(), yardstick.real.pool)
    assert yardstick.measure(iter([some[:3], some[3:]])) == pytest.approx(expected, rel=1e-5)
