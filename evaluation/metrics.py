"""Distances between sets of pictures, from rows of features: FID and sFID, the Inception Score,
KID, precision and recall.

It never sees a model or a picture. Sums are float64 and are made as features come, so that neither
the size of batches nor their number changes a result.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

BLOCK = 1024  # rows that are compared at a time


class Gaussian(NamedTuple):
    """All that a Fréchet distance knows of a set."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]


class Moments:
    """Mean and covariance of rows that come in batches (Chan et al. 1979, eq. 2.1)."""

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # Σ (x − mean)(x − mean)ᵀ

    def add(self, rows: Float[np.ndarray, "b d"]) -> None:
        """Take up some rows; a batch may have any number of them."""
        n = len(rows)
        if not n:
            return
        x, total = rows.astype(np.float64), self.count + n
        shift = x.mean(0) - self.mean
        x -= x.mean(0)
        self.scatter += x.T @ x
        self.scatter += np.outer(shift, shift) * (self.count * n / total)
        self.mean += shift * (n / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Of all rows up to now, which must be two at least; the covariance's divisor is n − 1."""
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} rows")
        return Gaussian(self.mean.copy(), self.scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    With Σa = A Aᵀ and Σb = B Bᵀ, the trace of the root is the sum of the singular values of Aᵀ B:
    it stays real, and nothing must be added where a covariance is singular, as that of few
    pictures is.
    """
    cross = np.linalg.svd(factor(a.covariance).T @ factor(b.covariance), compute_uv=False).sum()
    shift = np.square(a.mean - b.mean).sum()
    return float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def factor(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """A of Σ = A Aᵀ, by eigenvalues; those that are 0 but for rounding are left out.

    Of 2,048 features it takes a second, and a whole distance four and a half. Cholesky's method
    with pivots would halve that, but a covariance that was once rounded to float32 is not quite
    positive, and that noise would become pivots.
    """
    values, vectors = np.linalg.eigh(covariance)
    some = values > values.max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, some] * np.sqrt(values[some])


class Spread(NamedTuple):
    """A mean over parts or subsets, and their standard deviation."""

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "n classes"], *, n_parts: int = 10, seed: int = 0
) -> Spread:
    """exp E KL(p(y|x) ‖ p(y)), of ten parts each with its own p(y) (Salimans et al. 2016, §4).

    Rows are shuffled first: sets often come sorted by class, and a part of one class would have the
    score of one class.
    """
    rows = np.random.default_rng(seed).permutation(len(logits))
    parts = np.array_split(logits[rows].astype(np.float64), min(n_parts, len(logits)))
    scores = []
    for part in parts:
        log_p = part - part.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        p = np.exp(log_p)
        # Where all of a class's p are 0 in float64, it adds nothing: 0 · log 0 = 0.
        log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    *,
    n_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Spread:
    """KID: the unbiased squared MMD with kernel (x·y / d + 1)³, over subsets that are drawn without
    replacement (Bińkowski et al. 2018, eq. 4 and §4). Subsets are no larger than the smaller set.
    """
    size, rng = min(subset_size, len(a), len(b)), np.random.default_rng(seed)
    found = []
    for _ in range(n_subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)] for rows in (a, b))
        found.append(squared_mmd(x.astype(np.float64), y.astype(np.float64)))
    return Spread(float(np.mean(found)), float(np.std(found)))


def squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"]) -> float:
    n, d = x.shape

    def kernel(p, q):
        return (p @ q.T / d + 1) ** 3

    # A row's kernel with itself would bias the means within a set.
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


# --- precision and recall (Kynkäänniemi et al. 2019) ----------------------------------------------


class PrecisionRecall(NamedTuple):
    """Shares: of the drawn pictures that lie among real ones, and the other way round."""

    precision: float
    recall: float


def precision_recall(
    real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"], *, k: int = 3
) -> PrecisionRecall:
    """A picture lies among others if it is no further from one of them than that one's k-th
    neighbour is (eq. 1 and 2).
    """
    # Distances do not change with the origin, and are rounded least near it.
    centre = real.mean(0, keepdims=True)
    real, drawn = ((rows - centre).astype(np.float32) for rows in (real, drawn))
    of_real, of_drawn = reach(real, k), reach(drawn, k)
    return PrecisionRecall(
        precision=float(among(drawn, real, of_real).mean()),
        recall=float(among(real, drawn, of_drawn).mean()),
    )


def reach(rows: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n"]:
    """Squared distance of each row to its k-th neighbour, or to the last if there are fewer."""
    k = min(k, len(rows) - 1)
    parts = [_kth(block, rows, i * BLOCK, k=k) for i, block in enumerate(blocks(rows))]
    return np.concatenate([np.asarray(part) for part in parts])


def among(
    rows: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"], reach: Float[np.ndarray, "m"]
) -> Bool[np.ndarray, "n"]:
    """Whether each row is within the reach of one of the others."""
    parts = [_within(block, others, reach) for block in blocks(rows)]
    return np.concatenate([np.asarray(part) for part in parts])


def blocks(rows: Float[np.ndarray, "n d"]) -> Iterator[Float[np.ndarray, "b d"]]:
    return (rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK))


@partial(jax.jit, static_argnames="k")
def _kth(block, rows, first, *, k: int) -> Float[Array, "b"]:
    here = first + jnp.arange(len(block))
    others = here[:, None] != jnp.arange(len(rows))[None]
    distances = jnp.where(others, squared_distances(block, rows), jnp.inf)
    return -jax.lax.top_k(-distances, k)[0][:, -1]


@jax.jit
def _within(block, others, reach) -> Bool[Array, "b"]:
    return (squared_distances(block, others) <= reach[None]).any(1)


def squared_distances(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    products = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None] - 2 * products
