"""A single file of an original DiT or SiT, which has no config beside its weights.

    read_dit_file(Path("DiT-XL-2-256x256.pt"), parse_reference("DiT-XL-2-256x256.pt"))

What the weights do not tell follows from the file's name, from the arguments that the training
script saved with them, or from words before the path: the family, the number of heads, and whether
the last row of the table of labels is the null label.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets_config import DATASET_CONFIGS
from model import ModelConfig
from pretrained import dit, weight_files
from pretrained.state_dicts import describe_unused, pop_heads
from pretrained.weight_files import FileWeights
from runtime.errors import UserError

# Names of the label dropout among the arguments of training scripts.
DROPOUT_NAMES = ("class_dropout_prob", "class_dropout", "label_dropout", "cfg_prob")
# Numbers of classes that people train on.
CLASS_COUNTS = {1, 100, 101, 365, 21_841} | {d.n_classes for d in DATASET_CONFIGS.values()}


class Reference(NamedTuple):
    """A path or hub id, with the facts that may stand before a file's path."""

    family: str | None
    n_heads: int | None
    n_classes: int | None
    place: str


def parse_reference(text: str) -> Reference:
    """Split `dit:heads=6:classes=10:PATH` into its facts and the path."""
    match = re.fullmatch(r"(dit|sit|sd3):((?:(?:heads|classes)=\d+:)*)(.+)", text, re.IGNORECASE)
    if not match:
        return Reference(None, None, None, text)
    family, facts, place = match.groups()
    numbers = {name: int(n) for name, n in re.findall(r"(heads|classes)=(\d+)", facts.lower())}
    return Reference(family.lower(), numbers.get("heads"), numbers.get("classes"), place)


@dataclass(frozen=True)
class DitFile:
    """A network that was read from a file.

    Args:
        params: NumPy's float32, for `model.model_graphdef`.
        family: dit or sit, which says how it is sampled.
        has_null: it has a null label; otherwise that row of ours is zeros and must not be used.
        notices: lines for a person on how it was read.
    """

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    family: str
    has_null: bool
    notices: tuple[str, ...]


def read_dit_file(file: FileWeights, path: Path, reference: Reference) -> DitFile:
    """Convert the network of a file of the original DiT or SiT to ours.

    Raises:
        UserError: it cannot be read, is something else, or does not tell enough of the model.
    """
    where = str(path)
    tensors, facts = file.tensors, file.facts
    family = reference.family or _infer_family(path, find_fact(facts, str, "model") or "")
    config = dit.infer_config(tensors, where, reference.n_heads)
    labels = read_label_table(
        config.n_classes + 1,
        where,
        n_classes=reference.n_classes or find_fact(facts, int, "num_classes"),
        dropout=find_fact(facts, float, *DROPOUT_NAMES),
    )
    config = replace(config, n_classes=labels.n_classes)
    if not labels.has_null:
        dit.append_null_row(tensors, config.n_classes)
    shapes = dit.original_shapes(config)
    biases = weight_files.fill_missing_biases(tensors, shapes)
    heads = pop_heads(tensors, shapes)
    params = dit.params_from_original(tensors, config, where)
    if family == "sit":
        params, config = dit.convert_sit(params, config)
    unused = describe_unused(file.unused)
    notices = (*file.notices, *biases, *heads, *unused, *filter(None, [labels.notice]))
    return DitFile(config, params, family, labels.has_null, notices)


def _infer_family(path: Path, model_name: str) -> str:
    """Infer DiT or SiT from a file's name, else from the name of the model in its arguments."""
    for name in (path.name, model_name):
        families = [
            family
            for family in ("dit", "sit")
            if re.search(rf"(?<![a-z]){family}(?![a-z])", name.lower())
        ]
        if len(families) == 1:
            return families[0]
    raise UserError(
        f"'{path}' may be a DiT or a SiT: their files share a layout but run time in opposite "
        f"directions; name it as dit:{path} or sit:{path}"
    )


def find_fact(facts: Mapping[str, Any], kind: type, *names: str) -> Any:
    """Find an argument of the training script among a file's facts; None if it is not there."""
    for key, value in facts.items():
        name = key.removesuffix("._val").rpartition(".")[2]  # omegaconf keeps values under it
        if name in names and type(value) in (kind, int if kind is float else kind):
            return value
    return None


# --- the table of labels --------------------------------------------------------------------------


class LabelTable(NamedTuple):
    """The rows of a table of labels.

    Args:
        has_null: the last row is the null label. Training without label dropout makes no such row.
        notice: a line for a person, if that was not certain.
    """

    n_classes: int
    has_null: bool
    notice: str = ""


def read_label_table(
    n_rows: int, where: str, *, n_classes: int | None = None, dropout: float | None = None
) -> LabelTable:
    """Separate the classes from the null label in an original DiT's table of labels.

    Args:
        where: the file, for the messages of errors.
        n_classes: if it is known.
        dropout: the label dropout of its training, if it is known.

    Raises:
        UserError: the table has another number of rows, or both are as likely.
    """
    as_classes, with_null_label = (f"dit:classes={n}:PATH" for n in (n_rows, n_rows - 1))
    hint = f"name it as {as_classes} if it has no null label, else {with_null_label}"
    if n_rows == 1:
        return LabelTable(0, True)
    if n_classes is None and dropout is not None:
        n_classes = n_rows - (dropout > 0)
    if n_classes is not None:
        if n_classes not in (n_rows - 1, n_rows):
            raise UserError(f"'{where}': {n_classes} classes, and {n_rows} rows of labels: {hint}")
        return LabelTable(n_classes, n_classes < n_rows)
    without, with_null = n_rows in CLASS_COUNTS, n_rows - 1 in CLASS_COUNTS
    if without and with_null:
        raise UserError(f"'{where}' has {n_rows} rows of labels, the last perhaps null: {hint}")
    notice = f"{n_rows} rows of labels are taken for {n_rows - (not without)} classes"
    if without:
        return LabelTable(
            n_rows,
            False,
            f"{notice} without a null label; if it has one, name it as {with_null_label}",
        )
    return LabelTable(
        n_rows - 1, True, f"{notice} and the null label; if it has none, name it as {as_classes}"
    )
