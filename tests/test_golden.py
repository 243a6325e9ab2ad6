"""Our numbers beside those of pytorch-fid and torch-fidelity, which `golden/make.py` has written.

Where definitions differ, what they share is compared: KID draws its subsets at random, each tool in
its own way, so that one subset of all rows is taken; torch-fidelity shuffles for the Inception
Score by its own seed, so that its rows come in our order. The k of precision and recall is 3 in
both.
"""

import json

import jax
import numpy as np
import pytest
from golden import make

from evaluation import features, metrics
from evaluation.metrics import Moments, frechet_distance
from pretrained import inception as pretrained
from runtime import parallel

GOLDEN = json.loads(make.FILE.read_text())
THEIRS, FIDELITY = GOLDEN["pytorch_fid"], GOLDEN["torch_fidelity"]
N = len(THEIRS["pool"])


def gaussian(rows):
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return moments.gaussian()


@pytest.fixture(scope="module")
def sets():
    """Features of real and of drawn pictures."""
    return make.features(600, make.REAL), make.features(500, make.DRAWN)


def test_the_frechet_distance_is_pytorch_fids(sets):
    found = frechet_distance(*map(gaussian, sets))
    assert found == pytest.approx(THEIRS["fid_of_features"], rel=1e-9)


def test_the_inception_score_is_torch_fidelitys():
    for n_parts, name in ((1, "isc_of_one"), (10, "isc_of_ten")):
        found = metrics.inception_score(make.logits(400), n_parts=n_parts, seed=0)
        theirs = FIDELITY[name]
        assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
        assert found.std == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_the_kernel_distance_is_torch_fidelitys(sets):
    real, drawn = sets
    found = metrics.kernel_distance(drawn, real[:500], n_subsets=1, subset_size=500)
    # It computes in float32.
    assert found.mean == pytest.approx(FIDELITY["kid"]["kernel_inception_distance_mean"], rel=1e-4)


def test_precision_and_recall_are_torch_fidelitys(sets):
    found = metrics.precision_recall(*sets)
    theirs = FIDELITY["prc"]
    assert 0.1 < theirs["precision"] < 0.9 and 0.1 < theirs["recall"] < 0.9
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """The same random weights as the published tools had."""
    tensors = make.weights(pretrained.published_shapes().items())
    return pretrained.Pretrained(pretrained.to_params(tensors), "0" * 64)


@pytest.fixture(scope="module")
def extracted(published):
    """What each preparation makes of the real and the drawn pictures: (pool, logits) of each."""
    mesh = parallel.make_mesh(devices=jax.devices()[:1])

    def of(preparation):
        extract = features.of_inception(published, mesh, preparation=preparation)
        both = (make.pictures(N, seed) for seed in (make.REAL, make.DRAWN))
        found = [list(extract(iter([image]), batch_size=N)) for image in both]
        return [(rows.pool, rows.logits) for (rows,) in found]

    return of


@pytest.mark.slow
def test_features_and_fid_of_pictures_are_pytorch_fids(extracted):
    (real, _), (drawn, _) = extracted("pytorch_fid")
    scale = np.abs(THEIRS["pool"]).max()
    np.testing.assert_allclose(real[:, : make.KEPT], THEIRS["pool"], rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(np.linalg.norm(real, axis=1), THEIRS["pool_norms"], rtol=1e-5)
    found = frechet_distance(gaussian(real), gaussian(drawn))
    assert found == pytest.approx(THEIRS["fid_of_pictures"], rel=1e-4)


@pytest.mark.slow
def test_scores_of_pictures_are_torch_fidelitys(extracted):
    """It prepares pictures as the graph of 2015 does."""
    (real, _), (drawn, logits) = extracted("adm")
    theirs = FIDELITY["pictures"]
    found = frechet_distance(gaussian(real), gaussian(drawn))
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    score = metrics.inception_score(logits, n_parts=1)
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
