"""Our numbers beside those of pytorch-fid and torch-fidelity, written by `golden/make.py`.

The tools differ in their random choices, so these are taken out: KID uses one subset of all rows,
and the rows for the Inception Score of torch-fidelity, which shuffles by its own seed, come in our
order. Precision and recall use k = 3 in both.
"""

import jax
import numpy as np
import pytest
from golden import make
from golden_cases import FIDELITY, THEIRS, fit_statistics

from evaluation import features, metrics
from evaluation.metrics import frechet_distance
from pretrained import inception as pretrained
from runtime import parallel

N = len(THEIRS["pool"])


@pytest.fixture(scope="module")
def published():
    """The random weights that the published tools were run with."""
    tensors = make.weights(pretrained.published_shapes().items())
    return pretrained.PretrainedInception(pretrained.fold_batch_norms(tensors), "0" * 64)


@pytest.fixture(scope="module")
def extracted(published):
    """(pool, logits) of the real images and of the samples, by preparation."""
    mesh = parallel.make_mesh(devices=jax.devices()[:1])

    def extract(preparation):
        extractor = features.build_inception_extractor(published, mesh, preparation=preparation)
        both = (make.images(N, seed) for seed in (make.REAL_SEED, make.SAMPLES_SEED))
        found = [list(extractor(iter([image]), batch_size=N)) for image in both]
        return [(rows.pool, rows.logits) for (rows,) in found]

    return extract


@pytest.mark.slow
def test_features_and_fid_of_images_are_pytorch_fids(extracted):
    (real, _), (samples, _) = extracted("pytorch_fid")
    scale = np.abs(THEIRS["pool"]).max()
    np.testing.assert_allclose(real[:, : make.KEPT], THEIRS["pool"], rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(np.linalg.norm(real, axis=1), THEIRS["pool_norms"], rtol=1e-5)
    found = frechet_distance(fit_statistics(real), fit_statistics(samples))
    assert found == pytest.approx(THEIRS["fid_of_images"], rel=1e-4)


@pytest.mark.slow
def test_scores_of_images_are_torch_fidelitys(extracted):
    """torch-fidelity resizes images as the graph of 2015 does, which is our `adm`."""
    (real, _), (samples, logits) = extracted("adm")
    theirs = FIDELITY["images"]
    found = frechet_distance(fit_statistics(real), fit_statistics(samples))
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    score = metrics.inception_score(logits, n_parts=1)
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
