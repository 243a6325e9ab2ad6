"""How good are the digits that a run draws? 1,000 guided samples against the real ones.

    python benchmarks/digits.py --run runs/digits-…

A support-vector classifier trained on the real training split judges whether a sample is the digit
that was asked for. Two Fréchet distances compare statistics with the real test split: of pixels,
and of what a small network sees that was trained to read digits (the digit Fréchet distance).
Neither is FID: no Inception network is involved. The distance to the nearest training picture shows
whether samples are copies. What the real training split has of all this is printed too: it is the
floor. Needs scikit-learn (pip install --group dev).
"""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation.metrics import RunningStatistics, frechet_distance
from inference import grids
from inference.labels import spread_evenly
from runtime import cli
from train import Trainer
from training.config import TrainConfig


@dataclass(frozen=True)
class DigitsConfig:
    """Judge the digits that a run draws.

    Args:
        run: the run's folder.
        n: how many samples, 100 of each digit by default.
        cfg_scale: guidance; the run's own by default.
        n_steps: solver steps; the run's own by default.
        solver: the run's own by default.
    """

    run: Path
    n: int = 1000
    cfg_scale: float | None = None
    n_steps: int | None = None
    solver: str | None = None


@dataclass(frozen=True)
class Judgement:
    """`accuracy`: share of samples that are the digit asked for. `frechet`: distance of pixel
    statistics to the test split's. `digit_frechet`: the same of a digit reader's features.
    `novelty`: median distance to the nearest training picture, over that of the real test split;
    0 for copies, 1 for new digits."""

    accuracy: float
    frechet: float
    digit_frechet: float
    novelty: float


def distance(a, b) -> float:
    """The Fréchet distance between two sets of rows."""
    both = [RunningStatistics(rows.shape[1]) for rows in (a, b)]
    for moments, rows in zip(both, (a, b)):
        moments.update(rows)
    return frechet_distance(*(moments.statistics() for moments in both))


def reader(x, labels) -> Callable:
    """Rows of pixels → features: the 64 values before the last layer of a network that was trained
    to read these digits. Always the same one.
    """
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # which scikit-learn brings

    network = MLPClassifier((128, 64), alpha=1e-2, max_iter=60, tol=0, random_state=0)
    # Its products are so small that several threads would mostly wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # that 60 epochs are not the optimum: they are enough
        network.fit(x / 16, labels)

    def features(x):
        x = x / 16
        for kernel, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
            x = np.maximum(x @ kernel + bias, 0)
        return x

    return features


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
    features = reader(train_x, train[1])
    return Judgement(
        accuracy=float((classifier.predict(pictures) == labels).mean()),
        frechet=distance(pictures, test_x),
        digit_frechet=distance(features(pictures), features(test_x)),
        novelty=float(np.median(nearest(pictures, train_x)) / np.median(nearest(test_x, train_x))),
    )


def judge_run(trainer: Trainer, *, n: int = 1000, **how) -> Judgement:
    """Draw n samples, as many of each digit, and judge them."""
    labels = spread_evenly(range(10), n).tolist()
    pictures = grids.to_uint8(trainer.sample(labels, **how))
    data = trainer.data
    return judge(pictures, labels, train=data.images("train"), test=data.images("eval"))


def main() -> None:
    config = cli.parse_flags(DigitsConfig)
    how = {"cfg_scale": config.cfg_scale, "n_steps": config.n_steps}
    said: dict = {"solver": config.solver} if config.solver else {}
    trainer = Trainer(TrainConfig(run_dir=config.run, resume=True, **said))
    result = judge_run(trainer, n=config.n, **how)
    train, test = (trainer.data.images(split) for split in ("train", "eval"))
    floor = judge(*train, train=train, test=test)
    print(f"right digit {result.accuracy:.1%}, novelty {result.novelty:.2f}, Fréchet ", end="")
    print(f"{result.frechet:.1f} in pixels, {result.digit_frechet:.2f} in digit features ", end="")
    print(f"(the training split's own: {floor.frechet:.1f}, {floor.digit_frechet:.2f})")
    print(json.dumps(vars(result)))


if __name__ == "__main__":
    cli.run_command(main)
