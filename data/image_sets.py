"""Images to evaluate: of a folder, an .npz file or a dataset; and the .npz that samples go to.

All images are uint8 and come in batches; a set is never in memory as a whole. Features and metrics
are `evaluation`'s.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from data import images
from data.image_files import Listing, list_files
from data.load import open_dataset
from datasets_config import Crop
from runtime.errors import UserError, unknown_name
from runtime.files import atomic_file
from runtime.image_size import ImageSize, WrittenSize

ImageBatch = UInt8[np.ndarray, "b h w c"]
IMAGES_ENTRY = "arr_0.npy"
LABELS_ENTRY = "arr_1.npy"


@dataclass(frozen=True)
class ImageSet:
    """A number of images to evaluate.

    Args:
        count: of images.
        batches: reads all images, so many at a time; may be called repeatedly.
        card: where they are from, for the record of an evaluation.
        shape: (height, width, channels) of each image.
        notice: how they differ and what was left out, for a person to read.
    """

    count: int
    batches: Callable[[int], Iterator[ImageBatch]] = field(repr=False)
    card: dict[str, Any]
    shape: tuple[int, int, int]
    notice: str = ""

    def describe(self) -> str:
        """Describe the images in a line."""
        *sides, channels = self.shape
        kind = "grey" if channels == 1 else "RGB"
        return f"{self.count} images of {format_size(sides)} pixels, {kind}{self.notice}"


def image_set_from_split(
    name: str,
    *,
    split: str,
    data_dir: Path | None = None,
    image_column: str | None = None,
    image_size: WrittenSize | None = None,
    crop: Crop | None = None,
) -> ImageSet:
    """Open all images of a dataset's split, with the size and the crop of training by default.

    Raises:
        UserError: there is no such dataset or split.
    """
    source = open_dataset(
        name,
        conditioning="none",
        data_dir=data_dir,
        image_column=image_column,
        image_size=image_size,
        crop=crop,
    )
    splits = source.full_splits()
    if split not in splits:
        raise unknown_name("split", split, splits)
    rows = splits[split]

    def batches(n: int) -> Iterator[ImageBatch]:
        for start in range(0, len(rows), n):
            yield rows.decode(np.arange(start, min(start + n, len(rows))))

    c = source.config
    card = {"dataset_name": name, "split": split, "image_size": c.image_size}
    notice = f" (split '{split}' of {name}, cropped and resized to that)"
    if c.crop == "letterbox":
        card["crop"] = c.crop
        notice = f" (split '{split}' of {name}, resized to that between black bars)"
    return ImageSet(len(rows), batches, card, (*c.size.sides, c.channels), notice)


# --- folders --------------------------------------------------------------------------------------


class ImageHeader(NamedTuple):
    """Facts about an image file that need no decoding.

    Args:
        sides: (height, width), before a camera's turn is undone.
        several: it holds more than one image, of which the first is used.
    """

    is_grey: bool
    sides: tuple[int, int]
    several: bool


def image_set_from_folder(
    folder: Path, *, image_size: WrittenSize | None = None, crop: Crop | None = None
) -> ImageSet:
    """Open all images in a folder and its subfolders, in the order of their names. They are RGB
    unless all of them are grey.

    Args:
        folder: of image files. Hidden files are left out, as in training.
        image_size: crop and resize them to it; otherwise all must have one size.
        crop: how they get its proportions; by default their middle.

    Raises:
        UserError: there are none, one cannot be read, or their sizes differ.
    """
    listing = _list_images(folder)
    files = [folder / path for path in listing.images]
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(_read_header, files))
    size = None if image_size is None else ImageSize.parse(image_size)
    if not size:
        _check_sizes(files, headers)
    channels = 1 if all(header.is_grey for header in headers) else 3
    if crop and not size:
        raise UserError(f"--crop {crop} needs --image_size: images of a folder keep their size")

    def read(file: Path) -> UInt8[np.ndarray, "h w c"]:
        return _read_image(file, size, channels, letterbox=crop == "letterbox")

    first = read(files[0])

    def batches(n: int) -> Iterator[ImageBatch]:
        for start in range(0, len(files), n):
            batch = []
            for file in files[start : start + n]:
                image = read(file)
                if image.shape != first.shape:
                    raise _different_sizes(file, image.shape[:2], files[0], first.shape[:2])
                batch.append(image)
            yield np.stack(batch)

    card = {"images": str(folder), "image_size": size and size.written}
    if crop == "letterbox":
        card["crop"] = crop
    notice = _describe_headers(headers) + _describe_left_out(listing)
    return ImageSet(len(files), batches, card, first.shape, notice)


def _list_images(folder: Path) -> Listing:
    """List the images of a folder, of which there is at least one."""
    if folder.is_file():
        raise UserError(f"'{folder}' is a file, not a folder of images; --npz takes an .npz")
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'")
    listing = list_files(folder)
    if not listing.images:
        raise UserError(f"'{folder}' holds no images{_describe_left_out(listing)}")
    return listing


def _read_header(file: Path) -> ImageHeader:
    try:
        with Image.open(file) as image:
            several = bool(getattr(image, "is_animated", False))
            return ImageHeader(images.is_grey(image), (image.height, image.width), several)
    except OSError as error:
        is_gone = file.is_symlink() and not file.exists()
        reason = "a link to a file that is gone" if is_gone else error.strerror
        raise UserError(f"{file}: {reason or _describe_content(file)}") from None
    except Exception as error:  # Pillow's parsers raise anything on a damaged file
        raise UserError(f"{file}: the image cannot be read ({error})") from None


def _describe_content(file: Path) -> str:
    with file.open("rb") as opened:
        content = images.name_content(opened.read(1000))
    return f"the image cannot be read ({content})" if content else "the image cannot be read"


def _check_sizes(files: Sequence[Path], headers: Sequence[ImageHeader]) -> None:
    """Raise UserError if sizes differ in more than their order, which a camera's turn changes."""
    first = headers[0].sides
    for file, header in zip(files, headers):
        if sorted(header.sides) != sorted(first):
            raise _different_sizes(file, header.sides, files[0], first)


def _different_sizes(
    file: Path, sides: Sequence[int], other: Path, other_sides: Sequence[int]
) -> UserError:
    return UserError(
        f"{file} has {format_size(sides)} pixels (height × width), and {other} "
        f"{format_size(other_sides)}; --image_size makes them equal"
    )


def _describe_headers(headers: Sequence[ImageHeader]) -> str:
    """Count grey images, if not all are of a kind, and files of several images."""
    n_grey = sum(header.is_grey for header in headers)
    n_several = sum(header.several for header in headers)
    mixed = f"{n_grey} grey, {len(headers) - n_grey} in colour, all as RGB"
    parts = [mixed] if 0 < n_grey < len(headers) else []
    if n_several:
        parts.append(f"the first image of each of {n_several} files that hold several")
    return f" ({'; '.join(parts)})" if parts else ""


def _describe_left_out(listing: Listing) -> str:
    n_hidden, others = listing.n_hidden, listing.others
    parts = [f"{n_hidden} hidden files or folders"] if n_hidden else []
    if others:
        more = f" and {len(others) - 1} more that are no images" if len(others) > 1 else ""
        parts.append(f"{shorten(others[0])}{more}")
    return f"; left out: {', '.join(parts)}" if parts else ""


def _read_image(
    file: Path, size: ImageSize | None, channels: int, *, letterbox: bool
) -> UInt8[np.ndarray, "h w c"]:
    try:
        image = images.open_upright(file.read_bytes())
        if size:
            return images.decode_image(image, channels=channels, size=size, letterbox=letterbox)
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        return array.reshape(*array.shape[:2], channels)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def format_size(sides: Sequence[int]) -> str:
    """Write (height, width) as text."""
    height, width = sides
    return f"{height} × {width}"


def shorten(text: str) -> str:
    """Cut the middle out of a text, to 60 letters."""
    return text if len(text) <= 60 else f"{text[:29]}…{text[-30:]}"


# --- .npz -----------------------------------------------------------------------------------------


def image_set_from_npz(path: Path) -> ImageSet:
    """Open the images in `arr_0` of a file in the layout of Dhariwal & Nichol's suite.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    if path.is_dir():
        raise UserError(f"'{path}' is a folder, not an .npz; --images takes a folder of images")
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

    return ImageSet(shape[0], batches, {"npz": str(path)}, shape[1:])


@contextmanager
def _open_npz_images(path: Path) -> Generator[tuple[IO[bytes], tuple[int, int, int, int]]]:
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
                if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
                    raise UserError(f"arr_0 is {dtype} {shape}, not uint8 (n, h, w, 3 or 1)")
                if not shape[0]:
                    raise UserError("it holds no images")
                yield (
                    (io.BytesIO(_in_c_order(file.read(), shape)) if fortran_order else file),
                    shape,
                )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        with path.open("rb") as file:
            reason = images.name_content(file.read(1000)) or error
        raise UserError(f"{path} is damaged or no .npz file: {reason}") from None


def _in_c_order(content: bytes, shape: tuple[int, int, int, int]) -> memoryview:
    """Reorder the bytes of an array in Fortran's order. Its images lie spread over all of it, so
    that it has to be in memory as a whole.
    """
    if len(content) < math.prod(shape):
        raise UserError("its images are incomplete")
    array = np.frombuffer(content, np.uint8).reshape(shape, order="F")
    return np.ascontiguousarray(array).data


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
