"""Weights & Biases receives the logged metrics, and its failures never end a run."""

import importlib.util
import sys
from types import SimpleNamespace

import PIL.Image
import pytest

from runtime.errors import UserError
from training import wandb_sink
from training.tracking import Tracker
from training.wandb_sink import WandbSink


class Fake(SimpleNamespace):
    """A `wandb` package that keeps what it receives, or fails in the call `fails`."""

    def __init__(self, *, fails: str = "", step: int = 0, offline: bool = True):
        super().__init__(
            received=[], fails=fails, step=step, offline=offline, url=None, silent=False
        )
        self.dir = "wandb/x/files"
        self.Settings = self.Image = lambda *x, **y: x or y

    def setup(self, settings):
        self.silent = settings["silent"]

    def init(self, **settings):
        # Otherwise wandb would ask a terminal for a key.
        assert self.silent or settings.get("mode") == "offline"
        if self.fails == "init" or (self.fails == "network" and settings.get("mode") != "offline"):
            raise RuntimeError("no way\nthere")
        self.id = settings["id"]
        return self

    def log(self, values, *, step):
        if self.fails == "log":
            raise RuntimeError("no way\nthere")
        self.received.append((step, values))

    def finish(self):
        self.received.append("finished")

    def teardown(self):
        pass


def log_run(folder, monkeypatch, fake, *, is_new=True):
    """Log three steps. Returns the number of logged lines, and the messages."""
    monkeypatch.setitem(sys.modules, "wandb", fake)
    messages = []
    sink = WandbSink(folder, project="dit", settings={}, is_new=is_new)
    with Tracker(folder, n_steps=9, quiet=True, sinks=[sink]) as tracker:
        monkeypatch.setattr(tracker, "message", messages.append)
        tracker.begin()
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1 / step})
        tracker.image(3, "samples", PIL.Image.new("L", (8, 8)))
    messages = [line for line in messages if not line.startswith("step")]
    return len((folder / "metrics.jsonl").read_text().splitlines()), messages


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_failure_is_reported_once_and_ends_nothing_else(tmp_path, monkeypatch, fails):
    n_lines, messages = log_run(tmp_path, monkeypatch, Fake(fails=fails))
    assert n_lines == 3
    assert messages[-1] == "Weights & Biases failed, training continues: no way"
    assert [line.startswith("Weights & Biases cannot be reached") for line in messages[:-1]] == (
        [True] if fails == "init" else [False]
    )


def test_without_a_network_the_run_is_kept_offline(tmp_path, monkeypatch):
    fake = Fake(fails="network")
    _, messages = log_run(tmp_path, monkeypatch, fake)
    assert messages == [
        "Weights & Biases cannot be reached (no way): kept offline",
        "Weights & Biases: kept for: wandb sync wandb/x",
    ]
    assert len(fake.received) == 5 and fake.received[-1] == "finished"


def test_a_disabled_package_is_reported(tmp_path, monkeypatch):
    _, messages = log_run(tmp_path, monkeypatch, Fake(offline=False))
    assert messages == ["Weights & Biases: disabled"]


def test_known_steps_are_not_sent_again_and_a_new_start_is_a_new_run(tmp_path, monkeypatch):
    fake = Fake(step=3)
    log_run(tmp_path, monkeypatch, fake, is_new=False)
    assert [entry[0] for entry in fake.received[:-1]] == [3, 3]
    again = Fake()
    log_run(tmp_path, monkeypatch, again, is_new=False)
    anew = Fake()
    log_run(tmp_path, monkeypatch, anew, is_new=True)
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
