"""An interrupted conversion ends with the same folder of latents as an uninterrupted one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Image, Value
from latent_writer_cases import grey_cells, write

import convert_imagenet
from convert_imagenet import ConvertConfig
from data.arrow import ArrowSplit
from data.load import open_dataset
from data.parquet import ParquetSplit
from inference import latent_writer
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("name", "value", "minimum"),
    [
        ("image_size", 0, 1),
        ("batch_size", 0, 1),
        ("rows_per_file", 0, 1),
        ("n_workers", -1, 0),
        ("verify", -1, 0),
    ],
)
def test_numbers_out_of_range_are_refused(name, value, minimum):
    with pytest.raises(UserError, match=f"--{name} {value}: must be at least {minimum}"):
        convert_imagenet.check_flags(ConvertConfig(**{name: value}))
    convert_imagenet.check_flags(ConvertConfig(**{name: 8 * minimum}))


# --- where the images are from --------------------------------------------------------------------


def test_the_source_of_the_hub_is_known_by_its_commit():
    commit = "0123456789" * 4
    file = f"hf://datasets/owner/name@{commit}/data/train-0.parquet"
    digits: Any = open_dataset("digits")
    config = replace(digits.config, name="hf:owner/name", path="owner/name")
    info = SimpleNamespace(download_checksums={file: {}})
    streamed = ParquetSplit.__new__(ParquetSplit)
    streamed.files = [file]
    prepared = ArrowSplit.__new__(ArrowSplit)
    prepared.data = SimpleNamespace(info=info)  # pyright: ignore[reportAttributeAccessIssue]
    for data in (streamed, prepared):
        source = replace(digits, config=config, train=replace(digits.train, data=data))
        assert latent_writer.source_revision(source, None) == f"owner/name@{commit}"
        assert latent_writer.source_revision(source, Path("copy")) == "copy"


def test_the_plan_has_every_row_once():
    for n, per_file, size in ((10, 4, 3), (8, 4, 4), (1, 4, 3), (9, 1, 1)):
        files = latent_writer.plan_files(Path("x"), "train", n, per_file)
        rows = np.concatenate([rows for file in files for rows in file.batches(size)])
        assert rows.tolist() == list(range(n))
        assert len({file.path for file in files}) == len(files) == -(-n // per_file)
        assert all(len(rows) <= size for file in files for rows in file.batches(size))


def test_values_of_a_column_that_is_no_class_stay_out(tmp_path):
    """Only what a training can use is carried over."""
    folder = write(
        tmp_path / "s", image=(Image(), grey_cells(4)), name=(Value("string"), ["a"] * 4)
    )
    assert open_dataset(f"folder:{folder}").config.n_classes == 0
