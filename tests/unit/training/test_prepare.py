"""A run skips bad rows only if it is told to, leaves out the same ones when it is resumed, and
counts its epochs without them.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from bad_rows_cases import POINTER, write_dataset
from hub_copies import image_file
from pipeline_cases import own_cache  # noqa: F401
from train_cases import TINY

from data import bad_rows
from data.load import open_dataset
from data.pipeline import Pipeline
from runtime import parallel, processes
from runtime.errors import UserError
from train_vae import VaeConfig, VaeTrainer
from training.prepare import leave_out_bad_rows, prepare

BAD = {3: None, 11: POINTER.encode(), 29: b""}  # rows of a dataset of 40
SKIP = {"bad_rows": "skip", "bad_rows_at_most": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("damaged"), 40, BAD)


@pytest.fixture
def config(folder, tmp_path):
    name = f"folder:{folder}"
    return replace(TINY, dataset_name=name, n_steps=None, n_epochs=3, run_dir=tmp_path / "run")


@pytest.fixture
def no_check(monkeypatch):
    def find_bad_rows(split):
        raise AssertionError("nobody asked for a check")

    monkeypatch.setattr(bad_rows, "find_bad_rows", find_bad_rows)


@pytest.fixture
def every_row(folder):
    return open_dataset(f"folder:{folder}", image_size=8, channels=3)


@pytest.fixture
def begun(config):
    """A run whose folder names its bad rows, and its config for resuming it."""
    prepared = prepare(replace(config, **SKIP), parallel.devices())
    prepared.run_dir.mkdir()
    bad_rows.write_record(prepared.run_dir, prepared.source)
    return prepared.source, replace(prepared.config, resume=True)


def test_by_default_no_row_is_checked_or_left_out(config, no_check):
    prepared = prepare(config, parallel.devices())
    assert prepared.source.bad_rows is None and len(prepared.source.train) == 40
    assert (prepared.config.bad_rows, prepared.config.n_steps) == ("stop", 15)
    message = (
        r"row 3, .*cell is empty \(and 2 more\); `python -m data\.check` lists all, --bad_rows"
    )
    with pytest.raises(UserError, match=message):
        Pipeline(prepared.source, batch_size=8, seed=0)


def test_skipping_leaves_them_out_and_makes_shorter_epochs(config):
    prepared = prepare(replace(config, **SKIP), parallel.devices())
    assert prepared.source.train.rows.tolist() == [i for i in range(40) if i not in BAD]
    assert prepared.config.n_steps == 14  # of 8 images: 3 · 37 / 8
    Pipeline(prepared.source, batch_size=8, seed=0)
    assert bad_rows.summary(prepared.source) == (
        "bad rows left out: 3 to train on, 0 to evaluate with; bad_rows.json names them\n"
    )


def test_too_many_stop(config):
    with pytest.raises(UserError, match=r"3 of 40 .* --bad_rows_at_most 0\.01; "):
        prepare(replace(config, bad_rows="skip"), parallel.devices())


def test_a_profile_reads_no_images(config, no_check):
    prepare(replace(config, **SKIP, profile=True), parallel.devices())


def test_a_resumed_run_leaves_out_the_recorded_rows_without_another_check(
    begun, every_row, no_check
):
    source, config = begun
    again = leave_out_bad_rows(config, every_row, config.run_dir)
    assert again.train.rows.tolist() == source.train.rows.tolist()
    assert again.bad_rows == source.bad_rows
    with pytest.raises(UserError, match=r"cannot resume: .*bad_rows\.json; drop --bad_rows stop"):
        leave_out_bad_rows(replace(config, bad_rows="stop"), every_row, config.run_dir)


def test_a_run_that_a_bad_row_stopped_can_be_resumed_without_it(begun, every_row, tmp_path):
    _, config = begun
    source = leave_out_bad_rows(config, every_row, tmp_path)  # a folder without a record
    assert (source.n_train_rows, len(source.train)) == (40, 37)
    stopping = replace(config, bad_rows="stop")
    assert leave_out_bad_rows(stopping, every_row, tmp_path) is every_row


def test_a_damaged_record_is_one_line(begun, every_row):
    _, config = begun
    (config.run_dir / bad_rows.RECORD_FILE).write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"bad_rows\.json is damaged"):
        leave_out_bad_rows(config, every_row, config.run_dir)


def test_an_autoencoder_skips_them_too(folder, monkeypatch):
    monkeypatch.setattr(VaeTrainer, "_restore_or_create", lambda *args, **options: None)
    flags = {"dataset_name": f"folder:{folder}", "image_size": 16, "batch_size": 8, "n_epochs": 3}
    trainer = VaeTrainer(VaeConfig(**flags, **SKIP))
    assert (len(trainer.source.train), trainer.config.n_steps) == (37, 14)


def test_an_epoch_of_buckets_ends_when_every_row_was_seen(config, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "mixed"
    folder.mkdir()
    for i, size in enumerate([(16, 16)] * 17 + [(16, 8)] * 9 + [(8, 16)] * 18):
        (folder / f"{i:02d}.png").write_bytes(image_file(rng, size=size))
    flags = {
        "dataset_name": f"folder:{folder}",
        "image_size": 16,
        "buckets": ("8x16", "16", "16x8"),
    }
    config = replace(config, **flags, eval_split="none", n_epochs=1)
    prepared = prepare(config, parallel.devices())
    options = {"batch_size": 8, "seed": 0, "buckets": prepared.buckets, "n_workers": 0}
    pipeline = Pipeline(prepared.source, **options)
    n_steps, n_rows = prepared.config.n_steps, len(prepared.source.train)
    batches = [pipeline.batch_rows(step).tolist() for step in range(n_steps)]
    assert len(set(itertools.chain(*batches))) == n_rows
    assert len(set(itertools.chain(*batches[:-1]))) < n_rows
    half = prepare(replace(config, n_epochs=0.5), parallel.devices()).config.n_steps
    assert n_rows / 8 / 2 <= half < n_steps


def test_the_other_processes_receive_a_text_of_any_length(monkeypatch):
    """Process 0 sends, process 1 receives what was sent."""
    from jax.experimental import multihost_utils

    text = json.dumps(["größe"] * 5000)
    sent = []
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(processes, "is_first", lambda: True)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: sent.append(x) or x)
    assert processes.broadcast_text(lambda: text) == text
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: sent.pop(0))
    assert processes.broadcast_text(lambda: "") == text
