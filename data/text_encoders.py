"""Captions to tokens and a pooled vector, by the text encoders of Hugging Face.

Knows nothing of JAX, datasets or files of ours. transformers and torch are imported only when
something is encoded.
"""

import gc
import hashlib
import os
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16

from data.batch import EncodedCaption
from runtime.errors import UserError

CLIP_MODEL_TYPES = ("clip", "clip_text_model")
T5_TOKENS = 256  # as in diffusers' SD3; relative positions have no limit of their own
REVISION_DIGITS = 12
HUB_SECONDS = 10
TOKENIZER_FILES = ("config.json", "*token*", "vocab*", "merges*", "*.model")
WEIGHT_FILES = ("*.safetensors", "*.bin")
MIB = 2**20


class CaptionEmbedding(NamedTuple):
    """The embedding of one caption, unpadded. The null caption has no tokens."""

    tokens: Float16[np.ndarray, "n e"]
    pooled: Float16[np.ndarray, "p"]
    truncated: bool  # longer than one of the encoders takes; for the published SD3, than all take


def encode_captions(
    captions: Sequence[str],
    encoders: Sequence[str],
    revisions: Sequence[str | None],
    *,
    length: int,
    full_width: int | None = None,
) -> EncodedCaption:
    """Encode new captions for a trained model, padded to `length` or to the longest.

    Args:
        captions: at least one.
        encoders: the model's text encoders, folders or ids of the hub.
        revisions: the revisions that the model was trained with; None where unknown.
        length: tokens to pad to.
        full_width: for SD3, see `TextEncoders`.

    Raises:
        UserError: an encoder cannot be loaded or no longer has its revision, or a caption is too
            long.
    """
    check_revisions(encoders, revisions)
    embeddings = TextEncoders(encoders, revisions, full_width=full_width).encode(captions)
    release_gpu_memory()
    for caption, embedding in zip(captions, embeddings):
        if embedding.truncated:
            raise UserError(f"longer than the text encoder takes: '{caption}'")
    return pad_embeddings(embeddings, max(length, *(len(e.tokens) for e in embeddings)))


def pad_embeddings(embeddings: Sequence[CaptionEmbedding], length: int) -> EncodedCaption:
    """Stack at least one embedding, each padded with zeros or cut to `length` tokens."""
    n = len(embeddings)
    first = embeddings[0].tokens
    tokens = np.zeros((n, length, first.shape[1]), first.dtype)
    mask = np.zeros((n, length), bool)
    for i, embedding in enumerate(embeddings):
        shown = embedding.tokens[:length]
        tokens[i, : len(shown)] = shown
        mask[i, : len(shown)] = True
    return EncodedCaption(tokens, mask, np.stack([embedding.pooled for embedding in embeddings]))


# --- several encoders, joined ---------------------------------------------------------------------


class TextEncoders:
    """Text encoders, joined as in Stable Diffusion 3 (Esser et al. 2024, §4 and appendix B).

    A CLIP gives its last but one hidden states as tokens, and the projected state of the end token
    as the pooled vector; a T5, or any encoder like BERT, its last hidden states. The tokens of
    CLIPs are joined along the channels. Those of other encoders follow along the sequence. All are
    padded with zeros to the widest. The pooled vectors of CLIPs are concatenated.

    Unlike in SD3, no token is padding. Without a CLIP, the pooled vector is the mean of each
    encoder's tokens. A blank caption, the null caption, has no tokens and a pooled vector of zeros.

    With `full_width`, captions are encoded as SD3 expects: each is padded to the
    encoder's full length with tokens that count like any other, also to the encoder itself; a blank
    caption is encoded like any other; and without a T5, its tokens are zeros, with which SD3 was
    trained to do (§5.3.3).
    """

    def __init__(
        self,
        names: Sequence[str],
        revisions: Sequence[str | None] = (),
        *,
        full_width: int | None = None,
    ):
        """Load all encoders, on torch's GPU if there is one.

        Args:
            names: folders, or ids of the hub.
            revisions: the revision of each, which is ignored for folders.
            full_width: channels of a token of SD3; None for other models.

        Raises:
            UserError: an encoder cannot be loaded or is no text encoder; a library is missing; the
                encoders are wider than `full_width`.
        """
        revisions = revisions or [None] * len(names)
        self._encoders = [
            _TextEncoder(name, revision) for name, revision in zip(names, revisions, strict=True)
        ]
        clips = [encoder for encoder in self._encoders if encoder.is_clip]
        other_widths = [encoder.width for encoder in self._encoders if not encoder.is_clip]
        self.width = max(sum(encoder.width for encoder in clips), *other_widths, 0)
        self.pooled = sum(encoder.pooled for encoder in clips or self._encoders)
        self._full = full_width is not None
        if full_width is not None and self.width > full_width:
            raise UserError(
                f"the tokens of {', '.join(names)} have {self.width} channels: the model takes "
                f"{full_width}"
            )
        self.width = full_width or self.width

    def encode(self, captions: Sequence[str], batch_size: int = 64) -> list[CaptionEmbedding]:
        """Encode captions in their order. The result does not depend on how they are batched."""
        null = CaptionEmbedding(np.zeros((0, self.width), "f2"), np.zeros(self.pooled, "f2"), False)
        embeddings = [null] * len(captions)
        indices = [i for i, caption in enumerate(captions) if self._full or caption.strip()]
        if indices:
            texts = [captions[i] for i in indices]
            outputs = [
                encoder.encode(texts, batch_size, full=self._full) for encoder in self._encoders
            ]
            for i, *parts in zip(indices, *outputs):
                embeddings[i] = self._join(parts)
        return embeddings

    def _join(self, parts: Sequence[CaptionEmbedding]) -> CaptionEmbedding:
        """Join one caption's embeddings by all encoders."""
        clips = [part for encoder, part in zip(self._encoders, parts) if encoder.is_clip]
        sequences = [
            part.tokens for encoder, part in zip(self._encoders, parts) if not encoder.is_clip
        ]
        if clips:
            n = max(len(part.tokens) for part in clips)
            padded = [_zero_pad(part.tokens, n, part.tokens.shape[1]) for part in clips]
            sequences.insert(0, np.concatenate(padded, axis=1))
        if self._full and len(clips) == len(parts):
            sequences.append(np.zeros((T5_TOKENS, 0), "f2"))
        tokens = np.concatenate([_zero_pad(x, len(x), self.width) for x in sequences])
        pooled = np.concatenate([part.pooled for part in clips or parts])
        combine = all if self._full else any
        return CaptionEmbedding(tokens, pooled, combine(part.truncated for part in parts))


class _TextEncoder:
    """One text encoder with its tokenizer."""

    def __init__(self, name: str, revision: str | None):
        with _silence_libraries():
            self._tokenizer, self._model, config = _load(name, revision)
        self.is_clip = config.model_type in CLIP_MODEL_TYPES
        self.width: int = self._model.config.hidden_size
        self.pooled: int = self._model.config.projection_dim if self.is_clip else self.width
        positions = getattr(self._model.config, "max_position_embeddings", T5_TOKENS)
        self._max_tokens = min(positions, self._tokenizer.model_max_length)

    def encode(
        self, captions: Sequence[str], batch_size: int, *, full: bool = False
    ) -> list[CaptionEmbedding]:
        """Encode captions in their order.

        Args:
            captions: at least one.
            batch_size: captions that are encoded together.
            full: pad each to the most tokens, and let the encoder attend to the padding.
        """
        with _silence_libraries():
            all_ids = self._tokenize(captions, None)
            ids = self._tokenize(captions, self._max_tokens)
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # so that padding is small
            encoded = {}
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                outputs = self._forward([ids[i] for i in rows], full=full)
                for i, (tokens, pooled) in zip(rows, outputs):
                    truncated = len(all_ids[i]) > len(ids[i])
                    encoded[i] = CaptionEmbedding(_to_half(tokens), _to_half(pooled), truncated)
        return [encoded[i] for i in range(len(ids))]

    def _tokenize(self, captions: Sequence[str], max_length: int | None) -> list[list[int]]:
        return self._tokenizer(
            list(captions), truncation=max_length is not None, max_length=max_length, verbose=False
        )["input_ids"]

    def _forward(
        self, ids: Sequence[Sequence[int]], *, full: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Return tokens and pooled vector of each caption, in float32."""
        import torch

        lengths = np.array([len(row) for row in ids])
        mask = np.arange(self._max_tokens if full else lengths.max()) < lengths[:, None]
        padded = np.full(mask.shape, self._tokenizer.pad_token_id or 0)
        padded[mask] = np.concatenate(ids)
        if full:
            lengths = np.full_like(lengths, self._max_tokens)
            mask = np.ones_like(mask)
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
    """Give back the GPU memory of encoders that are no longer referenced: torch would keep it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _zero_pad(x: np.ndarray, n: int, width: int) -> np.ndarray:
    return np.pad(x, ((0, n - len(x)), (0, width - x.shape[1])))


def _to_half(x: np.ndarray) -> np.ndarray:
    """Clip to the range of float16: an infinity would make every attention to it a NaN."""
    return np.clip(x, -65504, 65504).astype(np.float16)


# --- revisions ------------------------------------------------------------------------------------


def find_revision(encoder: str) -> str | None:
    """Return 12 digits that change with the weights or the tokenizer; None if they are not known.

    For a folder they are a hash of its files, with only both ends of large ones. For an id of the
    hub they are the newest commit's; offline, those of the newest commit that is cached.
    """
    folder = Path(encoder).expanduser()
    revision = _hash_folder(folder) if folder.is_dir() else next(_find_commits(encoder), None)
    return revision and revision[:REVISION_DIGITS]


def check_revisions(encoders: Sequence[str], revisions: Sequence[str | None]) -> None:
    """Check that folders still hold the encoders of these revisions, as far as they are known.

    An id of the hub needs no check: its revision is what is loaded.

    Raises:
        UserError: a folder holds another encoder.
    """
    for encoder, expected in zip(encoders, revisions, strict=True):
        if not expected or not Path(encoder).expanduser().is_dir():
            continue
        revision = find_revision(encoder)
        if revision != expected:
            raise UserError(
                f"the text encoder '{encoder}' is not the one that was trained with: its revision "
                f"is {revision}, not {expected}"
            )


def _hash_folder(folder: Path) -> str:
    def find_files(patterns: Sequence[str]) -> list[Path]:
        paths = {path for pattern in patterns for path in folder.glob(pattern)}
        return sorted(path for path in paths if path.is_file())

    digest = hashlib.sha256()
    for path in find_files(TOKENIZER_FILES):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in find_files(WEIGHT_FILES):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(MIB))
            file.seek(max(0, size - MIB))
            digest.update(file.read(MIB))
    return digest.hexdigest()


def _find_commits(name: str) -> Iterator[str]:
    """Yield commits of an id of the hub, the cheapest to find first."""
    import huggingface_hub
    from huggingface_hub.file_download import repo_folder_name

    hub = huggingface_hub.HfApi()
    # Offline, refused, unknown: the hub's client raises its transport's kinds besides its own.
    with suppress(Exception):
        yield str(hub.model_info(name, timeout=HUB_SECONDS).sha)
    with suppress(ValueError):  # it cannot be an id
        cached = repo_folder_name(repo_id=name, repo_type="model")
        configs = Path(huggingface_hub.constants.HF_HUB_CACHE).glob(
            f"{cached}/snapshots/*/config.json"
        )
        newest_first = sorted(configs, key=lambda path: path.lstat().st_mtime, reverse=True)
        yield from (path.parent.name for path in newest_first)
    with suppress(Exception):
        yield from (commit.commit_id for commit in hub.list_repo_commits(name))


# --- loading --------------------------------------------------------------------------------------


def _load(name: str, revision: str | None) -> tuple[Any, Any, Any]:
    """Load tokenizer, model, and the config of the whole that the model may be a part of."""
    import torch
    import transformers

    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
        revision = None
    elif revision:  # the hub takes whole commits only
        commits = (commit for commit in _find_commits(name) if commit.startswith(revision))
        revision = next(commits, revision)
    with _errors_in_one_line(name):
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    model_class = _find_model_class(name, config)
    device = "cpu"
    dtype = torch.float32
    if torch.cuda.is_available():
        device = "cuda"
        # The states of T5 overflow float16.
        dtype = torch.bfloat16 if "t5" in config.model_type else torch.float16
    with _errors_in_one_line(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(_find_tokenizer(name)), revision=revision
        )
        model, report = model_class.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True
        )
        model.to(device)
    # transformers makes up weights or a vocabulary that are missing, and continues.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise UserError(f"the text encoder '{name}' is incomplete: its weights lack {missing[0]}")
    if len(tokenizer) < model.config.vocab_size / 2:
        raise UserError(f"the text encoder '{name}' is incomplete: it lacks its tokenizer's files")
    if config.is_encoder_decoder:
        model = model.get_encoder()
    return tokenizer, model.eval(), config


def _find_model_class(name: str, config: Any) -> Any:
    """Find the class of transformers' that loads an encoder of this config."""
    import transformers

    if config.model_type in CLIP_MODEL_TYPES:
        return transformers.CLIPTextModelWithProjection
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return transformers.AutoModel
    raise UserError(f"'{name}' is no text encoder (as CLIP, T5 or BERT) but a {config.model_type}")


def _find_tokenizer(name: str) -> str | Path:
    """Find the tokenizer of an encoder: in its folder, or beside it in a pipeline of diffusers,
    where text_encoder_2 has tokenizer_2.
    """
    folder = Path(name)
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return beside if beside.is_dir() else name


@contextmanager
def _errors_in_one_line(name: str) -> Generator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "" if Path(name).is_dir() else ", which is no folder"
        raise UserError(f"cannot load the text encoder '{name}'{hint}: {reason}") from error


@contextmanager
def _silence_libraries() -> Generator[None]:
    """Import the libraries, without warnings, reports or bars other than those of downloads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns at every later fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
            from transformers import logging
        except ImportError:
            raise UserError(
                "encoding captions needs transformers and torch: .venv/bin/pip install --group text"
            ) from None
        level = logging.get_verbosity()
        bars = logging.set_tqdm_hook(lambda _, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            logging.set_tqdm_hook(bars)
