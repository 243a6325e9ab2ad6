"""What pictures are of: classes by their names, or prompts; and the seeds of their noise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from data.batch import Caption
from inference import sampler
from inference.sampler import Labels
from inference.trained_model import TrainedModel
from model import ModelConfig
from runtime.errors import UserError, unknown

if TYPE_CHECKING:
    pass


def label_ids(words: Sequence[int | str], names: Sequence[str], n_classes: int) -> list[int]:
    """Class names or numbers → numbers. A name wins over a number that is spelled the same.

    Raises:
        UserError: no such class.
    """
    # Without classes there is one label, the null label 0.
    ids = {str(i): i for i in range(n_classes or 1)} | {name: i for i, name in enumerate(names)}
    for word in words:
        if str(word) not in ids and not n_classes:
            raise UserError(f"label '{word}': the model is told no classes")
        if str(word) not in ids:
            raise unknown("label", word, names or [f"0 … {n_classes - 1}"])
    return [ids[str(word)] for word in words]


def spread_evenly(ids: Sequence[int], n: int) -> Int[np.ndarray, "n"]:
    """n labels, each id as often as the others, side by side."""
    share, rest = divmod(n, len(ids))
    return np.repeat(np.asarray(ids, np.int32), [share + (i < rest) for i in range(len(ids))])


Seeds = int | Sequence[int]  # of all pictures, or of each


class SampleRequest(NamedTuple):
    """What n pictures are of.

    Args:
        which: each picture's place in `told`, and in `names` where there are any.
        names: of classes, or prompts.
        told: the label of each.
        seed: of all, or of each picture.
        negative: the label of one picture, from which guidance leads away.
    """

    which: Int[np.ndarray, "n"]
    names: Sequence[str]
    told: Int[np.ndarray, "k"] | Caption
    seed: Seeds = 0
    negative: Caption | None = None

    @property
    def captions(self) -> list[str] | None:
        """What stands below each picture: its prompt, or its class's name if it has one."""
        return label_texts(self.which, self.names)

    @property
    def words(self) -> list[str]:
        """The same for the name of a file, where a number will do; nothing if all are alike."""
        alike = len(jax.tree.leaves(self.told)[0]) == 1
        return self.captions or ["" if alike else str(i) for i in self.which]

    def rows(self, start: int, stop: int) -> tuple[Labels, dict[str, Any]]:
        """The labels of some of them, and what else `drawing.sample` is told of these. Beyond the
        last, that comes again.
        """
        places = np.minimum(np.arange(start, stop), len(self.which) - 1)
        seed, which = self.seed, self.which[places]
        seeds = seed if isinstance(seed, int) else [seed[place] for place in places]
        labels = jax.tree.map(lambda x: x[which], self.told)
        return labels, {"seed": seeds, "first": start, "negative": self.negative}


def request_labels(
    drawable: TrainedModel, words: Sequence[str], n: int, *, seed: Seeds = 0
) -> SampleRequest:
    """Classes by their names or numbers, by default all, each as often as the others, side by side.

    Raises:
        UserError: the model is told captions, there is no such class, or a seed cannot be.
    """
    model, names = drawable.model, drawable.label_names
    if model.text_width:
        raise UserError('this model was trained on captions; say what to draw by --prompts "…"')
    sampler.noise_origins(seed, n)
    ids = label_ids(words, names, model.n_classes) or every_class(model).tolist()
    return SampleRequest(spread_evenly(ids, n), names, every_class(model), seed)


def request_prompts(
    drawable: TrainedModel,
    prompts: Sequence[str],
    n: int,
    *,
    seed: Seeds = 0,
    negative: str | None = None,
) -> SampleRequest:
    """Prompts, each as often as the others, side by side.

    Args:
        negative: a caption in place of the null. To the published SD3 no caption is an empty one.

    Raises:
        UserError: the model is not told captions, or these cannot be encoded; a seed cannot be.
    """
    if not drawable.model.text_width:
        raise UserError("this model was trained without captions; choose classes by --labels")
    if not prompts:
        raise UserError('this model was trained on captions; say what to draw by --prompts "…"')
    sampler.noise_origins(seed, n)
    if negative is None and drawable.full_width:
        negative = ""
    # All in one go, so that they have the same number of tokens.
    told = drawable.encode([*prompts, *([] if negative is None else [negative])])
    last = None if negative is None else jax.tree.map(lambda x: x[-1:], told)
    return SampleRequest(spread_evenly(range(len(prompts)), n), prompts, told, seed, last)


def by_turns(drawable: TrainedModel, n: int, *, seed: int = 0) -> SampleRequest:
    """One of each class after the other: any stretch of them is balanced.

    Raises:
        UserError: the model is told captions.
    """
    model = drawable.model
    if model.text_width:
        raise UserError(
            "this model was trained on captions, and which to draw is not known here: let "
            "generate.py write an .npz, and pass it by --npz"
        )
    which = np.arange(n, dtype=np.int32) % max(1, model.n_classes)
    return SampleRequest(which, drawable.label_names, every_class(model), seed)


def every_class(model: ModelConfig) -> Int[np.ndarray, "k"]:
    """The label of each class; without classes, the null's."""
    return np.arange(max(1, model.n_classes), dtype=np.int32)


ShownLabels = Sequence[int | str] | Int[np.ndarray, "n"]


def label_texts(labels: ShownLabels, names: Sequence[str]) -> list[str] | None:
    """What stands below every picture: its caption, or its class's name if it has one."""
    if names:
        return [label if isinstance(label, str) else names[label] for label in labels]
    return [label for label in labels if isinstance(label, str)] or None
