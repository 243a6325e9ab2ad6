"""A log that survives interruption, and a speed of training alone."""

import json
import math
import sys

import numpy as np
import PIL.Image
import pytest

from training.tracking import Throughput, Tracker, duration

N_STEPS = 20


def log_steps(folder, *, first, last, start_step=0):
    """Log the steps first … last like a run that resumes from the checkpoint of `start_step`."""
    with Tracker(folder, start_step=start_step, n_steps=N_STEPS, quiet=True) as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {"loss": 1 / step, "loss_by_t": [step / 10] * 10})
            if step % 5 == 0:
                tracker.log(step, {"eval_loss": 2 / step})


def events(folder):
    """Read a folder's events: (tag, step, value) of every scalar, and the tag of every image."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]

    scalars, images = [], []
    for path in sorted(folder.glob("events*")):
        raw = path.read_bytes()
        while raw:  # uint64 length, its uint32 CRC, the event, its uint32 CRC
            length = int.from_bytes(raw[:8], "little")
            event = Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            for value in event.summary.value:
                if value.HasField("image"):
                    images.append(value.tag)
                else:
                    scalars.append((value.tag, event.step, value.simple_value))
    return scalars, images


@pytest.mark.parametrize("torn", [b"", b'{"step": 13, "lo', b'{"step"', b"\0\0\0"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, torn):
    log_steps(tmp_path / "whole", first=1, last=N_STEPS)
    log_steps(tmp_path / "broken", first=1, last=13)
    file = tmp_path / "broken" / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + torn)
    log_steps(tmp_path / "broken", first=11, last=N_STEPS, start_step=10)
    assert file.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert {path.name.split(".")[0] for path in file.parent.iterdir()} == {"metrics", "events"}


def test_a_run_that_never_saved_starts_its_log_anew(tmp_path):
    log_steps(tmp_path, first=1, last=3)
    log_steps(tmp_path, first=1, last=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2]


def test_every_line_is_valid_json_and_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path, n_steps=9, quiet=True)
    tracker.log(
        3, {"loss": math.nan, "bins": [1.0, None, math.inf], "norm": np.float32(0.5), "n": 2}
    )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 3, "loss": None, "bins": [1.0, None, None], "norm": 0.5, "n": 2}
    assert json.loads(line, parse_constant=pytest.fail) == expected
    tracker.close()
    tracker.close()


def test_events_hold_scalars_bins_and_images(tmp_path):
    with Tracker(tmp_path, n_steps=9, quiet=True) as tracker:
        tracker.log(4, {"loss": 0.5, "loss_by_t": [0.25] * 9 + [math.nan]})
        tracker.image(4, "samples", PIL.Image.new("L", (8, 8)))
    scalars, images = events(tmp_path)
    assert ("loss", 4, 0.5) in scalars
    assert ("loss_by_t/0.0-0.1", 4, 0.25) in scalars
    assert "loss_by_t/0.9-1.0" not in [tag for tag, _, _ in scalars]  # an empty bin is no point
    assert images == ["samples"]


def test_plain_lines_show_metrics_and_the_time_left(tmp_path, capsys):
    metrics = {
        "loss": 0.43211,
        "grad_norm": 1.234,
        "learning_rate": 3e-3,
        "images_per_second": 812.3,
    }
    with Tracker(tmp_path, n_steps=900) as tracker:
        tracker.log(50, {**metrics, "seconds_per_step": 0.1, "loss_by_t": [0.1] * 10})
        tracker.advance(50)
        tracker.message("saved")
    line = "step  50/900   loss 0.4321   grad 1.23   lr 3.0e-03   812 images/s   1:25 left"
    assert capsys.readouterr().out.splitlines() == [line, "saved"]
    assert [duration(s) for s in (0.4, 59.6, 3599.6)] == ["0:00", "1:00", "1:00:00"]


def test_a_terminal_gets_a_bar_that_starts_at_the_run_s_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Tracker(tmp_path, n_steps=20, start_step=10) as tracker:
        tracker.log(15, {"eval_loss": 0.5})
        tracker.log(15, {"loss": 0.25})
        tracker.message("saved")
        tracker.advance(15)
        assert tracker.bar is not None and tracker.bar.n == 15
    out = capsys.readouterr().out
    assert "10/20" in out and "eval loss 0.5000, loss 0.2500" in out
    assert "step 15/20" not in out


def test_throughput_counts_neither_the_first_step_nor_pauses():
    now = 0.0
    throughput = Throughput(clock=lambda: now)

    def step(seconds):
        nonlocal now
        now += seconds
        throughput.step(8)

    with throughput.paused():
        now += 50  # before the first step: restoring a checkpoint
    step(100)  # compiles
    assert throughput.take() == {}
    step(2)
    with throughput.paused():
        now += 1000
        with throughput.paused():
            now += 1000
    step(2)
    assert throughput.take() == {"images_per_second": 4.0, "seconds_per_step": 2.0}
    step(1)
    with throughput.paused():
        now += 7
        assert throughput.take() == {"images_per_second": 8.0, "seconds_per_step": 1.0}
        now += 7
    step(4)
    assert throughput.take() == {"images_per_second": 2.0, "seconds_per_step": 4.0}
