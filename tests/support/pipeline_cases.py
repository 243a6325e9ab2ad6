"""Inputs and helpers shared by the tests of data.pipeline."""

import zlib
from pathlib import Path

import datasets.config
import jax
import numpy as np
import pytest
from datasets import Dataset, Features
from hub_copies import image_file, make_copy

from data.batch import Batch, EncodedCaption
from data.caption_cache import CaptionStore
from data.load import open_dataset
from data.text_encoders import CaptionEmbedding

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Convert Parquet to Arrow in a folder of the test session, not in the user's cache."""
    cache = tmp_path_factory.getbasetemp() / "huggingface"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A dataset of 24 coloured training images, which are mirrored at random."""
    return make_copy("cifar10", tmp_path_factory.mktemp("cifar"))


@pytest.fixture
def source(cifar):
    return open_dataset("cifar10", data_dir=cifar)


def write_parquet(
    folder: Path, *, split: str = "train", features: dict | None = None, **columns
) -> Path:
    """Write these columns as Parquet; return the folder."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    known = Features(features) if features else None
    data = Dataset.from_dict(columns, features=known)
    data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def image_cells(n: int, **options) -> list[dict]:
    return [{"bytes": image_file(RNG, **options), "path": None} for _ in range(n)]


def batches_equal(a: Batch, b: Batch) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in leaves)


# --- captions ---


class EchoStore(CaptionStore):
    """A store without files: the embedding of a caption is its index among all captions."""

    def __init__(self, source):
        splits = (source.train.captions, source.eval.captions)
        self.captions = sorted({c for split in splits for captions in split for c in captions})

    def caption_ids(self, captions):
        return np.array([self.captions.index(caption) for caption in captions])

    def __call__(self, ids):
        one = ids.reshape(-1, 1)
        return EncodedCaption(one[..., None].astype(np.float16), one >= 0, one.astype(np.float16))

    def captions_of_batch(self, batch):
        return [self.captions[int(i)] for i in batch.label.pooled[:, 0]]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A dataset and its store: 20 training images, 4 to evaluate with. Row i has the captions
    row 5 i … 5 i + 4."""
    copy = make_copy("coco", tmp_path_factory.mktemp("coco"))
    source = open_dataset("coco", data_dir=copy)
    return source, EchoStore(source)


class FakeEncoders:
    """Text encoders whose embeddings have two channels that tell captions apart."""

    width = pooled = 2

    def encode(self, captions):
        hashes = [zlib.crc32(caption.encode()) % 1000 for caption in captions]
        return [
            CaptionEmbedding(np.full((3, 2), h, "f2"), np.full(2, h, "f2"), False) for h in hashes
        ]
