"""Opening a dataset: its columns, classes and splits, found and checked before anything trains.

The result is a `Source`, whose splits decode their rows on demand. The order of rows is
`data.shuffle`'s, the making of batches `data.pipeline`'s.
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from data import columns, latents
from data.arrow import ArrowSplit
from data.buckets import Buckets
from data.headers import read_headers
from data.image_folder import split_name
from data.parquet import ParquetSplit
from data.rows import Source, Split, cell_error
from data.sources import open_splits
from datasets_config import DATASET_CONFIGS, Crop, DatasetConfig, LatentEncoding, find_dataset
from runtime.errors import UserError, count, some_of
from runtime.image_size import ImageSize, WrittenSize, canonical_size

EVAL_SPLITS = ("validation", "valid", "val", "test")  # names of evaluation splits, best first
MIN_SIZE = 8  # of images whose size nothing else decides
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
    image_size: WrittenSize | None = None,
    channels: int | None = None,
    crop: Crop | None = None,
    streaming: bool = False,
    latents_dir: Path | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    unlabelled: str = "stop",
    class_order: Sequence[str] = (),
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
        image_size: 256 pixels, or 256x192 (height x width); by default the dataset's.
        channels: 1 (grey) or 3 (RGB); by default the dataset's.
        crop: how images get the proportions of `image_size`; by default the dataset's.
        streaming: read Parquet files where they lie, a row group at a time, whatever their size.
        latents_dir: what `convert_imagenet.py` made of the dataset, to be read instead of images.
        train_split: by default the dataset's, or "train".
        eval_split: by default the dataset's, or the first of `EVAL_SPLITS` that there is; "none" to
            hold out training rows.
        unlabelled: "skip" to leave out rows that have no class; they are an error otherwise.
        class_order: the classes of the run to resume, whose ids they keep.

    Raises:
        UserError: the dataset cannot be opened or does not fit; the message says what to pass.
    """
    entry = _find_entry(name)
    image_size = None if image_size is None else canonical_size(image_size)
    if latents_dir:
        given = {"image_size": image_size, "channels": channels, "crop": crop}
        entry = _latents_entry(entry, latents_dir, data_dir, image_column, given)
        data_dir = latents_dir
    elif channels not in (None, 1, 3) or (
        image_size is not None and min(ImageSize.parse(image_size).sides) < 2
    ):
        raise UserError("channels must be 1 or 3, and image_size at least 2")
    conditioning = columns.choose_conditioning(
        entry, conditioning, label_column, caption_column, templates
    )
    opened = open_splits(entry, _local_folder(entry, data_dir), streaming, label_column)
    (train_name, train_rows), (eval_name, eval_rows) = _choose_splits(
        entry, opened.splits, train_split, eval_split
    )
    config = columns.choose_columns(
        entry,
        opened.splits[train_name],
        conditioning=conditioning,
        image_column=image_column,
        label_column=label_column,
        caption_column=caption_column,
        templates=templates,
        class_order=class_order,
    )
    config = dataclasses.replace(
        config,
        image_size=image_size or entry.image_size,
        channels=channels or entry.channels,
        crop=crop or entry.crop,
    )
    notices = list(opened.notices)
    skip = unlabelled == "skip"
    train = _make_split(config, train_name, opened.splits[train_name], train_rows, skip)
    if not entry.model:
        train, notice = _measure_images(train)
        notices.append(notice)
    evaluation = _make_split(train.config, eval_name, opened.splits[eval_name], eval_rows, skip)
    notices += _describe_rows(entry, opened.splits, train, evaluation)
    buckets = None
    if entry.encoding and entry.encoding.buckets:
        buckets = {
            name: _latent_buckets(opened.splits[split.name], split.rows, entry.encoding)
            for name, split in (("train", train), ("eval", evaluation))
        }
    return Source(train.config, train, evaluation, tuple(notices), buckets=buckets)


def _latent_buckets(
    data: ArrowSplit | ParquetSplit, rows: Int64[np.ndarray, "n"], encoding: LatentEncoding
) -> Buckets:
    """Read which rows of latents are of which shape."""
    columns = [data.read_column(name).to_numpy()[rows] for name in latents.SIZE_COLUMNS]
    sizes = [encoding.at_bucket(ImageSize.parse(bucket)) for bucket in encoding.buckets]
    shapes = tuple(ImageSize(*size.shape[:2]) for size in sizes)
    ids = np.full(len(rows), -1)
    for i, shape in enumerate(shapes):
        ids[(columns[0] == shape.height) & (columns[1] == shape.width)] = i
    if (ids < 0).any():
        raise UserError(
            f"the latents have a row of {'×'.join(str(c[ids < 0][0]) for c in columns)}, which is "
            f"none of their shapes ({', '.join(encoding.buckets)}); make them again"
        )
    return Buckets(shapes, ids)


# --- facts about the dataset ----------------------------------------------------------------------


def _find_entry(name: str) -> DatasetConfig:
    """Return the table's entry, or one with zeros and empty names for the data to fill in."""
    kind, _, path = name.partition(":")
    if kind not in ("folder", "hf") or path.startswith("//"):
        if name not in DATASET_CONFIGS and (meant := _guess_name(name)):
            how = f"pass --dataset_name {shlex.quote(meant)}"
            raise UserError(f"unknown dataset '{name}'", how=how)
        return find_dataset(name)
    if not path:
        raise UserError(f"'{name}' names nothing", how="write folder:PATH or hf:owner/name")
    config_name = ""
    if kind == "hf":
        path, _, config_name = path.rstrip("/").partition(":")
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


def _guess_name(name: str) -> str | None:
    """Return what a path, an address or an id without its prefix should have been, if it is one."""
    if hub := re.fullmatch(
        r"(?:(?:https?://)?huggingface\.co|hf:/)/datasets/([^/]+/[^/]+).*", name
    ):
        return f"hf:{hub[1]}"
    if (name and Path(name).expanduser().exists()) or name.startswith((".", "/", "~")):
        return f"folder:{name}"
    return f"hf:{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _latents_entry(
    entry: DatasetConfig,
    folder: Path,
    data_dir: str | Path | None,
    image_column: str | None,
    given: Mapping[str, Any],
) -> DatasetConfig:
    """Replace what the entry says of images by what its latents are, and a model for their size.

    Args:
        given: values of flags of images that the latents must have; None for any.
    """
    encoding = latents.check_latents(folder).encoding
    if encoding.dataset_name != entry.name:
        raise UserError(
            f"the latents in '{folder}' are of {encoding.dataset_name}, not {entry.name}"
        )
    if data_dir or image_column:
        raise UserError("latents are read from their own folder: no --data_dir or --image_column")
    *sides, n_channels = encoding.shape
    size = ImageSize(*sides).written
    fixed = {"image_size": size, "channels": n_channels, "crop": encoding.crop}
    for flag, value in given.items():
        if value not in (None, fixed[flag]):
            raise UserError(
                f"--{flag} {value}: the latents in '{folder}' have {flag} {fixed[flag]}",
                how="leave it out, or convert again with another",
            )
    return dataclasses.replace(
        entry,
        **fixed,
        image_column=latents.MOMENTS_COLUMN,
        label_column="",
        caption_column=latents.CAPTION_COLUMN if encoding.captions else None,
        eval_split="",
        n_classes=0,
        label_names=(),
        model=entry.model if entry.latents_dir else _model_for(max(sides)),
        flip=encoding.mirrored,
        encoding=encoding,
    )


def _model_for(side: int) -> str:
    """Choose a preset for images or latents whose longer side has so many pixels."""
    return next(model for max_side, model in MODEL_BY_MAX_SIDE.items() if side <= max_side)


def _measure_images(train: Split) -> tuple[Split, str]:
    """Fill in size, channels and model of a dataset that is in no table: the median image decides
    the size, and colour is kept if any image has it. Returns a description of the images too.
    """
    config, headers = train.config, read_headers(train)
    if not headers.median_side and not config.image_size:
        sized = dataclasses.replace(config, image_size=MIN_SIZE)
        # Raises: it names the first image, and what is wrong.
        dataclasses.replace(train, config=sized).decode(np.arange(1))
    size = config.image_size or min(64, max(MIN_SIZE, headers.median_side // 8 * 8))
    channels = config.channels or (3 if headers.has_colour else 1)
    model = _model_for(max(ImageSize.parse(size).sides))
    config = dataclasses.replace(config, image_size=size, channels=channels, model=model)
    return dataclasses.replace(train, config=config), headers.describe(config.size)


def _describe_rows(
    entry: DatasetConfig,
    splits: Mapping[str, ArrowSplit | ParquetSplit],
    train: Split,
    evaluation: Split,
) -> list[str]:
    """List what may surprise: how classes are numbered, rows and splits that are left out.

    Raises:
        UserError: no row of the training split has a caption.
    """
    config, notices = train.config, list[str]()
    n = config.n_classes
    names = config.label_names
    if names != tuple(map(str, range(n))) and all(re.fullmatch(r"-?\d+", name) for name in names):
        notices.append(f"{n} classes: labels {names[0]} … {names[-1]} are numbered 0 … {n - 1}")
    features = splits[train.name].features
    unused = [names[i] for i in np.setdiff1d(np.arange(n), train.labels)]
    if unused and not entry.model:
        notices.append(f"classes without training images: {len(unused)} ({some_of(unused)})")
    others = [name for name in features if name != config.image_column]
    if others and config.conditioning == "none" and not entry.model and "label" not in features:
        notices.append(
            f"no classes: no column is called 'label' (columns: {some_of(others)}); --label_column "
            "NAME or --caption_column NAME takes one"
        )
    if str(features[config.image_column]).startswith("List("):
        notices.append(
            f"column '{config.image_column}' holds lists of images: the first of each is taken"
        )
    for split in (train, evaluation):
        n_empty = sum(captions == ("",) for captions in split.captions)
        if n_empty == len(split) and split is train:
            raise UserError(
                f"dataset '{config.name}', column '{config.caption_column}': all {n_empty} rows of "
                f"'{split.name}' are without a caption",
                how="pass --caption_column NAME, or --conditioning none to train without",
            )
        if n_empty:
            notices.append(
                f"{n_empty} of {count(len(split), 'row')} of '{split.name}' without a caption:"
                " the null caption"
            )
    used = len(train) + (len(evaluation) if evaluation.name == train.name else 0)
    if n_left_out := len(splits[train.name]) - used:
        notices.append(f"--unlabelled skip: {count(n_left_out, 'row')} of '{train.name}' left out")
    unused = [name for name in splits if name not in (train.name, evaluation.name)]
    if unused and not entry.model:
        notices.append(f"splits that are not used: {some_of(unused)}")
    return notices


# --- files ----------------------------------------------------------------------------------------


def _local_folder(entry: DatasetConfig, data_dir: str | Path | None) -> Path | None:
    """Return the dataset's folder, or zip file, on this machine; None for the hub."""
    if data_dir is not None or entry.name.startswith("folder:"):
        return Path(data_dir or entry.path).expanduser()
    embedded = Path(__file__).parents[1] / entry.path
    return embedded if entry.name in DATASET_CONFIGS and embedded.is_dir() else None


# --- splits ---------------------------------------------------------------------------------------


def _choose_splits(
    entry: DatasetConfig,
    splits: Mapping[str, ArrowSplit | ParquetSplit],
    train_split: str | None,
    eval_split: str | None,
) -> list[tuple[str, Int64[np.ndarray, "n"]]]:
    """Choose name and rows of the training and the evaluation split.

    Without a split to evaluate on, some rows of the training split are held out.
    """
    only = next(iter(splits)) if len(splits) == 1 else None
    train = _find_split(train_split, splits) or only or entry.train_split
    eval_split = _find_split(eval_split, splits)
    hold_out = eval_split is not None and eval_split.lower() == "none"
    if eval_split == train:
        raise UserError(
            f"--eval_split {eval_split} is the split to train on",
            how="pass --eval_split none to hold out rows of it",
        )
    for flag, name in (("train_split", train), ("eval_split", None if hold_out else eval_split)):
        if name and name not in splits:
            raise UserError(
                f"dataset '{entry.name}' has no split '{name}' (splits: {some_of(splits)})",
                how=f"pass --{flag} NAME",
            )
    candidates = EVAL_SPLITS if entry.eval_split == "" else (entry.eval_split,)
    candidates = (eval_split,) if eval_split else candidates
    names = [train, *(s for s in candidates if s in splits and s != train)][:2]
    if len(names) == 2:
        rows = [np.arange(len(splits[name])) for name in names]
    else:
        names = [train, train]
        rows = _hold_out_rows(splits[train], entry.eval_fraction)
    if not all(len(r) for r in rows):
        raise UserError(f"dataset '{entry.name}' has too few rows to train on and to evaluate with")
    return list(zip(names, rows))


def _find_split(flag: str | None, splits: Mapping[str, object]) -> str | None:
    """Return the split that a flag names, as in the data or by a usual name: "val", "Train"."""
    if not flag or flag in splits:
        return flag
    meant = split_name(flag)
    return meant if meant in splits and flag.isalpha() else flag


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
    config: DatasetConfig,
    name: str,
    data: ArrowSplit | ParquetSplit,
    rows: Int64[np.ndarray, "n"],
    skip_unlabelled: bool,
) -> Split:
    """Make a split with labels 0 … n_classes − 1; all 0, the null label, without classes."""
    used = (config.image_column, config.label_column, config.caption_column)
    needed = [column for column in used if column]
    hint = "" if name == config.train_split else "; --eval_split none holds out training rows"
    if not set(needed) <= set(data.features):
        raise UserError(
            f"dataset '{config.name}', split '{name}' needs the columns {' and '.join(needed)}"
            f" but has {some_of(data.features)}{hint}"
        )
    try:
        image_data = data.select_images(config.image_column)
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's
        raise UserError(
            f"dataset '{config.name}', split '{name}': column '{config.image_column}' holds no"
            f" images (columns: {some_of(data.features)})",
            how="pass --image_column NAME",
        ) from error
    labels = np.zeros(len(data), np.int32)
    if config.label_column is not None:
        try:
            labels = columns.read_label_ids(config, name, data)
        except UserError as error:
            raise UserError(f"{error}{hint}") from None
        if not skip_unlabelled:
            _require_labels(config, name, data, image_data, labels, hint)
        rows = rows[labels[rows] >= 0]
        if not len(rows):
            raise UserError(f"dataset '{config.name}', split '{name}': no row has a class{hint}")
    captions = columns.read_captions(config, data, rows, labels[rows])
    return Split(config, name, image_data, rows, labels[rows], captions)


def _require_labels(
    config: DatasetConfig,
    name: str,
    data: ArrowSplit | ParquetSplit,
    image_data: ArrowSplit | ParquetSplit,
    labels: Int32[np.ndarray, "n"],
    hint: str,
) -> None:
    """Raises UserError if a row has no class; names the first one, by its file if it has one."""
    without = np.flatnonzero(labels < 0)
    if not len(without):
        return
    column, row = str(config.label_column), int(without[0])
    cell = image_data.read_cells([row])[0] or {}
    file = f" ({cell['path']})" if cell.get("path") and not cell.get("bytes") else ""
    label = data.read_column(column)[row].as_py()
    raise cell_error(
        config,
        name,
        row,
        column,
        f"label {label} is none of the {config.n_classes} classes{file}: {len(without)} of "
        f"{len(labels)} rows have none; --unlabelled skip leaves them out{hint}",
    )
