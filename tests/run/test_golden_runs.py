"""Our numbers beside those of pytorch-fid and torch-fidelity, which `golden/make.py` has written.

Where definitions differ, what they share is compared: KID draws its subsets at random, each tool in
its own way, so that one subset of all rows is taken; torch-fidelity shuffles for the Inception
Score by its own seed, so that its rows come in our order. The k of precision and recall is 3 in
both.
"""

import jax
import numpy as np
import pytest
from golden import make
from golden_cases import FIDELITY, THEIRS, gaussian

from evaluation import features, metrics
from evaluation.metrics import frechet_distance
from pretrained import inception as pretrained
from runtime import parallel

N = len(THEIRS["pool"])


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """The same random weights as the published tools had."""
    tensors = make.weights(pretrained.published_shapes().items())
    return pretrained.PretrainedInception(pretrained.fold_batch_norms(tensors), "0" * 64)


@pytest.fixture(scope="module")
def extracted(published):
    """What each preparation makes of the real and the drawn pictures: (pool, logits) of each."""
    mesh = parallel.make_mesh(devices=jax.devices()[:1])

    def of(preparation):
        extract = features.build_inception_extractor(published, mesh, preparation=preparation)
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
