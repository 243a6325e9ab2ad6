"""Labels of the samples to make: classes by their names, or prompts; and the seeds of their noise.

Knows nothing of sampling itself: a `SampleRequest` says what to sample, `SamplingPlan` how.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from data.batch import EncodedCaption
from inference.sampler import Labels, check_seeds
from inference.trained_model import TrainedModel
from model import ModelConfig
from runtime.errors import UserError, unknown_name

Seeds = int | Sequence[int]  # one for all samples, or one for each
DisplayLabels = Sequence[int | str] | Int[np.ndarray, "n"]


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
        labels: the distinct labels: class ids, or encoded captions.
        seed: one for all samples, or one for each.
        negative: one caption in place of the null label of guidance.
    """

    label_index: Int[np.ndarray, "n"]
    names: Sequence[str]
    labels: Int[np.ndarray, "k"] | EncodedCaption
    seed: Seeds = 0
    negative: EncodedCaption | None = None

    @property
    def captions(self) -> list[str] | None:
        """The text below each image: its prompt, or the name of its class if it has one."""
        return label_texts(self.label_index, self.names)

    @property
    def file_labels(self) -> list[str]:
        """The label in each image's file name: its caption or number; empty if all are alike."""
        alike = len(jax.tree.leaves(self.labels)[0]) == 1
        return self.captions or ["" if alike else str(i) for i in self.label_index]

    def rows(self, start: int, stop: int) -> RequestRows:
        """Samples `start` … `stop` − 1. Beyond the last one, that is repeated."""
        places = np.minimum(np.arange(start, stop), len(self.label_index) - 1)
        rows = self.label_index[places]
        return RequestRows(
            labels=jax.tree.map(lambda x: x[rows], self.labels),
            seed=self.seed if isinstance(self.seed, int) else [self.seed[i] for i in places],
            first_index=start,
            negative=self.negative,
        )


def request_labels(
    trained: TrainedModel, words: Sequence[str], n: int, *, seed: Seeds = 0
) -> SampleRequest:
    """Request n samples of classes, equal shares of each, the samples of a class side by side.

    Args:
        words: class names or numbers; all classes if empty.

    Raises:
        UserError: the model was trained on captions, there is no such class, or a seed is out of
            range.
    """
    model, names = trained.model, trained.label_names
    if model.text_width:
        raise UserError('this model was trained on captions; name them by --prompts "…"')
    check_seeds(seed)
    ids = label_ids(words, names, model.n_classes) or all_labels(model).tolist()
    return SampleRequest(spread_evenly(ids, n), names, all_labels(model), seed)


def request_prompts(
    trained: TrainedModel,
    prompts: Sequence[str],
    n: int,
    *,
    seed: Seeds = 0,
    negative: str | None = None,
) -> SampleRequest:
    """Request n samples of prompts, equal shares of each, the samples of a prompt side by side.

    Args:
        negative: a caption in place of the null label of guidance. The null caption of the
            published SD3 is the empty one.

    Raises:
        UserError: the model was not trained on captions, there are no prompts, they cannot be
            encoded, or a seed is out of range.
    """
    if not trained.model.text_width:
        raise UserError("this model was trained without captions; choose classes by --labels")
    if not prompts:
        raise UserError('this model was trained on captions; name them by --prompts "…"')
    check_seeds(seed)
    if negative is None and trained.full_width:
        negative = ""
    if negative is None:
        encoded, encoded_negative = trained.encode_captions([*prompts]), None
    else:
        # In one call, so that all have the same number of tokens.
        encoded = trained.encode_captions([*prompts, negative])
        encoded_negative = jax.tree.map(lambda x: x[-1:], encoded)
    label_index = spread_evenly(range(len(prompts)), n)
    return SampleRequest(label_index, prompts, encoded, seed, encoded_negative)


def request_round_robin(trained: TrainedModel, n: int, *, seed: int = 0) -> SampleRequest:
    """Request n samples of one class after the other, so that any stretch of them is balanced.

    Raises:
        UserError: the model was trained on captions.
    """
    model = trained.model
    if model.text_width:
        raise UserError(
            "this model was trained on captions, and which to sample is not known here: let "
            "generate.py write an .npz, and pass it by --npz"
        )
    label_index = np.arange(n, dtype=np.int32) % max(1, model.n_classes)
    return SampleRequest(label_index, trained.label_names, all_labels(model), seed)


# --- class ids and names --------------------------------------------------------------------------


def label_ids(words: Sequence[int | str], names: Sequence[str], n_classes: int) -> list[int]:
    """Look up class ids by name or number. A name wins over a number that is spelled the same.

    Raises:
        UserError: there is no such class.
    """
    # Without classes there is one label, the null label 0.
    ids = {str(i): i for i in range(n_classes or 1)} | {name: i for i, name in enumerate(names)}
    for word in words:
        if str(word) not in ids and not n_classes:
            raise UserError(f"label '{word}': the model has no classes")
        if str(word) not in ids:
            raise unknown_name("label", word, names or [f"0 … {n_classes - 1}"])
    return [ids[str(word)] for word in words]


def all_labels(model: ModelConfig) -> Int[np.ndarray, "k"]:
    """The label of each class; without classes, the null label."""
    return np.arange(max(1, model.n_classes), dtype=np.int32)


def spread_evenly(ids: Sequence[int], n: int) -> Int[np.ndarray, "n"]:
    """Repeat ids to n labels: equal shares, equal ids side by side."""
    share, rest = divmod(n, len(ids))
    return np.repeat(np.asarray(ids, np.int32), [share + (i < rest) for i in range(len(ids))])


def label_texts(labels: DisplayLabels, names: Sequence[str]) -> list[str] | None:
    """The text below each image: its caption, or the name of its class; None if there is none."""
    if names:
        return [label if isinstance(label, str) else names[label] for label in labels]
    return [label for label in labels if isinstance(label, str)] or None
