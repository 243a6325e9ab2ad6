"""The Fréchet distance between a run's samples and real images, measured while it trains.

It is computed as `evaluate.py` computes it: the number logged at a step is that of the step's
checkpoint, evaluated with the same number of samples. Generates no samples itself and changes no
training state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.image_sets import ImageBatch
from evaluation.features import (
    FeatureExtractor,
    build_matching_extractor,
    check_feature_width,
    default_batch_size,
)
from evaluation.metrics import RunningStatistics, frechet_distance
from evaluation.reference import Reference, read_reference
from runtime import parallel

# In metrics.jsonl, by feature space. Only Inception features give an FID.
METRIC_NAMES = {"inception": "fid", "pixels": "pixel_frechet"}


@dataclass(frozen=True)
class TrainingFID:
    """Measures the Fréchet distance of samples to a reference.

    Args:
        reference: statistics of real images.
        extractor: computes the same features as the reference holds.
        n_samples: images per measurement. The distance is biased by it: fewer give a larger one.
    """

    reference: Reference
    extractor: FeatureExtractor
    n_samples: int

    @classmethod
    def load(
        cls,
        path: Path,
        mesh: parallel.Mesh,
        *,
        space: str,
        weights: str | None,
        n_samples: int,
        image_shape: tuple[int, int, int],
    ) -> "TrainingFID":
        """Load a reference and the extractor that matches it.

        Args:
            path: of the reference.
            space: of the features: inception or pixels.
            weights: Inception's: a file, a folder or an id on the hub.
            n_samples: images per measurement.
            image_shape: (h, w, c) of a sample.

        Raises:
            UserError: the reference or the weights cannot be loaded, or do not fit each other or
                the image shape.
        """
        reference = read_reference(path)
        extractor = build_matching_extractor(reference, mesh, space=space, weights=weights)
        check_feature_width(reference, extractor.feature_width(image_shape))
        return cls(reference, extractor, n_samples)

    @property
    def name(self) -> str:
        """The metric's name, with the number of samples: numbers of other sizes do not compare."""
        return f"{METRIC_NAMES[self.extractor.card['space']]}_{self.n_samples}"

    @property
    def batch_size(self) -> int:
        """The number of images to pass to `measure` at a time."""
        return min(default_batch_size(self.extractor.mesh), self.n_samples)

    @property
    def card(self) -> dict[str, Any]:
        """Everything the number depends on besides the run, for its config.json."""
        return {
            "name": self.name,
            "n": self.n_samples,
            "features": self.extractor.card,
            "reference": {
                "sha256": self.reference.sha256,
                "pictures": self.reference.card.get("pictures"),
            },
        }

    def measure(self, batches: Iterable[ImageBatch]) -> float | None:
        """Return the distance of the samples to the reference; None if there are fewer than
        `n_samples`.
        """
        statistics = RunningStatistics(len(self.reference.pool.mean))
        for features in self.extractor(batches, batch_size=self.batch_size):
            statistics.update(features.pool)
        if statistics.count < self.n_samples:
            return None
        return frechet_distance(statistics.statistics(), self.reference.pool)
