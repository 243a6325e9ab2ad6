"""Judge the digits that a run samples: 1,000 guided samples against the real ones.

    python benchmarks/digits.py --run runs/digits-…

A support-vector classifier trained on the real training split judges whether a sample is the
requested digit. Two Fréchet distances compare statistics with the real test split: of pixels, and
of the features of a small network trained to read digits (the digit Fréchet distance). Neither is
FID: no Inception network is involved. The distance to the nearest training image shows whether
samples are copies. The real training split's own distances are printed too: they are the floor.
Needs scikit-learn (`pip install --group dev`).
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
from runtime.flags import flag, required
from train import Trainer
from training.config import TrainConfig


@dataclass(frozen=True)
class DigitsConfig:
    """Judge the digits that a run samples."""

    run: Path = required("the run's folder")
    n: int = flag(1000, "the number of samples, 100 of each digit by default")
    cfg_scale: float | None = flag(None, "guidance scale; the run's own by default")
    n_steps: int | None = flag(None, "solver steps; the run's own by default")
    solver: str | None = flag(None, "the run's own by default")


@dataclass(frozen=True)
class Judgement:
    """Quality of sampled digits.

    Args:
        accuracy: share of samples that are the requested digit.
        frechet: distance of pixel statistics to the test split's.
        digit_frechet: the same of a digit reader's features.
        novelty: median distance to the nearest training image, over that of the real test split; 0
            for copies, 1 for new digits.
    """

    accuracy: float
    frechet: float
    digit_frechet: float
    novelty: float


def frechet_between(a, b) -> float:
    """Compute the Fréchet distance between the Gaussians fitted to the rows of `a` and of `b`."""
    statistics_a, statistics_b = RunningStatistics(a.shape[1]), RunningStatistics(b.shape[1])
    statistics_a.update(a)
    statistics_b.update(b)
    return frechet_distance(statistics_a.statistics(), statistics_b.statistics())


def train_digit_reader(x, labels) -> Callable:
    """Train a network to read these digits; returns its features of rows of pixels.

    The features are the 64 values before its last layer. The seed is fixed: the same digits give
    the same network.
    """
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # which scikit-learn brings

    network = MLPClassifier((128, 64), alpha=1e-2, max_iter=60, tol=0, random_state=0)
    # Its products are so small that several threads would mostly wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # it warns that 60 epochs do not converge: they suffice
        network.fit(x / 16, labels)

    def features(x):
        x = x / 16
        for kernel, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
            x = np.maximum(x @ kernel + bias, 0)
        return x

    return features


def nearest_distances(a, b):
    """Compute the distance of each row of `a` to its nearest row of `b`."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.clip(squares.min(1), 0, None))


def judge_digits(samples, labels, *, train, test) -> Judgement:
    """Judge samples of `labels`.

    Args:
        samples: (n 8 8 1) uint8.
        train: real images and their labels.
        test: other real images and their labels.
    """
    from sklearn.svm import SVC

    x, train_x, test_x = (
        images.reshape(len(images), -1) / 255 * 16 for images in (samples, train[0], test[0])
    )
    classifier = SVC(gamma=0.001, C=10).fit(train_x, train[1])  # pyright: ignore[reportArgumentType]
    features = train_digit_reader(train_x, train[1])
    return Judgement(
        accuracy=float((classifier.predict(x) == labels).mean()),
        frechet=frechet_between(x, test_x),
        digit_frechet=frechet_between(features(x), features(test_x)),
        novelty=float(
            np.median(nearest_distances(x, train_x)) / np.median(nearest_distances(test_x, train_x))
        ),
    )


def judge_run(
    trainer: Trainer, *, n: int = 1000, cfg_scale: float | None = None, n_steps: int | None = None
) -> Judgement:
    """Sample n digits, as many of each, and judge them."""
    labels = spread_evenly(range(10), n).tolist()
    samples = grids.to_uint8(trainer.sample(labels, cfg_scale=cfg_scale, n_steps=n_steps))
    data = trainer.data
    return judge_digits(
        samples, labels, train=data.decode_split("train"), test=data.decode_split("eval")
    )


def main() -> None:
    config = cli.parse_flags(DigitsConfig)
    run_config = TrainConfig(run_dir=config.run, resume=True)
    if config.solver:
        run_config = TrainConfig(run_dir=config.run, resume=True, solver=config.solver)
    trainer = Trainer(run_config)
    result = judge_run(trainer, n=config.n, cfg_scale=config.cfg_scale, n_steps=config.n_steps)
    train, test = (trainer.data.decode_split(split) for split in ("train", "eval"))
    floor = judge_digits(*train, train=train, test=test)
    print(f"right digit {result.accuracy:.1%}, novelty {result.novelty:.2f}, Fréchet ", end="")
    print(f"{result.frechet:.1f} in pixels, {result.digit_frechet:.2f} in digit features ", end="")
    print(f"(the training split's own: {floor.frechet:.1f}, {floor.digit_frechet:.2f})")
    print(json.dumps(vars(result)))


if __name__ == "__main__":
    cli.run_command(main)
