"""The README's claim: a run without a flag learns to write digits, and does not copy them."""

import json

import numpy as np
import pytest
from commands import run

from benchmarks.digits import frechet_distance


@pytest.mark.slow
def test_the_default_run_writes_digits(tmp_path, cache):
    folder = tmp_path / "run"
    trained = run("train.py", "--run_dir", folder, cache=cache, fast_compile=False)
    assert trained.returncode == 0, trained.stderr
    judged = run("benchmarks/digits.py", "--run", folder, cache=cache, fast_compile=False)
    assert judged.returncode == 0, judged.stderr
    result = json.loads(judged.stdout.splitlines()[-1])
    assert result["accuracy"] >= 0.98
    assert result["frechet"] <= 60
    assert result["novelty"] >= 0.9


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 2)), rng.normal(0, (2, 3), (200_000, 2)) + np.array((1, 0))
    np.testing.assert_allclose(frechet_distance(a, b), 1 + 1 + 4, rtol=0.02)
    assert abs(frechet_distance(a, a)) < 1e-6
