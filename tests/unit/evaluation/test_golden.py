"""Our numbers beside those of pytorch-fid and torch-fidelity, written by `golden/make.py`.

The tools differ in their random choices, so these are taken out: KID uses one subset of all rows,
and the rows for the Inception Score of torch-fidelity, which shuffles by its own seed, come in our
order. Precision and recall use k = 3 in both.
"""

import pytest
from golden import make
from golden_cases import FIDELITY, THEIRS, fit_statistics

from evaluation import metrics
from evaluation.metrics import frechet_distance


@pytest.fixture(scope="module")
def sets():
    """Features of real images and of samples."""
    return make.features(600, make.REAL_SEED), make.features(500, make.SAMPLES_SEED)


def test_the_frechet_distance_is_pytorch_fids(sets):
    found = frechet_distance(*map(fit_statistics, sets))
    assert found == pytest.approx(THEIRS["fid_of_features"], rel=1e-9)


def test_the_inception_score_is_torch_fidelitys():
    for n_parts, name in ((1, "isc_of_one"), (10, "isc_of_ten")):
        found = metrics.inception_score(make.logits(400), n_parts=n_parts, seed=0)
        theirs = FIDELITY[name]
        assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
        assert found.std == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_the_kernel_distance_is_torch_fidelitys(sets):
    real, samples = sets
    found = metrics.kernel_distance(samples, real[:500], n_subsets=1, subset_size=500)
    # It computes in float32.
    assert found.mean == pytest.approx(FIDELITY["kid"]["kernel_inception_distance_mean"], rel=1e-4)


def test_precision_and_recall_are_torch_fidelitys(sets):
    found = metrics.precision_recall(*sets)
    theirs = FIDELITY["prc"]
    assert 0.1 < theirs["precision"] < 0.9 and 0.1 < theirs["recall"] < 0.9
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
