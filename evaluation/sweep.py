"""Evaluation of one set of images, or of several guidance scales or averages one after the other.

Each is recorded as soon as it has its scores, and a repeated sweep leaves out what is recorded.
Samples nothing itself.
"""

import json
from collections.abc import Callable, Iterable, Sequence
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
        label: what sets it apart from the others, such as "cfg_scale 1.5"; empty if there are none.
        samples: file that the samples are written to.
    """

    images: ImageSet
    make_card: Callable[[], dict[str, Any]]
    label: str = ""
    samples: Path | None = None


def evaluate_in_turn(
    evaluations: Iterable[Evaluation], comparison: Comparison, record: Path
) -> list[Scores]:
    """Compute, print and record the scores of each set of images; empty in processes but the first.

    A single evaluation is made in any case; of several, those that are recorded are left out. Each
    is forgotten before the next is asked for, since its model may take much memory.

    Raises:
        UserError: a set cannot be compared with the reference, or the record cannot be written.
    """
    results: list[Scores] = []
    for evaluation in evaluations:
        results.append(_evaluate(evaluation, comparison, record))
        del evaluation
    return results


def _evaluate(evaluation: Evaluation, comparison: Comparison, record: Path) -> Scores:
    """Find the recorded scores of one of several evaluations, or compute and record them."""
    if evaluation.label:
        recorded = find_recorded(evaluation, record)
        if processes.is_first():
            note = f" recorded in {record} already, not evaluated again" if recorded else ""
            print(f"{evaluation.label}:{note}")
        if recorded:
            return recorded
    scores = comparison.score(evaluation.images)
    if processes.is_first():
        space = comparison.extractor.card["space"]
        report_scores(scores, evaluation.make_card(), record, space=space)
    return scores


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
    """Write a guidance scale, or a width, as short as it can be without becoming another."""
    short = f"{scale:g}"
    return short if float(short) == scale else repr(scale)


def format_table(values: Sequence[float], scores: Sequence[Scores], name: str = "cfg_scale") -> str:
    """Lay out the scores of several values of the flag `name`, a row for each."""
    names = list(dict.fromkeys(score for row in scores for score in row))
    cells = [[name, *names]]
    for value, row in zip(values, scores, strict=True):
        columns = [f"{row[score]:.6g}" if score in row else "-" for score in names]
        cells.append([format_scale(value), *columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [map(str.rjust, row, widths) for row in cells]
    return "\n".join("  ".join(line) for line in lines)
