"""The names of SD3's weights, as diffusers and as Stability AI publish them.

Each map or norm of ours is listed with the tensors, or the equal parts of tensors, that lie side by
side in it. The file's axes and its table of positions are `sd3`'s concern.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from model import ModelConfig

LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight"}
STACKS = ("dual_blocks", "blocks")


class Part(NamedTuple):
    """One of `n_parts` equal parts of a weight or bias of theirs, split along its outputs."""

    name: str
    index: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]
    n_parts: int = 1


Table = dict[str, tuple[Part, ...]]


class Layout(NamedTuple):
    """A publisher's names.

    Args:
        blocks: what stands before the number of a block.
        table: the tensor of positions.
        patch: the tensor of the first map, which is a convolution.
        outside, block, dual_block, last_block: our maps and norms, and their parts: those outside
            of blocks, and those of the three kinds of block.
    """

    blocks: str
    table: str
    patch: str
    outside: Table
    block: Table
    dual_block: Table
    last_block: Table


def join_tensors(*names: str) -> tuple[Part, ...]:
    """Describe an array of ours that holds these tensors side by side."""
    return tuple(Part(name) for name in names)


def take_chunks(name: str, n_parts: int, *indices: int) -> tuple[Part, ...]:
    """Describe an array of ours that holds some equal parts of a tensor side by side."""
    return tuple(Part(name, index, n_parts) for index in indices)


def add_prefix(prefix: str, table: Mapping[str, tuple[Part, ...]]) -> Table:
    return {f"{prefix}.{name}": parts for name, parts in table.items()}


def locate_parts(path: tuple[Any, ...], config: ModelConfig, layout: Layout) -> list[list[Part]]:
    """Locate an array of ours in a publisher's file.

    Returns:
        For each block of a stack, or once, the parts that lie side by side in the array.
    """
    stack, *rest, leaf = path
    last, n_dual = config.depth - 1, config.n_dual
    blocks = {
        "dual_blocks": (layout.dual_block, range(n_dual)),
        "blocks": (layout.block, range(n_dual, last)),
        "last": (layout.last_block, [last]),
    }
    if stack in blocks:
        table, numbers = blocks[stack]
        parts_by_prefix = {f"{layout.blocks}.{i}.": table[".".join(rest)] for i in numbers}
    else:
        parts_by_prefix = {"": layout.outside[".".join(path[:-1])]}
    return [
        [part._replace(name=f"{prefix}{part.name}.{LEAVES[leaf]}") for part in parts]
        for prefix, parts in parts_by_prefix.items()
    ]


# --- diffusers ------------------------------------------------------------------------------------
# A modulation has six parts (shift, scale and gate of attention and of the MLP), nine if there is a
# second attention, or two: there scale comes before shift, here shift before scale.

IMAGE_STREAM = {
    "modulation": take_chunks("norm1.linear", 6, *range(6)),
    "qkv.linear": join_tensors("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv.norm_q": join_tensors("attn.norm_q"),
    "qkv.norm_k": join_tensors("attn.norm_k"),
    "out": join_tensors("attn.to_out.0"),
    "mlp.up": join_tensors("ff.net.0.proj"),
    "mlp.down": join_tensors("ff.net.2"),
}
CONTEXT_STREAM = {
    "modulation": take_chunks("norm1_context.linear", 6, *range(6)),
    "qkv.linear": join_tensors("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "qkv.norm_q": join_tensors("attn.norm_added_q"),
    "qkv.norm_k": join_tensors("attn.norm_added_k"),
    "out": join_tensors("attn.to_add_out"),
    "mlp.up": join_tensors("ff_context.net.0.proj"),
    "mlp.down": join_tensors("ff_context.net.2"),
}
BLOCK = add_prefix("picture", IMAGE_STREAM) | add_prefix("context", CONTEXT_STREAM)
DIFFUSERS = Layout(
    blocks="transformer_blocks",
    table="pos_embed.pos_embed",
    patch="pos_embed.proj.weight",
    outside={
        "patch": join_tensors("pos_embed.proj"),
        "time.mlp.hidden": join_tensors("time_text_embed.timestep_embedder.linear_1"),
        "time.mlp.out": join_tensors("time_text_embed.timestep_embedder.linear_2"),
        "label.tokens": join_tensors("context_embedder"),
        "label.pooled.hidden": join_tensors("time_text_embed.text_embedder.linear_1"),
        "label.pooled.out": join_tensors("time_text_embed.text_embedder.linear_2"),
        "final.modulation": take_chunks("norm_out.linear", 2, 1, 0),
        "final.out": join_tensors("proj_out"),
    },
    block=BLOCK,
    dual_block=BLOCK
    | {
        "picture.modulation": take_chunks("norm1.linear", 9, *range(6)),
        "modulation": take_chunks("norm1.linear", 9, 6, 7, 8),
        "attention.qkv.linear": join_tensors("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attention.qkv.norm_q": join_tensors("attn2.norm_q"),
        "attention.qkv.norm_k": join_tensors("attn2.norm_k"),
        "attention.out": join_tensors("attn2.to_out.0"),
    },
    last_block=add_prefix("picture", IMAGE_STREAM)
    | {
        "modulation": take_chunks("norm1_context.linear", 2, 1, 0),
        "kv.linear": join_tensors("attn.add_k_proj", "attn.add_v_proj"),
        "kv.norm_k": join_tensors("attn.norm_added_k"),
    },
)

# --- Stability AI ---------------------------------------------------------------------------------
# Queries, keys and values are one map, and shift always comes before scale.

STREAM = {
    "modulation": "adaLN_modulation.1",
    "qkv.linear": "attn.qkv",
    "qkv.norm_q": "attn.ln_q",
    "qkv.norm_k": "attn.ln_k",
    "out": "attn.proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
IMAGE_BLOCK = {
    f"picture.{ours}": join_tensors(f"x_block.{theirs}") for ours, theirs in STREAM.items()
}
CONTEXT_BLOCK = {
    f"context.{ours}": join_tensors(f"context_block.{theirs}") for ours, theirs in STREAM.items()
}
STABILITY = Layout(
    blocks="joint_blocks",
    table="pos_embed",
    patch="x_embedder.proj.weight",
    outside={
        "patch": join_tensors("x_embedder.proj"),
        "time.mlp.hidden": join_tensors("t_embedder.mlp.0"),
        "time.mlp.out": join_tensors("t_embedder.mlp.2"),
        "label.tokens": join_tensors("context_embedder"),
        "label.pooled.hidden": join_tensors("y_embedder.mlp.0"),
        "label.pooled.out": join_tensors("y_embedder.mlp.2"),
        "final.modulation": join_tensors("final_layer.adaLN_modulation.1"),
        "final.out": join_tensors("final_layer.linear"),
    },
    block=IMAGE_BLOCK | CONTEXT_BLOCK,
    dual_block=IMAGE_BLOCK
    | CONTEXT_BLOCK
    | {
        "picture.modulation": take_chunks("x_block.adaLN_modulation.1", 9, *range(6)),
        "modulation": take_chunks("x_block.adaLN_modulation.1", 9, 6, 7, 8),
        "attention.qkv.linear": join_tensors("x_block.attn2.qkv"),
        "attention.qkv.norm_q": join_tensors("x_block.attn2.ln_q"),
        "attention.qkv.norm_k": join_tensors("x_block.attn2.ln_k"),
        "attention.out": join_tensors("x_block.attn2.proj"),
    },
    last_block=IMAGE_BLOCK
    | {
        "modulation": join_tensors("context_block.adaLN_modulation.1"),
        "kv.linear": take_chunks("context_block.attn.qkv", 3, 1, 2),
        "kv.norm_k": join_tensors("context_block.attn.ln_k"),
    },
)
