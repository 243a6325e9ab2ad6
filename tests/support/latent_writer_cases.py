"""Inputs and helpers shared by the tests of inference.latent_writer."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features
from hub_copies import image_file

RNG = np.random.default_rng(0)


def write(folder: Path, **columns: tuple[Any, list]) -> Path:
    """A Parquet folder of these columns, each with its kind."""
    (folder / "data").mkdir(parents=True)
    kinds, values = ({name: pair[i] for name, pair in columns.items()} for i in (0, 1))
    data = Dataset.from_dict(values, features=Features(kinds))
    data.to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


def grey_cells(n: int) -> list[dict]:
    return [{"bytes": image_file(RNG, "L"), "path": None} for _ in range(n)]
