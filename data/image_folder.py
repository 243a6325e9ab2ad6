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

from data import metadata_files
from data.columns import in_order
from data.image_files import Listing
from runtime.errors import UserError, count, some_of

if TYPE_CHECKING:  # at run time it is imported where it is used
    from datasets import Dataset

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
SPLIT_COLUMN = "split"


@dataclass(frozen=True)
class FolderFiles:
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
    """The splits of an image folder, and lines for a person on how it was read."""

    splits: "dict[str, Dataset]"
    notices: list[str]


def sort_files(listing: Listing) -> FolderFiles:
    """Sort the files that are no images into captions, tables and data."""
    stems = {_stem(path) for path in listing.images}
    stem_of = {path: _stem(path) for path in listing.images}
    captions: dict[str, str] = {}
    tables: list[str] = []
    data: list[str] = []
    others: list[str] = []
    for path in listing.others:
        suffix = os.path.splitext(path)[1].lower()
        stem = stem_of.get(_stem(path), _stem(path))  # of a.txt and a.jpg.txt
        if suffix in CAPTION_SUFFIXES and stem in stems and stem not in captions:
            captions[stem] = path
        elif suffix in TABLE_SUFFIXES:
            tables.append(path)
        elif suffix in DATA_SUFFIXES:
            data.append(path)
        else:
            others.append(path)
    return FolderFiles(
        listing.root, listing.images, captions, tables, data, others, listing.n_hidden
    )


def open_image_folder(files: FolderFiles, *, label_column: str | None) -> ImageFolder:
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

    taken = ["image", CAPTION_COLUMN] if files.captions else ["image"]
    table = metadata_files.read_tables(files.root, files.tables, files.images, taken)
    split_images = _splits(files)
    if len(split_images) == 1:
        split_images = _splits_of_table(table, files.images) or split_images
    folders = {split: _below(images) for split, images in split_images.items()}
    by_innermost = label_column == FOLDER_COLUMN
    classes = {
        split: {path: _class_of(parts, by_innermost) for path, parts in rows.items()}
        for split, rows in folders.items()
    }
    names = {name for rows in classes.values() for name in rows.values() if name is not None}
    notices = [_describe_files(files, classes, table.files)]
    if SPLIT_COLUMN in table.names() and len(split_images) == 1:
        notices.append(
            f"column '{SPLIT_COLUMN}' of a table divides nothing: not every image has a split "
            "there, or all have the same"
        )
    if len(names) > 1 and LABEL_COLUMN in table.names() and not by_innermost:
        notices.append(
            f"column '{LABEL_COLUMN}' of a table takes the place of the {len(names)} classes by "
            f"folder; --label_column {FOLDER_COLUMN} takes the folders"
        )
    splits: dict[str, Dataset] = {}
    for split, rows in classes.items():
        paths = list(rows)
        columns: dict[str, list[Any]] = {
            "image": [{"bytes": None, "path": str(files.root / path)} for path in paths]
        }
        features: dict[str, Any] = {"image": Image(decode=False)}
        if len(names) > 1:
            name = FOLDER_COLUMN if by_innermost else LABEL_COLUMN
            columns[name] = list(rows.values())
            features[name] = Value("string")
        if files.captions:
            columns[CAPTION_COLUMN] = [_read_caption(files, path) for path in paths]
            features[CAPTION_COLUMN] = Value("string")
        from_tables, kinds = table.columns(paths)
        splits[split] = Dataset.from_dict(
            columns | from_tables, features=Features(features | kinds)
        )
    if table.missing and splits:
        splits = _add_missing(splits, table, files.root)
    return ImageFolder(splits, notices)


# --- splits and classes ---------------------------------------------------------------------------


def _splits(files: FolderFiles) -> dict[str, list[str]]:
    """Divide images into splits by the outermost folder that has more than one entry."""
    parts = _below(files.images)
    tops = sorted({p[0] for p in parts.values() if p})
    split_of = {top: split_name(top) for top in tops}
    found = set(split_of.values()) - {None}
    if len(found) < 2 or ("train" not in found and None in split_of.values()):
        # A single folder of a split, or folders of which one happens to be called "test".
        return {"train": files.images}
    for split in found:
        same = [top for top in tops if split_of[top] == split]
        if len(same) > 1:
            raise UserError(
                f"folder '{files.root}': {some_of(same)} are all named after the split '{split}'",
                how="move them into one folder, or all but one elsewhere",
            )
    splits: dict[str, list[str]] = {}
    rest: list[str] = []
    for path, folders in parts.items():
        name = split_of[folders[0]] if folders else None
        splits.setdefault(name, []).append(path) if name else rest.append(path)
    if rest:
        named = some_of([top for top in tops if split_of[top]])
        raise UserError(
            f"folder '{files.root}': {len(rest)} images ({some_of(rest, 3)}) lie beside the "
            f"folders of splits ({named})",
            how="move them, or pass one of those folders as --dataset_name folder:PATH",
        )
    return splits


def _splits_of_table(table: metadata_files.Tables, images: list[str]) -> dict[str, list[str]]:
    """Divide images by the tables' column "split", if each has one of several splits there."""
    if SPLIT_COLUMN not in table.names():
        return {}
    words = table.columns(images)[0][SPLIT_COLUMN]
    names = [split_name(word) if isinstance(word, str) else None for word in words]
    splits: dict[str, list[str]] = {}
    for image, name in zip(images, names, strict=True):
        splits.setdefault(name or "", []).append(image)
    return splits if len(splits) > 1 and "train" in splits and "" not in splits else {}


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


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _read_caption(files: FolderFiles, image: str) -> str | None:
    """Read the text file beside an image, in one line; None without one."""
    file = files.captions.get(_stem(image))
    if file is None:
        return None
    try:
        return " ".join((files.root / file).read_text(encoding="utf-8-sig").split()) or None
    except (OSError, UnicodeDecodeError) as error:
        how = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        problem = f"the caption '{files.root / file}' cannot be read ({error})"
        raise UserError(problem, how=how) from error


def _describe_files(
    files: FolderFiles, classes: dict[str, dict[str, str | None]], tables: Sequence[str]
) -> str:
    """Count the images of each split and class, and list the files that are left out."""
    parts = [f"{count(len(rows), 'image')} to {split}" for split, rows in classes.items()]
    if len(classes) == 1:
        parts = [count(len(files.images), "image")]
    counts = Counter(name for rows in classes.values() for name in rows.values() if name)
    if len(counts) > 1:
        some = [f"{name} ({counts[name]})" for name in in_order(counts)]
        parts.append(f"{len(counts)} classes by folder: {some_of(some)}")
    if files.captions:
        parts.append(f"{count(len(files.captions), 'caption')} in text files")
    parts += [f"columns from {name}" for name in tables]
    others = files.others + [name for name in files.tables if name not in tables]
    others += files.data
    if others:
        parts.append(f"left out, as no images: {len(others)} ({some_of(others)})")
    if files.n_hidden:
        parts.append(f"{files.n_hidden} hidden")
    return f"folder '{files.root}': {'; '.join(parts)}"


def _add_missing(
    splits: "dict[str, Dataset]", table: metadata_files.Tables, root: Path
) -> "dict[str, Dataset]":
    """Add a row for each image that a table names and that is not there: an unreadable image."""
    from datasets import Dataset, concatenate_datasets

    first = "train" if "train" in splits else next(iter(splits))
    paths = list(table.missing)
    columns: dict[str, list[Any]] = {name: [None] * len(paths) for name in splits[first].features}
    columns |= {"image": [{"bytes": None, "path": str(root / path)} for path in paths]}
    columns |= table.columns(paths)[0]
    missing = Dataset.from_dict(columns, features=splits[first].features)
    return splits | {first: concatenate_datasets([splits[first], missing])}
