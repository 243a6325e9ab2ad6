"""Weights & Biases gets what the record gets, and can do no harm to a run."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from commands import ROOT

from runtime.errors import UserError
from training import wandb_sink
from training.tracking import Tracker
from training.wandb_sink import Sink

BLOCK = 2**15  # bytes of wandb's file, which is a log of LevelDB's format

RECORD = """
import sys
from pathlib import Path
import numpy as np
import PIL.Image
from tracking import Tracker
from weights_and_biases import Sink

folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sink = Sink(folder, project="dit", settings={"batch_size": 8, "dataset": {"name": "digits"}},
            fresh=first == 1)
with Tracker(folder, start_step=first - 1, n_steps=9, sinks=[sink]) as tracker:
    tracker.begin()
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1 / step, "loss_by_t": [0.5, None]})
        tracker.log(step, {"eval_loss": 2 / step})
    tracker.image(last, "samples", PIL.Image.new("L", (8, 8)))
"""


def scan(data: bytes) -> Iterator[bytes]:
    """The records of a file of wandb's."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, n, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + n], at + 7 + n
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def kept(file: Path) -> tuple[dict, list[dict]]:
    """The settings and the lines of history that a file of wandb's holds."""
    from wandb.proto import wandb_internal_pb2

    settings, history = {}, []
    for data in scan(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            settings = {i.key: json.loads(i.value_json) for i in record.run.config.update}
            settings["id"] = record.run.run_id
        elif kind == "history":
            items = record.history.item
            history.append(
                {(".".join(i.nested_key) or i.key): json.loads(i.value_json) for i in items}
            )
    return settings, history


@pytest.mark.slow
def test_offline_it_keeps_the_numbers_and_the_resumed_run_has_the_same_id(tmp_path):
    if not importlib.util.find_spec("wandb"):
        pytest.skip("wandb is not installed: pip install -r requirements-wandb.txt")
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    for first, last in ((1, 3), (4, 5)):
        words = [sys.executable, "-c", RECORD, str(tmp_path), str(first), str(last)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.startswith("Weights & Biases: kept for: wandb sync ")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    found = []
    for file in files:
        settings, history = kept(file)
        assert settings["id"] == (tmp_path / "wandb_id").read_text()
        assert settings["batch_size"] == 8 and settings["dataset"]["name"] == "digits"
        found += history
    assert [line["_step"] for line in found] == [1, 2, 3, 4, 5]
    for line in found:
        step = line["_step"]
        assert line["loss"] == pytest.approx(1 / step)
        assert line["eval_loss"] == pytest.approx(2 / step)
        assert line["loss_by_t/0.0-0.5"] == 0.5 and "loss_by_t/0.5-1.0" not in line
    pictures = [line["samples.path"] for line in found if "samples.path" in line]
    assert len(pictures) == 2 and all(path.endswith(".png") for path in pictures)


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


def recorded(folder, monkeypatch, fake, *, fresh=True):
    """The lines of a record, and what was said."""
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said = []
    sink = Sink(folder, project="dit", settings={}, fresh=fresh)
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
    assert said[-1] == "Weights & Biases failed, training goes on: no way"
    assert [line.startswith("Weights & Biases is not to be reached") for line in said[:-1]] == (
        [True] if fails == "init" else [False]
    )


def test_without_a_network_it_is_kept(tmp_path, monkeypatch):
    fake = Fake(fails="network")
    _, said = recorded(tmp_path, monkeypatch, fake)
    assert said == [
        "Weights & Biases is not to be reached (no way): kept offline",
        "Weights & Biases: kept for: wandb sync wandb/x",
    ]
    assert len(fake.told) == 5 and fake.told[-1] == "finished"


def test_where_it_is_disabled_that_is_said(tmp_path, monkeypatch):
    _, said = recorded(tmp_path, monkeypatch, Fake(offline=False))
    assert said == ["Weights & Biases: disabled"]


def test_what_it_has_is_not_sent_again_and_a_fresh_start_is_a_new_run(tmp_path, monkeypatch):
    fake = Fake(step=3)
    recorded(tmp_path, monkeypatch, fake, fresh=False)
    assert [told[0] for told in fake.told[:-1]] == [3, 3]
    again = Fake()
    recorded(tmp_path, monkeypatch, again, fresh=False)
    anew = Fake()
    recorded(tmp_path, monkeypatch, anew, fresh=True)
    assert fake.id == again.id != anew.id == (tmp_path / "wandb_id").read_text()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    """A folder of its name is not the package."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for folder in (None, tmp_path / "wandb"):
        if folder:
            folder.mkdir()
        importlib.invalidate_caches()
        with pytest.raises(UserError, match=r"pip install -r requirements-wandb.txt"):
            wandb_sink.require_installed()
