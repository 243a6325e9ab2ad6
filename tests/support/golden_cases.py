"""Inputs and helpers shared by the tests of evaluation.golden."""

import json

from golden import make

from evaluation.metrics import RunningStatistics

GOLDEN = json.loads(make.FILE.read_text())
THEIRS, FIDELITY = GOLDEN["pytorch_fid"], GOLDEN["torch_fidelity"]


def gaussian(rows):
    moments = RunningStatistics(rows.shape[1])
    moments.update(rows)
    return moments.statistics()
