"""A single file of Stability AI's SD3 or SD3.5, with or without the VAE and the text encoders.

It has no config: the shapes of its tensors tell it, but for the number of heads where queries and
keys are not normed. Published ones have a head for each block.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model import ModelConfig
from pretrained import autoencoder_file, sd3, weight_files
from pretrained.sd3_names import STABILITY
from pretrained.state_dicts import describe_unused, pop_heads
from pretrained.weight_files import FileWeights
from runtime.errors import UserError

ANCHOR = "joint_blocks.0.x_block.attn.qkv.weight"
CONTEXT, POOLED = "context_embedder.weight", "y_embedder.mlp.0.weight"
TEXT_ENCODERS = "text_encoders"  # where they lie in a file of the whole pipeline
NORM = "joint_blocks.0.x_block.attn.ln_q.weight"
# The size that SD3 was last trained on, and to which its positions are scaled, in latents.
SIDE = 128


class Sd3File(NamedTuple):
    """A network that was read from a file.

    Args:
        params: NumPy's float32, for `model.model_graphdef`.
        has_vae: the file holds its VAE too.
        notices: lines for a person on how it was read.
    """

    config: ModelConfig
    params: dict[str, Any]
    has_vae: bool
    notices: tuple[str, ...]


def is_sd3(file: FileWeights) -> bool:
    """Return True if a file's network is an SD3 under Stability AI's names."""
    return ANCHOR in file.tensors


def read_sd3_file(file: FileWeights, path: Path, n_heads: int | None) -> Sd3File:
    """Convert the network of a file to ours.

    Args:
        n_heads: of a size that was not published.

    Raises:
        UserError: it is something else, or does not tell enough of the model.
    """
    where = str(path)
    config = infer_config(file.tensors, where, n_heads)
    shapes = sd3.stability_shapes(config)
    notices = [*file.notices, *weight_files.fill_missing_biases(file.tensors, shapes)]
    notices += pop_heads(file.tensors, shapes)
    params = sd3.params_from_stability(file.tensors, config, where)
    has_vae = autoencoder_file.holds_autoencoder(file.shapes)
    others = [n for n in file.unused if not {*n.split(".")} & {*autoencoder_file.PLACES}]
    notices += describe_unused(others)
    if any(TEXT_ENCODERS in name.split(".") for name in others):
        notices.append("the text encoders are those of the hub, or of --text_towers")
    return Sd3File(config, params, has_vae, tuple(notices))


def infer_config(tensors: dict[str, np.ndarray], where: str, n_heads: int | None) -> ModelConfig:
    """Infer the shape of an SD3 from its tensors.

    Args:
        where: the file, for the messages of errors.
        n_heads: of a size that was not published.

    Raises:
        UserError: it is no SD3, or its number of heads is unknown.
    """
    try:
        width, channels, patch_size, _ = tensors[STABILITY.patch].shape
        _, n_positions, _ = tensors[STABILITY.table].shape
        _, text_width = tensors[CONTEXT].shape
        _, pooled_width = tensors[POOLED].shape
        n_out, _ = tensors["final_layer.linear.weight"].shape
    except (KeyError, ValueError) as error:
        problem = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"'{where}' holds no SD3: {problem}") from None
    if 0 in (width, channels, patch_size, n_positions, text_width, pooled_width, n_out):
        raise UserError(f"'{where}' holds no SD3: one of its tensors is empty")
    side = round(n_positions**0.5)
    depth = 1 + max(_block_numbers(tensors, r"joint_blocks\.(\d+)\."), default=-1)
    dual = _block_numbers(tensors, r"joint_blocks\.(\d+)\.x_block\.attn2\.")
    if dual != {*range(len(dual))}:
        raise UserError(f"'{where}': a second attention in blocks {sorted(dual)}: not supported")
    try:
        config = ModelConfig(
            width=width,
            depth=depth,
            n_heads=_find_heads(tensors, width, depth, n_heads, where),
            patch_size=patch_size,
            image_size=min(SIDE, side * patch_size),
            channels=channels,
            out_channels=n_out // patch_size**2,
            text_length=sd3.TEXT_LENGTH,
            text_width=text_width,
            pooled_width=pooled_width,
            n_dual=len(dual),
            position="centred",
            position_side=side,
            position_base=SIDE // patch_size,
            qk_norm=NORM in tensors,
            **sd3.FIXED,
        )
    except UserError as error:
        raise UserError(f"'{where}' holds no SD3: {error}") from None
    return sd3.with_positions_of(tensors[STABILITY.table], config)


def _block_numbers(tensors: dict[str, np.ndarray], pattern: str) -> set[int]:
    matches = [re.match(pattern, name) for name in tensors]
    return {int(match[1]) for match in matches if match}


def _find_heads(
    tensors: dict[str, np.ndarray], width: int, depth: int, n_heads: int | None, where: str
) -> int:
    """Find the number of heads: as given, or by the norm of a head's queries, or as published."""
    head_width = tensors[NORM].size if NORM in tensors else 0
    by_norm = width // head_width if head_width else None
    n_heads = n_heads or by_norm or (depth if width == 64 * depth else None)
    if n_heads is None:
        raise UserError(
            f"'{where}' has {depth} blocks of width {width}, which is no published size: give "
            f"their number of heads, such as sd3:heads=6:{where}"
        )
    if width % n_heads:
        raise UserError(f"'{where}': width {width} is not divisible by {n_heads} heads")
    return n_heads
