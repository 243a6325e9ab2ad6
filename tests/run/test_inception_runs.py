"""FID's Inception beside an independent one in torch, on random weights; images as other tools
prepare them; weights that are not its own.
"""

import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from inception_cases import (
    extracted,
    file,  # noqa: F401
    loaded,  # noqa: F401
    of_torch,  # noqa: F401
    ours,  # noqa: F401
    state,  # noqa: F401
    torch,  # noqa: F401
    two_sets,  # noqa: F401
    wave_images,
)

import evaluate
from evaluate import EvaluateConfig
from evaluation import features
from evaluation.during_training import TrainingFID
from evaluation.features import summarize_features
from evaluation.metrics import frechet_distance
from runtime import parallel
from runtime.errors import UserError


def nuclear_frechet(x, y):
    """From rows: tr (Σa Σb)^½ is the sum of the singular values of A Bᵀ, where Σ = AᵀA."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    p, q = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + (p**2).sum() + (q**2).sum() - 2 * cross


@pytest.mark.slow
def test_distances_are_those_of_torch(ours, of_torch):
    (pool_a, spatial_a, _), (pool_b, spatial_b, _) = of_torch
    a, b = ours
    fid, sfid = nuclear_frechet(pool_a, pool_b), nuclear_frechet(spatial_a, spatial_b)
    found = frechet_distance(a.pool, b.pool)
    np.testing.assert_allclose(found, fid, rtol=1e-4)
    np.testing.assert_allclose(frechet_distance(a.spatial, b.spatial), sfid, rtol=1e-4)


@pytest.mark.slow
def test_fid_is_the_same_in_batches_of_any_size_on_any_devices(loaded, two_sets):
    """Most batch sizes do not divide the number of images: the last batch counts, its padding does
    not. On eight devices each batch size is one of 8.
    """
    few = [two_sets[0][:5], two_sets[1][-4:]]

    def distance(n_devices, batch_size):
        summaries = extracted(loaded, few, n_devices=n_devices, batch_size=batch_size)
        return frechet_distance(*(summary.pool for summary in summaries))

    expected = distance(1, 1)
    found = [distance(1, 3), distance(8, 8)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_command_computes_every_score_of_inception(file, two_sets, tmp_path):
    for name, image in zip(("real", "samples"), two_sets):
        np.savez(tmp_path / f"{name}.npz", arr_0=image)
    flags = {"inception": str(file), "batch_size": 8}
    real, out = tmp_path / "statistics.npz", tmp_path / "record"
    evaluate.main(EvaluateConfig(npz=tmp_path / "real.npz", make_reference=real, **flags))
    config = EvaluateConfig(npz=tmp_path / "samples.npz", reference=real, out=out, **flags)
    evaluate.main(config)
    found = json.loads(out.read_text())
    names = {"fid", "sfid", "inception_score", "inception_score_std", "kid", "kid_std"}
    assert found.keys() == names | {"precision", "recall", "card"}
    assert found["fid"] > 0 and found["sfid"] > 0 and found["inception_score"] >= 1
    feature_card = found["card"]["features"]
    assert feature_card["preparation"] == "pytorch_fid" and len(feature_card["weights"]) == 64
    # A training run measures the same.
    fid = TrainingFID.load(
        real,
        parallel.make_mesh(),
        space="inception",
        weights=str(file),
        n_samples=9,
        image_shape=(40, 56, 3),
    )
    assert fid.name == "fid_9"
    assert fid.measure(iter([two_sets[1]])) == pytest.approx(found["fid"], rel=1e-5)
    with pytest.raises(UserError, match=r"statistics\.npz was made with --preparation pytorch_fid"):
        evaluate.main(replace(config, preparation="adm"))
    with np.load(real) as arrays:
        others: dict[str, Any] = dict(arrays)
    card = json.loads(str(others.pop("card")))
    card["features"]["weights"] = "0" * 64
    np.savez(real, **others, card=np.array(json.dumps(card)))
    with pytest.raises(UserError, match=r"made with other weights .* hash is 000000000000…, not"):
        evaluate.main(config)


def test_features_are_those_of_torch(ours, of_torch):
    for found, (pool, spatial, logits) in zip(ours, of_torch):
        np.testing.assert_allclose(found.features, pool, atol=1e-4 * np.abs(pool).max(), rtol=1e-4)
        scale = np.abs(logits).max()
        np.testing.assert_allclose(found.logits, logits, atol=1e-4 * scale, rtol=1e-4)
        mean = spatial.mean(0)
        assert mean.shape == (2023,) and mean.max() > 0.1
        np.testing.assert_allclose(found.spatial.mean, mean, atol=1e-4 * mean.max(), rtol=1e-4)


@pytest.mark.parametrize("n_devices", [1, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_and_devices_change_no_statistics(n_devices, batch_size):
    image = wave_images(50, 20, 24)
    mesh = parallel.make_mesh(devices=jax.devices()[:n_devices])
    rows = features.build_pixel_extractor(mesh)(iter([image[:3], image[3:]]), batch_size=batch_size)
    found = summarize_features(rows, 50, n_features=20, keep_logits=True)
    whole = [
        features.FeatureBatch(
            next(features.build_pixel_extractor(mesh)(iter([image]), batch_size=56)).pool
        )
    ]
    expected = summarize_features(whole, 50, n_features=20, keep_logits=True)
    scale = np.trace(expected.pool.covariance)
    assert abs(frechet_distance(found.pool, expected.pool)) < 1e-6 * scale
    np.testing.assert_allclose(found.features, expected.features, atol=1e-6)
    assert found.features.shape == (20, 16 * 16 * 3)
