"""Bad rows are named for what they are, all in one pass. Without them the order of rows is that of
a dataset that never had them.
"""

import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest
from bad_rows_cases import (
    DAMAGE,
    POINTER,
    cells_with_damage,
    huge_image,
    split_of,
    write_dataset,
    write_folder,
)
from datasets import Dataset, Features, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from latents_cases import ENCODING, moments
from pipeline_cases import batches_equal, own_cache  # noqa: F401

from data import bad_rows, images, latents
from data.bad_rows import find_bad_rows, leave_out
from data.load import open_dataset
from data.parquet import ParquetSplit, UnreachableError
from data.pipeline import Pipeline
from data.rows import BadRow, BadRowError, select_rows
from datasets_config import DATASET_CONFIGS
from runtime.errors import UserError

BAD = {3: None, 11: POINTER.encode(), 29: b""}  # rows of a dataset of 40


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("damaged"), 40, BAD)


@pytest.fixture
def source(damaged):
    return open_small(damaged)


def open_small(folder, **options):
    """Open it as a dataset of mirrored images that has a split to evaluate with."""
    return open_dataset("flowers", data_dir=folder, conditioning="none", image_size=8, **options)


def found(source) -> dict[str, list[BadRow]]:
    return {"train": find_bad_rows(source.train), "eval": find_bad_rows(source.eval)}


# --- finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_no_image_is_named_for_what_it_is(kind):
    content, name = DAMAGE[kind]
    with pytest.raises(UserError, match="the image cannot be read") as caught:
        images.open_upright(content)
    assert name in str(caught.value) and len(str(caught.value)) < 100


def test_a_decompression_bomb_is_a_bad_row():
    (bad,) = find_bad_rows(split_of(cells_with_damage(3, {1: huge_image()})))
    assert bad.row == 1 and "pixels" in bad.problem


def test_all_bad_rows_are_found_in_one_pass(source):
    rows = found(source)
    assert [bad.row for bad in rows["train"]] == list(BAD) and rows["eval"] == []
    assert rows["train"][0].problem == "the cell is empty"
    assert "Git LFS" in rows["train"][1].problem


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 19), st.sampled_from([None, *DAMAGE])))
def test_whatever_is_bad_is_found_and_nothing_else(kinds):
    bad = {row: DAMAGE[kind][0] if kind else None for row, kind in kinds.items()}
    split = split_of(cells_with_damage(20, bad))
    rows = find_bad_rows(split)
    assert [row.row for row in rows] == sorted(kinds)
    readable = split.decode_readable(np.arange(20))
    assert readable.rows.tolist() == [row for row in range(20) if row not in kinds]
    assert readable.bad == rows


def test_a_row_of_an_image_folder_is_named_by_its_file(tmp_path):
    folder = write_folder(tmp_path / "pics")
    source = open_dataset(f"folder:{folder}")
    (folder / "cat/004.png").unlink()
    (folder / "dog/005.png").write_text(POINTER)
    (folder / "dog/007.png").unlink()
    (folder / "dog/007.png").mkdir()
    bad = sorted(bad for split in found(source).values() for bad in split)
    assert {row.file: row.problem for row in bad} == {
        f"{folder}/cat/004.png": "the file cannot be read (No such file or directory)",
        f"{folder}/dog/005.png": "the image cannot be read (a Git LFS pointer: run `git lfs pull`)",
        f"{folder}/dog/007.png": "the file cannot be read (Is a directory)",
    }
    with pytest.raises(BadRowError, match=r"file 'cat/004.png', row \d+, column 'image': the file"):
        source.full_splits()["train"].decode(np.arange(20))


def test_the_line_is_short_and_says_what_to_do(tmp_path):
    folder = write_folder(tmp_path / ("long" * 20) / ("name" * 20), 40)
    source = open_dataset(f"folder:{folder}", image_size=8, channels=3)
    for file in folder.glob("*/*.png"):
        file.write_bytes(DAMAGE["a phone's photograph"][0])
    with pytest.raises(UserError) as caught:
        Pipeline(source, batch_size=2, seed=0)
    line = str(caught.value)
    assert "(and 35 more); `python -m data.check` lists all, --bad_rows skip" in line
    assert len(line) <= 300


def test_a_row_group_that_cannot_be_read_is_its_rows(tmp_path):
    cells = cells_with_damage(20, {})
    data = Dataset.from_dict({"img": cells}, features=Features({"img": Image()}))
    path = tmp_path / "x.parquet"
    data.to_parquet(path, batch_size=5)
    column = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    stream = ParquetSplit([str(path)]).select_images("img")
    split = dataclasses.replace(split_of(cells), data=stream)
    bad = find_bad_rows(split)
    assert [row.row for row in bad] == [5, 6, 7, 8, 9]
    assert {row.problem for row in bad} == {bad[0].problem}
    assert bad[0].problem.startswith(f"cannot read {path} (")


def test_a_row_of_latents_can_be_bad_too():
    cells = [{"bytes": cell, "path": None} for cell in latents.pack_moments(moments(4))]
    cells[1]["bytes"] = cells[1]["bytes"][:-1]
    config = dataclasses.replace(DATASET_CONFIGS["digits"], encoding=ENCODING)
    split = split_of([*cells, None], config)
    readable = split.decode_readable(np.arange(5))
    np.testing.assert_array_equal(readable.images, moments(4)[[0, 2, 3]])
    assert [(bad.row, bad.problem.split(" where")[0]) for bad in readable.bad] == [
        (1, "a row of the latents has 511 bytes"),
        (4, "the cell is empty"),
    ]


def test_the_network_is_no_fault_of_the_rows(monkeypatch):
    split = split_of(cells_with_damage(4, {}))

    def read_cells(rows):
        raise UnreachableError("cannot read hf://x (no route)")

    monkeypatch.setattr(split.data, "read_cells", read_cells)
    with pytest.raises(UnreachableError):
        find_bad_rows(split)
    with pytest.raises(UnreachableError):
        split.decode_readable(np.arange(4))


# --- opening --------------------------------------------------------------------------------------


def test_size_and_colours_are_found_by_readable_images(tmp_path):
    folder = write_dataset(tmp_path / "a", 40, {0: b"", 20: b"no image"})
    config = open_dataset(f"folder:{folder}").config
    assert (config.image_size, config.channels) == (8, 3)
    every = write_dataset(tmp_path / "b", 4, dict.fromkeys(range(4), b""))
    with pytest.raises(BadRowError, match=r"row 0, .*the file is empty"):
        open_dataset(f"folder:{every}")


def test_without_bad_rows_skipping_them_changes_nothing(tmp_path):
    folder = write_dataset(tmp_path, 30, {})
    plain = open_dataset(f"folder:{folder}")
    source = leave_out(plain, found(plain))
    a, b = (Pipeline(s, batch_size=7, seed=1) for s in (plain, source))
    assert all(batches_equal(a.train_batch(i), b.train_batch(i)) for i in range(9))


# --- leaving out ----------------------------------------------------------------------------------


def test_batches_are_those_of_a_dataset_that_never_had_the_bad_rows(source, tmp_path):
    """So the order is still a function of (seed, step), the same for processes and on resume."""
    clean = open_small(write_dataset(tmp_path, 40, BAD, without=True))
    source = leave_out(source, found(source))
    expected = Pipeline(clean, batch_size=6, seed=3)
    ours = Pipeline(source, batch_size=6, seed=3, in_memory=False, n_workers=0)
    for step, batch in zip(range(9), ours.train_batches(0, 9)):
        assert batches_equal(batch, expected.train_batch(step))
    for a, b in zip(ours.eval_batches(3), expected.eval_batches(3)):
        assert batches_equal(a, b)
    halves = [
        Pipeline(source, batch_size=6, seed=3, process_index=i, n_processes=2) for i in (0, 1)
    ]
    whole = expected.train_batch(7)
    np.testing.assert_array_equal(
        np.concatenate([half.train_batch(7).image for half in halves]), whole.image
    )


def test_a_streamed_epoch_has_every_good_row_once(damaged):
    source = open_small(damaged, streaming=True)
    source = leave_out(source, found(source))
    data = Pipeline(source, batch_size=5, seed=0, n_workers=0, shuffle_buffer=8)
    for epoch in range(3):
        rows = source.train.rows[data.epoch_order(epoch)]
        assert sorted(rows) == [row for row in range(40) if row not in BAD]


def test_labels_and_captions_stay_with_their_rows():
    split = split_of(cells_with_damage(5, {1: b""}))
    captions = [(f"row {i}",) for i in range(5)]
    split = dataclasses.replace(split, labels=np.arange(5, dtype=np.int32), captions=captions)
    kept = select_rows(split, np.array([0, 2, 3, 4]))
    assert kept.labels.tolist() == [0, 2, 3, 4] == kept.rows.tolist()
    assert kept.captions == [captions[i] for i in (0, 2, 3, 4)]


def test_a_row_that_breaks_later_names_the_record(source):
    left = leave_out(source, {"train": found(source)["train"][:1], "eval": []})
    with pytest.raises(UserError, match=r"row 11, .* delete bad_rows\.json in the run's folder"):
        Pipeline(left, batch_size=2, seed=0)


def test_too_many_bad_rows_stop_and_exactly_so_many_do_not(source):
    rows = found(source)
    bad_rows.require_few_bad_rows(source, rows, 3 / 40)
    message = r"^3 of 40 training rows are bad, more than --bad_rows_at_most 0\.05; .*row 3"
    with pytest.raises(UserError, match=message):
        bad_rows.require_few_bad_rows(source, rows, 0.05)


def test_a_split_without_any_other_row_is_refused():
    split = split_of(cells_with_damage(2, {0: b"", 1: b""}))
    source = dataclasses.replace(open_dataset("digits"), train=split)
    with pytest.raises(UserError, match=r"^no row can be read; the first is .*row 0"):
        leave_out(source, {"train": find_bad_rows(split), "eval": []})


# --- the record -----------------------------------------------------------------------------------


def test_the_record_comes_back(source, tmp_path):
    rows = found(source)
    left = leave_out(source, rows)
    assert left.n_train_rows == 40 == len(left.train) + 3
    bad_rows.write_record(tmp_path, left)
    text = bad_rows.read_record(tmp_path)
    assert bad_rows.from_json(text, source) == rows
    record = json.loads(text)["train"]
    assert (record["split"], record["n_rows"]) == ("train", 40)
    assert record["bad_rows"][0] == {"row": 3, "file": "", "problem": "the cell is empty"}


def test_a_record_of_other_rows_or_a_damaged_one_is_refused(source, tmp_path):
    text = bad_rows.to_json(leave_out(source, found(source)))
    with pytest.raises(UserError, match="cannot resume: split 'train' of flowers had 41 rows"):
        bad_rows.from_json(text.replace('"n_rows": 40', '"n_rows": 41'), source)
    for damage in (text[:50], "[]", "{}", text.replace('"row"', '"line"')):
        with pytest.raises(UserError, match=r"bad_rows\.json is damaged .*delete it"):
            bad_rows.from_json(damage, source)
    assert bad_rows.read_record(tmp_path) == ""
