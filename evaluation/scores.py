"""Scores of a set of images: computed from features, printed, and recorded as lines of JSON.

Opens no images and computes no features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from evaluation import metrics
from evaluation.features import FeatureSummary
from evaluation.reference import Reference
from runtime.files import report_unwritable

# Names of the scores in the record, by feature space: distance, kernel distance, precision, recall.
# Only Inception's distance is an FID; that of DINOv2 is FD-DINOv2, and its kernel distance KDD.
METRIC_NAMES = {
    "inception": ("fid", "kid", "precision", "recall", "sfid"),
    "dinov2": ("fd_dinov2", "kd_dinov2", "dinov2_precision", "dinov2_recall"),
    "pixels": ("pixel_frechet", "pixel_kernel", "pixel_precision", "pixel_recall"),
}
Scores = Mapping[str, float]  # by name


def compute_scores(
    summary: FeatureSummary,
    reference: Reference,
    reference_features: Float[np.ndarray, "n d"] | None,
    *,
    space: str,
    seed: int,
) -> dict[str, float]:
    """Compute every score for which both sides have the features.

    Args:
        reference_features: pool features of some of the reference's images.
        space: of the features: inception, dinov2 or pixels.
        seed: of the random subsets of KID and the Inception Score.
    """
    distance, kernel, precision, recall = METRIC_NAMES[space][:4]
    scores = {distance: metrics.frechet_distance(summary.pool, reference.pool)}
    if summary.spatial and reference.spatial:
        scores["sfid"] = metrics.frechet_distance(summary.spatial, reference.spatial)
    if summary.logits is not None:
        score = metrics.inception_score(summary.logits, seed=seed)
        scores["inception_score"] = score.mean
        scores["inception_score_std"] = score.std
    if reference_features is not None and min(len(reference_features), len(summary.features)) > 1:
        kid = metrics.kernel_distance(summary.features, reference_features, seed=seed)
        manifold = metrics.precision_recall(reference_features, summary.features)
        scores[kernel] = kid.mean
        scores[f"{kernel}_std"] = kid.std
        scores[precision] = manifold.precision
        scores[recall] = manifold.recall
    return scores


# --- the record -----------------------------------------------------------------------------------


def report_scores(scores: Scores, card: Mapping[str, Any], record: Path, *, space: str) -> None:
    """Print the scores and append them to the record.

    Args:
        space: of the features: inception, dinov2 or pixels.

    Raises:
        UserError: the record cannot be written.
    """
    for name, value in scores.items():
        print(f"{name:20} {value:.6g}")
    if missing := [name for name in METRIC_NAMES[space] if name not in scores]:
        print(f"not computed (no features in the reference, or disabled): {', '.join(missing)}")
    line = json.dumps(dict(scores) | {"card": card}, default=str)
    with report_unwritable(record), record.open("a") as file:
        file.write(line + "\n")
    print(f"{card['pictures']['count']} images; recorded in {record}")


def find_scores(path: Path, card: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the newest scores in a record that depend on the same as those of `card` do; None if
    there are none.
    """
    if not path.exists():
        return None
    basis = json.loads(json.dumps(basis_of(card), default=str))
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            scores = json.loads(line)
            is_same = basis_of(scores.pop("card")) == basis
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # torn by a kill, or of a version that recorded less
        if is_same:
            return scores
    return None


def basis_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a card that its scores depend on, without paths, times and versions."""
    config = card["config"]
    samples = dict(card["pictures"])
    if folder := config.get("run"):  # as typed; a run is the same from any directory
        samples["run"] = str(Path(str(folder)).resolve())
    return {
        "pictures": samples,
        "features": card["features"],
        "reference": card["reference"]["sha256"],
        "protocol": card.get("protocol"),
        "n_features": config["n_features"],
        "seed": config["seed"],
    }
