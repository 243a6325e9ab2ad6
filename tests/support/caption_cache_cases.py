"""Inputs and helpers shared by the tests of data.caption_cache."""

import hashlib

import numpy as np

from data import text_encoders
from data.caption_cache import CaptionStore

ENCODERS = ["us/clip", "us/t5"]
REVISIONS = ["0123456789ab", "ba9876543210"]
CAPTIONS = [f"caption {i}{' of many words' * (i % 3)}" for i in range(10)]


class FakeEncoders:
    """Text encoders whose embeddings are noise: a function of the caption, a token per character.

    `received` has the captions that were encoded.
    """

    width = 6
    pooled = 4

    def __init__(self, fails_at=None):
        self.received = []
        self.fails_at = fails_at

    def __call__(self):
        return self

    def encode(self, captions, batch_size=64):
        if self.fails_at is not None and len(self.received) >= self.fails_at:
            raise KeyboardInterrupt
        self.received += captions
        return [self.embedding(caption) for caption in captions]

    def embedding(self, caption):
        seed = int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16)
        noise = np.random.default_rng(seed).standard_normal((len(caption) + 1, 6))
        tokens, pooled = noise[1:].astype("f2"), noise[0, :4].astype("f2")
        return text_encoders.CaptionEmbedding(tokens, pooled, len(caption) > 30)


def never():
    raise AssertionError("the text encoders were loaded")


def open_store(
    folder, captions=CAPTIONS, load_encoders=never, encoders=ENCODERS, revisions=REVISIONS
):
    return CaptionStore.open(
        folder, captions, encoders, revisions=revisions, load_encoders=load_encoders
    )


def assert_holds(store, captions):
    batch = store(store.caption_ids(captions))
    for i, caption in enumerate(captions):
        expected = FakeEncoders().embedding(caption)
        np.testing.assert_array_equal(batch.mask[i], np.arange(store.length) < len(caption))
        np.testing.assert_array_equal(batch.tokens[i, : len(caption)], expected.tokens)
        assert not batch.tokens[i, len(caption) :].any()
        np.testing.assert_array_equal(batch.pooled[i], expected.pooled)
    assert batch.tokens.dtype == batch.pooled.dtype == np.float16
