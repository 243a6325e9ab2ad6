"""How far a run's pictures are from real ones while it trains: a Fréchet distance.

It measures as `evaluate.py` does, so that a number in the middle of a run is that of the checkpoint
of the same step, judged with as many pictures. It draws nothing itself, and changes no state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from data.image_sets import Batch
from evaluation import features, metrics, reference
from evaluation.features import Extractor
from evaluation.metrics import Moments
from evaluation.reference import Reference
from runtime import parallel

NAMES = {"inception": "fid", "pixels": "pixel_frechet"}  # what is no FID is never called so


@dataclass(frozen=True)
class TrainingFID:
    """Statistics of real pictures, and what makes the same features of others."""

    real: Reference
    extract: Extractor
    n: int  # how many pictures are looked at: a Fréchet distance depends on it

    @classmethod
    def open(
        cls,
        path: Path,
        mesh: parallel.Mesh,
        *,
        space: str,
        weights: str | None,
        n: int,
        shape: tuple[int, int, int],
    ) -> Self:
        """Args:
            space: of features: inception or pixels.
            weights: Inception's.
            n: how many pictures are to be measured.
            shape: of a picture.

        Raises:
            UserError: the reference or the weights are not there, or do not fit each other or the
                pictures.
        """
        real = reference.read(path)
        extract = features.like(real, mesh, space=space, weights=weights)
        features.require_fit(real, extract.width(shape))
        return cls(real, extract, n)

    @property
    def name(self) -> str:
        """Of the number: it tells how many pictures, for fewer have a larger distance."""
        return f"{NAMES[self.extract.card['space']]}_{self.n}"

    @property
    def batch_size(self) -> int:
        """How many pictures to hand over at a time."""
        return min(features.batch_size(self.extract.mesh), self.n)

    @property
    def card(self) -> dict[str, Any]:
        """What the number depends on besides the run."""
        known = {"sha256": self.real.sha256, "pictures": self.real.card.get("pictures")}
        return {"name": self.name, "n": self.n, "features": self.extract.card, "reference": known}

    def distance(self, pictures: Iterable[Batch]) -> float | None:
        """Of n pictures to the real ones; None if there were fewer."""
        pool = Moments(len(self.real.pool.mean))
        for rows in self.extract(pictures, batch_size=self.batch_size):
            pool.add(rows.pool)
        if pool.count < self.n:
            return None
        return metrics.frechet_distance(pool.gaussian(), self.real.pool)
