"""Distances between sets of features, by closed forms and by the definitions written out in NumPy;
reference files.
"""

import json

import numpy as np
import pytest
import scipy.linalg

from evaluation import metrics, reference
from evaluation.metrics import FeatureStatistics, RunningStatistics, frechet_distance
from runtime.errors import UserError

rng = np.random.default_rng(0)


def rows(n: int, d: int, *, shift: float = 0.0, mix: int = 0) -> np.ndarray:
    """Correlated features."""
    mixing = np.random.default_rng(mix).normal(size=(d, d)) / np.sqrt(d)
    return (rng.normal(size=(n, d)) @ mixing + shift).astype(np.float32)


def fit_statistics(x: np.ndarray) -> FeatureStatistics:
    statistics = RunningStatistics(x.shape[1])
    statistics.update(x)
    return statistics.statistics()


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_batches_of_any_size_give_the_same_statistics(size):
    x = rows(150, 12, shift=100.0)  # far from 0, where plain sums of squares lose digits
    statistics = RunningStatistics(12)
    for start in range(0, len(x), size):
        statistics.update(x[start : start + size])
    statistics.update(x[:0])
    assert statistics.count == 150
    mean, covariance = statistics.statistics()
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_one_row_has_no_covariance():
    with pytest.raises(ValueError, match="covariance of 1 rows"):
        fit_statistics(rows(1, 3))


# --- Fréchet distance -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [500, 8])  # 8 rows of 40 features: a singular covariance
def test_a_set_is_at_distance_0_from_itself_and_a_shift_is_squared(n):
    a = fit_statistics(rows(n, 40))
    scale = np.trace(a.covariance)
    assert abs(frechet_distance(a, a)) < 1e-9 * scale
    shift = rng.normal(size=40)
    moved = FeatureStatistics(a.mean + shift, a.covariance)
    np.testing.assert_allclose(frechet_distance(a, moved), shift @ shift, atol=1e-9 * scale)


def test_deviations_of_independent_features_are_compared_one_by_one():
    a, b = rng.uniform(0.1, 2, (2, 30))
    zero = np.zeros(30)
    found = frechet_distance(
        FeatureStatistics(zero, np.diag(a**2)), FeatureStatistics(zero, np.diag(b**2))
    )
    np.testing.assert_allclose(found, np.square(a - b).sum(), rtol=1e-12)


def test_the_root_is_that_of_the_product():
    a, b = fit_statistics(rows(400, 30, mix=1)), fit_statistics(rows(400, 30, mix=2, shift=0.3))
    product = np.real(scipy.linalg.sqrtm(a.covariance @ b.covariance))
    expected = np.square(a.mean - b.mean).sum()
    expected += np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(product)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(b, a), expected, rtol=1e-9)


def test_few_rows_of_many_features_need_no_epsilon():
    # tr (Σa Σb)^½ is the sum of the singular values of A Bᵀ, where Σ = AᵀA: no root of a matrix.
    x, y = rows(10, 60, mix=1), rows(12, 60, mix=2)
    a, b = fit_statistics(x), fit_statistics(y)
    p, q = ((z - z.mean(0)).astype(np.float64) / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    expected = np.square(a.mean - b.mean).sum() + (p**2).sum() + (q**2).sum() - 2 * cross
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)


def test_covariances_that_were_rounded_are_near_enough():
    """As files may hold them: not quite positive, where they are singular."""
    a, b = fit_statistics(rows(10, 60, mix=1)), fit_statistics(rows(12, 60, mix=2))
    rough = [
        FeatureStatistics(x.mean, x.covariance.astype(np.float32).astype(float)) for x in (a, b)
    ]
    assert np.linalg.eigvalsh(rough[0].covariance).min() < 0
    assert frechet_distance(*rough) == pytest.approx(frechet_distance(a, b), rel=1e-3)


# --- Inception Score ------------------------------------------------------------------------------


def test_the_score_is_1_without_information_and_the_number_of_classes_at_best():
    assert metrics.inception_score(np.zeros((40, 8), np.float32)) == pytest.approx((1, 0))
    sure = np.tile(100 * np.eye(8, dtype=np.float32), (50, 1))
    assert metrics.inception_score(sure, n_parts=1).mean == pytest.approx(8)
    in_order = sure[np.argsort(np.arange(400) % 8, kind="stable")]  # class after class
    assert metrics.inception_score(in_order).mean > 6.5


def test_the_score_is_the_exponential_of_a_mean_divergence():
    logits = rng.normal(size=(30, 5)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    divergence = np.mean([sum(q * np.log(q / m) for q, m in zip(row, p.mean(0))) for row in p])
    found = metrics.inception_score(logits, n_parts=1)
    assert found == pytest.approx((np.exp(divergence), 0), rel=1e-9)
    assert metrics.inception_score(logits, seed=1) == metrics.inception_score(logits, seed=1)


# --- KID ------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_the_mean_over_pairs():
    x, y = rows(6, 4, mix=1).astype(np.float64), rows(6, 4, mix=2, shift=0.5).astype(np.float64)

    def kernel(p, q):
        return (p @ q / 4 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = np.mean([kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs])
    expected -= 2 * np.mean([kernel(p, q) for p in x for q in y])
    assert metrics.squared_mmd(x, y) == pytest.approx(expected, rel=1e-9)
    # A subset of all rows is all of them, in another order.
    assert metrics.kernel_distance(x, y, n_subsets=3) == pytest.approx((expected, 0), rel=1e-9)


def test_the_kernel_distance_of_one_distribution_is_0_on_average():
    x, y = rows(400, 6), rows(400, 6)
    subsets = {"n_subsets": 200, "subset_size": 50}
    same, std = metrics.kernel_distance(x, y, **subsets)
    assert abs(same) < std / 2
    assert metrics.kernel_distance(x, y + 1, **subsets).mean > 3 * std
    assert metrics.kernel_distance(x, y, seed=1, **subsets) == metrics.kernel_distance(
        x, y, seed=1, **subsets
    )


# --- precision and recall -------------------------------------------------------------------------


def precision_recall_by_loops(real, samples, k=3):
    """Kynkäänniemi et al. 2019, eq. 1 and 2, written out."""

    def share(rows, others):
        inside = 0
        for row in rows:
            for i, other in enumerate(others):
                to_neighbours = np.sort(np.linalg.norm(np.delete(others, i, 0) - other, axis=1))
                if np.linalg.norm(row - other) <= to_neighbours[k - 1]:
                    inside += 1
                    break
        return inside / len(rows)

    return share(samples, real), share(real, samples)


@pytest.mark.parametrize("block", [7, 1024])
def test_precision_and_recall_are_shares_inside_a_manifold(monkeypatch, block):
    monkeypatch.setattr(metrics, "ROWS_PER_BLOCK", block)
    real, samples = rows(50, 5, shift=10.0), rows(40, 5, shift=10.4)
    expected = precision_recall_by_loops(real.astype(np.float64), samples.astype(np.float64))
    assert metrics.precision_recall(real, samples) == pytest.approx(expected)
    assert 0 < min(expected) < 1


def test_precision_and_recall_of_equal_of_disjoint_and_of_collapsed_sets():
    x = rows(60, 8)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x + 1000) == (0, 0)
    one_mode = x[:1] + 1e-3 * rng.normal(size=(60, 8)).astype(np.float32)
    precision, recall = metrics.precision_recall(x, one_mode)
    assert precision == 1 and recall <= 1 / 60


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def known():
    x = rows(30, 6)
    return fit_statistics(x), x


def test_a_reference_is_read_as_it_was_written(tmp_path, known):
    pool, x = known
    spatial, card = fit_statistics(rows(30, 4)), {"features": {"space": "pixels"}, "count": 30}
    reference.write_reference(tmp_path / "a.npz", pool, spatial, x, card)
    found = reference.read_reference(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.pool.covariance, pool.covariance)
    assert found.spatial and found.features is not None
    np.testing.assert_array_equal(found.spatial.mean, spatial.mean)
    np.testing.assert_array_equal(found.features, x)
    assert found.card == card and found.feature_card == {"space": "pixels"}
    with np.load(tmp_path / "a.npz") as arrays:  # as pytorch-fid reads it
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64


def test_references_of_other_tools_are_read(tmp_path, known):
    pool, _ = known
    theirs = {"mu": pool.mean, "sigma": pool.covariance}
    np.savez(tmp_path / "fid.npz", **theirs)
    found = reference.read_reference(tmp_path / "fid.npz")
    assert found.feature_card == {"space": "inception", "preparation": "pytorch_fid"}
    assert found.spatial is None and found.features is None and not found.has_images
    np.savez_compressed(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
        mu_s=pool.mean,
        sigma_s=pool.covariance,
        **theirs,
    )
    found = reference.read_reference(tmp_path / "adm.npz")
    assert found.feature_card["preparation"] == "adm" and found.has_images and found.spatial


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "but no mu and sigma .*--npz"),
        ({}, "holds nothing"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3)}, "damaged.*sigma_s"),
        ({"mu": np.array([print], object), "sigma": np.eye(1)}, "damaged: Object arrays"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((5, 2))}, r"\(5, 2\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "card": np.array(json.dumps([]))}, "its card"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "card": np.array("no JSON")}, "damaged"),
    ],
)
def test_a_file_that_is_no_reference_is_refused_in_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message) as refused:
        reference.read_reference(tmp_path / "x.npz")
    assert "\n" not in str(refused.value)


def test_a_missing_or_damaged_reference_is_refused(tmp_path, known):
    pool, x = known
    with pytest.raises(UserError, match="No such file"):
        reference.read_reference(tmp_path / "x.npz")
    reference.write_reference(tmp_path / "x.npz", pool, None, x, {})
    whole = (tmp_path / "x.npz").read_bytes()
    place = whole.index(pool.covariance.tobytes()) + 5
    rotten = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for content in (b"", b"text", whole[: len(whole) // 2], rotten):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"reference .*x.npz"):
            reference.read_reference(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "x.npz", mu=pool.mean, sigma=pool.covariance)
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:40] + bytes([255]) * 40 + whole[80:])
    with pytest.raises(UserError, match=r"reference .*x.npz is damaged"):
        reference.read_reference(tmp_path / "x.npz")
