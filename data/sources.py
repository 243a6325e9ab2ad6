"""The splits of a dataset, from wherever it lies: the hub, or a folder as people have it.

Image folders and zip files of them are read here (`data.image_folder`); Parquet, Arrow, WebDataset
and the hub's own layouts are opened by `datasets`. Which splits, columns and rows are used is
`data.load`'s.
"""

import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from data.arrow import ArrowSplit
from data.image_files import IMAGE_SUFFIXES, list_files
from data.image_folder import FolderFiles, open_image_folder, sort_files, split_name
from data.parquet import ParquetSplit
from datasets_config import DatasetConfig
from runtime.errors import UserError, some_of

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    from datasets import Dataset

CARD = "README.md"
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
            return OpenedSplits(_open_parquet(entry, folder, config_name), [])
        if folder and not _is_saved(folder):
            return _open_folder(entry, folder, config_name, label_column)
        return OpenedSplits(_open_arrow(entry, folder), [])
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub each raise their own kinds
        place = f"folder '{folder}'" if folder else f"'{entry.path}' of the Hugging Face hub"
        how = "" if folder else "--data_dir FOLDER opens a local copy"
        cause = _first_cause(error)
        if cause.startswith("Config name is missing"):
            place, how = f"{place} without a configuration", f"write {entry.name}:NAME"
            cause = str(error).partition("available configs: ")[2].partition("\n")[0]
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
        raise UserError(
            f"dataset '{entry.name}': '{path}' is a file", how="pass the folder that it lies in"
        )
    return _unzip(path), config_name


def _unzip(path: Path) -> Path:
    """Unpack a zip file into the user's cache, once for each state of the file."""
    stat = path.stat()
    fact = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dit-jax" / "unzipped"
    folder = cache / hashlib.blake2b(fact.encode(), digest_size=12).hexdigest() / path.stem
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
    files = sort_files(list_files(folder))
    if _has_configs(folder):  # its author says what belongs to which split
        return OpenedSplits(_load(folder, config_name), [])
    archives = [path for path in files.data if path.lower().endswith(".zip")]
    if len(archives) == 1 and files.data == archives and not files.images:
        return _open_folder(entry, _unzip(folder / archives[0]), None, label_column)
    if files.images and not files.data:
        opened = open_image_folder(files, label_column=label_column)
        return OpenedSplits(
            {name: ArrowSplit(data) for name, data in opened.splits.items()}, opened.notices
        )
    if not files.images and not files.data and not files.tables:
        found = files.others or [f"{files.n_hidden} hidden files"] * bool(files.n_hidden)
        what = f"it holds {some_of(found)}" if found else "it is empty"
        raise UserError(
            f"dataset '{entry.name}': cannot open folder '{folder}': no images or Parquet files"
            f" ({what})"
        )
    splits = _load(folder, config_name, _parquet_of_splits(files))
    splits = {name: _resolve_paths(data, folder) for name, data in splits.items()}
    if files.images and not any(_has_paths(data) for data in splits.values()):
        raise UserError(
            f"dataset '{entry.name}': folder '{folder}' holds {some_of(files.data, 2)} and "
            f"{len(files.images)} image files ({some_of(files.images, 2)})",
            how="pass the folder of one of them",
        )
    return OpenedSplits(splits, [])


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
    return splits if any(name != name.lower() for name in names) else None


def _load(
    folder: Path, config_name: str | None, parquet: dict[str, list[str]] | None = None
) -> dict[str, ArrowSplit | ParquetSplit]:
    import datasets

    with _without_progress_bars():
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
    from datasets import Image

    if not isinstance(split, ArrowSplit) or not len(split):
        return split
    if any(isinstance(feature, Image) for feature in split.features.values()):
        return split
    first = split.data[0]
    for name, value in first.items():
        if not isinstance(value, str) or Path(value).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if not (folder / value).exists():
            raise UserError(
                f"folder '{folder}', column '{name}' names the image '{value}', which does not lie"
                " there"
            )
        paths = [str(folder / path) if path else None for path in split.data[name]]
        cells = [{"bytes": None, "path": path} for path in paths]
        resolved = split.data.remove_columns([name]).add_column(name, cells)
        return ArrowSplit(resolved.cast_column(name, Image(decode=False)))
    return split


def _has_paths(split: ArrowSplit | ParquetSplit) -> bool:
    """Return whether the images of a split are files of their own."""
    from datasets import Image

    names = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    cells = split.select_images(names[0]).read_cells([0]) if names and len(split) else [None]
    return bool(cells[0]) and cells[0]["bytes"] is None


# --- datasets of the hub and of save_to_disk, and streaming ---------------------------------------


def _open_arrow(entry: DatasetConfig, folder: Path | None) -> dict[str, ArrowSplit | ParquetSplit]:
    """Open the dataset with `datasets`, which downloads and converts it where necessary."""
    import datasets

    if folder is None:
        splits = datasets.load_dataset(entry.path, entry.config_name)
    elif (folder / "dataset_dict.json").exists():
        splits = datasets.DatasetDict.load_from_disk(folder)
    else:
        splits = {"train": datasets.Dataset.load_from_disk(folder)}
    return {str(name): ArrowSplit(_with_flat_columns(data)) for name, data in splits.items()}


def _open_parquet(
    entry: DatasetConfig, folder: Path | None, config_name: str | None
) -> dict[str, ArrowSplit | ParquetSplit]:
    """Open the dataset's Parquet files where they lie."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    if folder and _is_saved(folder):
        builder = None
    elif folder:
        builder = datasets.load_dataset_builder(str(folder), config_name)
    else:
        builder = datasets.load_dataset_builder(entry.path, entry.config_name)
    if not isinstance(builder, Parquet):
        kind = "a folder of save_to_disk" if builder is None else f"of the kind '{builder.name}'"
        raise UserError(
            f"dataset '{entry.name}': --streaming reads Parquet files, and this is {kind}",
            how="drop --streaming",
        )
    files = builder.config.data_files or {}
    return {str(name): ParquetSplit(files[name], builder.info.features) for name in files}


@contextlib.contextmanager
def _without_progress_bars() -> Generator[None]:
    import datasets

    were_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()
