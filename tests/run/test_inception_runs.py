"""FID's Inception beside an independent one in torch, on random weights; pictures as other tools
prepare them; weights that are not its own.
"""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from inception_cases import (
    extracted,
    file,  # noqa: F401
    loaded,  # noqa: F401
    of_torch,  # noqa: F401
    ours,  # noqa: F401
    two_sets,  # noqa: F401
)

import evaluate
from evaluate import EvaluateConfig
from evaluation.during_training import TrainingFID
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
    """Most do not divide the sets: the last batch counts, and what fills it up does not. A batch of
    64 has all of so few pictures, as one of 5 has; on eight devices any is one of 8.
    """
    few = [two_sets[0][:5], two_sets[1][-4:]]

    def distance(n_devices, batch_size):
        how = {"n_devices": n_devices, "batch_size": batch_size}
        return frechet_distance(*(part.pool for part in extracted(loaded, few, **how)))

    expected = distance(1, 1)
    found = [distance(*how) for how in ((1, 5), (1, 7), (8, 8))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_command_measures_all_that_inception_can(file, two_sets, tmp_path):
    for name, image in zip(("real", "drawn"), two_sets):
        np.savez(tmp_path / f"{name}.npz", arr_0=image)
    how = {"inception": str(file), "batch_size": 8}
    real, out = tmp_path / "statistics.npz", tmp_path / "record"
    evaluate.main(EvaluateConfig(npz=tmp_path / "real.npz", make_reference=real, **how))
    judge = EvaluateConfig(npz=tmp_path / "drawn.npz", reference=real, out=out, **how)
    evaluate.main(judge)
    found = json.loads(out.read_text())
    names = {"fid", "sfid", "inception_score", "inception_score_std", "kid", "kid_std"}
    assert found.keys() == names | {"precision", "recall", "card"}
    assert found["fid"] > 0 and found["sfid"] > 0 and found["inception_score"] >= 1
    feature_card = found["card"]["features"]
    assert feature_card["preparation"] == "pytorch_fid" and len(feature_card["weights"]) == 64
    # What a training run measures is the same.
    how = {"space": "inception", "weights": str(file), "n": 9, "shape": (40, 56, 3)}
    yardstick = TrainingFID.load(real, parallel.make_mesh(), **how)
    assert yardstick.name == "fid_9"
    assert yardstick.measure(iter([two_sets[1]])) == pytest.approx(found["fid"], rel=1e-5)
    with pytest.raises(UserError, match=r"statistics\.npz is of --preparation pytorch_fid"):
        evaluate.main(replace(judge, preparation="adm"))
    with np.load(real) as arrays:
        others: dict[str, Any] = dict(arrays)
    card = json.loads(str(others.pop("card")))
    card["features"]["weights"] = "0" * 64
    np.savez(real, **others, card=np.array(json.dumps(card)))
    with pytest.raises(UserError, match=r"made with other weights .* hash is 000000000000…, not"):
        evaluate.main(judge)
