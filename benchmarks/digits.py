"""How good are the digits that a run draws? 1,000 guided samples against the real ones.

    python benchmarks/digits.py --run runs/digits-…

A support-vector classifier trained on the real training split judges whether a sample is the digit
that was asked for; the Fréchet distance compares pixel statistics with the real test split (this is
not FID: no Inception network is involved); the distance to the nearest training picture shows
whether samples are copies. Needs scikit-learn (requirements-dev.txt).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
import images
from drawing import spread
from train import Trainer


@dataclass(frozen=True)
class DigitsConfig:
    """Judge the digits that a run draws.

    Args:
        run: the run's folder.
        n: how many samples, 100 of each digit by default.
        cfg_scale: guidance; the run's own by default.
        n_steps: solver steps; the run's own by default.
    """

    run: Path
    n: int = 1000
    cfg_scale: float | None = None
    n_steps: int | None = None


@dataclass(frozen=True)
class Judgement:
    """`accuracy`: share of samples that are the digit asked for. `frechet`: distance of pixel
    statistics to the test split's. `novelty`: median distance to the nearest training picture, over
    that of the real test split; 0 for copies, 1 for new digits."""

    accuracy: float
    frechet: float
    novelty: float


def frechet_distance(a, b) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½), from rows of features (Dowson & Landau 1982)."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # The eigenvalues of Σa Σb are those of this symmetric matrix, which keeps them real.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def nearest(a, b):
    """The distance of each row of `a` to its nearest row of `b`."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.clip(squares.min(1), 0, None))


def judge(pictures, labels, *, train, test) -> Judgement:
    """`pictures` (n 8 8 1) uint8 of `labels`; `train` and `test` are (pictures, labels) too."""
    from sklearn.svm import SVC

    pictures, train_x, test_x = (
        x.reshape(len(x), -1) / 255 * 16 for x in (pictures, train[0], test[0])
    )
    classifier = SVC(gamma=0.001, C=10).fit(train_x, train[1])  # pyright: ignore[reportArgumentType]
    return Judgement(
        accuracy=float((classifier.predict(pictures) == labels).mean()),
        frechet=frechet_distance(pictures, test_x),
        novelty=float(np.median(nearest(pictures, train_x)) / np.median(nearest(test_x, train_x))),
    )


def judge_run(trainer: Trainer, *, n: int = 1000, **how) -> Judgement:
    """Draw n samples, as many of each digit, and judge them."""
    labels = spread(range(10), n).tolist()
    pictures = images.to_uint8(trainer.sample(labels, **how))
    data = trainer.data
    return judge(pictures, labels, train=data.images("train"), test=data.images("eval"))


def main() -> None:
    config = cli.parse(DigitsConfig)
    how = {"cfg_scale": config.cfg_scale, "n_steps": config.n_steps}
    result = judge_run(Trainer.from_run(config.run), n=config.n, **how)
    print(f"right digit {result.accuracy:.1%}, Fréchet {result.frechet:.1f}", end="")
    print(f" (the training split's own is 26), novelty {result.novelty:.2f}")
    print(json.dumps(vars(result)))


if __name__ == "__main__":
    cli.run(main)
