"""A folder of image files as a table: a file is a row, or is left out and counted.

Splits and classes follow from the names of folders, captions and labels from text files and tables
that lie beside the images (see `data.metadata_files`). Nothing is decoded. `data.load` opens the
other kinds of folders.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data import images, metadata_files
from data.columns import in_order
from runtime.errors import UserError, some_of

if TYPE_CHECKING:  # at run time it is imported where it is used
    from datasets import Dataset

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
CAPTION_SUFFIXES = (".txt", ".caption")
DATA_SUFFIXES = (".parquet", ".arrow", ".tar", ".zip")
SPLIT_FOLDERS = {
    "train": re.compile(r"train(ing)?([-._ 0-9].*)?"),
    "validation": re.compile(r"(validation|valid|val|dev)([-._ 0-9].*)?"),
    "test": re.compile(r"(test(ing)?|eval(uation)?)([-._ 0-9].*)?"),
}
LABEL_COLUMN = "label"
FOLDER_COLUMN = "folder"  # classes by the innermost folder, if it is asked for
CAPTION_COLUMN = "text"


@dataclass(frozen=True)
class Listing:
    """The files of a tree by kind, as paths relative to `root`, sorted."""

    root: Path
    images: list[str]
    captions: dict[str, str]  # image path without suffix → caption file
    tables: list[str]
    data: list[str]  # Parquet, Arrow and archives, which are not opened as an image folder
    others: list[str]
    n_hidden: int


@dataclass(frozen=True)
class ImageFolder:
    """The splits of an image folder, and what a person should know of how it was read."""

    splits: "dict[str, Dataset]"
    notices: list[str]


def list_files(root: Path) -> Listing:
    """List a tree, following links. Hidden files and folders are only counted.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[str] = []
    texts: list[str] = []
    tables: list[str] = []
    data: list[str] = []
    others: list[str] = []
    n_hidden = 0

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read folder '{error.filename}': {error.strerror}")

    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        visible = [name for name in folders if not _is_hidden(name)]
        n_hidden += len(folders) - len(visible)
        folders[:] = sorted(visible)
        prefix = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in files:
            path, suffix = str(prefix / name), os.path.splitext(name)[1].lower()
            if _is_hidden(name):
                n_hidden += 1
            elif suffix in IMAGE_SUFFIXES:
                found.append(path)
            elif suffix in TABLE_SUFFIXES:
                tables.append(path)
            elif suffix in DATA_SUFFIXES:
                data.append(path)
            elif suffix in CAPTION_SUFFIXES:
                texts.append(path)
            else:
                (found if _is_image(root / path) else others).append(path)
    stems = {os.path.splitext(path)[0] for path in found}
    captions = {os.path.splitext(path)[0]: path for path in sorted(texts, reverse=True)}
    others += [path for path in texts if os.path.splitext(path)[0] not in stems]
    captions = {stem: path for stem, path in captions.items() if stem in stems}
    return Listing(
        root, sorted(found), captions, sorted(tables), sorted(data), sorted(others), n_hidden
    )


def open_image_folder(listing: Listing, *, label_column: str | None) -> ImageFolder:
    """Make a table of each split: image, label, caption, and columns of tables beside the images.

    The class of an image is the name of the folder below its split that it lies in, at any depth;
    with the label column "folder" it is the innermost folder. It is null for an image that lies
    beside the folders.

    Args:
        label_column: the flag, or None.

    Raises:
        UserError: splits are ambiguous, or a table does not fit the images.
    """
    from datasets import Dataset, Features, Image, Value

    folders = {split: _below(split_images) for split, split_images in _splits(listing).items()}
    by_innermost = label_column == FOLDER_COLUMN
    classes = {
        split: {path: _class_of(parts, by_innermost) for path, parts in rows.items()}
        for split, rows in folders.items()
    }
    names = {name for rows in classes.values() for name in rows.values() if name is not None}
    table = metadata_files.read_tables(listing.root, listing.tables, listing.images)
    notices = [_describe_files(listing, classes, table.files)]
    splits: dict[str, Dataset] = {}
    for split, rows in classes.items():
        paths = list(rows)
        columns: dict[str, list[Any]] = {
            "image": [{"bytes": None, "path": str(listing.root / path)} for path in paths]
        }
        features: dict[str, Any] = {"image": Image(decode=False)}
        if len(names) > 1:
            name = FOLDER_COLUMN if by_innermost else LABEL_COLUMN
            columns[name] = list(rows.values())
            features[name] = Value("string")
        if listing.captions:
            columns[CAPTION_COLUMN] = [_read_caption(listing, path) for path in paths]
            features[CAPTION_COLUMN] = Value("string")
        from_tables, kinds = table.columns(paths)
        splits[split] = Dataset.from_dict(
            columns | from_tables, features=Features(features | kinds)
        )
    if table.missing and splits:
        splits = _add_missing(splits, table, listing.root)
    return ImageFolder(splits, notices)


# --- splits and classes ---------------------------------------------------------------------------


def _splits(listing: Listing) -> dict[str, list[str]]:
    """Divide images into splits by the outermost folder that has more than one entry."""
    parts = _below(listing.images)
    tops = sorted({p[0] for p in parts.values() if p})
    split_of = {top: split_name(top) for top in tops}
    found = set(split_of.values()) - {None}
    if "train" not in found or len(found) < 2:
        # A single folder of a split, or folders of which one happens to be called "test".
        return {"train": listing.images}
    splits: dict[str, list[str]] = {}
    rest: list[str] = []
    for path, folders in parts.items():
        name = split_of[folders[0]] if folders else None
        splits.setdefault(name, []).append(path) if name else rest.append(path)
    if rest:
        named = some_of([top for top in tops if split_of[top]])
        raise UserError(
            f"folder '{listing.root}': {len(rest)} images ({some_of(rest, 3)}) lie beside the "
            f"folders of splits ({named}); move them, or pass one of those folders as "
            "--dataset_name folder:PATH"
        )
    return splits


def split_name(folder: str) -> str | None:
    """Return the split that a folder's name stands for, in any case."""
    lower = folder.lower()
    return next((name for name, words in SPLIT_FOLDERS.items() if words.fullmatch(lower)), None)


def _below(paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the folders of each path, without those that all paths lie in."""
    folders = {path: PurePosixPath(path).parts[:-1] for path in paths}
    first, last = min(folders.values(), default=()), max(folders.values(), default=())
    n_shared = next(
        (i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last))
    )
    return {path: parts[n_shared:] for path, parts in folders.items()}


def _class_of(folders: tuple[str, ...], by_innermost: bool) -> str | None:
    if not folders:
        return None
    return "/".join(folders) if by_innermost else folders[0]


# --- files ----------------------------------------------------------------------------------------


def _is_hidden(name: str) -> bool:
    """Return whether a file or folder is a system's own: a Mac's `._x`, thumbnails, `__MACOSX`."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return bool(images.SIGNATURE.match(file.read(16)))
    except OSError:  # not to be read: it has no image's suffix either
        return False


def _read_caption(listing: Listing, image: str) -> str | None:
    """Read the text file beside an image, in one line; None without one."""
    file = listing.captions.get(os.path.splitext(image)[0])
    if file is None:
        return None
    try:
        return " ".join((listing.root / file).read_text(encoding="utf-8-sig").split()) or None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the caption '{listing.root / file}' cannot be read ({error})") from error


def _describe_files(
    listing: Listing, classes: dict[str, dict[str, str | None]], tables: Sequence[str]
) -> str:
    """Tell how many images each split and class has, and which files are left out."""
    parts = [f"{len(rows)} images to {split}" for split, rows in classes.items()]
    if len(classes) == 1:
        parts = [f"{len(listing.images)} images"]
    counts = Counter(name for rows in classes.values() for name in rows.values() if name)
    if len(counts) > 1:
        some = [f"{name} ({counts[name]})" for name in in_order(counts)]
        parts.append(f"{len(counts)} classes by folder: {some_of(some)}")
    if listing.captions:
        parts.append(f"{len(listing.captions)} captions in text files")
    parts += [f"columns from {name}" for name in tables]
    others = listing.others + [name for name in listing.tables if name not in tables]
    others += listing.data
    if others:
        parts.append(f"left out, as no images: {len(others)} ({some_of(others)})")
    if listing.n_hidden:
        parts.append(f"{listing.n_hidden} hidden")
    return f"folder '{listing.root}': {'; '.join(parts)}"


def _add_missing(
    splits: "dict[str, Dataset]", table: metadata_files.Tables, root: Path
) -> "dict[str, Dataset]":
    """Add a row for each image that a table names and that is not there: an unreadable image."""
    from datasets import Dataset, concatenate_datasets

    first = next(iter(splits))
    paths = list(table.missing)
    columns: dict[str, list[Any]] = {name: [None] * len(paths) for name in splits[first].features}
    columns |= {"image": [{"bytes": None, "path": str(root / path)} for path in paths]}
    columns |= table.columns(paths)[0]
    missing = Dataset.from_dict(columns, features=splits[first].features)
    return splits | {first: concatenate_datasets([splits[first], missing])}
