"""Opening a data set: its columns, classes and splits, found and checked before anything trains.

A `Source` holds pictures as files and knows how to decode some rows of them; the order of the rows
and the making of batches are the pipeline's.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Int32, Int64, UInt8

import datasets_config
import images
import latents
from datasets_config import DATASET_CONFIGS, DatasetConfig
from errors import UserError, unknown
from streams import Streamed

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    from datasets import Dataset, Features

EVAL_SPLITS = ("validation", "valid", "val", "test")
Pictures = UInt8[np.ndarray, "b h w c"] | Float16[np.ndarray, "b h w k"]
MODELS_BY_SIDE = {16: "DiT-Ti/2", 32: "DiT-S/2", 64: "DiT-S/4", math.inf: "DiT-B/8"}


class Stored:
    """All rows of a split as `datasets` keeps them on this machine. `Streamed` is the other way."""

    def __init__(self, data: "Dataset"):
        self.data, self.features = data, data.features

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> "pyarrow.ChunkedArray":
        """A whole column: of labels or captions."""
        return self.data.select_columns([name]).with_format("arrow")[:][name]

    def pictures(self, name: str) -> "Stored":
        """The same rows, of which `cells` are those of this column, of pictures or plain bytes.

        Raises:
            TypeError, ValueError, NotImplementedError: the column holds neither.
        """
        from datasets import Image, Value

        only = self.data.select_columns([name])
        if self.features[name] == Value("binary"):
            return Stored(only)
        return Stored(only.cast_column(name, Image(decode=False)))

    def cells(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The undecoded pictures of these rows."""
        (column,) = self.data[rows].values()
        return [{"bytes": c, "path": None} if isinstance(c, bytes) else c for c in column]


class Readable(NamedTuple):
    """Pictures of those rows of a split that have any, and of each other row of the data what is
    wrong with it.
    """

    rows: Int64[np.ndarray, "b"]
    images: UInt8[np.ndarray, "b h w c"]
    problems: dict[int, str]


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of one split, with undecoded pictures and checked labels or captions."""

    config: DatasetConfig
    name: str
    data: Stored | Streamed  # the pictures of all rows
    rows: Int64[np.ndarray, "n"]  # those that belong here
    labels: Int32[np.ndarray, "n"]
    captions: list[tuple[str, ...]]  # those of each picture; empty where there are none

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def picture(self) -> tuple[tuple[int, int, int], Any]:
        """Shape and type of what `images` has for a row."""
        c = self.config
        if c.encoding:
            return c.encoding.moments_shape, np.float16
        return (c.image_size, c.image_size, c.channels), np.uint8

    def images(self, indices: Int64[np.ndarray, "b"]) -> Pictures:
        """Decodes these rows of the split; a `UserError` names the data set, row and column. Of
        latents, they are moments.
        """
        rows = self.rows[indices].tolist()
        if self.config.encoding:
            cells = [cell["bytes"] for cell in self.data.cells(rows)]
            return latents.unpack(cells, self.config.encoding)
        size, channels = self.config.image_size, self.config.channels
        decoded = np.empty((len(indices), size, size, channels), np.uint8)
        for i, cell in enumerate(self.data.cells(rows)):
            try:
                decoded[i] = images.decode(_content(cell), channels=channels, size=size)
            except UserError as error:
                column = self.config.image_column
                raise _bad_cell(self.config, self.name, rows[i], column, str(error)) from error
        return decoded

    def readable(self, indices: Int64[np.ndarray, "b"]) -> Readable:
        """Decodes those of these rows that can be."""
        try:
            return Readable(indices, self.images(indices), {})
        except UserError:  # not said which others there are
            good, problems = [], {}
            for place, index in enumerate(indices):
                try:
                    self.images(indices[place : place + 1])
                    good.append(place)
                except UserError as error:
                    problems[int(self.rows[index])] = str(error)
            return Readable(indices[good], self.images(indices[good]), problems)


@dataclass(frozen=True, eq=False)
class Source:
    """An opened data set. `config` has no holes: its columns, classes and sizes are the data's."""

    config: DatasetConfig
    train: Split
    eval: Split

    def whole(self) -> dict[str, Split]:
        """The splits with all of their rows: what was held back of the training rows is put back
        in its place.
        """
        train, held_out = self.train, self.eval
        if train.name != held_out.name:
            return {"train": train, held_out.name: held_out}
        rows = np.concatenate([train.rows, held_out.rows])
        order = np.argsort(rows)
        labels = np.concatenate([train.labels, held_out.labels])[order]
        captions = train.captions + held_out.captions
        captions = [captions[i] for i in order] if captions else []
        both = dataclasses.replace(train, rows=rows[order], labels=labels, captions=captions)
        return {"train": both}


def open_source(
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
    """Opens a data set and checks every label; a `UserError` says what is wrong and what to pass.

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
    conditioning = _conditioning(entry, conditioning, label_column, caption_column, templates)
    splits = _load(entry, _folder(entry, data_dir), streaming)
    (train, train_rows), (held_out, held_out_rows) = _choose_splits(entry, splits)
    features = splits[train].features
    image_column = _image_column(entry, features, image_column)
    templates = templates or (() if caption_column else entry.templates)
    if conditioning == "text" and not templates:
        caption_column = _caption_column(entry, features, caption_column)
    if conditioning == "none" or caption_column:
        label_column = ""
    label_column = _label_column(entry, features, label_column)
    if conditioning in ("class", "text") and not (label_column or caption_column):
        raise UserError(
            f"data set '{entry.name}' has no classes to tell a model; pass --label_column"
        )
    names = _class_names(entry, splits[train], label_column)
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
        return datasets_config.find(name)
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
    encoding = latents.examine(folder).encoding
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
        model = next(model for most, model in MODELS_BY_SIDE.items() if side <= most)
    return dataclasses.replace(
        entry,
        image_column=latents.COLUMN,
        label_column="",
        caption_column=latents.CAPTION if encoding.captions else None,
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
    embedded = Path(__file__).parent / entry.path
    return embedded if entry.name in DATASET_CONFIGS and embedded.is_dir() else None


def _load(
    entry: DatasetConfig, folder: Path | None, streaming: bool
) -> dict[str, Stored | Streamed]:
    """All splits of the set."""
    if folder and not folder.is_dir():
        raise UserError(f"data set '{entry.name}': there is no folder '{folder}'")
    try:
        splits = _parquet(entry, folder) if streaming else _stored(entry, folder)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub each raise their own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        where = f"folder '{folder}'" if folder else f"'{entry.path}' of the Hugging Face hub"
        hint = "" if folder else "; --data_dir FOLDER opens a local copy"
        raise UserError(f"data set '{entry.name}': cannot open {where} ({reason}){hint}") from error
    return {str(name): data for name, data in splits.items()}


def _stored(entry: DatasetConfig, folder: Path | None) -> dict[Any, Stored]:
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
    return {name: Stored(data) for name, data in splits.items()}


def _parquet(entry: DatasetConfig, folder: Path | None) -> dict[Any, Streamed]:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    saved = folder and any((folder / f).exists() for f in ("dataset_dict.json", "state.json"))
    path, name = (str(folder), None) if folder else (entry.path, entry.config_name)
    builder = None if saved else datasets.load_dataset_builder(path, name)
    if not isinstance(builder, Parquet):
        kind = "a folder of save_to_disk" if builder is None else f"of the kind '{builder.name}'"
        raise UserError(
            f"data set '{entry.name}': --streaming reads Parquet files, and this is {kind}; "
            "drop --streaming"
        )
    files = builder.config.data_files or {}
    return {name: Streamed(files[name], builder.info.features) for name in files}


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
    entry: DatasetConfig, splits: Mapping[str, Stored | Streamed]
) -> list[tuple[str, Int64[np.ndarray, "n"]]]:
    """Name and rows of the training and the evaluation split; the latter is carved if need be."""
    train = entry.train_split if len(splits) > 1 else next(iter(splits))
    if train not in splits:
        raise UserError(
            f"data set '{entry.name}' has no split '{train}' (splits: {', '.join(splits)})"
        )
    candidates = EVAL_SPLITS if entry.eval_split == "" else (entry.eval_split,)
    chosen = [train, *(s for s in candidates if s in splits and s != train)][:2]
    rows = [np.arange(len(splits[s])) for s in chosen]
    if len(chosen) == 1:
        # Which rows are held back depends on nothing but their number: two runs can be compared.
        chosen, rows = [train, train], _carved(splits[train], entry.eval_fraction)
    if not all(len(r) for r in rows):
        raise UserError(
            f"data set '{entry.name}' has too few rows to train on and to evaluate with"
        )
    return list(zip(chosen, rows))


def _carved(data: Stored | Streamed, fraction: float) -> list[Int64[np.ndarray, "n"]]:
    """Rows to train on and rows held back, of what is streamed whole row groups if it has many."""
    unit = rows = np.arange(len(data))
    if isinstance(data, Streamed) and len(data.sizes) * fraction > 2:
        unit = data.group(rows)
    order = np.random.default_rng(0).permutation(unit[-1] + 1)
    counts = np.cumsum(np.bincount(unit)[order])
    n_units = np.searchsorted(counts, max(1, round(fraction * len(rows)))) + 1
    held_back = np.isin(unit, order[:n_units])
    return [rows[~held_back], rows[held_back]]


def _image_column(entry: DatasetConfig, features: "Features", wanted: str | None) -> str:
    from datasets import Image

    fitting = [name for name, feature in features.items() if isinstance(feature, Image)]
    return _column_name(entry, features, fitting, wanted=wanted, flag="image_column")


def _label_column(entry: DatasetConfig, features: "Features", wanted: str | None) -> str | None:
    from datasets import ClassLabel

    fitting = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not fitting and _label_kind(features.get("label")):
        fitting = ["label"]
    unlabelled = entry.label_column is None or (entry.label_column == "" and not fitting)
    if wanted == "" or (wanted is None and unlabelled):
        return None
    return _column_name(entry, features, fitting, wanted=wanted, flag="label_column")


def _conditioning(
    entry: DatasetConfig,
    wanted: str | None,
    label_column: str | None,
    caption_column: str | None,
    templates: tuple[str, ...],
) -> str | None:
    """What a model shall be told; None for classes where there are any."""
    if wanted not in (None, "class", "text", "none"):
        raise unknown("conditioning", wanted, ("class", "text", "none"))
    if (caption_column or templates) and wanted not in (None, "text"):
        raise UserError(f"captions are for --conditioning text, not {wanted}")
    if caption_column and (templates or label_column):
        other = "--caption" if templates else "--label_column"
        raise UserError(f"pass --caption_column or {other}, not both")
    if label_column and wanted == "none":
        raise UserError(f"--label_column {label_column} is of no use to --conditioning none")
    if wanted:
        return wanted
    listed = entry.conditioning == "text" and not label_column
    return "text" if caption_column or templates or listed else None


def _caption_column(entry: DatasetConfig, features: "Features", wanted: str | None) -> str:
    texts = re.compile(r"((large_)?list<\w+: )?(large_)?string>?")
    fitting = [field.name for field in features.arrow_schema if texts.fullmatch(str(field.type))]
    # Where several hold texts, such as file names, none is taken for want of the one that is meant.
    only = fitting if len(fitting) == 1 else []
    column = _column_name(entry, features, only, wanted=wanted, flag="caption_column")
    if column not in fitting:
        raise UserError(
            f"data set '{entry.name}', column '{column}': holds no texts; pass --caption_column"
        )
    return column


def _captions(
    config: DatasetConfig,
    data: Stored | Streamed,
    rows: Int64[np.ndarray, "n"],
    labels: Int32[np.ndarray, "n"],
) -> list[tuple[str, ...]]:
    """The captions of every row; an empty one where there is none, which is the null caption."""
    if config.caption_column:
        cells = data.column(config.caption_column).take(rows).to_pylist()
        texts = ((cell,) if isinstance(cell, str) else cell for cell in cells)
        return [tuple(text or "" for text in several or ("",)) for several in texts]
    if not config.templates:
        return []
    if not any("{label}" in template for template in config.templates):
        raise UserError(f"--caption {config.templates[0]!r}: {{label}} must stand in one of them")
    try:
        of_class = [
            tuple(template.format(label=name) for template in config.templates)
            for name in config.label_names
        ]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--caption {' '.join(map(repr, config.templates))}: only {{label}} may stand in braces"
        ) from error
    return [of_class[label] for label in labels]


def _column_name(
    entry: DatasetConfig, features: "Features", fitting: list[str], *, wanted: str | None, flag: str
) -> str:
    """The column asked for, else the entry's, else the one that fits (for an entry, the first)."""
    listed = getattr(entry, flag)
    choice = wanted if wanted is not None else listed
    if choice in features:
        return choice
    if wanted is None and fitting and (listed or len(fitting) == 1):
        return fitting[0]
    problem = f"has no column '{choice}'" if choice else "leaves open which column to take"
    raise UserError(
        f"data set '{entry.name}' {problem} (columns: {', '.join(features)}); pass --{flag}"
    )


def _label_kind(feature: Any) -> str | None:
    """How the column names its classes: "class", "bool", "int", "string", or None."""
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return "class"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return next((kind for kind in ("bool", "int", "string") if kind in dtype), None)


def _class_names(
    entry: DatasetConfig, data: Stored | Streamed, column: str | None
) -> tuple[str, ...]:
    """One name per class, in the order of the ids; () when there are no classes."""
    if column is None:
        return ()
    feature, is_listed = data.features[column], column == entry.label_column
    listed = entry.label_names if is_listed else ()
    kind = _label_kind(feature)
    if kind == "class":
        return tuple(feature.names)
    if kind == "bool":
        return listed or (f"not {column}", column)
    values = [v for v in data.column(column).unique().to_pylist() if v is not None]
    if kind == "string":
        return tuple(sorted(values))
    if kind == "int":
        n_classes = entry.n_classes if is_listed else max(values, default=0) + 1
        return listed or tuple(str(i) for i in range(n_classes))
    raise UserError(
        f"data set '{entry.name}', column '{column}': labels must be classes, whole numbers,"
        f" bools or strings, not {feature}; pass --label_column"
    )


def _split(
    config: DatasetConfig, name: str, data: Stored | Streamed, rows: Int64[np.ndarray, "n"]
) -> Split:
    """The rows with labels 0 … n_classes − 1; all 0, the null id, when there are no classes."""
    wanted = (config.image_column, config.label_column, config.caption_column)
    columns = [column for column in wanted if column]
    if not set(columns) <= set(data.features):
        raise UserError(
            f"data set '{config.name}', split '{name}' needs the columns {' and '.join(columns)}"
            f" but has {', '.join(data.features)}"
        )
    try:
        pictures = data.pictures(columns[0])
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's
        raise UserError(
            f"data set '{config.name}', split '{name}': column '{columns[0]}' holds no pictures"
            f" (columns: {', '.join(data.features)}); pass --image_column"
        ) from error
    labels = np.zeros(len(data), np.int32)
    if config.label_column is not None:
        labels = _label_ids(config, name, data.column(config.label_column))
    captions = _captions(config, data, rows, labels[rows])
    return Split(config, name, pictures, rows, labels[rows], captions)


def _label_ids(
    config: DatasetConfig, split: str, column: "pyarrow.ChunkedArray"
) -> Int32[np.ndarray, "n"]:
    """Class ids of a whole split; names become their place in `config.label_names`."""
    names = config.label_names
    if "string" in str(column.type):
        place = {name: i for i, name in enumerate(names)}
        ids = np.array([place.get(name, -1) for name in column.to_pylist()])
    else:
        ids = column.cast("int64").fill_null(-1).to_numpy()
    outside = (ids < 0) | (ids >= len(names))
    if outside.any():
        row = int(outside.argmax())
        label = column[row].as_py()
        allowed = f"{names[0]} … {names[-1]}" if isinstance(label, str) else f"0 … {len(names) - 1}"
        problem = f"label {label!r} is none of the {len(names)} classes {allowed}"
        raise _bad_cell(config, split, row, str(config.label_column), problem)
    return ids.astype(np.int32)


def _with_measured_pictures(split: Split) -> DatasetConfig:
    """Fills size, channels and model of a set that is in no table, from sixteen of its pictures."""
    config = split.config
    if not config.image_size:
        row = int(split.rows[0])
        try:
            side = min(images.upright(_content(split.data.cells([row])[0])).size)
        except UserError as error:
            raise _bad_cell(config, split.name, row, config.image_column, str(error)) from error
        config = dataclasses.replace(config, image_size=min(64, max(8, side // 8 * 8)))
    if not config.channels:
        coloured = dataclasses.replace(split, config=dataclasses.replace(config, channels=3))
        some = coloured.images(np.linspace(0, len(split) - 1, 16).astype(int))
        config = dataclasses.replace(config, channels=1 if (some == some[..., :1]).all() else 3)
    fitting = next(model for side, model in MODELS_BY_SIDE.items() if config.image_size <= side)
    return dataclasses.replace(config, model=fitting)


def _content(cell: Mapping[str, Any] | None) -> bytes:
    """The file of an undecoded picture, which an image folder keeps on disk."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UserError("the cell is empty")
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise UserError(f"the file cannot be read ({error})") from error


def _bad_cell(config: DatasetConfig, split: str, row: int, column: str, problem: str) -> UserError:
    return UserError(
        f"data set '{config.name}', split '{split}', row {row}, column '{column}': {problem}"
    )
