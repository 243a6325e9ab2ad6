"""Captions to tokens and a pooled vector, by the text encoders of Hugging Face.

Knows nothing of JAX, datasets or files of ours. transformers and torch are imported only when
something is encoded.
"""

import gc
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16

from data.batch import EncodedCaption
from runtime.errors import UserError

CLIP_MODEL_TYPES = ("clip", "clip_text_model")
T5_TOKENS = 256  # as diffusers' SD3; positions that are relative have no end of their own
REVISION_DIGITS = 12
HUB_SECONDS = 10
TOKENIZER_FILES = ("config.json", "*token*", "vocab*", "merges*", "*.model")
WEIGHT_FILES = ("*.safetensors", "*.bin")


class CaptionEmbedding(NamedTuple):
    """What is kept of one caption, unpadded; the null caption has no tokens."""

    tokens: Float16[np.ndarray, "n e"]
    pooled: Float16[np.ndarray, "p"]
    cut: bool  # the caption was longer than a tower takes; of SD3's, than any does


def pad_embeddings(embeddings: Sequence[CaptionEmbedding], length: int) -> EncodedCaption:
    """At least one embedding, each with zeros up to `length` tokens or cut to it."""
    n, (first, *_) = len(embeddings), embeddings
    tokens = np.zeros((n, length, first.tokens.shape[1]), first.tokens.dtype)
    mask = np.zeros((n, length), bool)
    for i, embedding in enumerate(embeddings):
        kept = embedding.tokens[:length]
        tokens[i, : len(kept)] = kept
        mask[i, : len(kept)] = True
    return EncodedCaption(tokens, mask, np.stack([embedding.pooled for embedding in embeddings]))


def find_revision(tower: str) -> str | None:
    """12 digits that change when the tower's weights or tokenizer do; None if they cannot be told.

    For a folder they are a hash of its files, of large ones' ends; for an id of the hub they are
    the newest commit's, offline the newest that is cached.
    """
    folder = Path(tower).expanduser()
    commit = _folder_hash(folder) if folder.is_dir() else next(_commits(tower), None)
    return commit and commit[:REVISION_DIGITS]


def _folder_hash(folder: Path) -> str:
    def files(patterns: Sequence[str]) -> list[Path]:
        found = {path for pattern in patterns for path in folder.glob(pattern)}
        return sorted(path for path in found if path.is_file())

    digest, mib = hashlib.sha256(), 2**20
    for path in files(TOKENIZER_FILES):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in files(WEIGHT_FILES):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(mib))
            file.seek(max(0, size - mib))
            digest.update(file.read(mib))
    return digest.hexdigest()


def _commits(tower: str) -> Iterator[str]:
    """Commits of an id of the hub, those that cost least to ask for first."""
    import huggingface_hub
    from huggingface_hub.file_download import repo_folder_name

    hub = huggingface_hub.HfApi()
    # Offline, refused, unknown: the hub's client raises its transport's kinds besides its own.
    with suppress(Exception):
        yield str(hub.model_info(tower, timeout=HUB_SECONDS).sha)
    with suppress(ValueError):  # it cannot be an id
        cached = repo_folder_name(repo_id=tower, repo_type="model")
        found = Path(huggingface_hub.constants.HF_HUB_CACHE).glob(
            f"{cached}/snapshots/*/config.json"
        )
        newest_first = sorted(found, key=lambda path: path.lstat().st_mtime, reverse=True)
        yield from (path.parent.name for path in newest_first)
    with suppress(Exception):
        yield from (commit.commit_id for commit in hub.list_repo_commits(tower))


class TextEncoders:
    """Text encoders, joined as in Stable Diffusion 3 (Esser et al. 2024, §4 and appendix B).

    A CLIP gives its last but one hidden states as tokens, and the projected state of the end token
    as the pooled vector; a T5, or any encoder as BERT, its last hidden states. CLIPs' tokens lie
    side by side along the channels, those of the other towers after them along the sequence, and
    all are filled with zeros up to the widest. The CLIPs' pooled vectors are concatenated.

    Other than there, no token is padding; if no tower is a CLIP, pooled are the means of each one's
    tokens; and a blank caption, the null, has no tokens and zeros as its pooled vector.

    For the published SD3 that is not so, and its `full_width` asks for its ways: every caption is
    filled up with its tower's padding, which counts like any token, also to the tower itself; a
    blank caption is encoded like any other; and if there is no T5, its tokens are zeros, by which
    SD3 is trained to do without (§5.3.3).
    """

    def __init__(
        self,
        names: Sequence[str],
        revisions: Sequence[str | None] = (),
        *,
        full_width: int | None = None,
    ):
        """Loads all of them, on a GPU of torch's if there is one.

        Args:
            names: folders, or ids of the hub.
            revisions: each one's `revision`, of no account for folders.
            full_width: channels of a token as the published SD3 takes it; None for our own models.

        Raises:
            UserError: a tower cannot be loaded or is no text encoder; a library is missing; the
                towers are wider than `full_width`.
        """
        revisions = revisions or [None] * len(names)
        self._towers = [_TextEncoder(*pair) for pair in zip(names, revisions, strict=True)]
        clips = [tower for tower in self._towers if tower.is_clip]
        others = [tower.width for tower in self._towers if not tower.is_clip]
        self.width = max(sum(tower.width for tower in clips), *others, 0)
        self.pooled = sum(tower.pooled for tower in clips or self._towers)
        self._full = full_width is not None
        if full_width is not None and self.width > full_width:
            raise UserError(
                f"the tokens of {', '.join(names)} have {self.width} channels: the model takes "
                f"{full_width}"
            )
        self.width = full_width or self.width

    def encode(self, captions: Sequence[str], batch_size: int = 64) -> list[CaptionEmbedding]:
        """In the captions' order; a caption's embedding does not depend on those beside it."""
        null = CaptionEmbedding(np.zeros((0, self.width), "f2"), np.zeros(self.pooled, "f2"), False)
        encoded = [null] * len(captions)
        asked = [i for i, caption in enumerate(captions) if self._full or caption.strip()]
        if asked:
            spoken = [captions[i] for i in asked]
            outputs = [tower.encode(spoken, batch_size, full=self._full) for tower in self._towers]
            for i, *parts in zip(asked, *outputs):
                encoded[i] = self._join(parts)
        return encoded

    def _join(self, parts: Sequence[CaptionEmbedding]) -> CaptionEmbedding:
        clips = [part for tower, part in zip(self._towers, parts) if tower.is_clip]
        rest = [part.tokens for tower, part in zip(self._towers, parts) if not tower.is_clip]
        if clips:
            n = max(len(part.tokens) for part in clips)
            grown = [_zero_padded(part.tokens, n, part.tokens.shape[1]) for part in clips]
            rest.insert(0, np.concatenate(grown, axis=1))
        if self._full and len(clips) == len(parts):
            rest.append(np.zeros((T5_TOKENS, 0), "f2"))
        tokens = np.concatenate([_zero_padded(x, len(x), self.width) for x in rest])
        pooled = np.concatenate([part.pooled for part in clips or parts])
        cut = (all if self._full else any)(part.cut for part in parts)
        return CaptionEmbedding(tokens, pooled, cut)


def check_revisions(towers: Sequence[str], revisions: Sequence[str | None]) -> None:
    """Raises UserError if a tower's folder no longer holds what it held, as far as that is known.
    (Of the hub, the revision is what is loaded.)
    """
    for tower, known in zip(towers, revisions, strict=True):
        folder = Path(tower).expanduser()
        if known and folder.is_dir() and (now := find_revision(tower)) != known:
            raise UserError(
                f"the text encoder '{tower}' is not the one that was trained with: its revision is "
                f"{now}, not {known}"
            )


def encode_captions(
    captions: Sequence[str],
    towers: Sequence[str],
    revisions: Sequence[str | None],
    *,
    length: int,
    full_width: int | None = None,
) -> EncodedCaption:
    """New captions as the towers of a trained run see them, padded to `length` or to the longest.

    Args:
        full_width: as `Towers` takes it, for the published SD3.

    Raises:
        UserError: a tower is not to be had, is no longer the one of these revisions, or takes less
            than a whole caption.
    """
    check_revisions(towers, revisions)
    embeddings = TextEncoders(towers, revisions, full_width=full_width).encode(captions)
    release_gpu_memory()
    for caption, embedding in zip(captions, embeddings):
        if embedding.cut:
            raise UserError(f"longer than the text encoder takes: '{caption}'")
    return pad_embeddings(embeddings, max(length, *(len(e.tokens) for e in embeddings)))


class _TextEncoder:
    """One of them, not yet joined."""

    def __init__(self, name: str, revision: str | None):
        with _quiet():
            self._tokenizer, self._model, config = _load(name, revision)
        self.is_clip = config.model_type in CLIP_MODEL_TYPES
        self.width: int = self._model.config.hidden_size
        self.pooled: int = self._model.config.projection_dim if self.is_clip else self.width
        positions = getattr(self._model.config, "max_position_embeddings", T5_TOKENS)
        self._most = min(positions, self._tokenizer.model_max_length)

    def encode(
        self, captions: Sequence[str], batch_size: int, *, full: bool = False
    ) -> list[CaptionEmbedding]:
        """`full`: with padding up to the most tokens, and nothing hidden."""
        with _quiet():
            whole, ids = self._tokenize(captions, None), self._tokenize(captions, self._most)
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # so that padding is small
            encoded = {}
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                some = [ids[i] for i in rows]
                for i, (tokens, pooled) in zip(rows, self._forward(some, full=full)):
                    cut = len(whole[i]) > len(ids[i])
                    encoded[i] = CaptionEmbedding(_to_half(tokens), _to_half(pooled), cut)
        return [encoded[i] for i in range(len(ids))]

    def _tokenize(self, captions: Sequence[str], length: int | None) -> list[list[int]]:
        return self._tokenizer(
            list(captions), truncation=length is not None, max_length=length, verbose=False
        )["input_ids"]

    def _forward(
        self, ids: Sequence[Sequence[int]], *, full: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import torch

        lengths = np.array([len(row) for row in ids])
        mask = np.arange(self._most if full else lengths.max()) < lengths[:, None]
        padded = np.full(mask.shape, self._tokenizer.pad_token_id or 0)
        padded[mask] = np.concatenate(ids)
        if full:
            lengths, mask = np.full_like(lengths, self._most), np.ones_like(mask)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(padded).to(self._model.device),
                attention_mask=torch.from_numpy(mask.astype(int)).to(self._model.device),
                output_hidden_states=self.is_clip,
            )
        tokens = output.hidden_states[-2] if self.is_clip else output.last_hidden_state
        tokens = [row[:n] for row, n in zip(tokens.float().cpu().numpy(), lengths)]
        if self.is_clip:
            return zip(tokens, output.text_embeds.float().cpu().numpy())
        return ((row, row.mean(axis=0)) for row in tokens)


def release_gpu_memory() -> None:
    """Gives the GPU's memory of towers that are held no more back: torch would keep it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _load(name: str, revision: str | None) -> tuple[Any, Any, Any]:
    """Tokenizer, model and the configuration of the whole, of which the model may be a part."""
    import torch
    import transformers

    if (folder := Path(name).expanduser()).is_dir():
        name, revision = str(folder), None
    elif revision:  # the hub takes whole commits only
        revision = next((c for c in _commits(name) if c.startswith(revision)), revision)
    source: dict[str, Any] = {"pretrained_model_name_or_path": name, "revision": revision}
    with _one_line(name):
        config = transformers.AutoConfig.from_pretrained(**source)
    kind: Any
    if config.model_type in CLIP_MODEL_TYPES:
        kind = transformers.CLIPTextModelWithProjection
    elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        kind = transformers.AutoModelForTextEncoding
    elif type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        kind = transformers.AutoModel
    else:
        raise UserError(
            f"'{name}' is no text encoder (as CLIP, T5 or BERT) but a {config.model_type}"
        )
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():  # where T5's states overflow float16
        device, dtype = "cuda", torch.bfloat16 if "t5" in config.model_type else torch.float16
    with _one_line(name):
        words = source | {"pretrained_model_name_or_path": str(_tokenizer_place(name))}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**words)
        model, report = kind.from_pretrained(**source, dtype=dtype, output_loading_info=True)
        model.to(device)
    # transformers makes up what is missing, be it weights or a vocabulary, and goes on.
    if lacking := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise UserError(f"the text encoder '{name}' is not whole: its weights lack {lacking[0]}")
    if len(tokenizer) < model.config.vocab_size / 2:
        raise UserError(f"the text encoder '{name}' is not whole: it lacks its tokenizer's files")
    model = model.get_encoder() if config.is_encoder_decoder else model
    return tokenizer, model.eval(), config


def _tokenizer_place(name: str) -> str | Path:
    """Where a tower's tokenizer is: in its folder, or in a pipeline of diffusers beside it, where
    text_encoder_2 has tokenizer_2.
    """
    folder = Path(name)
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return beside if beside.is_dir() else name


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        where = "" if Path(name).is_dir() else ", which is no folder"
        raise UserError(f"cannot load the text encoder '{name}'{where}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Imports the libraries, with no warnings, no reports and no bars but those of downloads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns at every later fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torch  # noqa: F401
            from transformers import logging
        except ImportError:
            raise UserError(
                "encoding captions needs transformers and torch:"
                " .venv/bin/pip install --group text"
            ) from None
        level = logging.get_verbosity()
        bars = logging.set_tqdm_hook(lambda _, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            logging.set_tqdm_hook(bars)


def _zero_padded(x: np.ndarray, n: int, width: int) -> np.ndarray:
    return np.pad(x, ((0, n - len(x)), (0, width - x.shape[1])))


def _to_half(x: np.ndarray) -> np.ndarray:
    """Clipped to what float16 holds: an infinity would make every attention to it a NaN."""
    return np.clip(x, -65504, 65504).astype(np.float16)
