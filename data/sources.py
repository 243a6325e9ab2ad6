"""The splits of a dataset, from wherever it lies: the hub, or a folder as people have it.

Image folders and zip files of them are read here (`data.image_folder`); Parquet, Arrow, WebDataset
and the hub's own layouts are opened by `datasets`. Which splits, columns and rows are used is
`data.load`'s.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from data.arrow import ArrowSplit
from data.columns import MAX_EMPTY_CELLS, first_cell
from data.image_files import IMAGE_SUFFIXES, list_files
from data.image_folder import FolderFiles, open_image_folder, sort_files, split_name
from data.images import name_content
from data.parquet import ParquetSplit
from datasets_config import DatasetConfig
from runtime.errors import UserError, count, some_of
from runtime.files import describe_state, user_cache

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    from datasets import Dataset, DatasetBuilder

CARD = "README.md"
ARCHIVE = re.compile(r"\.(7z|rar|tgz|tar\.\w+)$")  # which nothing here unpacks
WEBDATASET_RECORD = "json"  # the column that `datasets` makes of a sample's .json file


@dataclass(frozen=True)
class OpenedSplits:
    """All splits of a dataset by name, and lines for a person on how they were read."""

    splits: dict[str, ArrowSplit | ParquetSplit]
    notices: list[str]


def open_splits(
    entry: DatasetConfig, folder: Path | None, streaming: bool, label_column: str | None
) -> OpenedSplits:
    """Open all splits of a dataset.

    Args:
        folder: where it lies on this machine, or its zip file; None for the hub.
        streaming: read Parquet files where they lie.
        label_column: the flag, or None: it may name the innermost folder of an image.

    Raises:
        UserError: the dataset cannot be opened.
    """
    config_name = entry.config_name
    if folder:
        folder, config_name = _find_folder(entry, folder)
    try:
        if streaming:
            with _hub_quietly():
                return OpenedSplits(_open_parquet(entry, folder, config_name), [])
        if folder and not _is_saved(folder):
            return _open_folder(entry, folder, config_name, label_column)
        with _hub_quietly():
            return _open_arrow(entry, folder)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub each raise their own kinds
        place = f"folder '{folder}'" if folder else f"'{entry.path}' of the Hugging Face hub"
        how = "" if folder else "--data_dir FOLDER opens a local copy"
        cause = _first_cause(error)
        if cause.startswith("Config name is missing"):
            place, how = f"{place} without a configuration", f"write {entry.name}:NAME"
            cause = str(error).partition("available configs: ")[2].partition("\n")[0]
        if "is not cached in" in cause:  # the text of `datasets` when it finds no network
            cause = "the hub is out of reach, and the dataset is not in the cache"
        problem = f"dataset '{entry.name}': cannot open {place} ({cause})"
        raise UserError(problem, how=how) from error


def _find_folder(entry: DatasetConfig, path: Path) -> tuple[Path, str | None]:
    """Return an existing folder, unzipped if necessary, and the configuration named after it."""
    config_name = None
    if not path.exists():
        before, _, config_name = str(path).rpartition(":")
        if not (before and Path(before).is_dir()):
            raise UserError(f"dataset '{entry.name}': there is no folder '{path}'")
        path = Path(before)
    if path.is_dir():
        return path.absolute(), config_name
    if path.suffix.lower() != ".zip":
        is_archive = ARCHIVE.search(path.name.lower())
        how = "unpack it, and pass that folder" if is_archive else "pass the folder that it lies in"
        raise UserError(f"dataset '{entry.name}': '{path}' is a file", how=how)
    return _unzip(path), config_name


def _unzip(path: Path) -> Path:
    """Unpack a zip file into the user's cache, once for each state of the file."""
    state = describe_state(path.resolve()).encode()
    name = hashlib.blake2b(state, digest_size=12).hexdigest()
    folder = user_cache() / "unzipped" / name / path.stem
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path) as archive, TemporaryDirectory(dir=folder.parent) as unfinished:
            unpacked = Path(unfinished, folder.name)
            unpacked.mkdir()
            archive.extractall(unpacked)
            # Fails if another process of the run was faster: it may be reading its files already.
            unpacked.rename(folder)
    except OSError as error:
        if not folder.exists():
            reason = error.strerror or error
            raise UserError(f"'{path}' cannot be unpacked ({reason})") from error
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise UserError(f"'{path}' cannot be unpacked ({error})") from error
    return folder


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _first_cause(error: BaseException) -> str:
    """Return the first line of the error that led to this one: the later ones only say "failed"."""
    while cause := error.__cause__ or error.__context__:
        if not str(cause).strip():
            break
        error = cause
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --- folders --------------------------------------------------------------------------------------


def _open_folder(
    entry: DatasetConfig, folder: Path, config_name: str | None, label_column: str | None
) -> OpenedSplits:
    """Open a folder by what lies in it."""
    import datasets

    files = sort_files(list_files(folder))
    if _has_configs(folder):  # its author says what belongs to which split
        try:
            return OpenedSplits(_load(folder, config_name), [])
        except Exception:
            _check_contents(files)
            raise
    if config_name:
        raise UserError(
            f"dataset '{entry.name}': the {CARD} of '{folder}' lists no configurations",
            how=f"pass folder:{folder}",
        )
    archives = [path for path in files.data if path.lower().endswith(".zip")]
    if len(archives) > 1:
        raise UserError(
            f"dataset '{entry.name}': folder '{folder}' holds {len(archives)} zip files "
            f"({some_of(archives, 3)})",
            how="unpack them, or pass one as --dataset_name folder:PATH",
        )
    if len(archives) == 1 and files.data == archives and not files.images:
        return _open_folder(entry, _unzip(folder / archives[0]), None, label_column)
    if files.images and not files.data:
        opened = open_image_folder(files, label_column=label_column)
        return OpenedSplits(
            {name: ArrowSplit(data) for name, data in opened.splits.items()}, opened.notices
        )
    if not files.images and not files.data and not files.tables:
        found = files.others or ([f"{files.n_hidden} hidden files"] if files.n_hidden else [])
        what = f"it holds {some_of(found)}" if found else "it is empty"
        raise UserError(
            f"dataset '{entry.name}': cannot open folder '{folder}': no images or Parquet files"
            f" ({what})",
            how="unpack the archive first" if any(map(ARCHIVE.search, found)) else "",
        )
    _require_plain_name(folder)
    parquet = _parquet_of_splits(files)
    try:
        if not parquet:
            _require_all_used(entry, files, datasets.load_dataset_builder(str(folder)))
        splits = _load(folder, None, parquet)
    except UserError:
        raise
    except Exception:
        _check_contents(files)
        raise
    splits = {name: _resolve_paths(data, folder) for name, data in splits.items()}
    if files.images and not any(_has_paths(data) for data in splits.values()):
        raise UserError(
            f"dataset '{entry.name}': folder '{folder}' holds {some_of(files.data, 2)} and "
            f"{len(files.images)} image files ({some_of(files.images, 2)})",
            how="pass the folder of one of them",
        )
    return OpenedSplits(splits, _describe_left_out(files, splits))


def _check_contents(files: FolderFiles) -> None:
    """Raise UserError for a data file that is a Git LFS pointer, a web page or without rows."""
    import pyarrow.parquet

    for path in (files.root / path for path in files.data):
        with path.open("rb") as file:
            content = name_content(file.read(1000))
        if not content and path.suffix.lower() == ".parquet":
            with contextlib.suppress(pyarrow.ArrowException, OSError):  # datasets says what it is
                n_rows = pyarrow.parquet.read_metadata(path).num_rows
                content = "" if n_rows else "an empty table, which can be removed"
        if content:
            raise UserError(f"'{path}' holds no rows: {content}")


def _require_all_used(entry: DatasetConfig, files: FolderFiles, builder: "DatasetBuilder") -> None:
    """Raise UserError if `datasets` leaves out data files, as those beside files of splits."""
    used = {
        os.path.normpath(file)
        for split_files in (builder.config.data_files or {}).values()
        for file in split_files
    }
    unused = [path for path in files.data if os.path.normpath(files.root / path) not in used]
    if unused:
        raise UserError(
            f"dataset '{entry.name}': {some_of(unused, 3)} in '{files.root}' would not be used, as "
            "other files are named after splits or of another kind",
            how="rename or move them (train-extra.parquet is of the split train)",
        )


def _has_configs(folder: Path) -> bool:
    """Return whether a dataset card says which files make up which split."""
    try:
        card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    return bool(header and re.search(r"^configs:", header[1], re.MULTILINE))


def _parquet_of_splits(files: FolderFiles) -> dict[str, list[str]] | None:
    """Divide Parquet files by folders or names such as Train and TEST; None to leave it to
    `datasets`, which knows the names in lower case.
    """
    splits: dict[str, list[str]] = {}
    names: list[str] = []
    for path in files.data:
        parts = [*Path(path).parts[:-1], Path(path).stem]
        part = next(filter(split_name, parts), None)
        if part is None or not path.lower().endswith(".parquet"):
            return None
        splits.setdefault(str(split_name(part)), []).append(str(files.root / path))
        names.append(part)
    has_capitals = any(name != name.lower() for name in [*names, *map(_suffix, files.data)])
    return splits if has_capitals else None


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1]


def _require_plain_name(folder: Path) -> None:
    """Raise UserError for a folder in whose name `datasets` sees a pattern."""
    if glob.escape(str(folder)) != str(folder):
        raise UserError(
            f"'{folder}': its data files cannot be read with * ? [ in the name: rename it"
        )


def _load(
    folder: Path, config_name: str | None, parquet: dict[str, list[str]] | None = None
) -> dict[str, ArrowSplit | ParquetSplit]:
    import datasets

    _require_plain_name(folder)
    with _quietly():
        if parquet:
            splits = datasets.load_dataset("parquet", data_files=parquet)
        else:
            splits = datasets.load_dataset(str(folder), config_name)
    return {str(name): ArrowSplit(_with_flat_columns(data)) for name, data in splits.items()}


def _with_flat_columns(data: "Dataset") -> "Dataset":
    """Make columns such as "json.caption" of a WebDataset's records, and images of records of bytes
    and path that are not declared as images.
    """
    from datasets import Image, concatenate_datasets

    for name, feature in data.features.items():
        if isinstance(feature, dict) and "bytes" in feature and feature.keys() <= {"bytes", "path"}:
            data = data.cast_column(name, Image(decode=False))
    if not isinstance(data.features.get(WEBDATASET_RECORD), dict):
        return data
    members = data.select_columns([WEBDATASET_RECORD]).flatten()
    return concatenate_datasets([data.remove_columns([WEBDATASET_RECORD]), members], axis=1)


def _resolve_paths(split: ArrowSplit | ParquetSplit, folder: Path) -> ArrowSplit | ParquetSplit:
    """Turn a column of paths of image files, relative to the folder, into one of images."""
    from datasets import Dataset, Features, Image, concatenate_datasets

    if not isinstance(split, ArrowSplit) or not len(split):
        return split
    image_columns = _image_columns(split)
    for name in image_columns or split.features:
        first = _first_path(split, name)
        if first is None or Path(first).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if not (folder / first).exists():
            is_url = re.match(r"https?://", first)
            raise UserError(
                f"folder '{folder}', column '{name}' names the image '{first}', which does not lie"
                " there",
                how="download the images first, as with img2dataset" if is_url else "",
            )
        paths = _paths(split, name) if image_columns else split.data[name]
        cells = [{"bytes": None, "path": str(folder / path)} if path else None for path in paths]
        features = Features({name: Image(decode=False)})
        images = Dataset.from_dict({name: cells}, features=features)
        others = split.data.remove_columns([name])
        parts = [images, others] if others.column_names else [images]
        return ArrowSplit(concatenate_datasets(parts, axis=1))
    return split


def _image_columns(split: ArrowSplit | ParquetSplit) -> list[str]:
    from datasets import Image

    return [name for name, feature in split.features.items() if isinstance(feature, Image)]


def _first_path(split: ArrowSplit, name: str) -> str | None:
    """Return the first path in a column of texts, or of images that are files of their own."""
    if name in _image_columns(split):
        cell = first_cell(split, name)
        return cell["path"] if cell and cell["bytes"] is None else None
    values = split.data[:MAX_EMPTY_CELLS][name]
    return next((value for value in values if value and isinstance(value, str)), None)


def _paths(split: ArrowSplit | ParquetSplit, name: str) -> list[str | None]:
    cells = split.select_images(name).read_cells(list(range(len(split))))
    return [cell["path"] if cell else None for cell in cells]


def _has_paths(split: ArrowSplit | ParquetSplit) -> bool:
    """Return whether the images of a split are files of their own."""
    names = _image_columns(split)
    cell = first_cell(split, names[0]) if names else None
    return cell is not None and cell["bytes"] is None


def _describe_left_out(
    files: FolderFiles, splits: dict[str, ArrowSplit | ParquetSplit]
) -> list[str]:
    """Count the images that no row names, and the files that hold no rows."""
    parts: list[str] = []
    if files.images:
        paths = [p for split in splits.values() for p in _paths(split, _image_columns(split)[0])]
        named = {os.path.normpath(path) for path in paths if path}
        unnamed = [path for path in files.images if str(files.root / path) not in named]
        if unnamed:
            parts.append(f"{count(len(unnamed), 'image')} that no row names ({some_of(unnamed)})")
    others = [path for path in files.others if path != CARD] + files.tables * bool(files.data)
    if others:
        parts.append(f"{count(len(others), 'other file')} ({some_of(others)})")
    return [f"folder '{files.root}': left out: {'; '.join(parts)}"] if parts else []


# --- datasets of the hub and of save_to_disk, and streaming ---------------------------------------


def _open_arrow(entry: DatasetConfig, folder: Path | None) -> OpenedSplits:
    """Open the dataset with `datasets`, which downloads and converts it where necessary."""
    import datasets

    empty: list[str] = []
    if folder is None:
        splits = datasets.load_dataset(entry.path, entry.config_name)
    elif (folder / "dataset_dict.json").exists():
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        empty = [name for name in names if not list((folder / name).glob("*.arrow"))]
        full = [name for name in names if name not in empty]
        splits = {name: datasets.Dataset.load_from_disk(folder / name) for name in full}
    else:
        splits = {"train": datasets.Dataset.load_from_disk(folder)}
    opened: dict[str, ArrowSplit | ParquetSplit] = {
        str(name): ArrowSplit(_with_flat_columns(data)) for name, data in splits.items()
    }
    return OpenedSplits(opened, [f"splits without rows: {some_of(empty)}"] * bool(empty))


def _open_parquet(
    entry: DatasetConfig, folder: Path | None, config_name: str | None
) -> dict[str, ArrowSplit | ParquetSplit]:
    """Open the dataset's Parquet files where they lie."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    if folder and _is_saved(folder):
        builder = None
    elif folder:
        _require_plain_name(folder)
        builder = datasets.load_dataset_builder(str(folder), config_name)
    else:
        builder = datasets.load_dataset_builder(entry.path, entry.config_name)
    if not isinstance(builder, Parquet):
        kind = "a folder of save_to_disk" if builder is None else f"of the kind '{builder.name}'"
        raise UserError(
            f"dataset '{entry.name}': --streaming reads Parquet files, and this is {kind}",
            how="drop --streaming",
        )
    if folder and not _has_configs(folder):
        _require_all_used(entry, sort_files(list_files(folder)), builder)
    files = builder.config.data_files or {}
    try:
        return {str(name): ParquetSplit(files[name], builder.info.features) for name in files}
    except UserError:
        if folder:
            _check_contents(sort_files(list_files(folder)))
        raise


@contextlib.contextmanager
def _hub_quietly() -> Generator[None]:
    """Keep `huggingface_hub` from printing each attempt: the failure of the last is an error."""
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


@contextlib.contextmanager
def _quietly() -> Generator[None]:
    """Keep `datasets` from printing: no bars, and no errors besides those that it raises."""
    import datasets

    were_enabled, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if were_enabled:
            datasets.enable_progress_bars()
