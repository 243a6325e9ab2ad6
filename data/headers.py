"""Sizes of a split's images, and whether they have colour, from the headers of all files.

Nothing is decoded. Headers of files are cached by path, size and time of change, so that a large
folder is looked at once; a file that could not be read is looked at again.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from PIL import Image

from data import images
from data.parquet import ParquetSplit
from data.rows import Split, file_name
from runtime.errors import UserError, count
from runtime.files import atomic_file
from runtime.image_size import ImageSize

UNREADABLE, GREY, COLOUR = range(3)
ROWS_AT_ONCE = 512
Header = tuple[int, int, int]  # kind, height, width
KindsAndSides = tuple[UInt8[np.ndarray, "n"], Int32[np.ndarray, "n 2"]]
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
        of_all: read them all.
    """
    first = split.read_cells([int(split.rows[0])])[0]
    if isinstance(first, Mapping) and first["bytes"] is None and first["path"] is not None:
        paths = [file_name(cell) for cell in split.read_cells(split.rows.tolist())]
        kind, sides = _read_cached(paths)
        return Headers(kind, sides, len(split), paths)
    rows = split.rows if of_all else _spread(split.rows, MAX_ROWS_WITHOUT_FILES)
    if isinstance(split.data, ParquetSplit) and not of_all:
        groups = split.data.find_groups(rows)
        rows = rows[np.isin(groups, _spread(np.unique(groups), MAX_STREAMED_GROUPS))]

    def read(chunk: Int64[np.ndarray, "b"]) -> list[Header]:
        return [_read_header(cell) for cell in split.read_cells(chunk.tolist())]

    kind, sides = _in_threads(read, np.array_split(rows, len(rows) // ROWS_AT_ONCE + 1))
    return Headers(kind, sides, len(split))


def _spread(values: Int64[np.ndarray, "n"], n: int) -> Int64[np.ndarray, "m"]:
    """Choose at most n values, evenly spaced from the first to the last."""
    return values[np.linspace(0, len(values) - 1, min(len(values), n)).astype(int)]


def _read_header(cell: Mapping[str, Any] | UserError | None) -> Header:
    """Return the kind, the height and the width of an undecoded image."""
    if cell is None or isinstance(cell, UserError) or (cell["bytes"] is None and not cell["path"]):
        return UNREADABLE, 0, 0
    try:
        source = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        with Image.open(source) as image:
            kind = GREY if images.is_grey(image) else COLOUR
            width, height = image.size
            # Without EXIF among the facts of a PNG's header, Pillow would look behind its pixels.
            if "exif" in image.info and image.getexif().get(ORIENTATION) in TURNED:
                width, height = height, width
            return kind, height, width
    except Exception:  # whatever Pillow's parsers raise: decoding the image will name the problem
        return UNREADABLE, 0, 0


def _in_threads(read: Callable[[Any], list[Header]], chunks: Iterable[Any]) -> KindsAndSides:
    with ThreadPoolExecutor() as pool:
        headers = [header for part in pool.map(read, chunks) for header in part]
    facts = np.array(headers, np.int64).reshape(-1, 3)
    return facts[:, 0].astype(np.uint8), facts[:, 1:].astype(np.int32)


# --- the cache of a folder's headers --------------------------------------------------------------

ENTRY = np.dtype([("key", np.uint64), ("kind", np.uint8), ("sides", np.int32, 2)])


def _read_cached(paths: Sequence[str]) -> KindsAndSides:
    """Read the headers of files; those that are unchanged since the last time come from a cache."""
    cache = _cache_file(paths)
    entries = np.zeros(len(paths), ENTRY)
    entries["key"] = [_file_key(path) for path in paths]
    known = _load_cache(cache)
    places = np.minimum(np.searchsorted(known["key"], entries["key"]), len(known) - 1)
    is_known = known["key"][places] == entries["key"]
    entries[is_known] = known[places[is_known]]
    new = np.flatnonzero(~is_known)
    if len(new):

        def read(chunk: Int64[np.ndarray, "b"]) -> list[Header]:
            return [_read_header({"bytes": None, "path": paths[i]}) for i in chunk]

        chunks = np.array_split(new, len(new) // ROWS_AT_ONCE + 1)
        entries["kind"][new], entries["sides"][new] = _in_threads(read, chunks)
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(cache, sync=False) as file:
                found = entries[entries["kind"] != UNREADABLE]
                # Of other splits of the folder too; entries that are not known are zeros.
                both = np.concatenate([found, known[known["key"] != 0]])
                np.save(file, both[np.unique(both["key"], return_index=True)[1]])
    return entries["kind"], entries["sides"]


def _load_cache(cache: Path) -> np.ndarray:
    """Load the entries of an earlier start, sorted by key; one of no file if there are none."""
    try:
        known = np.load(cache)
    except (OSError, ValueError, EOFError):  # none yet, or damaged
        known = np.zeros(0, ENTRY)
    return known if len(known) and known.dtype == ENTRY else np.zeros(1, ENTRY)


def _file_key(path: str) -> int:
    """Hash path, size and time of change to 64 bits."""
    try:
        stat = os.stat(path)
        fact = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    except OSError:
        fact = path
    return int.from_bytes(hashlib.blake2b(fact.encode(), digest_size=8).digest(), "little")


def _cache_file(paths: Sequence[str]) -> Path:
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    name = hashlib.blake2b(root.encode(), digest_size=12).hexdigest()
    return cache / "dit-jax" / "headers" / f"{name}.npy"
