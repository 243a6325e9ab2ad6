"""Parquet files read where they lie: the same rows as `datasets` finds, whatever the order."""

import pickle
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image
from hub_copies import image_file, make_copy
from parquet_cases import (
    RNG,
    batches_equal,
    folder,  # noqa: F401
    make_pipeline,
    open_both,
)

from data import headers, parquet
from data.batch import Batch
from data.load import open_dataset
from data.parquet import ParquetSplit
from runtime.errors import UserError


def test_rows_labels_and_classes_are_those_that_datasets_finds(folder):
    stored, streamed = open_both(folder)
    assert streamed.config == stored.config
    for split in (stored.train, stored.eval):
        rows = np.searchsorted(np.arange(60), split.rows)
        everything = replace(streamed.train, rows=np.arange(60))
        np.testing.assert_array_equal(everything.decode(rows), split.decode(np.arange(len(split))))
        whole = streamed.train.data.read_column("label").to_numpy()
        np.testing.assert_array_equal(whole[rows], split.labels)


@pytest.mark.parametrize("name", ["cifar10", "celeba", "butterflies", "coco"])
def test_the_hubs_schemas_stream(tmp_path, name):
    copy = make_copy(name, tmp_path / "data")
    stored = open_dataset(name, data_dir=copy)
    streamed = open_dataset(name, data_dir=copy, streaming=True)
    assert streamed.config == stored.config
    for a, b in ((stored.train, streamed.train), (stored.eval, streamed.eval)):
        np.testing.assert_array_equal(a.decode(np.arange(len(a))), b.decode(np.arange(len(b))))
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.captions == b.captions


def test_held_out_rows_are_whole_row_groups_where_there_are_many(tmp_path):
    (tmp_path / "data").mkdir()
    files = [{"bytes": image_file(RNG), "path": None} for _ in range(200)]
    data = Dataset.from_dict({"img": files}, features=Features({"img": Image()}))
    data.to_parquet(tmp_path / "data/train.parquet", batch_size=4)
    source = open_dataset(f"folder:{tmp_path}", streaming=True)
    assert len(source.eval) == 20 and len(source.train) == 180
    assert not set(source.eval.rows) & set(source.train.rows)
    assert set(np.bincount(source.eval.rows // 4)) == {0, 4}


def test_a_streamed_epoch_has_every_row_once(folder):
    one = make_pipeline(open_both(folder)[1], n_workers=0)
    n = len(one.source.train)
    chain = np.concatenate([one.batch_rows(step) for step in range(3 * n // 8 + 1)])[: 3 * n]
    for epoch in chain.reshape(3, n):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))


def test_processes_share_out_a_streamed_batch(folder):
    source = open_both(folder)[1]
    whole = make_pipeline(source, n_workers=0)
    halves = [make_pipeline(source, n_workers=0, process_index=i, n_processes=2) for i in range(2)]
    for step in (0, 9):
        parts = [half.train_batch(step) for half in halves]
        assert batches_equal(
            whole.train_batch(step), Batch(*(np.concatenate(x) for x in zip(*parts)))
        )


def test_evaluation_is_the_same_every_time(folder):
    source = open_both(folder)[1]
    one, two = (list(make_pipeline(source, n_workers=0).eval_batches(2)) for _ in range(2))
    assert all(batches_equal(a, b) for a, b in zip(one, two))
    assert set(np.concatenate([b.label for b in one])) <= {0, 1, 2}


def test_few_row_groups_are_cached_and_none_is_sent_to_a_worker(folder):
    one = make_pipeline(open_both(folder)[1], n_workers=0)
    stream = one.source.train.data
    assert isinstance(stream, ParquetSplit)
    for step in range(20):
        one.train_batch(step)
    assert 0 < len(stream._open_groups) <= stream.max_open_groups
    assert len(pickle.dumps(stream)) < 5000
    assert pickle.loads(pickle.dumps(stream)).read_cells([50]) == stream.read_cells([50])


# --- what goes wrong ------------------------------------------------------------------------------


def test_only_parquet_streams(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").write_bytes(image_file(RNG))
    with pytest.raises(
        UserError, match="reads Parquet files, and this is of the kind 'imagefolder'"
    ):
        open_dataset(f"folder:{tmp_path / 'images'}", streaming=True)
    Dataset.from_dict({"img": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="and this is a folder of save_to_disk; drop --streaming"):
        open_dataset(f"folder:{tmp_path / 'saved'}", streaming=True)


def test_a_column_without_images_is_named(folder):
    with pytest.raises(UserError, match="column 'label' holds no images"):
        open_dataset(f"folder:{folder}", streaming=True, image_column="label", label_column="")


def test_opening_reads_few_of_many_row_groups(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    files = [{"bytes": image_file(RNG), "path": None} for _ in range(200)]
    data = Dataset.from_dict({"img": files}, features=Features({"img": Image()}))
    data.to_parquet(tmp_path / "data/train.parquet", batch_size=4)
    read = []
    read_images = ParquetSplit._read_images
    monkeypatch.setattr(
        ParquetSplit,
        "_read_images",
        lambda self, group: read.append(group) or read_images(self, group),
    )
    source = open_dataset(f"folder:{tmp_path}", streaming=True)
    assert len(set(read)) <= headers.MAX_STREAMED_GROUPS < 45
    assert source.notices[0].startswith("64 of 180 images: ")


def test_an_image_that_cannot_be_decoded_is_named_by_its_row(tmp_path):
    (tmp_path / "data").mkdir()
    files = [{"bytes": image_file(RNG), "path": None} for _ in range(30)]
    files[17]["bytes"] = b"no image"
    data = Dataset.from_dict({"img": files}, features=Features({"img": Image()}))
    data.to_parquet(tmp_path / "data/train.parquet", batch_size=4)
    source = open_dataset(f"folder:{tmp_path}", streaming=True, image_size=8, channels=3)
    with pytest.raises(UserError, match="split 'train', row 17, column 'img'"):
        list(make_pipeline(source, n_workers=0).train_batches(0, 4))


def test_a_damaged_file_is_named(folder, tmp_path):
    (path,) = folder.glob("data/*-00001-*")
    (tmp_path / "x.parquet").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read .*x\.parquet"):
        ParquetSplit([str(tmp_path / "x.parquet")])


def copy_to_memory(folder: Path) -> list[str]:
    files = []
    for path in sorted(folder.glob("data/*.parquet")):
        files.append(f"memory://set/{path.name}")
        with fsspec.open(files[-1], "wb") as file:
            file.write(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    return files


def test_a_remote_file_that_is_out_of_reach_is_tried_again(folder, monkeypatch, capsys):
    stream = ParquetSplit(copy_to_memory(folder)).select_images("img")
    original_open = fsspec.open
    failures = [1, 1]
    pauses = []

    def flaky(path, *args):
        if failures.pop():
            raise ConnectionError("no route")
        return original_open(path, *args)

    monkeypatch.setattr(fsspec, "open", flaky)
    monkeypatch.setattr(parquet.time, "sleep", pauses.append)
    failures.insert(0, 0)
    expected = pyarrow.parquet.read_table(next(folder.glob("data/*-00000-*")))["img"][5].as_py()
    assert stream.read_cells([5]) == [expected]
    assert pauses == [1, 4]
    warning = (
        "warning: cannot read memory://set/train-00000-of-00002.parquet (no route); trying again"
    )
    assert capsys.readouterr().err.splitlines()[0] == f"{warning} in 1 s"
    failures[:] = [1] * 9
    with pytest.raises(UserError, match=r"cannot read memory://.* \(no route\)"):
        stream.read_cells([30])
    assert pauses == [1, 4, 1, 4, 16, 60]


@pytest.mark.parametrize("problem", ["missing", "damaged", "column"])
def test_lasting_problems_are_not_tried_again(folder, monkeypatch, problem):
    def sleep(seconds):
        raise AssertionError("nobody should wait for this")

    monkeypatch.setattr(parquet.time, "sleep", sleep)
    files = copy_to_memory(folder)
    if problem == "missing":
        files = ["memory://set/elsewhere.parquet"]
    if problem == "damaged":
        with fsspec.open(files[0], "wb") as file:
            file.write(b"PAR1 and no more")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"cannot read memory://set/"):
        ParquetSplit(files).read_column("no such column")
