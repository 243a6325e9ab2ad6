"""data.columns."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32, Int64

from data.parquet import ParquetSplit
from datasets_config import DatasetConfig
from runtime.errors import UserError, unknown_name

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    from datasets import Features
from data.arrow import ArrowSplit
from data.rows import cell_error


def find_image_column(entry: DatasetConfig, features: "Features", wanted: str | None) -> str:
    from datasets import Image

    fitting = [name for name, feature in features.items() if isinstance(feature, Image)]
    return _choose_column(entry, features, fitting, wanted=wanted, flag="image_column")


def find_label_column(entry: DatasetConfig, features: "Features", wanted: str | None) -> str | None:
    from datasets import ClassLabel

    fitting = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not fitting and _label_type(features.get("label")):
        fitting = ["label"]
    unlabelled = entry.label_column is None or (entry.label_column == "" and not fitting)
    if wanted == "" or (wanted is None and unlabelled):
        return None
    return _choose_column(entry, features, fitting, wanted=wanted, flag="label_column")


def choose_conditioning(
    entry: DatasetConfig,
    wanted: str | None,
    label_column: str | None,
    caption_column: str | None,
    templates: tuple[str, ...],
) -> str | None:
    """What a model shall be told; None for classes where there are any."""
    if wanted not in (None, "class", "text", "none"):
        raise unknown_name("conditioning", wanted, ("class", "text", "none"))
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


def find_caption_column(entry: DatasetConfig, features: "Features", wanted: str | None) -> str:
    texts = re.compile(r"((large_)?list<\w+: )?(large_)?string>?")
    fitting = [field.name for field in features.arrow_schema if texts.fullmatch(str(field.type))]
    # Where several hold texts, such as file names, none is taken for want of the one that is meant.
    only = fitting if len(fitting) == 1 else []
    column = _choose_column(entry, features, only, wanted=wanted, flag="caption_column")
    if column not in fitting:
        raise UserError(
            f"dataset '{entry.name}', column '{column}': holds no texts; pass --caption_column"
        )
    return column


def read_captions(
    config: DatasetConfig,
    data: ArrowSplit | ParquetSplit,
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


def _choose_column(
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
        f"dataset '{entry.name}' {problem} (columns: {', '.join(features)}); pass --{flag}"
    )


def _label_type(feature: Any) -> str | None:
    """How the column names its classes: "class", "bool", "int", "string", or None."""
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return "class"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return next((kind for kind in ("bool", "int", "string") if kind in dtype), None)


def read_class_names(
    entry: DatasetConfig, data: ArrowSplit | ParquetSplit, column: str | None
) -> tuple[str, ...]:
    """One name per class, in the order of the ids; () when there are no classes."""
    if column is None:
        return ()
    feature, is_listed = data.features[column], column == entry.label_column
    listed = entry.label_names if is_listed else ()
    kind = _label_type(feature)
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
        f"dataset '{entry.name}', column '{column}': labels must be classes, whole numbers,"
        f" bools or strings, not {feature}; pass --label_column"
    )


def read_label_ids(
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
        raise cell_error(config, split, row, str(config.label_column), problem)
    return ids.astype(np.int32)
