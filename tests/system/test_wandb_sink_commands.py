"""Weights & Biases gets what the record gets, and can do no harm to a run."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT

BLOCK = 2**15  # bytes of wandb's file, which is a log of LevelDB's format

RECORD = """
import sys
from pathlib import Path
import numpy as np
import PIL.Image
from training.tracking import Tracker
from training.wandb_sink import WandbSink

folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sink = WandbSink(folder, project="dit", settings={"batch_size": 8, "dataset": {"name": "digits"}},
            is_new=first == 1)
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
        pytest.skip("wandb is not installed: pip install --group wandb")
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
