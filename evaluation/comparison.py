"""Comparison of sets of images with one reference, whose features are computed once.

comparison = Comparison(reference, extractor, batch_size=64, n_features=10_000, seed=0)
comparison.score(images)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from data import image_sets
from data.image_sets import ImageBatch, ImageSet
from evaluation.features import (
    FeatureBatch,
    FeatureExtractor,
    FeatureSummary,
    check_feature_width,
    summarize_features,
)
from evaluation.reference import Reference
from evaluation.scores import compute_scores
from runtime import processes
from runtime.errors import UserError


def extract_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    batch_size: int,
    n_features: int,
    seed: int,
    *,
    reference: Reference | None = None,
) -> FeatureSummary:
    """Compute the features of all images, with a progress bar.

    Args:
        n_features: images whose own features are kept, a random subset.
        seed: of that subset.
        reference: statistics that the images will be compared with.

    Raises:
        UserError: fewer than two images, or the reference holds features of another width.
    """
    if images.count < 2:
        raise UserError(f"statistics need at least two images, not {images.count}")

    def show_progress(batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        disable = None if processes.is_first() else True  # None: tqdm asks if this is a terminal
        with tqdm(total=images.count, unit=" images", disable=disable) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def check_width(batches: Iterator[FeatureBatch]) -> Iterator[FeatureBatch]:
        for batch in batches:
            if reference:  # at the first batch, not after hours
                check_feature_width(reference, batch.pool.shape[1])
            yield batch

    batches = show_progress(images.batches(batch_size))
    features = extractor(batches, batch_size=min(batch_size, images.count))
    return summarize_features(
        check_width(features),
        images.count,
        n_features=n_features,
        keep_logits=reference is not None,
        seed=seed,
    )


@dataclass(frozen=True)
class Comparison:
    """Everything that images are compared with and by.

    Args:
        n_features: images of each side that KID, precision and recall compare.
        seed: of the random subsets.
    """

    reference: Reference
    extractor: FeatureExtractor = field(repr=False)
    batch_size: int
    n_features: int
    seed: int

    def extract_features(self, images: ImageSet) -> FeatureSummary:
        """Compute the features of all images, as the function of this name does."""
        n, size = self.n_features, self.batch_size
        return extract_features(
            images, self.extractor, size, n, self.seed, reference=self.reference
        )

    @cached_property
    def reference_features(self) -> Float[np.ndarray, "n d"] | None:
        """Features of at most `n_features` of the reference's images: those in its file, or
        computed from its images; None if it holds neither.
        """
        reference = self.reference
        if not self.n_features:
            return None
        if reference.features is None and reference.has_images:
            return self.extract_features(image_sets.image_set_from_npz(reference.path)).features
        if reference.features is None or len(reference.features) <= self.n_features:
            return reference.features
        # A random subset: datasets are often sorted by class, so the first rows would be a few
        # classes.
        rows = np.random.default_rng(self.seed).permutation(len(reference.features))
        return reference.features[rows[: self.n_features]]

    def score(self, images: ImageSet) -> dict[str, float]:
        """Compute every score of a set of images. All processes take part; only in the first of
        them is the result not empty.

        Raises:
            UserError: fewer than two images, or the reference holds features of another width.
        """
        summary = self.extract_features(images)
        reference_features = self.reference_features
        if not processes.is_first():
            return {}
        n, m = (0 if x is None else len(x) for x in (summary.features, reference_features))
        if m and n != m:
            print(f"KID, precision and recall compare {n} images with {m} of the reference")
        return compute_scores(
            summary,
            self.reference,
            reference_features,
            space=self.extractor.card["space"],
            seed=self.seed,
        )
