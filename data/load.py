"""Opening a dataset: its columns, classes and splits, found and checked before anything trains.

The result is a `Source`, whose splits decode their rows on demand. The order of rows is
`data.shuffle`'s, the making of batches `data.pipeline`'s.
"""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from data import columns, images, latents
from data.arrow import ArrowSplit
from data.parquet import ParquetSplit
from data.rows import Source, Split, cell_error, image_bytes
from datasets_config import DATASET_CONFIGS, DatasetConfig, find_dataset
from runtime.errors import UserError

EVAL_SPLITS = ("validation", "valid", "val", "test")  # names of evaluation splits, best first
MODEL_BY_MAX_SIDE = {16: "DiT-Ti/2", 32: "DiT-S/2", 64: "DiT-S/4", math.inf: "DiT-B/8"}
N_MEASURED_IMAGES = 16  # images that are decoded to see whether a dataset has colours


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
    """Open a dataset and check every label.

    Args:
        name: a key of `DATASET_CONFIGS`, `folder:PATH` or `hf:owner/name[:configuration]`.
        data_dir: a local copy: a folder of Parquet files or images, or of `save_to_disk`.
        image_column: by default the dataset's.
        label_column: by default the dataset's; "" to train without classes.
        conditioning: class, text or none; by default what the arguments and the data suggest.
        caption_column: by default the dataset's.
        templates: captions made from class names, as "a photo of a {label}".
        image_size: pixels to a side; by default the dataset's.
        channels: 1 (grey) or 3 (RGB); by default the dataset's.
        streaming: read Parquet files where they lie, a row group at a time, whatever their size.
        latents_dir: what `convert_imagenet.py` made of the dataset, to be read instead of images.

    Raises:
        UserError: the dataset cannot be opened, or its columns or labels do not fit. The message
            says what to pass.
    """
    entry = _find_entry(name)
    if latents_dir:
        entry = _latents_entry(entry, latents_dir, data_dir, image_column, image_size, channels)
        data_dir = latents_dir
    elif channels not in (None, 1, 3) or (image_size is not None and image_size < 2):
        raise UserError("channels must be 1 or 3, and image_size at least 2")
    conditioning = columns.choose_conditioning(
        entry, conditioning, label_column, caption_column, templates
    )
    splits = _open_splits(entry, _local_folder(entry, data_dir), streaming)
    (train_name, train_rows), (eval_name, eval_rows) = _choose_splits(entry, splits)
    config = columns.choose_columns(
        entry,
        splits[train_name],
        conditioning=conditioning,
        image_column=image_column,
        label_column=label_column,
        caption_column=caption_column,
        templates=templates,
    )
    config = dataclasses.replace(
        config, image_size=image_size or entry.image_size, channels=channels or entry.channels
    )
    train = _make_split(config, train_name, splits[train_name], train_rows)
    if not entry.model:
        config = _measure_images(train)
        train = dataclasses.replace(train, config=config)
    return Source(config, train, _make_split(config, eval_name, splits[eval_name], eval_rows))


# --- facts about the dataset ----------------------------------------------------------------------


def _find_entry(name: str) -> DatasetConfig:
    """Return the table's entry, or one with zeros and empty names for the data to fill in."""
    kind, _, path = name.partition(":")
    if kind not in ("folder", "hf"):
        return find_dataset(name)
    if not path:
        raise UserError(f"'{name}' names nothing; write folder:PATH or hf:owner/name")
    config_name = ""
    if kind == "hf":
        path, _, config_name = path.partition(":")
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
        flip=False,  # there may be letters in the images
    )


def _latents_entry(
    entry: DatasetConfig,
    folder: Path,
    data_dir: str | Path | None,
    image_column: str | None,
    image_size: int | None,
    channels: int | None,
) -> DatasetConfig:
    """Replace what the entry says of images by what its latents are, and a model for their size."""
    encoding = latents.check_latents(folder).encoding
    if encoding.dataset_name != entry.name:
        raise UserError(
            f"the latents in '{folder}' are of {encoding.dataset_name}, not {entry.name}"
        )
    if data_dir or image_column:
        raise UserError("latents are read from their own folder: no --data_dir or --image_column")
    side = encoding.shape[0]
    n_channels = encoding.shape[-1]
    for flag, value, fixed in (
        ("image_size", image_size, side),
        ("channels", channels, n_channels),
    ):
        if value not in (None, fixed):
            raise UserError(f"--{flag} {value}: the latents in '{folder}' have {fixed}")
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
        model=entry.model if entry.latents_dir else _model_for(side),
        flip=encoding.mirrored,
        encoding=encoding,
    )


def _model_for(side: int) -> str:
    """Choose a preset for images or latents of this many pixels to a side."""
    return next(model for max_side, model in MODEL_BY_MAX_SIDE.items() if side <= max_side)


def _measure_images(split: Split) -> DatasetConfig:
    """Fill in size, channels and model of a dataset that is in no table, from a few images."""
    config = split.config
    if not config.image_size:
        row = int(split.rows[0])
        try:
            cell = split.data.read_cells([row])[0]
            side = min(images.open_upright(image_bytes(cell)).size)
        except UserError as error:
            raise cell_error(config, split.name, row, config.image_column, str(error)) from error
        config = dataclasses.replace(config, image_size=min(64, max(8, side // 8 * 8)))
    if not config.channels:
        as_rgb = dataclasses.replace(split, config=dataclasses.replace(config, channels=3))
        rows = np.linspace(0, len(split) - 1, N_MEASURED_IMAGES).astype(int)
        measured = as_rgb.decode(rows)
        is_grey = (measured == measured[..., :1]).all()
        config = dataclasses.replace(config, channels=1 if is_grey else 3)
    return dataclasses.replace(config, model=_model_for(config.image_size))


# --- files ----------------------------------------------------------------------------------------


def _local_folder(entry: DatasetConfig, data_dir: str | Path | None) -> Path | None:
    """Return the dataset's folder on this machine; None for the hub."""
    if data_dir is not None or entry.name.startswith("folder:"):
        return Path(data_dir or entry.path).expanduser()
    embedded = Path(__file__).parents[1] / entry.path
    return embedded if entry.name in DATASET_CONFIGS and embedded.is_dir() else None


def _open_splits(
    entry: DatasetConfig, folder: Path | None, streaming: bool
) -> dict[str, ArrowSplit | ParquetSplit]:
    """Open all splits of the dataset."""
    if folder and not folder.is_dir():
        raise UserError(f"dataset '{entry.name}': there is no folder '{folder}'")
    try:
        splits = _open_parquet(entry, folder) if streaming else _open_arrow(entry, folder)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub each raise their own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        place = f"folder '{folder}'" if folder else f"'{entry.path}' of the Hugging Face hub"
        hint = "" if folder else "; --data_dir FOLDER opens a local copy"
        raise UserError(f"dataset '{entry.name}': cannot open {place} ({reason}){hint}") from error
    return {str(name): data for name, data in splits.items()}


def _open_arrow(entry: DatasetConfig, folder: Path | None) -> dict[Any, ArrowSplit]:
    """Open the dataset with `datasets`, which downloads and converts it where necessary."""
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


def _open_parquet(entry: DatasetConfig, folder: Path | None) -> dict[Any, ParquetSplit]:
    """Open the dataset's Parquet files where they lie."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    saved = folder and any((folder / f).exists() for f in ("dataset_dict.json", "state.json"))
    if saved:
        builder = None
    elif folder:
        builder = datasets.load_dataset_builder(str(folder), None)
    else:
        builder = datasets.load_dataset_builder(entry.path, entry.config_name)
    if not isinstance(builder, Parquet):
        kind = "a folder of save_to_disk" if builder is None else f"of the kind '{builder.name}'"
        raise UserError(
            f"dataset '{entry.name}': --streaming reads Parquet files, and this is {kind}; "
            "drop --streaming"
        )
    files = builder.config.data_files or {}
    return {name: ParquetSplit(files[name], builder.info.features) for name in files}


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


# --- splits ---------------------------------------------------------------------------------------


def _choose_splits(
    entry: DatasetConfig, splits: Mapping[str, ArrowSplit | ParquetSplit]
) -> list[tuple[str, Int64[np.ndarray, "n"]]]:
    """Choose name and rows of the training and the evaluation split.

    Without a split to evaluate on, some rows of the training split are held out.
    """
    train: str = entry.train_split if len(splits) > 1 else next(iter(splits))
    if train not in splits:
        raise UserError(
            f"dataset '{entry.name}' has no split '{train}' (splits: {', '.join(splits)})"
        )
    candidates = EVAL_SPLITS if entry.eval_split == "" else (entry.eval_split,)
    names = [train, *(s for s in candidates if s in splits and s != train)][:2]
    if len(names) == 2:
        rows = [np.arange(len(splits[name])) for name in names]
    else:
        names = [train, train]
        rows = _hold_out_rows(splits[train], entry.eval_fraction)
    if not all(len(r) for r in rows):
        raise UserError(f"dataset '{entry.name}' has too few rows to train on and to evaluate with")
    return list(zip(names, rows))


def _hold_out_rows(
    data: ArrowSplit | ParquetSplit, fraction: float
) -> list[Int64[np.ndarray, "n"]]:
    """Divide the rows into those to train on and those held out.

    The division depends on nothing but the number of rows (and of row groups), so that two runs
    can be compared. Of a streamed split with many row groups, whole ones are held out.
    """
    rows = np.arange(len(data))
    unit_of_row = rows
    if isinstance(data, ParquetSplit) and len(data.group_rows) * fraction > 2:
        unit_of_row = data.find_groups(rows)
    order = np.random.default_rng(0).permutation(unit_of_row[-1] + 1)
    rows_so_far = np.cumsum(np.bincount(unit_of_row)[order])
    n_units = np.searchsorted(rows_so_far, max(1, round(fraction * len(rows)))) + 1
    is_held_out = np.isin(unit_of_row, order[:n_units])
    return [rows[~is_held_out], rows[is_held_out]]


def _make_split(
    config: DatasetConfig, name: str, data: ArrowSplit | ParquetSplit, rows: Int64[np.ndarray, "n"]
) -> Split:
    """Make a split with labels 0 … n_classes − 1; all 0, the null label, without classes."""
    used = (config.image_column, config.label_column, config.caption_column)
    needed = [column for column in used if column]
    if not set(needed) <= set(data.features):
        raise UserError(
            f"dataset '{config.name}', split '{name}' needs the columns {' and '.join(needed)}"
            f" but has {', '.join(data.features)}"
        )
    try:
        image_data = data.select_images(config.image_column)
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's
        raise UserError(
            f"dataset '{config.name}', split '{name}': column '{config.image_column}' holds no"
            f" images (columns: {', '.join(data.features)}); pass --image_column"
        ) from error
    labels = np.zeros(len(data), np.int32)
    if config.label_column is not None:
        labels = columns.read_label_ids(config, name, data.read_column(config.label_column))
    captions = columns.read_captions(config, data, rows, labels[rows])
    return Split(config, name, image_data, rows, labels[rows], captions)
