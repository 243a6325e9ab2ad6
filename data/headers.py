"""Sizes of a split's images, and whether they have colour, from the headers of all files.

Nothing is decoded. A header is read once, and again if its file changes: see `data.header_cache`.
An image that could not be read is looked at again.
"""

import io
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64
from PIL import Image
from tqdm import tqdm

from data import images
from data.header_cache import COLOUR, GREY, NO_KEY, UNREADABLE, HeaderCache, make_key, make_row_keys
from data.parquet import ParquetSplit
from data.rows import Split, file_name
from runtime.errors import UserError, count
from runtime.files import describe_state
from runtime.image_size import ImageSize

ROWS_AT_ONCE = 512
Header = tuple[int, int, int]  # kind, height, width
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap the sides
MAX_ROWS_WITHOUT_FILES = 20_000  # of images inside tables: a header is read with its whole image
MAX_STREAMED_GROUPS = (
    16  # of Parquet files read where they lie: a header is read with its row group
)


@dataclass(frozen=True)
class Headers:
    """Kind, height and width in pixels of each image that was looked at."""

    kind: UInt8[np.ndarray, "n"]
    sides: Int32[np.ndarray, "n 2"]
    n_rows: int  # of the split
    paths: Sequence[str] = ()  # where images are files

    @property
    def has_colour(self) -> bool:
        """True if any image has a mode with colours."""
        return bool((self.kind == COLOUR).any())

    @property
    def median_side(self) -> int:
        """The shorter side of the median image; 0 if no image can be read."""
        readable = self.sides[self.kind != UNREADABLE].min(1)
        return int(np.median(readable)) if len(readable) else 0

    def describe(self, size: ImageSize) -> str:
        """Describe kinds and sizes in one line, and count images smaller than `size`."""
        n_grey, n_colour, n_bad = ((self.kind == k).sum() for k in (GREY, COLOUR, UNREADABLE))
        n = len(self.kind)
        looked_at = f"{n} of {self.n_rows} images" if n < self.n_rows else count(n, "image")
        kinds = [f"{n_grey} grey" if n_grey else "", f"{n_colour} in colour" if n_colour else ""]
        if n_bad:
            first = next((p for p, k in zip(self.paths, self.kind) if k == UNREADABLE), "")
            kinds += [f"{n_bad} not readable{f' (first: {first})' if first else ''}"]
        sides = self.sides[self.kind != UNREADABLE]
        parts = [f"{looked_at}: {', '.join(kind for kind in kinds if kind)}"]
        if len(sides):
            shorter = sides.min(1)
            low, high = shorter.min(), shorter.max()
            extent = f"{low}–{high} px, median {self.median_side}" if low < high else f"{low} px"
            parts.append(f"shorter side {extent}")
            if n_small := (sides < np.array(size.sides)).any(1).sum():
                parts.append(f"{n_small} smaller than {size} px, which are enlarged")
        return "; ".join(parts)


def read_headers(split: Split, *, of_all: bool = False) -> Headers:
    """Read the headers of all images of a split.

    Images inside tables are read with their headers: of those at most `MAX_ROWS_WITHOUT_FILES`,
    spread over the split, and of a streamed split only those in `MAX_STREAMED_GROUPS` row groups.

    Args:
        of_all: read them all. A line says so before many are read.
    """
    title = f"'{split.name}'" if of_all else ""
    first = split.read_cells([int(split.rows[0])])[0]
    if _is_file(first):
        paths = [file_name(cell) for cell in split.read_cells(split.rows.tolist())]
        keys = np.array([make_key(describe_state(path)) for path in paths], np.uint64)

        def read_files(indices: Int64[np.ndarray, "b"]) -> list[Header]:
            return [_read_header({"bytes": None, "path": paths[i]}) for i in indices]

        return _read_new(split, keys, read_files, title, paths)
    rows = split.rows if of_all else _choose_rows(split)
    keys = make_row_keys(split.data.file_states())[rows]

    def read_cells(indices: Int64[np.ndarray, "b"]) -> list[Header]:
        cells = split.read_cells(rows[indices].tolist())
        # A file that the table names may change while the table does not.
        keys[indices[[_is_file(cell) for cell in cells]]] = NO_KEY
        return [_read_header(cell) for cell in cells]

    return _read_new(split, keys, read_cells, title)


def _is_file(cell: Mapping[str, Any] | UserError | None) -> bool:
    """Return whether an undecoded image is a file of its own."""
    return isinstance(cell, Mapping) and cell["bytes"] is None and cell["path"] is not None


def _choose_rows(split: Split) -> Int64[np.ndarray, "m"]:
    rows = _spread(split.rows, MAX_ROWS_WITHOUT_FILES)
    if isinstance(split.data, ParquetSplit):
        groups = split.data.find_groups(rows)
        rows = rows[np.isin(groups, _spread(np.unique(groups), MAX_STREAMED_GROUPS))]
    return rows


def _spread(values: Int64[np.ndarray, "n"], n: int) -> Int64[np.ndarray, "m"]:
    """Choose at most n values, evenly spaced from the first to the last."""
    return values[np.linspace(0, len(values) - 1, min(len(values), n)).astype(int)]


def _read_new(
    split: Split,
    keys: UInt64[np.ndarray, "n"],
    read: Callable[[Int64[np.ndarray, "b"]], list[Header]],
    title: str,
    paths: Sequence[str] = (),
) -> Headers:
    """Read the headers of images in threads, except those that are cached.

    Args:
        keys: of the images, in the cache. `read` may take away those of images that it reads.
        read: reads the headers of the images with these numbers.
        title: of the images in a line before many are read, and of a progress bar; "" for neither.
    """
    cache = HeaderCache(split.config.name)
    headers = cache.find(keys)
    new = np.flatnonzero(headers["kind"] == UNREADABLE)
    if title and len(new) > ROWS_AT_ONCE:
        when = "as at each start: nothing tells when they change"
        if keys[new].any():
            when = f"once: they are cached in {cache.path}"
            if not cache.can_save():
                when = f"as at each start: {cache.path.parent} cannot be written"
        print(f"reading the sizes of {len(new)} images of {title}, {when}", file=sys.stderr)
    try:
        with closing(_in_threads(read, new, title)) as parts:
            for part, facts in parts:
                headers["key"][part] = keys[part]
                headers["kind"][part], headers["sides"][part] = facts[:, 0], facts[:, 1:]
                cache.add(headers[part])
    finally:
        cache.save()
    return Headers(headers["kind"], headers["sides"], len(split), paths)


def _in_threads(
    read: Callable[[Int64[np.ndarray, "b"]], list[Header]],
    indices: Int64[np.ndarray, "n"],
    title: str,
) -> Generator[tuple[Int64[np.ndarray, "b"], Int64[np.ndarray, "b 3"]]]:
    """Yield indices, in parts, with the headers of their images."""
    parts = [indices[i : i + ROWS_AT_ONCE] for i in range(0, len(indices), ROWS_AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        try:
            bar = tqdm(
                pool.map(read, parts),
                f"sizes of {title}",
                len(parts),
                leave=False,
                delay=2,
                disable=None if title else True,  # None: tqdm asks if this is a terminal
                unit=" images",
                unit_scale=ROWS_AT_ONCE,
            )
            for part, found in zip(parts, bar):
                yield part, np.array(found, np.int64).reshape(-1, 3)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else Ctrl-C waits for all images
            raise


def _read_header(cell: Mapping[str, Any] | UserError | None) -> Header:
    """Return the kind, the height and the width of an undecoded image."""
    if cell is None or isinstance(cell, UserError) or (cell["bytes"] is None and not cell["path"]):
        return UNREADABLE, 0, 0
    try:
        source = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        with Image.open(source) as image:
            kind = GREY if images.is_grey(image) else COLOUR
            width, height = image.size
            if _is_turned(image):
                width, height = height, width
            return kind, height, width
    except Exception:  # whatever Pillow's parsers raise: decoding the image will name the problem
        return UNREADABLE, 0, 0


def _is_turned(image: Image.Image) -> bool:
    """Return whether decoding swaps the sides of an opened image, by its EXIF or XMP."""
    if ORIENTATION in getattr(image, "tag_v2", ()):  # Pillow has turned the size of a TIFF already
        return False
    # The method of a PNG would look behind its pixels.
    return Image.Image.getexif(image).get(ORIENTATION) in TURNED
