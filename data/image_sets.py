"""Images to evaluate: of a folder, an .npz file or a dataset; and the .npz that samples go to.

All images are uint8 and come in batches; a set is never in memory as a whole. Features and metrics
are `evaluation`'s.
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
IMAGES_ENTRY = "arr_0.npy"
LABELS_ENTRY = "arr_1.npy"


@dataclass(frozen=True)
class ImageSet:
    """A number of images to evaluate.

    Args:
        count: of images.
        batches: reads all images, so many at a time; may be called repeatedly.
        card: where they are from, for the record of an evaluation.
    """

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
    """Open all images of a dataset's split, cropped and resized as for training.

    Raises:
        UserError: there is no such dataset or split.
    """
    source = open_dataset(
        name,
        conditioning="none",
        data_dir=data_dir,
        image_column=image_column,
        image_size=image_size,
    )
    splits = source.full_splits()
    if split not in splits:
        raise unknown_name("split", split, splits)
    rows = splits[split]

    def batches(n: int) -> Iterator[ImageBatch]:
        for start in range(0, len(rows), n):
            yield rows.decode(np.arange(start, min(start + n, len(rows))))

    card = {"dataset_name": name, "split": split, "image_size": source.config.image_size}
    return ImageSet(len(rows), batches, card)


# --- folders --------------------------------------------------------------------------------------


def image_set_from_folder(folder: Path, *, image_size: int | None = None) -> ImageSet:
    """Open all images in a folder and its subfolders, in the order of their names.

    Args:
        folder: of image files.
        image_size: crop and resize them; otherwise all must have one size.

    Raises:
        UserError: there are none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'")
    files = sorted(
        f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
    )
    if not files:
        raise UserError(f"'{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
    first = _read_image(files[0], image_size)
    channels = first.shape[-1]

    def batches(n: int) -> Iterator[ImageBatch]:
        for start in range(0, len(files), n):
            batch = []
            for file in files[start : start + n]:
                image = _read_image(file, image_size, channels)
                if image.shape != first.shape:
                    raise UserError(
                        f"{file} has {_format_size(image)} pixels, and {files[0]} "
                        f"{_format_size(first)}; --image_size makes them equal"
                    )
                batch.append(image)
            yield np.stack(batch)

    return ImageSet(len(files), batches, {"images": str(folder), "image_size": image_size})


def _read_image(
    file: Path, image_size: int | None, channels: int | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """Read an image file. Unless `channels` is given, a grey image has one."""
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


def _format_size(image: UInt8[np.ndarray, "h w c"]) -> str:
    height, width, _ = image.shape
    return f"{width} × {height}"


# --- .npz -----------------------------------------------------------------------------------------


def image_set_from_npz(path: Path) -> ImageSet:
    """Open the images in `arr_0` of a file in the layout of Dhariwal & Nichol's suite.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    with _open_npz_images(path) as (_, shape):
        pass  # checked now, read later

    def batches(n: int) -> Iterator[ImageBatch]:
        image_bytes = int(np.prod(shape[1:]))
        with _open_npz_images(path) as (file, _):
            for start in range(0, shape[0], n):
                size = min(n, shape[0] - start)
                content = file.read(size * image_bytes)
                if len(content) < size * image_bytes:
                    raise UserError("its images are incomplete")
                yield np.frombuffer(content, np.uint8).reshape(size, *shape[1:])

    return ImageSet(shape[0], batches, {"npz": str(path)})


@contextmanager
def _open_npz_images(path: Path) -> Generator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open an .npz at the first byte of its images. Yields the file and the shape of the images.

    Errors of the block are those of the file as well.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if IMAGES_ENTRY not in archive.namelist():
                raise UserError(f"it holds {', '.join(archive.namelist())}, but no {IMAGES_ENTRY}")
            with archive.open(IMAGES_ENTRY) as file:
                major, _ = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if major == 1
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran_order, dtype = read_header(file)
                is_images = len(shape) == 4 and shape[-1] in (1, 3) and not fortran_order
                if dtype != np.uint8 or not is_images:
                    raise UserError(f"arr_0 is {dtype} {shape}, not uint8 (n, h, w, 3 or 1)")
                yield file, shape
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or no .npz file: {error}") from None


def copy_to_npz(
    batches: Iterable[ImageBatch], path: Path, labels: Int[np.ndarray, "n"]
) -> Generator[ImageBatch]:
    """Yield the batches, and write them to `path` on the way.

    The file has the layout of Dhariwal & Nichol's suite: images in `arr_0`, labels in `arr_1`. It
    takes its name when it is complete.
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
