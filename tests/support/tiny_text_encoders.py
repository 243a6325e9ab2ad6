"""Text encoders with random weights, small enough to be made where a test needs one."""

from collections.abc import Sequence
from pathlib import Path

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def save_clip(
    folder: Path,
    *,
    width: int = 16,
    projected: int = 12,
    merges: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> str:
    """A CLIP text encoder, which reads letters, and pairs of some."""
    import torch
    import transformers

    torch.manual_seed(seed)
    pieces = [*LETTERS, *(c + "</w>" for c in LETTERS), *map("".join, merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(pieces), len(pieces) + 1
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocabulary,
        merges=list(merges),  # pyright: ignore[reportArgumentType]
        model_max_length=24,
    )
    tokenizer.save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=projected,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=30,
        initializer_factor=10.0,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return str(folder)


def save_t5(folder: Path) -> str:
    """A T5, which reads letters. Its tokens have 24 channels."""
    import torch
    import transformers

    torch.manual_seed(2)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary = special + [(letter, -3.0) for letter in LETTERS]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)
