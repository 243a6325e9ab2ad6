"""Columns of a dataset: which ones hold images, labels and captions, and their values, checked.

Reading files is `data.arrow`'s and `data.parquet`'s; `data.load` decides which splits to open.
"""

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32, Int64

from data.arrow import ArrowSplit
from data.parquet import ParquetSplit
from data.rows import cell_error
from datasets_config import DatasetConfig
from runtime.errors import UserError, unknown_name

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    from datasets import Features

CONDITIONINGS = ("class", "text", "none")


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
) -> DatasetConfig:
    """Fill in the columns, templates and classes of a dataset from the flags and its training data.

    Raises:
        UserError: a column is missing, is of the wrong type, or has to be named.
    """
    features = data.features
    image_column = find_image_column(entry, features, image_column)
    templates = templates or (() if caption_column else entry.templates)
    if conditioning == "text" and not templates:
        caption_column = find_caption_column(entry, features, caption_column)
    if conditioning == "none" or caption_column:
        label_column = ""
    label_column = find_label_column(entry, features, label_column)
    if conditioning in ("class", "text") and not (label_column or caption_column):
        raise UserError(
            f"dataset '{entry.name}' has no classes to condition a model on; pass --label_column"
        )
    class_names = read_class_names(entry, data, label_column)
    return dataclasses.replace(
        entry,
        image_column=image_column,
        label_column=label_column,
        caption_column=caption_column,
        templates=templates if conditioning == "text" else (),
        n_classes=len(class_names),
        label_names=class_names,
    )


def find_image_column(config: DatasetConfig, features: "Features", flag: str | None) -> str:
    """Find the column of images. `flag` is the value of --image_column."""
    from datasets import Image

    fitting = [name for name, feature in features.items() if isinstance(feature, Image)]
    return _choose_column(
        features,
        fitting,
        name="image_column",
        flag=flag,
        recommended=config.image_column,
        dataset=config.name,
    )


def find_label_column(config: DatasetConfig, features: "Features", flag: str | None) -> str | None:
    """Find the column of labels, None for no labels. `flag` is the value of --label_column."""
    from datasets import ClassLabel

    fitting = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not fitting and _label_type(features.get("label")):
        fitting = ["label"]
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
            f"dataset '{config.name}', column '{column}': holds no texts; pass --caption_column"
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
    raise UserError(
        f"dataset '{dataset}' {problem} (columns: {', '.join(features)}); pass --{name}"
    )


# --- labels ---------------------------------------------------------------------------------------


def read_class_names(
    config: DatasetConfig, data: ArrowSplit | ParquetSplit, column: str | None
) -> tuple[str, ...]:
    """Return one name per class, in the order of the ids; () when there are no classes.

    Raises:
        UserError: the column's type is no type of labels.
    """
    if column is None:
        return ()
    feature = data.features[column]
    is_recommended = column == config.label_column
    known_names = config.label_names if is_recommended else ()
    label_type = _label_type(feature)
    if label_type == "class":
        return tuple(feature.names)
    if label_type == "bool":
        return known_names or (f"not {column}", column)
    values = [v for v in data.read_column(column).unique().to_pylist() if v is not None]
    if label_type == "string":
        return tuple(sorted(values))
    if label_type == "int":
        n_classes = config.n_classes if is_recommended else max(values, default=0) + 1
        return known_names or tuple(str(i) for i in range(n_classes))
    raise UserError(
        f"dataset '{config.name}', column '{column}': labels must be classes, whole numbers,"
        f" bools or strings, not {feature}; pass --label_column"
    )


def read_label_ids(
    config: DatasetConfig, split: str, column: "pyarrow.ChunkedArray"
) -> Int32[np.ndarray, "n"]:
    """Convert the labels of a whole split to class ids: a name to its index in
    `config.label_names`.

    Raises:
        UserError: a label is none of the classes. The message names the first such row.
    """
    names = config.label_names
    if "string" in str(column.type):
        id_of_name = {name: i for i, name in enumerate(names)}
        ids = np.array([id_of_name.get(name, -1) for name in column.to_pylist()])
    else:
        ids = column.cast("int64").fill_null(-1).to_numpy()
    outside = (ids < 0) | (ids >= len(names))
    if outside.any():
        row = int(outside.argmax())
        label = column[row].as_py()
        allowed = f"{names[0]} … {names[-1]}" if isinstance(label, str) else f"0 … {len(names) - 1}"
        problem = f"label {label!r} is none of the {len(names)} classes {allowed}"
        raise cell_error(config, split, row, str(config.label_column), problem)
    return ids.astype(np.int32)


def _label_type(feature: Any) -> str | None:
    """Return how a column names its classes: "class", "bool", "int", "string", or None."""
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return "class"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return next((name for name in ("bool", "int", "string") if name in dtype), None)


# --- captions -------------------------------------------------------------------------------------


def read_captions(
    config: DatasetConfig,
    data: ArrowSplit | ParquetSplit,
    rows: Int64[np.ndarray, "n"],
    labels: Int32[np.ndarray, "n"],
) -> list[tuple[str, ...]]:
    """Return the captions of each row, from a column or from templates and class names.

    A row without a caption gets the empty one, which is the null caption. The list is empty for a
    dataset without captions.

    Raises:
        UserError: a template cannot be filled in.
    """
    if config.caption_column:
        cells = data.read_column(config.caption_column).take(rows).to_pylist()
        lists = ((cell,) if isinstance(cell, str) else cell for cell in cells)
        return [tuple(text or "" for text in texts or ("",)) for texts in lists]
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
