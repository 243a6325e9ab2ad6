"""Evaluation of one set of images, or of several guidance scales one after the other.

Each scale is recorded as soon as it has its scores, and a repeated sweep leaves out what is
recorded. Samples nothing itself.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.image_sets import ImageSet
from evaluation.comparison import Comparison
from evaluation.scores import Scores, find_scores, report_scores
from runtime import processes


@dataclass(frozen=True)
class Evaluation:
    """A set of images to compare with a reference.

    Args:
        make_card: makes the record of everything that the scores depend on.
        cfg_scale: guidance scale of the samples; None if there are no others.
        samples: file that the samples are written to.
    """

    images: ImageSet
    make_card: Callable[[], dict[str, Any]]
    cfg_scale: float | None = None
    samples: Path | None = None


def evaluate_in_turn(
    evaluations: Sequence[Evaluation], comparison: Comparison, record: Path
) -> list[Scores]:
    """Compute, print and record the scores of each set of images; empty in processes but the first.

    A single evaluation is made in any case; of several, those that are recorded are left out.

    Raises:
        UserError: a set cannot be compared with the reference, or the record cannot be written.
    """
    space = comparison.extractor.card["space"]
    results: list[Scores] = []
    for evaluation in evaluations:
        if len(evaluations) > 1:
            recorded = find_recorded(evaluation, record)
            if processes.is_first():
                note = f" recorded in {record} already, not evaluated again" if recorded else ""
                print(f"cfg_scale {format_scale(evaluation.cfg_scale or 0)}:{note}")
            if recorded:
                results.append(recorded)
                continue
        scores = comparison.score(evaluation.images)
        if processes.is_first():
            report_scores(scores, evaluation.make_card(), record, space=space)
        results.append(scores)
    return results


def find_recorded(evaluation: Evaluation, record: Path) -> dict[str, float] | None:
    """Return the recorded scores of the same evaluation, if there are any. None if its samples are
    to be written and are not there.
    """

    def find() -> str:
        if evaluation.samples and not evaluation.samples.exists():
            return json.dumps(None)
        return json.dumps(find_scores(record, evaluation.make_card()))

    # Process 0 looks for all: they must agree, and the others may not see its files.
    return json.loads(processes.broadcast_text(find))


# --- texts ----------------------------------------------------------------------------------------


def format_scale(scale: float) -> str:
    """Write a guidance scale as short as it can be without becoming another."""
    short = f"{scale:g}"
    return short if float(short) == scale else repr(scale)


def format_table(scales: Sequence[float], scores: Sequence[Scores]) -> str:
    """Lay out the scores of several guidance scales, a row for each."""
    names = list(dict.fromkeys(name for row in scores for name in row))
    cells = [["cfg_scale", *names]]
    for scale, row in zip(scales, scores, strict=True):
        values = [f"{row[name]:.6g}" if name in row else "-" for name in names]
        cells.append([format_scale(scale), *values])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [map(str.rjust, row, widths) for row in cells]
    return "\n".join("  ".join(line) for line in lines)
