"""Small local copies of the hub's datasets, with its columns, features, splits and image sizes.

The images are smooth noise.
"""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PillowImage

from datasets_config import DATASET_CONFIGS

DIGIT_NAMES = [str(i) for i in range(10)]
OTHER_ATTRIBUTES = ("5_o_Clock_Shadow", "Eyeglasses", "Male", "Young")  # 4 of the other 39

# name: splits, Pillow's mode and (width, height) of the images, their format, the other columns
SCHEMAS = {
    "digits": (("train", "test"), "L", (8, 8), "PNG", {"label": ClassLabel(names=DIGIT_NAMES)}),
    "mnist": (("train", "test"), "L", (28, 28), "PNG", {"label": ClassLabel(names=DIGIT_NAMES)}),
    "fashion_mnist": (
        *(("train", "test"), "L", (28, 28), "PNG"),
        {"label": ClassLabel(names=list(DATASET_CONFIGS["fashion_mnist"].label_names))},
    ),
    "cifar10": (
        *(("train", "test"), "RGB", (32, 32), "PNG"),
        {"label": ClassLabel(names=list(DATASET_CONFIGS["cifar10"].label_names))},
    ),
    "flowers": (
        *(("train", "test"), "RGB", (75, 50), "JPEG"),
        {"label": ClassLabel(names=[f"flower {i}" for i in range(102)])},
    ),
    "butterflies": (
        *(("train",), "RGB", (96, 80), "JPEG"),
        {
            "name": Value("string"),
            "scientific_name": Value("string"),
            "sim_score": Value("float64"),
        },
    ),
    "tiny_imagenet": (
        *(("train", "valid"), "RGB", (64, 64), "JPEG"),
        {"label": ClassLabel(names=[f"n{i:08d}" for i in range(200)])},
    ),
    "imagenet": (
        *(("train", "validation"), "RGB", (80, 64), "JPEG"),
        {"label": ClassLabel(names=[f"n{i:08d}" for i in range(1000)])},
    ),
    "celeba": (
        *(("train", "valid", "test"), "RGB", (178, 218), "JPEG"),
        {
            "celeb_id": Value("int64"),
            **{name: Value("bool") for name in (*OTHER_ATTRIBUTES, "Smiling")},
        },
    ),
    "celebahq": (
        *(("train", "validation"), "RGB", (256, 256), "JPEG"),
        {"label": ClassLabel(names=["female", "male"])},
    ),
    "coco": (
        *(("train",), "RGB", (64, 48), "JPEG"),
        {
            "filepath": Value("string"),
            "filename": Value("string"),
            "sentids": List(Value("int64")),
            "sentences_raw": List(Value("string")),
        },
    ),
}


def make_copy(name: str, folder: Path, n: int = 24) -> Path:
    """Write a copy of the dataset `name` with n rows in each split, as Parquet; return `folder`."""
    splits, mode, size, file_format, others = SCHEMAS[name]
    features = Features({DATASET_CONFIGS[name].image_column: Image(), **others})
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split in splits:
        columns: dict[str, list] = {
            column: [column_value(feature, i) for i in range(n)]
            for column, feature in others.items()
        }
        files = [
            {"bytes": image_file(rng, mode, size, file_format), "path": None} for _ in range(n)
        ]
        columns[DATASET_CONFIGS[name].image_column] = files
        data = Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def image_file(
    rng: np.random.Generator, mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "PNG"
) -> bytes:
    """Make an image file of smooth noise."""
    coarse = rng.integers(0, 256, (4, 4) if mode == "L" else (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(coarse).resize(size, PillowImage.Resampling.BICUBIC).save(
        file, format=form
    )
    return file.getvalue()


def column_value(feature: ClassLabel | Value | List, i: int) -> object:
    """Make the i-th value of a column that has no images; five of them for a column of lists."""
    if isinstance(feature, List):
        return [column_value(feature.feature, 5 * i + k) for k in range(5)]
    if isinstance(feature, ClassLabel):
        return i % len(feature.names)
    return {"int64": i, "bool": i % 2 == 0, "float64": i / 10, "string": f"row {i}"}[feature.dtype]
