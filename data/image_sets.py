"""Sets of pictures that are to be judged: in folders, .npz files and datasets; and the .npz that
drawn ones are written to. All are uint8, in batches, and never all in memory.
"""

import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int, UInt8

from data import images
from data.load import open_dataset
from runtime.errors import UserError, unknown_name
from runtime.files import atomic_file

ImageBatch = UInt8[np.ndarray, "b h w c"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGES_ENTRY, LABELS_ENTRY = "arr_0.npy", "arr_1.npy"


@dataclass(frozen=True)
class ImageSet:
    """So many pictures, and what they are; `batches(n)` reads them, n at a time."""

    count: int
    batches: Callable[[int], Iterator[ImageBatch]] = field(repr=False)
    card: dict[str, Any]


def image_set_from_split(
    name: str,
    *,
    split: str,
    data_dir: Path | None = None,
    image_column: str | None = None,
    image_size: int | None = None,
) -> ImageSet:
    """All pictures of a split, cropped and resized as for training.

    Raises:
        UserError: there is no such dataset or split.
    """
    how = {"data_dir": data_dir, "image_column": image_column, "image_size": image_size}
    source = open_dataset(name, conditioning="none", **how)
    splits = source.whole()
    if split not in splits:
        raise unknown_name("split", split, splits)
    rows, c = splits[split], source.config

    def batches(n: int) -> Iterator[ImageBatch]:
        for start in range(0, len(rows), n):
            yield rows.images(np.arange(start, min(start + n, len(rows))))

    card = {"dataset_name": name, "split": split, "image_size": c.image_size}
    return ImageSet(len(rows), batches, card)


def image_set_from_folder(folder: Path, *, image_size: int | None = None) -> ImageSet:
    """All pictures in a folder and its subfolders, in the order of their names.

    Args:
        image_size: crop and resize them; otherwise all must have one size.

    Raises:
        UserError: there are none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"'{folder}' holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    first = _picture(files[0], image_size)
    channels = first.shape[-1]

    def batches(n: int) -> Iterator[ImageBatch]:
        for start in range(0, len(files), n):
            batch = []
            for file in files[start : start + n]:
                batch.append(_picture(file, image_size, channels))
                if batch[-1].shape != first.shape:
                    sizes = f"{_size(batch[-1])} pixels, and {files[0]} {_size(first)}"
                    raise UserError(f"{file} has {sizes}; --image_size makes them equal")
            yield np.stack(batch)

    return ImageSet(len(files), batches, {"images": str(folder), "image_size": image_size})


def _picture(
    file: Path, image_size: int | None, channels: int | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """A file's picture; where channels are not said, grey ones have one."""
    try:
        image = images.open_upright(file.read_bytes())
        channels = channels or (1 if image.mode in ("1", "L") else 3)
        if image_size:
            return images.decode_image(image, channels=channels, size=image_size)
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        return array.reshape(*array.shape[:2], channels)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _size(picture: UInt8[np.ndarray, "h w c"]) -> str:
    height, width, _ = picture.shape
    return f"{width} × {height}"


# --- .npz -----------------------------------------------------------------------------------------


def image_set_from_npz(path: Path) -> ImageSet:
    """The pictures in `arr_0` of a file in the layout of Dhariwal & Nichol's suite.

    Raises:
        UserError: the file is not there, is damaged or holds something else.
    """
    with _opened(path) as (_, shape):
        pass

    def batches(n: int) -> Iterator[ImageBatch]:
        n_bytes = int(np.prod(shape[1:]))
        with _opened(path) as (file, _):
            for start in range(0, shape[0], n):
                size = min(n, shape[0] - start)
                content = file.read(size * n_bytes)
                if len(content) < size * n_bytes:
                    raise UserError("its pictures are not whole")
                yield np.frombuffer(content, np.uint8).reshape(size, *shape[1:])

    return ImageSet(shape[0], batches, {"npz": str(path)})


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The file of the pictures at their first byte, and their shape."""
    try:
        with zipfile.ZipFile(path) as archive:
            if IMAGES_ENTRY not in archive.namelist():
                raise UserError(f"it holds {', '.join(archive.namelist())}, but no {IMAGES_ENTRY}")
            with archive.open(IMAGES_ENTRY) as file:
                major, _ = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if major == 1
                    else np.lib.format.read_array_header_2_0
                )
                shape, by_columns, dtype = read(file)
                if dtype != np.uint8 or len(shape) != 4 or by_columns or shape[-1] not in (1, 3):
                    raise UserError(f"arr_0 is {dtype} {shape}, not uint8 (n, h, w, 3 or 1)")
                yield file, shape
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or no .npz file: {error}") from None


def copy_to_npz(batches: Iterable[ImageBatch], path: Path, labels: Int[np.ndarray, "n"]) -> Generator[ImageBatch]:
    """The same batches, which are also written to `path` in the layout of Dhariwal & Nichol's
    suite: pictures in `arr_0`, labels in `arr_1`. The file takes its name when it is whole.
    """
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(IMAGES_ENTRY, "w", force_zip64=True) as entry:
            for i, batch in enumerate(batches):
                if i == 0:
                    shape = (len(labels), *batch.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(entry, header)
                entry.write(np.ascontiguousarray(batch).data)
                yield batch
        with archive.open(LABELS_ENTRY, "w") as entry:
            np.lib.format.write_array(entry, labels.astype(np.int64), allow_pickle=False)
