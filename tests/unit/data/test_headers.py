"""The header of an image is read once, whether it is a file or lies inside a table, and again once
it may have changed.
"""

import os

import fsspec
import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from hub_copies import image_file
from pipeline_cases import own_cache  # noqa: F401

from data import headers
from data.arrow import ArrowSplit
from data.headers import read_headers
from data.load import open_dataset
from data.parquet import ParquetSplit
from data.rows import Split

RNG = np.random.default_rng(0)
SIZES = [(9, 8 + i) for i in range(24)]  # width and height


@pytest.fixture(autouse=True)
def header_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "ROWS_AT_ONCE", 4)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data/train-0.parquet", [image(size) for size in SIZES[:16]])
    write_table(tmp_path / "data/train-1.parquet", [image(size) for size in SIZES[16:]])
    return tmp_path / "data"


@pytest.fixture
def n_read(monkeypatch):
    """Count the images whose headers are read: those of two calls, in a list."""
    counts = []
    original = headers._read_header
    monkeypatch.setattr(headers, "_read_header", lambda cell: counts.append(1) or original(cell))
    return lambda: (len(counts), counts.clear())[0]


def image(size):
    return {"bytes": image_file(RNG, size=size), "path": None}


def write_table(path, cells):
    data = Dataset.from_dict({"img": cells}, features=Features({"img": ImageFeature(decode=False)}))
    data.to_parquet(path, batch_size=4)


def read_sides(folder, streaming=True):
    """Open the dataset as a new start does, and read the sizes of all images of both splits."""
    source = open_dataset(f"folder:{folder}", streaming=streaming, image_size=8)
    sides = {}
    for split in (source.train, source.eval):
        sides |= dict(zip(split.rows.tolist(), read_headers(split, of_all=True).sides.tolist()))
    return [tuple(sides[row][::-1]) for row in range(len(sides))]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_inside_tables_are_read_at_the_first_start_only(
    folder, n_read, streaming, header_cache
):
    assert read_sides(folder, streaming) == SIZES and n_read() == len(SIZES)
    assert read_sides(folder, streaming) == SIZES and n_read() == 0
    (cache,) = header_cache.rglob("*.npy")
    cache.write_bytes(cache.read_bytes()[:-5])
    assert read_sides(folder, streaming) == SIZES and n_read() == len(SIZES)


def test_a_new_or_changed_file_costs_only_itself(folder, n_read):
    read_sides(folder)
    n_read()
    write_table(folder / "train-2.parquet", [image((30, 20))] * 4)
    assert read_sides(folder) == [*SIZES, *[(30, 20)] * 4] and n_read() == 4
    write_table(folder / "train-0.parquet", [image((20, 30))] * 16)
    assert read_sides(folder)[:17] == [*[(20, 30)] * 16, SIZES[16]] and n_read() == 16
    os.utime(folder / "train-1.parquet", ns=(1, 1))
    assert read_sides(folder)[16:24] == SIZES[16:] and n_read() == 8


def test_what_could_not_be_read_or_lies_outside_the_table_is_looked_at_again(
    folder, n_read, tmp_path
):
    outside = tmp_path / "outside.png"
    outside.write_bytes(image_file(RNG, size=(7, 8)))
    cells = [image((9, 9)), {"bytes": b"no image", "path": None}, None]
    cells += [{"bytes": None, "path": str(outside)}]
    write_table(folder / "train-0.parquet", cells * 2)
    assert read_sides(folder)[:4] == [(9, 9), (0, 0), (0, 0), (7, 8)]
    n_read()
    outside.write_bytes(image_file(RNG, size=(5, 6)))
    assert read_sides(folder)[:4] == [(9, 9), (0, 0), (0, 0), (5, 6)]
    assert n_read() == 5 + 6  # the training split is read when it is opened, too


def split_of(data):
    config = open_dataset("digits").config
    n = len(data)
    data = data.select_images("img")
    return Split(config, "train", data, np.arange(n), np.zeros(n, np.int32), [])


@pytest.mark.parametrize("at, is_cached", [("@" + 40 * "a", True), ("@main", False), ("", False)])
def test_a_file_of_the_hub_is_known_by_its_commit(
    folder, n_read, monkeypatch, capsys, at, is_cached
):
    address = f"hf://datasets/owner/name{at}/train-0.parquet"
    original = fsspec.open
    monkeypatch.setattr(fsspec, "open", lambda path: original(folder / path.split("/")[-1]))
    for n in (16, 0 if is_cached else 16):
        read_headers(split_of(ParquetSplit([address])), of_all=True)
        assert n_read() == n
    lines = capsys.readouterr().err.splitlines()
    how = "once: they are cached in " if is_cached else "as at each start: nothing tells when"
    assert all(f"reading the sizes of 16 images of 'train', {how}" in line for line in lines)
    assert len(lines) == (1 if is_cached else 2)


def test_a_table_in_memory_is_read_each_time(n_read):
    features = Features({"img": ImageFeature(decode=False)})
    data = Dataset.from_dict({"img": [image((9, 9))] * 3}, features=features)
    for _ in range(2):
        assert read_headers(split_of(ArrowSplit(data))).sides.tolist() == [[9, 9]] * 3
        assert n_read() == 3


def test_other_rows_of_the_same_files_are_other_images(folder, n_read):
    data = open_dataset(f"folder:{folder}").train.data
    assert isinstance(data, ArrowSplit)
    for rows in (range(10), range(10, 20)):
        split = split_of(ArrowSplit(data.data.select(rows)))
        assert read_headers(split).sides.tolist() == [list(SIZES[row][::-1]) for row in rows]


def test_an_interrupted_start_keeps_what_it_has_read(folder, n_read, monkeypatch):
    data = ParquetSplit([str(folder / "train-0.parquet")])
    read_cells = Split.read_cells

    def interrupt(self, rows):
        if 12 in rows:
            raise KeyboardInterrupt
        return read_cells(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Split, "read_cells", interrupt)
        read_headers(split_of(data), of_all=True)
    n_read()
    assert len(read_headers(split_of(data), of_all=True).sides) == 16 and n_read() == 4
