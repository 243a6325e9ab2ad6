"""Columns of a dataset: which ones hold images, labels and captions, and their values, checked.

Reading files is `data.arrow`'s and `data.parquet`'s; `data.load` decides which splits to open.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32, Int64

from data import images
from data.arrow import ArrowSplit
from data.parquet import ParquetSplit
from data.rows import cell_error
from datasets_config import DatasetConfig
from runtime.errors import UserError, some_of, unknown_name

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    from datasets import Features

CONDITIONINGS = ("class", "text", "none")
MAX_EMPTY_CELLS = 100  # at the start of a column, before it is given up
WEBDATASET_COLUMNS = ("__key__", "__url__")  # which `datasets` adds
MIN_ROWS_OF_CLASSES = 100  # fewer rows may each have a class of their own


# --- which columns --------------------------------------------------------------------------------


def choose_conditioning(
    config: DatasetConfig,
    conditioning: str | None,
    label_column: str | None,
    caption_column: str | None,
    templates: tuple[str, ...],
) -> str | None:
    """Choose what a model is conditioned on: "class", "text" or "none".

    None means classes if the data turn out to have any.

    Raises:
        UserError: the flags contradict each other.
    """
    if conditioning is not None and conditioning not in CONDITIONINGS:
        raise unknown_name("conditioning", conditioning, CONDITIONINGS)
    if (caption_column or templates) and conditioning not in (None, "text"):
        raise UserError(f"captions are for --conditioning text, not {conditioning}")
    if caption_column and (templates or label_column):
        other_flag = "--caption" if templates else "--label_column"
        raise UserError(f"pass --caption_column or {other_flag}, not both")
    if label_column and conditioning == "none":
        raise UserError(f"--label_column {label_column} is of no use to --conditioning none")
    if conditioning:
        return conditioning
    recommends_text = config.conditioning == "text" and not label_column
    return "text" if caption_column or templates or recommends_text else None


def choose_columns(
    entry: DatasetConfig,
    data: ArrowSplit | ParquetSplit,
    *,
    conditioning: str | None,
    image_column: str | None,
    label_column: str | None,
    caption_column: str | None,
    templates: tuple[str, ...],
    class_order: Sequence[str] = (),
) -> DatasetConfig:
    """Fill in the columns, templates and classes of a dataset from the flags and its training data.

    Args:
        class_order: the classes of the run to resume, whose ids they keep.

    Raises:
        UserError: a column is missing, is of the wrong type, or has to be named.
    """
    features = data.features
    image_column = find_image_column(entry, data, image_column)
    templates = templates or (() if caption_column else entry.templates)
    if conditioning == "text" and not templates:
        caption_column = find_caption_column(entry, features, caption_column)
    if conditioning == "none" or caption_column:
        label_column = ""
    label_column = find_label_column(entry, features, label_column)
    if conditioning in ("class", "text") and not (label_column or caption_column):
        before, how = "", "pass --label_column NAME"
        if class_order:
            before, how = f"; the run has {some_of(class_order)}", "put them back"
        raise UserError(
            f"dataset '{entry.name}' has no classes to condition a model on{before}", how=how
        )
    class_names = read_class_names(entry, data, label_column, class_order)
    if class_order and sorted(class_order) == sorted(class_names):
        class_names = tuple(class_order)
    return dataclasses.replace(
        entry,
        image_column=image_column,
        label_column=label_column,
        caption_column=caption_column,
        templates=templates if conditioning == "text" else (),
        n_classes=len(class_names),
        label_names=class_names,
    )


def find_image_column(
    config: DatasetConfig, data: ArrowSplit | ParquetSplit, flag: str | None
) -> str:
    """Find the column of images. `flag` is the value of --image_column.

    Without features of Hugging Face's, images are bytes, records of bytes and path, or paths.
    """
    from datasets import Image, List

    features = data.features
    fitting = [name for name, feature in features.items() if isinstance(feature, Image)]
    fitting = fitting or [
        name
        for name, feature in features.items()
        if isinstance(feature, List) and isinstance(feature.feature, Image)
    ]
    fitting = fitting or [
        field.name for field in features.arrow_schema if _holds_images(data, field)
    ]
    if not fitting and flag is None and config.image_column not in features:
        raise UserError(
            f"dataset '{config.name}' has no column of images (columns: {some_of(features)})",
            how="images are files, bytes of files, or paths of files in the folder",
        )
    return _choose_column(
        features,
        fitting,
        name="image_column",
        flag=flag,
        recommended=config.image_column,
        dataset=config.name,
    )


def _holds_images(data: ArrowSplit | ParquetSplit, field: "pyarrow.Field") -> bool:
    """Return whether the cells of a column are image files, or records of one, by the first."""
    if not re.match(r"((large_)?list<\w+: )?((large_)?binary|struct<.*bytes: )", str(field.type)):
        return False
    first = first_cell(data, field.name)
    raw: bytes | None = first["bytes"] if first else None
    return raw is not None and images.SIGNATURE.match(raw) is not None


def first_cell(data: ArrowSplit | ParquetSplit, column: str) -> dict[str, Any] | None:
    """Return the first undecoded image of a column that is not empty; None if the first
    `MAX_EMPTY_CELLS` are.
    """
    images_of_column = data.select_images(column)
    for row in range(min(len(data), MAX_EMPTY_CELLS)):
        cell = images_of_column.read_cells([row])[0]
        if cell and (cell["bytes"] or cell["path"]):
            return cell
    return None


def find_label_column(config: DatasetConfig, features: "Features", flag: str | None) -> str | None:
    """Find the column of labels, None for no labels. `flag` is the value of --label_column."""
    from datasets import ClassLabel

    fitting = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not fitting and "label" in features:
        fitting = ["label"]
    if flag and flag.lower() == "none" and flag not in features:
        flag = ""
    unlabelled = config.label_column is None or (config.label_column == "" and not fitting)
    if flag == "" or (flag is None and unlabelled):
        return None
    return _choose_column(
        features,
        fitting,
        name="label_column",
        flag=flag,
        recommended=config.label_column,
        dataset=config.name,
    )


def find_caption_column(config: DatasetConfig, features: "Features", flag: str | None) -> str:
    """Find the column of captions. `flag` is the value of --caption_column."""
    pattern = re.compile(r"((large_)?list<\w+: )?(large_)?string>?")
    texts = [field.name for field in features.arrow_schema if pattern.fullmatch(str(field.type))]
    texts = [name for name in texts if name not in WEBDATASET_COLUMNS]
    # Several columns of texts, such as file names: guessing would take the wrong one.
    fitting = texts if len(texts) == 1 else []
    column = _choose_column(
        features,
        fitting,
        name="caption_column",
        flag=flag,
        recommended=config.caption_column,
        dataset=config.name,
    )
    if column not in texts:
        raise UserError(
            f"dataset '{config.name}', column '{column}': holds no texts",
            how="pass --caption_column NAME",
        )
    return column


def _choose_column(
    features: "Features",
    fitting: list[str],
    *,
    name: str,
    flag: str | None,
    recommended: str | None,
    dataset: str,
) -> str:
    """Choose the flag's column, else the recommended one, else the one of a fitting type.

    Where a column is recommended and the data lack it, the first fitting one is taken; where none
    is, the fitting one must be the only one.
    """
    column = flag if flag is not None else recommended
    if column is not None and column in features:
        return column
    if flag is None and fitting and (recommended or len(fitting) == 1):
        return fitting[0]
    problem = f"has no column '{column}'" if column else "leaves open which column to take"
    columns = some_of(features)
    raise UserError(
        f"dataset '{dataset}' {problem} (columns: {columns})", how=f"pass --{name} NAME"
    )


# --- labels ---------------------------------------------------------------------------------------


def read_class_names(
    config: DatasetConfig,
    data: ArrowSplit | ParquetSplit,
    column: str | None,
    class_order: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return one name per class, in the order of the ids; () when there are no classes. Of declared
    classes without names, those that no row has are left out, but for the run to resume, whose
    classes are `class_order`.

    Raises:
        UserError: the column's type is no type of labels, or it has other classes than the known
            dataset.
    """
    if column is None:
        return ()
    feature = data.features[column]
    is_recommended = column == config.label_column
    known_names = config.label_names if is_recommended else ()
    label_type = _label_type(feature)
    if label_type == "class":
        names = tuple(feature.names)
        is_named = names != tuple(map(str, range(len(names)))) or config.encoding
        if not (is_named or config.n_classes or {*class_order} == {*names}):
            used = {*data.read_column(column).unique().to_pylist()}
            names = tuple(name for i, name in enumerate(names) if i in used)
        return _of_known_dataset(config, column, names)
    if label_type == "bool":
        return known_names or (f"not {column}", column)
    values: list[Any] = []
    if label_type:
        values = [v for v in data.read_column(column).unique().to_pylist() if v not in (None, "")]
    if label_type == "float" and all(value != value or value.is_integer() for value in values):
        values = list({int(value) for value in values if value == value})  # 0.0 and −0.0 are one
        label_type = "int"
    if label_type not in ("int", "string"):
        raise UserError(
            f"dataset '{config.name}', column '{column}': labels must be classes, whole numbers,"
            f" bools or strings, not {_describe_feature(feature, values)}",
            how='pass --label_column NAME, or --label_column "" to train without classes',
        )
    if len(data) >= MIN_ROWS_OF_CLASSES and len(values) > len(data) / 2:
        raise UserError(
            f"dataset '{config.name}', column '{column}' has {len(values)} different values in"
            f" {len(data)} rows: no classes",
            how='pass --label_column NAME, or --label_column "" to train without classes',
        )
    if label_type == "int" and is_recommended and config.n_classes:
        return known_names or tuple(str(i) for i in range(config.n_classes))
    return _of_known_dataset(config, column, tuple(in_order(map(str, values))))


def _of_known_dataset(
    config: DatasetConfig, column: str, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names of the classes, which must be as many as a known dataset has."""
    if column == config.label_column and config.n_classes not in (0, len(names)):
        raise UserError(
            f"dataset '{config.name}' has {config.n_classes} classes, and column '{column}' here "
            f"{len(names)} ({some_of(names)})",
            how="pass --dataset_name folder:PATH if it is a dataset of your own",
        )
    return names


def in_order(names: Iterable[str]) -> list[str]:
    """Sort class names: whole numbers by value, else alphabetically."""
    names = list(names)
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def read_label_ids(
    config: DatasetConfig, split: str, data: ArrowSplit | ParquetSplit
) -> Int32[np.ndarray, "n"]:
    """Convert the labels of a whole split to class ids: a name or number to its index in
    `config.label_names`, a null to −1.

    Raises:
        UserError: a label is none of the classes. The message names the first such row.
    """
    label_column = str(config.label_column)
    feature, column = data.features[label_column], data.read_column(label_column)
    kind, names = _label_type(feature), config.label_names
    id_of_label = {name: i for i, name in enumerate(names)}
    unknown = len(names)
    if kind in ("class", "bool"):
        # The run to resume may have the classes in another order, and unused ones are left out.
        own_names = feature.names if kind == "class" else names
        own_ids = np.array([*(id_of_label.get(name, unknown) for name in own_names), unknown, -1])
        ids = column.cast("int64").fill_null(-1).to_numpy()
        ids = own_ids[np.where((ids < -1) | (ids >= len(own_names)), len(own_names), ids)]
    else:
        if kind != "string" and not all(re.fullmatch(r"-?\d+", name) for name in names):
            # Numbers are ids where the dataset's entry has words for the classes.
            id_of_label = {str(i): i for i in range(-1, len(names))}
        labels = map(_integer, column.to_pylist())
        ids = np.array([id_of_label.get(label, unknown) if label else -1 for label in labels])
    outside = ids == unknown
    if outside.any():
        row = int(outside.argmax())
        label = column[row].as_py()
        allowed = f"{names[0]} … {names[-1]}"
        problem = f"label {label!r} is none of the {len(names)} classes {allowed}"
        raise cell_error(config, split, row, label_column, problem)
    return ids.astype(np.int32)


def _integer(value: Any) -> str:
    """Write a label as a class's name: 3 and 3.0 as "3", null and NaN as ""."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, int | float) else str(value)


def _describe_feature(feature: Any, values: Sequence[Any]) -> str:
    """Describe a column that holds no labels, by its type or by a value that is no class."""
    fractions = [value for value in values if isinstance(value, float) and value % 1]
    return f"fractions such as {fractions[0]}" if fractions else str(feature)[:60]


def _label_type(feature: Any) -> str | None:
    """Return how a column names its classes: "class", "bool", "int", "float", "string", or None."""
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return "class"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return next((name for name in ("bool", "int", "float", "string") if name in dtype), None)


# --- captions -------------------------------------------------------------------------------------


def read_captions(
    config: DatasetConfig,
    data: ArrowSplit | ParquetSplit,
    rows: Int64[np.ndarray, "n"],
    labels: Int32[np.ndarray, "n"],
) -> list[tuple[str, ...]]:
    """Return the captions of each row, from a column or from templates and class names.

    A row without any, or with blank ones only, gets the empty caption, which is the null caption.
    The list is empty for a dataset without captions.

    Raises:
        UserError: a template cannot be filled in.
    """
    if config.caption_column:
        cells = data.read_column(config.caption_column).take(rows).to_pylist()
        lists = ((cell,) if isinstance(cell, str) else cell or () for cell in cells)
        return [tuple(text for text in texts if text and text.strip()) or ("",) for texts in lists]
    if not config.templates:
        return []
    if not any("{label}" in template for template in config.templates):
        raise UserError(f"--caption {config.templates[0]!r}: {{label}} must stand in one of them")
    try:
        captions_of_class = [
            tuple(template.format(label=name) for template in config.templates)
            for name in config.label_names
        ]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--caption {' '.join(map(repr, config.templates))}: only {{label}} may stand in braces"
        ) from error
    return [captions_of_class[label] for label in labels]
