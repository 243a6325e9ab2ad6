"""Measuring the FID of a run changes nothing else in it, and gives the numbers of `evaluate.py`."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from during_training_cases import digits  # noqa: F401

import evaluate
from evaluate import EvaluateConfig
from runtime.errors import UserError
from runtime.signals import StopRequest
from train import Trainer
from training.config import TrainConfig
from training.session import open_session

N = 21  # samples, which no batch size divides
NAME = f"pixel_frechet_{N}"
TINY = TrainConfig(
    model="DiT-Nano/8",
    batch_size=8,
    n_steps=6,
    warmup_steps=1,
    log_every=1,
    eval_save_steps=2,
    keep_checkpoints=9,
    sample_every_n=100,
    n_eval_batches=1,
    n_sample_steps=2,
    half_precision=False,
)


@pytest.fixture(scope="module")
def measured(digits):
    return {"fid_every": 4, "fid_reference": digits, "fid_features": "pixels", "fid_n": N}


def lines(folder: Path) -> list[dict]:
    """The record of a run without its timings."""
    timed = {"images_per_second", "seconds_per_step", "mfu"}
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in timed} for line in found]


def assert_same(a, b):
    """Bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def whole(measured, tmp_path_factory) -> Trainer:
    trainer = Trainer(replace(TINY, run_dir=tmp_path_factory.mktemp("runs") / "run", **measured))
    trainer.fit()
    return trainer


def test_measuring_changes_nothing_else(whole, tmp_path):
    other = Trainer(replace(TINY, run_dir=tmp_path / "run"))
    other.fit()
    assert_same(other.state, whole.state)
    found = lines(whole.run_dir)
    assert [line["step"] for line in found if NAME in line] == [4, 6]  # the last step too
    assert [line for line in found if NAME not in line] == lines(tmp_path / "run")


def test_the_numbers_are_those_of_the_command(whole, digits, tmp_path):
    out = tmp_path / "record"
    for line in lines(whole.run_dir):
        if NAME not in line:
            continue
        config = EvaluateConfig(
            run=whole.run_dir,
            step=line["step"],
            n=N,
            reference=digits,
            features="pixels",
            out=out,
            batch_size=8,
        )
        evaluate.main(config)
        found = json.loads(out.read_text().splitlines()[-1])
        assert line[NAME] == pytest.approx(found["pixel_frechet"], rel=1e-6)
        assert found["pixel_frechet"] > 0


def test_the_config_of_a_run_records_the_measurement(whole):
    card = json.loads((whole.run_dir / "config.json").read_text())["yardstick"]
    assert (card["name"], card["n"], card["features"]["space"]) == (NAME, N, "pixels")
    assert len(card["reference"]["sha256"]) == 64


def test_a_measured_run_resumes_bit_identically(whole, measured, tmp_path):
    config = replace(TINY, run_dir=tmp_path / "run", **measured)
    Trainer(config).fit(n_steps=4)
    resumed = Trainer(TrainConfig(run_dir=tmp_path / "run", resume=True))
    resumed.fit()
    assert_same(resumed.state, whole.state)
    assert lines(tmp_path / "run") == lines(whole.run_dir)


def test_a_run_resumes_without_its_reference_if_it_measures_no_more(
    whole, measured, digits, tmp_path
):
    moved = tmp_path / "real.npz"
    moved.write_bytes(digits.read_bytes())
    config = replace(TINY, run_dir=tmp_path / "run", **measured | {"fid_reference": moved})
    Trainer(config).fit(n_steps=2)
    moved.unlink()
    resume = TrainConfig(run_dir=tmp_path / "run", resume=True)
    assert Trainer.from_run(tmp_path / "run").sample([3]).shape == (1, 8, 8, 1)
    with pytest.raises(UserError, match=r"real\.npz: No such file"):
        Trainer(resume).fit()
    Trainer(replace(resume, fid_every=0)).fit(n_steps=3)


def test_a_stop_request_interrupts_the_measurement(measured, tmp_path, capsys, monkeypatch):
    trainer = Trainer(replace(TINY, run_dir=tmp_path / "run", **measured))
    stop, batch_sizes = StopRequest(), []
    fid = trainer.open_fid()
    assert fid is not None
    with open_session(trainer, 6) as session:
        honest_samples = trainer.fid_samples

        def fid_samples(n, batch_size):
            for batch in honest_samples(n, batch_size):
                batch_sizes.append(len(batch))
                stop.signal = 15
                yield batch

        monkeypatch.setattr(trainer, "fid_samples", fid_samples)
        monkeypatch.setattr(trainer, "_fid", replace(fid, n_samples=1000))
        session.measure(stop)
    assert len(batch_sizes) == 1
    assert "step 0 is not measured: the run is stopping" in capsys.readouterr().out
    assert lines(tmp_path / "run") == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fid_reference": None}, "--fid_every needs --fid_reference FILE.npz"),
        ({"fid_reference": Path("nowhere.npz")}, "reference nowhere.npz: No such file"),
        ({"fid_every": None}, "--fid_reference is for --fid_every"),
        ({"fid_every": -1}, "--fid_every -1: must be at least 0"),
        ({"fid_n": 1}, "--fid_n 1: statistics need at least 2"),
        ({"fid_features": None}, "--fid_every needs Inception's weights: pass --inception"),
        ({"fid_features": None, "inception": "x.pth"}, "holds features 'pixels', not 'incep"),
        ({"image_size": 16}, "has 64 features per image, and these images have 256"),
    ],
)
def test_measurements_that_cannot_work_are_refused_before_anything_is_written(
    measured, tmp_path, changes, message
):
    config = replace(TINY, run_dir=tmp_path / "run", **measured | changes)
    with pytest.raises(UserError, match=message):
        Trainer(config).fit()
    assert not (tmp_path / "run").exists()
