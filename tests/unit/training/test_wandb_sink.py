"""Weights & Biases gets what the record gets, and can do no harm to a run."""

import importlib.util
import sys
from types import SimpleNamespace

import PIL.Image
import pytest

from runtime.errors import UserError
from training import wandb_sink
from training.tracking import Tracker
from training.wandb_sink import WandbSink

# --- with another in its place --------------------------------------------------------------------


class Fake(SimpleNamespace):
    """A `wandb` that remembers, or fails where it is told to."""

    def __init__(self, *, fails: str = "", step: int = 0, offline: bool = True):
        super().__init__(told=[], fails=fails, step=step, offline=offline, url=None, silent=False)
        self.dir = "wandb/x/files"
        self.Settings = self.Image = lambda *x, **y: x or y

    def setup(self, settings):
        self.silent = settings["silent"]

    def init(self, **told):
        assert self.silent or told.get("mode") == "offline"  # or a terminal is asked for a key
        if self.fails == "init" or (self.fails == "network" and told.get("mode") != "offline"):
            raise RuntimeError("no way\nthere")
        self.id = told["id"]
        return self

    def log(self, values, *, step):
        if self.fails == "log":
            raise RuntimeError("no way\nthere")
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")

    def teardown(self):
        pass


def recorded(folder, monkeypatch, fake, *, is_new=True):
    """The lines of a record, and what was said."""
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said = []
    sink = WandbSink(folder, project="dit", settings={}, is_new=is_new)
    with Tracker(folder, n_steps=9, quiet=True, sinks=[sink]) as tracker:
        monkeypatch.setattr(tracker, "message", said.append)
        tracker.begin()
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1 / step})
        tracker.image(3, "samples", PIL.Image.new("L", (8, 8)))
    said = [line for line in said if not line.startswith("step")]
    return len((folder / "metrics.jsonl").read_text().splitlines()), said


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_failure_is_told_once_and_ends_nothing_else(tmp_path, monkeypatch, fails):
    n_lines, said = recorded(tmp_path, monkeypatch, Fake(fails=fails))
    assert n_lines == 3
    assert said[-1] == "Weights & Biases failed, training continues: no way"
    assert [line.startswith("Weights & Biases cannot be reached") for line in said[:-1]] == (
        [True] if fails == "init" else [False]
    )


def test_without_a_network_it_is_kept(tmp_path, monkeypatch):
    fake = Fake(fails="network")
    _, said = recorded(tmp_path, monkeypatch, fake)
    assert said == [
        "Weights & Biases cannot be reached (no way): kept offline",
        "Weights & Biases: kept for: wandb sync wandb/x",
    ]
    assert len(fake.told) == 5 and fake.told[-1] == "finished"


def test_where_it_is_disabled_that_is_said(tmp_path, monkeypatch):
    _, said = recorded(tmp_path, monkeypatch, Fake(offline=False))
    assert said == ["Weights & Biases: disabled"]


def test_what_it_has_is_not_sent_again_and_a_fresh_start_is_a_new_run(tmp_path, monkeypatch):
    fake = Fake(step=3)
    recorded(tmp_path, monkeypatch, fake, is_new=False)
    assert [told[0] for told in fake.told[:-1]] == [3, 3]
    again = Fake()
    recorded(tmp_path, monkeypatch, again, is_new=False)
    anew = Fake()
    recorded(tmp_path, monkeypatch, anew, is_new=True)
    assert fake.id == again.id != anew.id == (tmp_path / "wandb_id").read_text()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    """A folder of its name is not the package."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for folder in (None, tmp_path / "wandb"):
        if folder:
            folder.mkdir()
        importlib.invalidate_caches()
        with pytest.raises(UserError, match=r"pip install --group wandb"):
            wandb_sink.require_installed()
