"""Files that have the name of an image and cannot be decoded, and small datasets with some."""

import io
from pathlib import Path

import numpy as np
from datasets import Image
from hub_copies import image_file
from PIL import Image as PillowImage
from pipeline_cases import write_parquet

from data.arrow import ArrowSplit
from data.rows import Split
from datasets_config import DATASET_CONFIGS, DatasetConfig

JPEG = image_file(np.random.default_rng(0), size=(32, 32), form="JPEG")
PNG = image_file(np.random.default_rng(0), size=(32, 32))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def huge_image() -> bytes:
    """Make a small file of 400 million black pixels, more than twice what Pillow opens."""
    file = io.BytesIO()
    PillowImage.new("1", (20_000, 20_000)).save(file, format="PNG")
    return file.getvalue()


# name: the content of the file, and how the problem is named
DAMAGE = {
    "zero bytes": (b"", "the file is empty"),
    "a sparse file": (b"\0" * 300, "nothing but zeros"),
    "a Git LFS pointer": (POINTER.encode(), "a Git LFS pointer: run `git lfs pull`"),
    "a git-annex pointer": (b"/annex/objects/SHA256E-s9--1.jpg\n", "a git-annex pointer"),
    "a web page": (b"\r\n<!DOCTYPE html>\n<html lang='en'>", "an HTML page: download the"),
    "a web page in capitals": (b"\xef\xbb\xbf<HTML><BODY>Not found", "an HTML page: download the"),
    "a comment before a page": (b"<!-- saved -->\n<html>", "an HTML page: download the"),
    "a drawing": (b"<?xml version='1.0'?>\n<svg width='3'>", "SVG: convert it to PNG"),
    "a bucket's answer": (b"<?xml version='1.0'?><Error><Code>", "text: '<?xml version="),
    "a server's answer": (b'{"message": "Not Found"}\n', """text: '{"message": "Not Found"}'"""),
    "words": ("größe unbekannt".encode(), "text: 'größe unbekannt'"),
    "a phone's photograph": (b"\0\0\0\x20ftypheic\0\0\0\0mif1heic", "HEIC, which Pillow does"),
    "a video": (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
    "a PDF": (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3", "a PDF"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], ""),
    "half a PNG": (PNG[: len(PNG) // 2], ""),
    "bytes by chance": (bytes(range(1, 200)), "cannot identify image file"),
}


class Cells(ArrowSplit):
    """Cells in memory in place of a dataset's."""

    def __init__(self, cells: list):
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def read_cells(self, rows):
        return [self.cells[row] for row in rows]


def split_of(cells: list, config: DatasetConfig = DATASET_CONFIGS["butterflies"]) -> Split:
    """Make a split of these cells."""
    n = len(cells)
    return Split(config, "train", Cells(cells), np.arange(n), np.zeros(n, np.int32), [])


def cells_with_damage(n: int, bad: dict[int, bytes | None]) -> list[dict | None]:
    """Make n cells of different images, with these contents at these rows."""
    rng = np.random.default_rng(0)
    cells: list[dict | None] = [{"bytes": image_file(rng), "path": None} for _ in range(n)]
    for row, content in bad.items():
        cells[row] = None if content is None else {"bytes": content, "path": None}
    return cells


def write_dataset(
    folder: Path, n: int, bad: dict[int, bytes | None], *, without: bool = False
) -> Path:
    """Write a Parquet dataset of n training rows with these bad ones, or without them, and 8 rows
    to evaluate with.
    """
    cells = cells_with_damage(n, bad)
    if without:
        cells = [cell for row, cell in enumerate(cells) if row not in bad]
    write_parquet(folder, split="test", features={"image": Image()}, image=cells_with_damage(8, {}))
    return write_parquet(folder, features={"image": Image()}, image=cells)


def write_folder(folder: Path, n: int = 20) -> Path:
    """Write an image folder of n files in two classes."""
    rng = np.random.default_rng(0)
    for i in range(n):
        file = folder / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_file(rng))
    return folder
