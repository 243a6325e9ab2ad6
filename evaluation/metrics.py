"""Distances between two sets of images, computed from their features: FID and sFID, the Inception
Score, KID, precision and recall.

Sees feature arrays only, never a model or an image. Sums are accumulated in float64, so neither the
batch size nor the number of batches changes a result.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

ROWS_PER_BLOCK = 1024  # bounds the memory of a pairwise distance matrix to this many rows


class FeatureStatistics(NamedTuple):
    """Mean and covariance of features: the Gaussian that a Fréchet distance compares."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]


class RunningStatistics:
    """Mean and covariance of rows that arrive in batches (Chan et al. 1979, eq. 2.1)."""

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # Σ (x − mean)(x − mean)ᵀ

    def update(self, rows: Float[np.ndarray, "b d"]) -> None:
        """Add a batch of any size."""
        n = len(rows)
        if not n:
            return
        x = rows.astype(np.float64)
        total = self.count + n
        shift = x.mean(0) - self.mean
        x -= x.mean(0)
        self.scatter += x.T @ x
        self.scatter += np.outer(shift, shift) * (self.count * n / total)
        self.mean += shift * (n / total)
        self.count = total

    def statistics(self) -> FeatureStatistics:
        """Return the statistics of all rows so far; the covariance divides by n − 1.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} rows")
        return FeatureStatistics(self.mean.copy(), self.scatter / (self.count - 1))


# --- Fréchet distance (FID, sFID) -----------------------------------------------------------------


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    With Σa = A Aᵀ and Σb = B Bᵀ, the trace of the root is the sum of the singular values of Aᵀ B.
    It is always real, and singular covariances (fewer images than features) need no added epsilon.
    """
    root_a = factor_covariance(a.covariance)
    root_b = factor_covariance(b.covariance)
    cross = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    shift = np.square(a.mean - b.mean).sum()
    return float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def factor_covariance(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """Factor Σ = A Aᵀ by eigenvalues, dropping those that are 0 up to rounding.

    At 2,048 features this takes a second, and a whole distance four and a half. Pivoted Cholesky
    would halve that, but a covariance that was once rounded to float32 is slightly indefinite, and
    that noise would become pivots.
    """
    values, vectors = np.linalg.eigh(covariance)
    nonzero = values > values.max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, nonzero] * np.sqrt(values[nonzero])


# --- Inception Score and KID ----------------------------------------------------------------------


class MeanAndStd(NamedTuple):
    """Mean and standard deviation of a score over splits or subsets."""

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "n classes"], *, n_parts: int = 10, seed: int = 0
) -> MeanAndStd:
    """exp E KL(p(y|x) ‖ p(y)) over ten splits, each with its own p(y) (Salimans et al. 2016, §4).

    Rows are shuffled first: images often come sorted by class, and a split of a single class would
    score 1.
    """
    rows = np.random.default_rng(seed).permutation(len(logits))
    parts = np.array_split(logits[rows].astype(np.float64), min(n_parts, len(logits)))
    scores = []
    for part in parts:
        log_p = part - part.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        p = np.exp(log_p)
        # A class whose p underflows to 0 in every row contributes nothing: 0 · log 0 = 0.
        log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return MeanAndStd(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    *,
    n_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> MeanAndStd:
    """KID: the unbiased squared MMD with kernel (x·y / d + 1)³, averaged over random subsets
    (Bińkowski et al. 2018, eq. 4 and §4).

    Subsets are chosen without replacement and are no larger than the smaller of the two inputs.
    """
    size = min(subset_size, len(a), len(b))
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(n_subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)] for rows in (a, b))
        distances.append(squared_mmd(x.astype(np.float64), y.astype(np.float64)))
    return MeanAndStd(float(np.mean(distances)), float(np.std(distances)))


def squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"]) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 4)."""
    n, d = x.shape

    def kernel(p: Any, q: Any) -> Any:
        return (p @ q.T / d + 1) ** 3

    # The diagonal, a row's kernel with itself, would bias the two means within a set.
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


# --- precision and recall (Kynkäänniemi et al. 2019) ----------------------------------------------


class PrecisionRecall(NamedTuple):
    """Share of samples inside the manifold of the real images, and the reverse; each in 0 … 1."""

    precision: float
    recall: float


def precision_recall(
    real: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], *, k: int = 3
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A manifold is the union of balls around its feature vectors, each with the distance to its own
    k-th nearest neighbour as radius.
    """
    # Distances do not depend on the origin, and float32 rounds least near it.
    centre = real.mean(0, keepdims=True)
    real, samples = ((rows - centre).astype(np.float32) for rows in (real, samples))
    real_radii = squared_knn_radii(real, k)
    sample_radii = squared_knn_radii(samples, k)
    return PrecisionRecall(
        precision=float(in_manifold(samples, real, real_radii).mean()),
        recall=float(in_manifold(real, samples, sample_radii).mean()),
    )


def squared_knn_radii(rows: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n"]:
    """Squared distance of each row to its k-th nearest neighbour, or to the farthest if there are
    fewer than k.
    """
    k = min(k, len(rows) - 1)
    radii = [
        _squared_kth_distance(block, rows, i * ROWS_PER_BLOCK, k=k)
        for i, block in enumerate(iterate_blocks(rows))
    ]
    return np.concatenate([np.asarray(block) for block in radii])


def in_manifold(
    rows: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "m d"],
    squared_radii: Float[np.ndarray, "m"],
) -> Bool[np.ndarray, "n"]:
    """Test for each row if it lies in a ball around one of the centres."""
    inside = [_in_any_ball(block, centres, squared_radii) for block in iterate_blocks(rows)]
    return np.concatenate([np.asarray(block) for block in inside])


def iterate_blocks(rows: Float[np.ndarray, "n d"]) -> Iterator[Float[np.ndarray, "b d"]]:
    """Split rows into blocks of at most `ROWS_PER_BLOCK`."""
    return (rows[i : i + ROWS_PER_BLOCK] for i in range(0, len(rows), ROWS_PER_BLOCK))


@partial(jax.jit, static_argnames="k")
def _squared_kth_distance(block: Any, rows: Any, first: Any, *, k: int) -> Float[Array, "b"]:
    positions = first + jnp.arange(len(block))
    is_other = positions[:, None] != jnp.arange(len(rows))[None]
    distances = jnp.where(is_other, squared_distances(block, rows), jnp.inf)
    return -jax.lax.top_k(-distances, k)[0][:, -1]


@jax.jit
def _in_any_ball(block: Any, centres: Any, squared_radii: Any) -> Bool[Array, "b"]:
    return (squared_distances(block, centres) <= squared_radii[None]).any(1)


def squared_distances(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Pairwise squared Euclidean distances, |a|² + |b|² − 2 a·b."""
    products = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None] - 2 * products
