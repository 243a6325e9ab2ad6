"""Weights & Biases receives the logged metrics, and a resumed run keeps its id."""

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

BLOCK = 2**15  # bytes; wandb writes the log format of LevelDB

LOG_RUN = """
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
    """Split the bytes of a wandb file into its records."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, n, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + n]
        at += 7 + n
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def read_wandb_file(file: Path) -> tuple[dict, list[dict]]:
    """The settings and the history in a wandb file."""
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
def test_an_offline_run_keeps_the_metrics_and_resumes_with_the_same_id(tmp_path):
    if not importlib.util.find_spec("wandb"):
        pytest.skip("wandb is not installed: pip install --group wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    for first, last in ((1, 3), (4, 5)):
        words = [sys.executable, "-c", LOG_RUN, str(tmp_path), str(first), str(last)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.startswith("Weights & Biases: kept for: wandb sync ")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    lines = []
    for file in files:
        settings, history = read_wandb_file(file)
        assert settings["id"] == (tmp_path / "wandb_id").read_text()
        assert settings["batch_size"] == 8 and settings["dataset"]["name"] == "digits"
        lines += history
    assert [line["_step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        step = line["_step"]
        assert line["loss"] == pytest.approx(1 / step)
        assert line["eval_loss"] == pytest.approx(2 / step)
        assert line["loss_by_t/0.0-0.5"] == 0.5 and "loss_by_t/0.5-1.0" not in line
    images = [line["samples.path"] for line in lines if "samples.path" in line]
    assert len(images) == 2 and all(path.endswith(".png") for path in images)
