"""Inputs and helpers shared by the tests of figures."""

import pytest
from curves_cases import record
from curves_cases import sheets as put_sheets

import figures
from figures import FiguresConfig
from inference.trained_model import TrainedModel

FEW = {"n_steps": 3, "cfg_sweep": (1.0, 2.0), "denoise": (0.5,)}
OF_RECORDS = ["curves.png", "progress.gif"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`figures.main` on a record and a model of random weights: what it drew, and what it said."""
    run = record(tmp_path / "run") if (tmp_path / "run").mkdir() is None else tmp_path
    put_sheets(run / "samples", "0000005.png", "0000010.png", "final.png")

    def call(of: TrainedModel, **flags) -> tuple[set[str], list[str]]:
        monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: of)
        figures.main(FiguresConfig(run=run, **(FEW | flags)))
        out = flags.get("out", run / "figures")
        said = capsys.readouterr().out.splitlines()
        return {path.name for path in out.iterdir()}, [s for s in said if " left out" in s]

    return call
