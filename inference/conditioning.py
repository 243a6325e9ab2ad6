"""Conditioning of a model: classes, captions, or none; from a person's words to its labels.

    trained.conditioning.request(8, labels=["cat", "ship"])
    trained.conditioning.request(4, prompts=["a cat on a sofa"])

Everything that differs between a model of classes and one of captions is here. Sampling itself
takes labels of either kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Int

from data import text_encoders
from data.batch import EncodedCaption
from data.caption_cache import CaptionStore
from data.rows import Split
from inference.labels import (
    SampleRequest,
    Seeds,
    label_ids,
    label_texts,
    random_ids,
    spread_evenly,
)
from inference.sampler import Labels, check_seeds
from model import ModelConfig
from runtime.errors import UserError

OpenSplit = Callable[[], Split]


class Conditioning(ABC):
    """The conditioning of a model: the kind of its labels.

    Attributes:
        takes_prompts: whether a person describes samples in free text.
        example: flags of generate.py that name samples, for a person to complete.
        choices: names, or else numbers, of all labels that a person can choose from.
        names: class names by label, if there are any.
        encoders: folders or hub ids of the text encoders.
        revisions: their commits.
        full_width: channels of a token of SD3, if captions are encoded as SD3 takes them; see
            `text_encoders.TextEncoders`.
    """

    takes_prompts: ClassVar[bool] = False
    example: str = ""
    choices: Sequence[str] = ()
    names: Sequence[str] = ()
    encoders: Sequence[str] = ()
    revisions: Sequence[str | None] = ()
    full_width: int | None = None

    @property
    def store(self) -> CaptionStore | None:
        """The encoded captions of a dataset in training."""
        return None

    @property
    def null(self) -> EncodedCaption | None:
        """One label in place of the null label, for a model that has another one than the null
        class or the caption without tokens.
        """
        return None

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the `ModelConfig` that follow from it."""
        return {}

    @property
    @abstractmethod
    def title(self) -> str:
        """A few words, such as "10 classes"."""

    @abstractmethod
    def describe(self) -> str:
        """Describe it in a sentence, for readers of exported weights."""

    # --- labels of samples ------------------------------------------------------------------------

    @abstractmethod
    def check(
        self, *, labels: Sequence[str] = (), prompts: Sequence[str] = (), negative: bool = False
    ) -> None:
        """Raises UserError if these words, or a negative prompt, do not fit the model."""

    @abstractmethod
    def request(
        self,
        n: int,
        *,
        labels: Sequence[str] = (),
        prompts: Sequence[str] = (),
        negative: str | None = None,
        seed: Seeds = 0,
    ) -> SampleRequest:
        """Request n samples: equal shares of each label or prompt, those of one side by side.

        Args:
            labels: class names or numbers; all classes if empty.
            prompts: captions.
            negative: a caption in place of the null label of guidance.

        Raises:
            UserError: the words do not fit the model, or a seed is out of range.
        """

    @abstractmethod
    def request_balanced(self, n: int, open_split: OpenSplit, *, seed: int = 0) -> SampleRequest:
        """Request n samples of one class after the other, so that any stretch of them is balanced,
        or of the first caption of each row of a split.

        Raises:
            UserError: the model was trained on captions, and they cannot be read or encoded.
        """

    def request_random(self, n: int, *, seed: int = 0) -> SampleRequest:
        """Request n samples of random classes, which depend on the seed and their index alone.

        Raises:
            UserError: the model was trained on captions, or the seed is out of range.
        """
        raise UserError("random labels need a model of classes")

    @abstractmethod
    def encode(self, words: Sequence[int | str]) -> Labels:
        """The model's labels for class numbers, class names or captions.

        Raises:
            UserError: there is no such class.
        """

    # --- labels of a dataset ----------------------------------------------------------------------

    @abstractmethod
    def examples(self, n: int, open_split: OpenSplit) -> list[str]:
        """Up to n different words to show a model by: classes, evenly spaced among all, or captions
        of a split of the dataset.
        """

    @abstractmethod
    def all_words(self, split: Split) -> Sequence[int | str]:
        """Each class, or each image's first caption: the words of samples to compare with images
        of a split.
        """

    @abstractmethod
    def grid_words(self, n: int, split: Split) -> list[int] | list[str]:
        """The words of a row of samples during training: up to n classes spread over all of them,
        or n captions of a split.
        """

    @abstractmethod
    def of_rows(
        self, split: Split, rows: Int[np.ndarray, "b"]
    ) -> tuple[Int[np.ndarray, "b"] | EncodedCaption, Sequence[str]]:
        """The labels of these rows of a split, and their names; none if there are none."""

    @abstractmethod
    def class_ids(self, words: Sequence[str]) -> list[int]:
        """The classes that words name, to choose images of a dataset by; empty for all images.

        Raises:
            UserError: there is no such class.
        """

    @abstractmethod
    def blank(self, n: int) -> Any:
        """Labels of a batch of n rows that stands for any other."""


class Classes(Conditioning):
    """Classes by number and perhaps by name; label `n_classes` is the null label."""

    def __init__(self, n_classes: int, names: Sequence[str] = ()):
        self.n_classes = n_classes
        self.names = list(names)
        self.choices = self.names or [str(i) for i in range(n_classes)]

    @property
    def all(self) -> Int[np.ndarray, "k"]:
        """The label of each class; without classes, the null label."""
        return np.arange(max(1, self.n_classes), dtype=np.int32)

    @property
    def title(self) -> str:
        return f"{self.n_classes} classes"

    def describe(self) -> str:
        return (
            f"It is conditioned on one of {self.n_classes} classes; {self.n_classes} is the null "
            "label."
        )

    def check(
        self, *, labels: Sequence[str] = (), prompts: Sequence[str] = (), negative: bool = False
    ) -> None:
        if prompts or negative:
            raise UserError("this model was trained without captions; choose classes by --labels")
        self.encode(labels)

    def request(
        self,
        n: int,
        *,
        labels: Sequence[str] = (),
        prompts: Sequence[str] = (),
        negative: str | None = None,
        seed: Seeds = 0,
    ) -> SampleRequest:
        self.check(labels=labels, prompts=prompts, negative=negative is not None)
        check_seeds(seed)
        ids = self.encode(labels) or self.all.tolist()
        return SampleRequest(spread_evenly(ids, n), self.names, self.all, seed)

    def request_balanced(self, n: int, open_split: OpenSplit, *, seed: int = 0) -> SampleRequest:
        label_index = np.arange(n, dtype=np.int32) % len(self.all)
        return SampleRequest(label_index, self.names, self.all, seed)

    def request_random(self, n: int, *, seed: int = 0) -> SampleRequest:
        check_seeds(seed)
        return SampleRequest(random_ids(n, len(self.all), seed=seed), self.names, self.all, seed)

    def encode(self, words: Sequence[int | str]) -> list[int]:
        return label_ids(words, self.names, self.n_classes)

    def examples(self, n: int, open_split: OpenSplit) -> list[str]:
        ids = np.linspace(0, len(self.choices) - 1, min(n, len(self.choices))).round().astype(int)
        return [str(self.choices[i]) for i in np.unique(ids)]

    def all_words(self, split: Split) -> Sequence[int | str]:
        return self.all.tolist()

    def grid_words(self, n: int, split: Split) -> list[int] | list[str]:
        ids = np.linspace(0, self.n_classes - 1, min(n, self.n_classes))
        return ids.astype(int).tolist()

    def of_rows(
        self, split: Split, rows: Int[np.ndarray, "b"]
    ) -> tuple[Int[np.ndarray, "b"] | EncodedCaption, Sequence[str]]:
        labels = split.labels[rows]
        return labels, label_texts(labels, self.names) or ()

    def class_ids(self, words: Sequence[str]) -> list[int]:
        return self.encode(words)

    def blank(self, n: int) -> Any:
        return np.zeros(n, np.int32)


class Unconditional(Classes):
    """No conditioning: the only label is the null label, 0."""

    NULL_SAMPLES = 4  # in a row of a grid

    def __init__(self):
        super().__init__(0)

    @property
    def title(self) -> str:
        return "unconditional"

    def describe(self) -> str:
        return "It is unconditional."

    def grid_words(self, n: int, split: Split) -> list[int] | list[str]:
        return [0] * self.NULL_SAMPLES

    def of_rows(
        self, split: Split, rows: Int[np.ndarray, "b"]
    ) -> tuple[Int[np.ndarray, "b"] | EncodedCaption, Sequence[str]]:
        return np.zeros(len(rows), np.int32), ()


class Captions(Conditioning):
    """Captions in free text.

    Args:
        encode: encodes captions as the model takes them.
        encoders: folders or hub ids of the text encoders.
        full_width: of SD3, whose null label is the encoded "", not the caption without tokens.
        open_store: opens the encoded captions of a dataset, and encodes what is missing.
    """

    takes_prompts = True
    example = '--prompts "…"'

    def __init__(
        self,
        encode: Callable[[Sequence[str]], EncodedCaption],
        encoders: Sequence[str],
        *,
        open_store: Callable[[Sequence[str]], CaptionStore],
        full_width: int | None = None,
    ):
        self._encode = encode
        self._open_store = open_store
        self.encoders = encoders
        self.full_width = full_width

    @property
    def title(self) -> str:
        return "captions"

    def describe(self) -> str:
        encoders = ", ".join(f"`{encoder}`" for encoder in self.encoders)
        return f"It is conditioned on captions, encoded by {encoders}."

    def check(
        self, *, labels: Sequence[str] = (), prompts: Sequence[str] = (), negative: bool = False
    ) -> None:
        if labels:
            raise UserError('this model was trained on captions; name them by --prompts "…"')

    def request(
        self,
        n: int,
        *,
        labels: Sequence[str] = (),
        prompts: Sequence[str] = (),
        negative: str | None = None,
        seed: Seeds = 0,
    ) -> SampleRequest:
        self.check(labels=labels)
        if not prompts:
            raise UserError('this model was trained on captions; name them by --prompts "…"')
        check_seeds(seed)
        if negative is None and self.full_width:
            negative = ""
        if negative is None:
            encoded, encoded_negative = self.encode(prompts), None
        else:
            # In one call, so that all have the same number of tokens.
            encoded = self.encode([*prompts, negative])
            encoded_negative = jax.tree.map(lambda x: x[-1:], encoded)
        label_index = spread_evenly(range(len(prompts)), n)
        return SampleRequest(label_index, prompts, encoded, seed, encoded_negative)

    def request_balanced(self, n: int, open_split: OpenSplit, *, seed: int = 0) -> SampleRequest:
        try:
            captions = [str(word) for word in self.all_words(open_split())][:n]
            store = self._open_store(captions)
        except UserError as error:
            raise UserError(
                f"{error}; or let generate.py write an .npz of --prompts, and pass it by --npz"
            ) from None
        ids = store.caption_ids(captions)
        null = store(store.caption_ids([""])) if self.full_width else None
        # Thousands of captions may be gigabytes: each batch reads its own.
        return SampleRequest(
            np.arange(n, dtype=np.int32) % len(captions),
            captions,
            lambda rows: store(ids[rows]),
            seed,
            null,
        )

    @cached_property
    def null(self) -> EncodedCaption | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.encode([""]) if self.full_width else None

    def encode(self, words: Sequence[int | str]) -> EncodedCaption:
        if not words:
            raise UserError("there are no captions to sample")
        return self._encode([str(word) for word in words])

    def examples(self, n: int, open_split: OpenSplit) -> list[str]:
        return first_captions(_captions_of(open_split()))[:n]

    def all_words(self, split: Split) -> Sequence[int | str]:
        return [texts[0] for texts in _captions_of(split)]

    def grid_words(self, n: int, split: Split) -> list[int] | list[str]:
        return first_captions(split.captions)[:n]

    def of_rows(
        self, split: Split, rows: Int[np.ndarray, "b"]
    ) -> tuple[Int[np.ndarray, "b"] | EncodedCaption, Sequence[str]]:
        texts = _captions_of(split)
        captions = [texts[row][0] for row in rows]
        return self.encode(captions), captions

    def class_ids(self, words: Sequence[str]) -> list[int]:
        return []

    def blank(self, n: int) -> Any:
        raise NotImplementedError("batches are made in training, by StoredCaptions")


class StoredCaptions(Captions):
    """Captions of a dataset in training, encoded once; new ones are encoded when they come."""

    def __init__(self, store: CaptionStore, encoders: Sequence[str]):
        super().__init__(
            self._encode_or_look_up,
            encoders,
            open_store=lambda _: store,
            full_width=store.full_width,
        )
        self._store = store
        self.revisions = store.revisions

    @property
    def store(self) -> CaptionStore:
        return self._store

    @property
    def fields(self) -> dict[str, Any]:
        store = self._store
        return {
            "text_length": store.length,
            "text_width": store.width,
            "pooled_width": store.pooled,
        }

    @property
    def title(self) -> str:
        n_cut = self.store.n_truncated
        cut = f"; {n_cut} are longer and were cut" if n_cut else ""
        return f"captions, padded to {self.store.length} tokens{cut}"

    def _encode_or_look_up(self, captions: Sequence[str]) -> EncodedCaption:
        store = self.store
        if all(caption in store for caption in captions):
            return store(store.caption_ids(list(captions)))
        return text_encoders.encode_captions(
            list(captions),
            self.encoders,
            store.revisions,
            length=store.length,
            full_width=self.full_width,
        )

    def blank(self, n: int) -> Any:
        return self.store.null_captions(n)


def _captions_of(split: Split) -> list[tuple[str, ...]]:
    """Return the captions of each row of a split.

    Raises:
        UserError: it was opened without captions.
    """
    if not split.captions:
        raise UserError(f"dataset '{split.config.name}', split '{split.name}' has no captions")
    return split.captions


def first_captions(captions: Sequence[Sequence[str]]) -> list[str]:
    """The first caption of each row, without repeats."""
    return list(dict.fromkeys(texts[0] for texts in captions))


def class_conditioning(n_classes: int, names: Sequence[str] = ()) -> Classes:
    """Classes, or `Unconditional` if there are none."""
    return Classes(n_classes, names) if n_classes else Unconditional()


def conditioning_of(model: ModelConfig, names: Sequence[str], captions: Captions) -> Conditioning:
    """The conditioning of a model: `captions` if it takes them, else its classes."""
    return captions if model.text_width else class_conditioning(model.n_classes, names)
