"""Inputs and helpers shared by the tests of data.caption_cache."""

import hashlib

import numpy as np

from data import text_encoders
from data.caption_cache import CaptionStore

TOWERS, REVISIONS = ["us/clip", "us/t5"], ["0123456789ab", "ba9876543210"]
CAPTIONS = [f"caption {i}{' of many words' * (i % 3)}" for i in range(10)]


class FakeTowers:
    """Noise that is a function of the caption, a token per character. Keeps what it is given."""

    width, pooled = 6, 4

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def __call__(self):
        return self

    def encode(self, captions, batch_size=64):
        if self.fails_at is not None and len(self.asked) >= self.fails_at:
            raise KeyboardInterrupt
        self.asked += captions
        return [self.embedding(caption) for caption in captions]

    def embedding(self, caption):
        seed = int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16)
        noise = np.random.default_rng(seed).standard_normal((len(caption) + 1, 6))
        tokens, pooled = noise[1:].astype("f2"), noise[0, :4].astype("f2")
        return text_encoders.CaptionEmbedding(tokens, pooled, len(caption) > 30)


def never():
    raise AssertionError("the towers were made")


def open_store(folder, wanted=CAPTIONS, encoder=never, towers=TOWERS, revisions=REVISIONS):
    return CaptionStore.open(folder, wanted, towers, revisions=revisions, encoder=encoder)


def assert_holds(store, wanted):
    batch = store(store.ids(wanted))
    for i, caption in enumerate(wanted):
        expected = FakeTowers().embedding(caption)
        np.testing.assert_array_equal(batch.mask[i], np.arange(store.length) < len(caption))
        np.testing.assert_array_equal(batch.tokens[i, : len(caption)], expected.tokens)
        assert not batch.tokens[i, len(caption) :].any()
        np.testing.assert_array_equal(batch.pooled[i], expected.pooled)
    assert batch.tokens.dtype == batch.pooled.dtype == np.float16
