"""Inputs and helpers shared by the tests of data.parquet."""

import jax
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from hub_copies import image_file

from data.batch import Batch
from data.load import open_dataset
from data.pipeline import Pipeline

RNG = np.random.default_rng(0)
FEATURES = Features({"img": Image(), "label": ClassLabel(names=list("abc"))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parquet files of 60 images: two files, row groups of 4."""
    folder = tmp_path_factory.mktemp("dataset") / "data"
    folder.mkdir()
    for i, n in enumerate((34, 26)):
        files = [{"bytes": image_file(RNG), "path": None} for _ in range(n)]
        columns = {"img": files, "label": [k % 3 for k in range(n)]}
        data = Dataset.from_dict(columns, features=FEATURES)
        data.to_parquet(folder / f"train-{i:05d}-of-00002.parquet", batch_size=4)
    return folder.parent


def open_both(folder, **options):
    return [
        open_dataset(f"folder:{folder}", streaming=streaming, **options)
        for streaming in (False, True)
    ]


def batches_equal(a: Batch, b: Batch) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in leaves)


# --- batches --------------------------------------------------------------------------------------


def make_pipeline(source, **options):
    return Pipeline(source, batch_size=8, seed=3, shuffle_buffer=12, **options)
