"""Inputs and helpers shared by the tests beside pytorch-fid and torch-fidelity."""

import json

from golden import make

from evaluation.metrics import RunningStatistics

GOLDEN = json.loads(make.FILE.read_text())
THEIRS, FIDELITY = GOLDEN["pytorch_fid"], GOLDEN["torch_fidelity"]


def fit_statistics(rows):
    statistics = RunningStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics.statistics()
