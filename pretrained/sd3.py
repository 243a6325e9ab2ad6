"""Stable Diffusion 3's transformers (SD3 and SD3.5), as diffusers and Stability AI publish them.

An MMDiT of ours on captions is written in the same form.

Two things of a file are not among our weights. Its table of positions is computed here, so it must
be one that we can compute: Stability AI's (`centred`), or that of a new model (`cropped`). The
context's queries in the last block are dropped, and written as zeros: their attention's result is
thrown away.

How captions are padded is not in the weights either. diffusers shows SD3 all padding of captions,
and the encoded "" where there is none: see `full_width` of `text_encoders.TextEncoders`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from einops import rearrange
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Float

from model import JOINT, ModelConfig, init_model_params, make_position_embedding
from networks.layers import sincos_table
from pretrained import weight_files
from pretrained.sd3_names import DIFFUSERS, STABILITY, STACKS, Layout, Part, locate_parts
from pretrained.state_dicts import flatten_leaves
from runtime.errors import UserError

CLASS = "SD3Transformer2DModel"
TEXT_LENGTH = 77 + 256  # of CLIP and of T5, padding included
QK_NORM = "rms_norm"
PATCH, TABLE = DIFFUSERS.patch, DIFFUSERS.table

# The values of facts that a config leaves out.
DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": [],
    "qk_norm": None,
}
# Fields of our model that are the same in every SD3.
FIXED: dict[str, Any] = {
    "block": JOINT,
    "rope": False,
    "mlp": "gelu",
    "mlp_ratio": 4.0,
    "norm": "layer",
    "time_scale": 1000.0,
    "time_endpoint": False,
    "n_classes": 0,
    "caption_norm": False,
    "bottleneck": 0,
    "inner_head": 0,
    "takes_span": False,
}


# --- the config -----------------------------------------------------------------------------------


def config_from_diffusers(
    config: Mapping[str, Any], where: str, tensors: Mapping[str, np.ndarray] | None = None
) -> ModelConfig:
    """Convert a `config.json` of diffusers to ours.

    The model is not tied to its `image_size`, which is diffusers' default: replace it by any other
    that the table of positions covers, with `dataclasses.replace`.

    Args:
        where: the network, for the messages of errors.
        tensors: the weights, whose table shows how positions are counted. The config does not;
            without them, positions are those of the published weights.

    Raises:
        UserError: it is the config of something else, or of something that is not supported.
    """
    name = config.get("_class_name")
    if name != CLASS:
        raise UserError(f"'{where}' is not an {CLASS} but {name or 'of no known class'}")
    facts = DEFAULTS | {k: v for k, v in config.items() if not k.startswith("_")}
    if facts["out_channels"] is None:
        facts["out_channels"] = facts["in_channels"]
    try:
        require_supported(facts)
        ours = ModelConfig(
            width=facts["num_attention_heads"] * facts["attention_head_dim"],
            depth=facts["num_layers"],
            n_heads=facts["num_attention_heads"],
            patch_size=facts["patch_size"],
            image_size=facts["sample_size"],
            channels=facts["in_channels"],
            out_channels=facts["out_channels"],
            text_length=TEXT_LENGTH,
            text_width=facts["joint_attention_dim"],
            pooled_width=facts["pooled_projection_dim"],
            n_dual=len(facts["dual_attention_layers"]),
            position="centred",
            position_side=facts["pos_embed_max_size"],
            position_base=facts["sample_size"] // facts["patch_size"],
            qk_norm=facts["qk_norm"] == QK_NORM,
            **FIXED,
        )
    except UserError as error:
        raise UserError(f"'{where}': its {weight_files.CONFIG} says {error}") from None
    table = (tensors or {}).get(TABLE)
    return ours if table is None else with_positions_of(table, ours)


def with_positions_of(table: Float[np.ndarray, "..."], config: ModelConfig) -> ModelConfig:
    """Return the config with cropped positions if a file's table has these."""
    cropped = replace(config, position="cropped")
    return cropped if matches_positions(table, cropped) else config


def require_supported(facts: Mapping[str, Any]) -> None:
    """Raise UserError for the first fact that is of the wrong kind or not supported."""
    for name, value in facts.items():
        if type(DEFAULTS.get(name)) is int and (type(value) is not int or value < 1):
            raise UserError(f"{name} {value}: must be a whole number above 0")
        if name not in DEFAULTS and value is not None:
            raise UserError(f"{name} {value}: not supported")
    if facts["qk_norm"] not in (None, QK_NORM):
        raise UserError(f"qk_norm {facts['qk_norm']}: not supported")
    dual = facts["dual_attention_layers"]
    if not isinstance(dual, Sequence) or list(dual) != list(range(len(dual))):
        raise UserError(f"dual_attention_layers {dual}: must be the first ones, from 0")
    width = facts["num_attention_heads"] * facts["attention_head_dim"]
    if facts["caption_projection_dim"] != width:
        raise UserError(
            f"caption_projection_dim {facts['caption_projection_dim']}: must be the width, {width}"
        )


def config_to_diffusers(config: ModelConfig) -> dict[str, Any]:
    """Make the config from which diffusers builds the model.

    Its `sample_size` is the one that positions are counted by, whatever size the model was trained
    on.

    Raises:
        UserError: SD3 cannot express the model.
    """
    c = config
    unfit = {k: getattr(c, k) for k, fixed in FIXED.items() if getattr(c, k) != fixed}
    if c.position not in ("cropped", "centred"):
        unfit["position"] = c.position
    if not c.text_width:
        unfit["text_width"] = 0
    if max(c.grid) > c.position_side:
        unfit["image_size"] = c.image_size
    if unfit:
        fields = ", ".join(f"{name} {value}" for name, value in unfit.items())
        raise UserError(f"diffusers' {CLASS} cannot hold a model with {fields}")
    return {
        "_class_name": CLASS,
        "sample_size": c.position_base * c.patch_size,
        "patch_size": c.patch_size,
        "in_channels": c.channels,
        "num_layers": c.depth,
        "attention_head_dim": c.width // c.n_heads,
        "num_attention_heads": c.n_heads,
        "joint_attention_dim": c.text_width,
        "caption_projection_dim": c.width,
        "pooled_projection_dim": c.pooled_width,
        "out_channels": c.out_channels,
        "pos_embed_max_size": c.position_side,
        "dual_attention_layers": list(range(c.n_dual)),
        "qk_norm": QK_NORM if c.qk_norm else None,
    }


# --- shapes ---------------------------------------------------------------------------------------


def block_maps(path: tuple[Any, ...], config: ModelConfig) -> list[list[str]]:
    """Name diffusers' maps that lie side by side in one of ours, for each block of its stack.

    Args:
        path: of the kernel of ours.
    """
    return [
        [part.name.removesuffix(".weight") for part in parts]
        for parts in locate_parts(path, config, DIFFUSERS)
    ]


@lru_cache
def our_shapes(config: ModelConfig) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Return the shape of each array of ours by its path."""
    tree = jax.eval_shape(lambda: init_model_params(config, jax.random.key(0)))
    return {path: x.shape for path, x in flatten_leaves(tree).items()}


def dropped_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Make the context's queries in the last block, as they are written."""
    d = config.width
    attention = f"transformer_blocks.{config.depth - 1}.attn"
    tensors = {
        f"{attention}.add_q_proj.weight": np.zeros((d, d), np.float32),
        f"{attention}.add_q_proj.bias": np.zeros(d, np.float32),
    }
    if config.qk_norm:
        tensors[f"{attention}.norm_added_q.weight"] = np.ones(d // config.n_heads, np.float32)
    return tensors


@lru_cache
def diffusers_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of diffusers' tensors by its name."""
    dropped = {name: x.shape for name, x in dropped_tensors(config).items()}
    return dropped | _used_shapes(config, DIFFUSERS)


@lru_cache
def stability_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of Stability AI's tensors by its name."""
    norm = f"joint_blocks.{config.depth - 1}.context_block.attn.ln_q.weight"
    dropped = {norm: (config.width // config.n_heads,)} if config.qk_norm else {}
    return dropped | _used_shapes(config, STABILITY)


def _used_shapes(config: ModelConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    c = config
    shapes: dict[str, tuple[int, ...]] = {layout.table: (1, c.position_side**2, c.width)}
    for path, shape in our_shapes(c).items():
        *inputs, outputs = shape[path[0] in STACKS :]
        for parts in locate_parts(path, c, layout):
            for part in parts:
                shapes[part.name] = (outputs // len(parts) * part.n_parts, *inputs)
    shapes[layout.patch] = (c.width, c.channels, c.patch_size, c.patch_size)
    return shapes


# --- the weights ----------------------------------------------------------------------------------


def params_from_diffusers(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str
) -> dict[str, Any]:
    """Convert diffusers' weights to ours, float32.

    Each is used once and none is left, except the two that the module's docstring names.

    Raises:
        UserError: some are missing, left over or of another shape; the message names a few. Or
            positions are not those of the config.
    """
    weight_files.require_shapes(where, tensors, diffusers_shapes(config))
    return _convert_params(tensors, config, where, DIFFUSERS)


def params_from_stability(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str
) -> dict[str, Any]:
    """Convert Stability AI's weights to ours, as `params_from_diffusers` does with diffusers'."""
    reference = "the shape of their first tensors"
    weight_files.require_shapes(where, tensors, stability_shapes(config), reference)
    return _convert_params(tensors, config, where, STABILITY)


def _convert_params(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str, layout: Layout
) -> dict[str, Any]:
    if not matches_positions(tensors[layout.table], config):
        raise UserError(
            f"the weights of '{where}': {layout.table} is an unknown table of positions"
        )
    flat = {**tensors, layout.patch: rearrange(tensors[layout.patch], "d c p q -> d (p q c)")}

    def piece(part: Part) -> np.ndarray:
        chunk = np.split(flat[part.name].T, part.n_parts, axis=-1)[part.index]
        return np.asarray(chunk, np.float32)

    def array(path: tuple[Any, ...]) -> np.ndarray:
        rows = [
            np.concatenate([*map(piece, parts)], axis=-1)
            for parts in locate_parts(path, config, layout)
        ]
        return np.ascontiguousarray(np.stack(rows) if path[0] in STACKS else rows[0])

    return unflatten_dict({path: array(path) for path in our_shapes(config)})


def params_to_diffusers(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Return our weights under diffusers' names and in its axes."""
    pieces_by_name: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for path, x in flatten_leaves(params).items():
        rows = np.asarray(x) if path[0] in STACKS else np.asarray(x)[None]
        for row, parts in zip(rows, locate_parts(path, config, DIFFUSERS), strict=True):
            for part, piece in zip(parts, np.split(row, len(parts), axis=-1), strict=True):
                pieces_by_name[part.name][part.index] = piece
    tensors = {
        name: np.concatenate([pieces[i] for i in sorted(pieces)], axis=-1).T
        for name, pieces in pieces_by_name.items()
    }
    p = config.patch_size
    tensors[PATCH] = rearrange(tensors[PATCH], "d (p q c) -> d c p q", p=p, q=p)
    return tensors | dropped_tensors(config) | {TABLE: position_table(config)}


# --- positions ------------------------------------------------------------------------------------


def axis_positions(config: ModelConfig) -> Float[np.ndarray, "s half"]:
    """Compute the half of a token's table that encodes its column; that of its row is the same."""
    places = make_position_embedding(config, rngs=nnx.Rngs(0)).positions(config.position_side)
    return sincos_table(config.width, np.zeros(1), places)[:, : config.width // 2]


def position_table(config: ModelConfig) -> Float[np.ndarray, "1 n d"]:
    """Compute the whole table that positions are cropped from."""
    axis = axis_positions(config)
    shape = (len(axis), *axis.shape)
    columns, rows = np.broadcast_to(axis[None], shape), np.broadcast_to(axis[:, None], shape)
    return rearrange(np.concatenate([columns, rows], axis=-1), "h w d -> 1 (h w) d")


def matches_positions(table: Float[np.ndarray, "..."], config: ModelConfig) -> bool:
    """Return True if a file's table is the config's, up to its precision."""
    axis = axis_positions(config)
    if table.shape != (1, len(axis) ** 2, config.width):
        return False
    rows = rearrange(table, "1 (h w) (two d) -> h w two d", h=len(axis), two=2)
    error = weight_files.rounding_of_positions(table.dtype)
    # One row after the other: the whole table is a gigabyte in SD3.5 medium.
    return all(
        np.allclose(
            row.astype(np.float32),
            np.stack([axis, np.broadcast_to(own, axis.shape)], axis=1),
            rtol=0,
            atol=error,
        )
        for row, own in zip(rows, axis, strict=True)
    )
