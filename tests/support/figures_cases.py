"""Inputs and helpers shared by the tests of figures."""

import pytest
from curves_cases import record, write_grids

import figures
from figures import FiguresConfig
from inference.trained_model import TrainedModel

FEW = {"n_steps": 3, "cfg_sweep": (1.0, 2.0), "denoise": (0.5,)}
OF_RECORDS = ["curves.png", "progress.gif"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Call `figures.main` on a record and a model of random weights.

    Returns the names of the figures it made, and its lines about those left out.
    """
    run = record(tmp_path / "run") if (tmp_path / "run").mkdir() is None else tmp_path
    write_grids(run / "samples", "0000005.png", "0000010.png", "final.png")

    def call(trained: TrainedModel, **flags) -> tuple[set[str], list[str]]:
        monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: trained)
        figures.main(FiguresConfig(run=run, **(FEW | flags)))
        out = flags.get("out", run / "figures")
        lines = capsys.readouterr().out.splitlines()
        left_out = [line for line in lines if " left out" in line]
        return {path.name for path in out.iterdir()}, left_out

    return call
