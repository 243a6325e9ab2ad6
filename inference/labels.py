"""Labels of the samples to make: classes by their names, or prompts; and the seeds of their noise.

Knows nothing of sampling itself: a `SampleRequest` says what to sample, `SamplingPlan` how.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from data.batch import EncodedCaption
from datasets_config import DatasetConfig
from inference import fonts
from inference.sampler import Labels
from runtime.errors import UserError, some_of, unknown_name

Seeds = int | Sequence[int]  # one for all samples, or one for each
ReadCaptions = Callable[[Int[np.ndarray, "b"]], EncodedCaption]
DisplayLabels = Sequence[int | str] | Int[np.ndarray, "n"]
# Folded into a seed's key where initial noise folds the image's index: no image has this index.
RANDOM_LABEL_TAG = 2**32 - 2


# --- requests -------------------------------------------------------------------------------------


class RequestRows(NamedTuple):
    """Consecutive samples of a request, as the arguments of `TrainedModel.sample`."""

    labels: Labels
    seed: Seeds
    first_index: int
    negative: EncodedCaption | None


class SampleRequest(NamedTuple):
    """n samples to make.

    Args:
        label_index: for each sample, the row of its label in `labels`, and in `names` if any.
        names: class names, or prompts; empty for classes without names.
        labels: the distinct labels: class ids, or encoded captions; or a function from rows to
            them, which reads them when they are sampled.
        seed: one for all samples, or one for each.
        negative: one caption in place of the null label of guidance.
    """

    label_index: Int[np.ndarray, "n"]
    names: Sequence[str]
    labels: Int[np.ndarray, "k"] | EncodedCaption | ReadCaptions
    seed: Seeds = 0
    negative: EncodedCaption | None = None

    @property
    def captions(self) -> list[str] | None:
        """The text below each image: its prompt, or the name of its class if it has one."""
        return label_texts(self.label_index, self.names)

    @property
    def grid_captions(self) -> list[str] | None:
        """The same for a grid, or numbers where no font here has the characters."""
        return grid_texts(self.label_index, self.names)

    @property
    def file_labels(self) -> list[str]:
        """The label in each image's file name: its caption or number; empty if all are alike."""
        if self.captions:
            return self.captions
        alike = len(jax.tree.leaves(self.labels)[0]) == 1
        return ["" if alike else str(i) for i in self.label_index]

    def rows(self, start: int, stop: int) -> RequestRows:
        """Samples `start` … `stop` − 1. Beyond the last one, that is repeated."""
        places = np.minimum(np.arange(start, stop), len(self.label_index) - 1)
        rows = self.label_index[places]
        labels = self.labels
        return RequestRows(
            labels=labels(rows) if callable(labels) else jax.tree.map(lambda x: x[rows], labels),
            seed=self.seed if isinstance(self.seed, int) else [self.seed[i] for i in places],
            first_index=start,
            negative=self.negative,
        )


# --- class ids and names --------------------------------------------------------------------------


def label_ids(words: Sequence[int | str], names: Sequence[str], n_classes: int) -> list[int]:
    """Look up class ids: a string is a name, or a number where no class is named by a number; an
    integer is an id.

    Raises:
        UserError: there is no such class.
    """
    # Without classes there is one label, the null label 0.
    numbers = {str(i): i for i in range(n_classes or 1)}
    by_name = {name: i for i, name in enumerate(names)}
    if not any(re.fullmatch(r"-?\d+", name) for name in names):
        by_name |= numbers
    ids: list[int] = []
    for word in words:
        known = by_name if isinstance(word, str) else numbers
        if str(word) not in known and not n_classes:
            raise UserError(f"label '{word}': the model has no classes")
        if str(word) not in known:
            raise unknown_name("label", word, names or [f"0 … {n_classes - 1}"])
        ids.append(known[str(word)])
    return ids


def changed_classes(dataset: DatasetConfig, names_before: Sequence[str], n_before: int) -> str:
    """Describe how the classes of an opened dataset differ from those that a model was trained on;
    "" if they do not. Other classes give the same ids another meaning.

    Args:
        names_before: the class names of the training; empty if they were not recorded.
        n_before: the number of its classes.
    """
    n, before, names = dataset.n_classes, list(names_before), list(dataset.label_names)
    if before and names and before != names:
        changes = {"added": set(names) - set(before), "removed": set(before) - set(names)}
        texts = [
            f"{what}: {some_of([name[:30] for name in sorted(found)], 2)}"
            for what, found in changes.items()
            if found
        ]
        change = "; ".join(texts) or "in another order"
    elif n != n_before:
        change = "some were added" if n > n_before else "some were removed"
    else:
        return ""
    return f"{dataset.name} had {n_before} classes, now it has {n} ({change})"


def spread_evenly(ids: Sequence[int], n: int) -> Int[np.ndarray, "n"]:
    """Repeat ids to n labels: equal shares, equal ids side by side."""
    share, rest = divmod(n, len(ids))
    return np.repeat(np.asarray(ids, np.int32), [share + (i < rest) for i in range(len(ids))])


def random_ids(n: int, n_classes: int, *, seed: int) -> Int[np.ndarray, "n"]:
    """A random class for each of n samples, uniform among all: a function of seed and index."""
    label_key = jax.random.fold_in(jax.random.key(seed), RANDOM_LABEL_TAG)

    def random_id(index: Int[Array, ""]) -> Int[Array, ""]:
        return jax.random.randint(jax.random.fold_in(label_key, index), (), 0, n_classes)

    return np.asarray(jax.vmap(random_id)(jnp.arange(n)), np.int32)


def grid_texts(labels: DisplayLabels, names: Sequence[str]) -> list[str] | None:
    """The text below each image of a grid: as `label_texts`, or the number of the class or of the
    caption where no font here has the text's characters.
    """
    texts = label_texts(labels, names)
    if texts is None:
        return None
    captions = list(dict.fromkeys(label for label in labels if isinstance(label, str)))
    numbers = [captions.index(i) if isinstance(i, str) else int(i) for i in labels]
    return drawable_texts(texts, numbers)


def drawable_texts(texts: Sequence[str], numbers: Iterable[int]) -> list[str]:
    """Replace texts that no font here can draw by their numbers."""
    return [
        text if fonts.is_drawable(text) else str(number) for text, number in zip(texts, numbers)
    ]


def label_texts(labels: DisplayLabels, names: Sequence[str]) -> list[str] | None:
    """The text below each image: its caption, or the name of its class; None if there is none."""
    if names:
        return [label if isinstance(label, str) else names[label] for label in labels]
    return [label for label in labels if isinstance(label, str)] or None
