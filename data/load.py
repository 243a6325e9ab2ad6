"""Opening a dataset: its columns, classes and splits, found and checked before anything trains.

A `Source` holds pictures as files and knows how to decode some rows of them; the order of the rows
and the making of batches are the pipeline's.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

import datasets_config
from data import images, latents
from data.parquet import ParquetSplit
from datasets_config import DATASET_CONFIGS, DatasetConfig
from runtime.errors import UserError

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    pass
from data.arrow import ArrowSplit
from data.columns import (
    find_caption_column,
    read_captions,
    read_class_names,
    choose_conditioning,
    find_image_column,
    find_label_column,
    read_label_ids,
)
from data.rows import Source, Split, cell_error, image_bytes

EVAL_SPLITS = ("validation", "valid", "val", "test")
MODEL_BY_MAX_SIDE = {16: "DiT-Ti/2", 32: "DiT-S/2", 64: "DiT-S/4", math.inf: "DiT-B/8"}


def open_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    conditioning: str | None = None,
    caption_column: str | None = None,
    templates: tuple[str, ...] = (),
    image_size: int | None = None,
    channels: int | None = None,
    streaming: bool = False,
    latents_dir: Path | None = None,
) -> Source:
    """Opens a dataset and checks every label; a `UserError` says what is wrong and what to pass.

    Args:
        name: a key of `DATASET_CONFIGS`, `folder:PATH` or `hf:owner/name[:configuration]`.
        data_dir: a local copy: a folder of Parquet files or pictures, or of `save_to_disk`.
        label_column: "" to train without classes.
        conditioning: class, text or none; by default what the arguments and the data suggest.
        templates: of captions made from class names, as "a photo of a {label}".
        streaming: read Parquet files where they lie, a row group at a time, whatever their size.
        latents_dir: what `convert_imagenet.py` made of the set, to be read in place of pictures.
    """
    entry = _entry(name)
    if latents_dir:
        entry = _of_latents(entry, latents_dir, data_dir, image_column, image_size, channels)
        data_dir = latents_dir
    elif channels not in (None, 1, 3) or (image_size is not None and image_size < 2):
        raise UserError("channels must be 1 or 3, and image_size at least 2")
    conditioning = choose_conditioning(entry, conditioning, label_column, caption_column, templates)
    splits = _load(entry, _folder(entry, data_dir), streaming)
    (train, train_rows), (held_out, held_out_rows) = _choose_splits(entry, splits)
    features = splits[train].features
    image_column = find_image_column(entry, features, image_column)
    templates = templates or (() if caption_column else entry.templates)
    if conditioning == "text" and not templates:
        caption_column = find_caption_column(entry, features, caption_column)
    if conditioning == "none" or caption_column:
        label_column = ""
    label_column = find_label_column(entry, features, label_column)
    if conditioning in ("class", "text") and not (label_column or caption_column):
        raise UserError(
            f"dataset '{entry.name}' has no classes to tell a model; pass --label_column"
        )
    names = read_class_names(entry, splits[train], label_column)
    config = dataclasses.replace(
        entry,
        image_column=image_column,
        label_column=label_column,
        caption_column=caption_column,
        templates=templates if conditioning == "text" else (),
        n_classes=len(names),
        label_names=names,
        image_size=image_size or entry.image_size,
        channels=channels or entry.channels,
    )
    split = _split(config, train, splits[train], train_rows)
    if not entry.model:
        config = _with_measured_pictures(split)
        split = dataclasses.replace(split, config=config)
    return Source(config, split, _split(config, held_out, splits[held_out], held_out_rows))


def _entry(name: str) -> DatasetConfig:
    """The table's entry, or one with zeros and empty names where the data will have to tell."""
    kind, _, path = name.partition(":")
    if kind not in ("folder", "hf"):
        return datasets_config.find_dataset(name)
    if not path:
        raise UserError(f"'{name}' names nothing; write folder:PATH or hf:owner/name")
    path, _, config_name = path.partition(":") if kind == "hf" else (path, "", "")
    return DatasetConfig(
        name=name,
        path=path,
        config_name=config_name or None,
        image_column="",
        label_column="",
        eval_split="",
        n_classes=0,
        channels=0,
        image_size=0,
        model="",
        n_steps=20_000,
        flip=False,  # there may be letters in the pictures
    )


def _of_latents(
    entry: DatasetConfig,
    folder: Path,
    data_dir: str | Path | None,
    image_column: str | None,
    image_size: int | None,
    channels: int | None,
) -> DatasetConfig:
    """The entry with what its latents are, and a model for their size."""
    encoding = latents.check_latents(folder).encoding
    if encoding.dataset_name != entry.name:
        raise UserError(
            f"the latents in '{folder}' are of {encoding.dataset_name}, not {entry.name}"
        )
    if data_dir or image_column:
        raise UserError("latents are read from their own folder: no --data_dir or --image_column")
    side, n_channels = encoding.shape[0], encoding.shape[-1]
    for flag, value, fixed in (
        ("image_size", image_size, side),
        ("channels", channels, n_channels),
    ):
        if value not in (None, fixed):
            raise UserError(f"--{flag} {value}: the latents in '{folder}' have {fixed}")
    if entry.latents_dir:
        model = entry.model
    else:
        model = next(model for most, model in MODEL_BY_MAX_SIDE.items() if side <= most)
    return dataclasses.replace(
        entry,
        image_column=latents.MOMENTS_COLUMN,
        label_column="",
        caption_column=latents.CAPTION_COLUMN if encoding.captions else None,
        eval_split="",
        n_classes=0,
        label_names=(),
        image_size=side,
        channels=n_channels,
        model=model,
        flip=encoding.mirrored,
        encoding=encoding,
    )


def _folder(entry: DatasetConfig, data_dir: str | Path | None) -> Path | None:
    """Where the set lies on this machine; None for the hub."""
    if data_dir is not None or entry.name.startswith("folder:"):
        return Path(data_dir or entry.path).expanduser()
    embedded = Path(__file__).parents[1] / entry.path
    return embedded if entry.name in DATASET_CONFIGS and embedded.is_dir() else None


def _load(
    entry: DatasetConfig, folder: Path | None, streaming: bool
) -> dict[str, ArrowSplit | ParquetSplit]:
    """All splits of the set."""
    if folder and not folder.is_dir():
        raise UserError(f"dataset '{entry.name}': there is no folder '{folder}'")
    try:
        splits = _parquet(entry, folder) if streaming else _stored(entry, folder)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub each raise their own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        where = f"folder '{folder}'" if folder else f"'{entry.path}' of the Hugging Face hub"
        hint = "" if folder else "; --data_dir FOLDER opens a local copy"
        raise UserError(f"dataset '{entry.name}': cannot open {where} ({reason}){hint}") from error
    return {str(name): data for name, data in splits.items()}


def _stored(entry: DatasetConfig, folder: Path | None) -> dict[Any, ArrowSplit]:
    import datasets

    if folder is None:
        splits = datasets.load_dataset(entry.path, entry.config_name)
    elif (folder / "dataset_dict.json").exists():
        splits = datasets.DatasetDict.load_from_disk(folder)
    elif (folder / "state.json").exists():
        splits = {"train": datasets.Dataset.load_from_disk(folder)}
    else:
        with _without_progress_bars():
            splits = datasets.load_dataset(str(folder))
    return {name: ArrowSplit(data) for name, data in splits.items()}


def _parquet(entry: DatasetConfig, folder: Path | None) -> dict[Any, ParquetSplit]:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    saved = folder and any((folder / f).exists() for f in ("dataset_dict.json", "state.json"))
    path, name = (str(folder), None) if folder else (entry.path, entry.config_name)
    builder = None if saved else datasets.load_dataset_builder(path, name)
    if not isinstance(builder, Parquet):
        kind = "a folder of save_to_disk" if builder is None else f"of the kind '{builder.name}'"
        raise UserError(
            f"dataset '{entry.name}': --streaming reads Parquet files, and this is {kind}; "
            "drop --streaming"
        )
    files = builder.config.data_files or {}
    return {name: ParquetSplit(files[name], builder.info.features) for name in files}


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    import datasets

    were_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()


def _choose_splits(
    entry: DatasetConfig, splits: Mapping[str, ArrowSplit | ParquetSplit]
) -> list[tuple[str, Int64[np.ndarray, "n"]]]:
    """Name and rows of the training and the evaluation split; the latter is carved if need be."""
    train = entry.train_split if len(splits) > 1 else next(iter(splits))
    if train not in splits:
        raise UserError(
            f"dataset '{entry.name}' has no split '{train}' (splits: {', '.join(splits)})"
        )
    candidates = EVAL_SPLITS if entry.eval_split == "" else (entry.eval_split,)
    chosen = [train, *(s for s in candidates if s in splits and s != train)][:2]
    rows = [np.arange(len(splits[s])) for s in chosen]
    if len(chosen) == 1:
        # Which rows are held back depends on nothing but their number: two runs can be compared.
        chosen, rows = [train, train], _carved(splits[train], entry.eval_fraction)
    if not all(len(r) for r in rows):
        raise UserError(
            f"dataset '{entry.name}' has too few rows to train on and to evaluate with"
        )
    return list(zip(chosen, rows))


def _carved(data: ArrowSplit | ParquetSplit, fraction: float) -> list[Int64[np.ndarray, "n"]]:
    """Rows to train on and rows held back, of what is streamed whole row groups if it has many."""
    unit = rows = np.arange(len(data))
    if isinstance(data, ParquetSplit) and len(data.sizes) * fraction > 2:
        unit = data.group(rows)
    order = np.random.default_rng(0).permutation(unit[-1] + 1)
    counts = np.cumsum(np.bincount(unit)[order])
    n_units = np.searchsorted(counts, max(1, round(fraction * len(rows)))) + 1
    held_back = np.isin(unit, order[:n_units])
    return [rows[~held_back], rows[held_back]]


def _split(
    config: DatasetConfig, name: str, data: ArrowSplit | ParquetSplit, rows: Int64[np.ndarray, "n"]
) -> Split:
    """The rows with labels 0 … n_classes − 1; all 0, the null id, when there are no classes."""
    wanted = (config.image_column, config.label_column, config.caption_column)
    columns = [column for column in wanted if column]
    if not set(columns) <= set(data.features):
        raise UserError(
            f"dataset '{config.name}', split '{name}' needs the columns {' and '.join(columns)}"
            f" but has {', '.join(data.features)}"
        )
    try:
        pictures = data.pictures(columns[0])
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's
        raise UserError(
            f"dataset '{config.name}', split '{name}': column '{columns[0]}' holds no pictures"
            f" (columns: {', '.join(data.features)}); pass --image_column"
        ) from error
    labels = np.zeros(len(data), np.int32)
    if config.label_column is not None:
        labels = read_label_ids(config, name, data.column(config.label_column))
    captions = read_captions(config, data, rows, labels[rows])
    return Split(config, name, pictures, rows, labels[rows], captions)


def _with_measured_pictures(split: Split) -> DatasetConfig:
    """Fills size, channels and model of a set that is in no table, from sixteen of its pictures."""
    config = split.config
    if not config.image_size:
        row = int(split.rows[0])
        try:
            side = min(images.open_upright(image_bytes(split.data.cells([row])[0])).size)
        except UserError as error:
            raise cell_error(config, split.name, row, config.image_column, str(error)) from error
        config = dataclasses.replace(config, image_size=min(64, max(8, side // 8 * 8)))
    if not config.channels:
        coloured = dataclasses.replace(split, config=dataclasses.replace(config, channels=3))
        some = coloured.images(np.linspace(0, len(split) - 1, 16).astype(int))
        config = dataclasses.replace(config, channels=1 if (some == some[..., :1]).all() else 3)
    fitting = next(model for side, model in MODEL_BY_MAX_SIDE.items() if config.image_size <= side)
    return dataclasses.replace(config, model=fitting)
