"""Worker processes give the same batches as threads; one that dies is replaced or reported."""

import contextlib
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Image
from pipeline_cases import (
    FakeEncoders,
    batches_equal,
    cifar,  # noqa: F401
    coco,  # noqa: F401
    image_cells,
    own_cache,  # noqa: F401
    source,  # noqa: F401
    write_parquet,
)

from data.caption_cache import CaptionStore
from data.load import open_dataset
from data.pipeline import Pipeline
from data.rows import Split
from runtime.errors import RunError, UserError


def children() -> set[int]:
    """Ids of the processes that this one has started and not yet waited for."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def test_worker_processes_give_the_same_batches_in_order_and_end_when_closed(source):
    in_memory = Pipeline(source, batch_size=6, seed=0)
    streamed = Pipeline(source, batch_size=6, seed=0, in_memory=False, n_workers=2)
    before = children()
    with contextlib.closing(streamed.train_batches(2, 1000)) as batches:
        for step in range(2, 9):
            assert batches_equal(next(batches), in_memory.train_batch(step))
        assert len(children() - before) == 2
    assert children() == before


def test_batches_are_the_same_when_workers_are_killed(source, capfd):
    in_memory = Pipeline(source, batch_size=6, seed=0)
    streamed = Pipeline(source, batch_size=6, seed=0, in_memory=False, n_workers=2)
    before = children()
    with contextlib.closing(streamed.train_batches(2, 1000)) as batches:
        for step in range(2, 20):
            assert batches_equal(next(batches), in_memory.train_batch(step))
            if step in (3, 11):
                os.kill(max(children() - before), signal.SIGKILL)
    assert capfd.readouterr().err.count("was killed by SIGKILL") == 2


class Deadly(Split):
    """A split with an image that kills the process that decodes it."""

    def decode(self, indices, places=None):
        if 17 in self.rows[indices]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(indices, places)


def test_rows_that_kill_every_worker_end_the_run_and_are_named(source):
    source = replace(source, train=Deadly(**vars(source.train)))
    pipeline = Pipeline(source, batch_size=6, seed=0, in_memory=False, n_workers=2)
    due = next(step for step in range(4) if 17 in pipeline.batch_rows(step))
    batches = pipeline.train_batches(0, 100)
    n_before = 0
    with pytest.raises(RunError, match=r"SIGKILL, 3 times .* training split: \[") as caught:
        for _ in batches:
            n_before += 1
    assert n_before == due
    rows = json.loads(str(caught.value).rpartition(": ")[2])
    assert 17 in rows and set(rows) < set(pipeline.batch_rows(due).tolist()) and len(rows) == 3


def test_a_bad_row_ends_the_workers_with_its_row_and_column(tmp_path):
    rows = [*image_cells(17), {"bytes": b"not an image", "path": None}, *image_cells(6)]
    folder = write_parquet(tmp_path, features={"image": Image()}, image=rows)
    write_parquet(tmp_path, split="test", features={"image": Image()}, image=image_cells(2))
    source = open_dataset("butterflies", data_dir=folder, image_size=8)
    with pytest.raises(UserError, match="row 17, column 'image': the image cannot be read"):
        Pipeline(source, batch_size=4, seed=0)
    streamed = Pipeline(source, batch_size=4, seed=0, in_memory=False, n_workers=1)
    start = time.monotonic()
    with pytest.raises(UserError, match="row 17, column 'image': the image cannot be read"):
        list(streamed.train_batches(0, 100))
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_worker_processes_give_the_same_captions(coco, tmp_path):
    source, _ = coco
    splits = (source.train, source.eval)
    texts = [text for split in splits for captions in split.captions for text in captions]
    revisions = ["0123456789ab"]
    store = CaptionStore.open(
        tmp_path, texts, ["us/it"], revisions=revisions, load_encoders=FakeEncoders
    )
    in_memory = Pipeline(source, batch_size=6, seed=0, caption_store=store)
    streamed = Pipeline(
        source, batch_size=6, seed=0, caption_store=store, in_memory=False, n_workers=1
    )
    with contextlib.closing(streamed.train_batches(2, 1000)) as batches:
        for step in range(2, 6):
            assert batches_equal(next(batches), in_memory.train_batch(step))
