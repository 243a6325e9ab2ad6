"""The names of an autoencoder's weights: ours, diffusers' of today and of before, and latent
diffusion's, from which all have come.

Each table is a list of patterns that are replaced one after the other.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.errors import UserError

CLASS = "AutoencoderKL"
ANCHOR = "encoder.conv_in.weight"  # a tensor by which it is known, of one name in all files
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
Renames = tuple[tuple[str, str], ...]

OURS: Renames = (
    (r"^encoder\.levels\.", "encoder.down_blocks."),
    (r"^decoder\.levels\.", "decoder.up_blocks."),
    (r"\.blocks\.", ".resnets."),
    (r"^(encoder\..*)\.resize\.", r"\1.downsamplers.0."),
    (r"^(decoder\..*)\.resize\.", r"\1.upsamplers.0."),
    (r"\.middle\.before\.", ".mid_block.resnets.0."),
    (r"\.middle\.after\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.middle\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^(quant|post_quant)\.", r"\1_conv."),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.shift$", ".bias"),
)
# In diffusers' files from before 2023.
OLD_DIFFUSERS: Renames = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)
# The decoder's levels are counted from full resolution: see `rename_to_diffusers`.
LATENT_DIFFUSION: Renames = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
LEVEL = re.compile(r"decoder\.up\.(\d+)\.(resnets|upsamplers)\.")


def apply_renames(name: str, rules: Renames) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def diffusers_name(path: tuple[Any, ...]) -> str:
    """Return diffusers' name of a weight of ours."""
    return apply_renames(".".join(map(str, path)), OURS)


def rename_to_diffusers(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Return latent diffusion's weights, or diffusers', under diffusers' names of today.

    Names that are neither's stay as they are.

    Raises:
        UserError: two weights have the same name then.
    """
    names = {name: apply_renames(name, LATENT_DIFFUSION + OLD_DIFFUSERS) for name in tensors}
    last = max((int(m[1]) for name in names.values() if (m := LEVEL.match(name))), default=0)
    renamed: dict[str, np.ndarray] = {}
    for old_name, name in names.items():
        name = LEVEL.sub(lambda m: f"decoder.up_blocks.{last - int(m[1])}.{m[2]}.", name)
        if name in renamed:
            raise UserError(f"the weights of '{where}' hold {name} twice, once by an old name")
        renamed[name] = tensors[old_name]
    return renamed
