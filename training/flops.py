"""training.flops."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime.errors import UserError

# The backward pass of a matrix product is two products of its size. Recomputation by remat is not
# counted, as in PaLM's MFU (Chowdhery et al. 2022, appendix B): it is a cost, not a use.
TRAIN_PER_FORWARD = 3
COUNTED = ("adaln_zero", "adaln", "cross_attention", "in_context", "joint")  # blocks
FREQUENCIES = 256  # of the sinusoid that the t embedder's MLP reads


def flops_by_module(config: Any) -> dict[str, float]:
    """Forward FLOPs per image, 2 per multiply-add, with captions of the trained length.

    Counts matrix products, attention's scores and values among them. Norms, activations, softmax
    and residuals are left out: XLA counts 0.7 % more for DiT-S/2. Looking up a class is free.
    """
    c, d, n = config, config.width, config.grid[0] * config.grid[1]
    m = c.text_length or (c.n_class_tokens if c.block == "joint" else 1)
    patch_in, patch_out = (c.patch_size**2 * channels for channels in (c.channels, c.out_channels))
    caption = c.text_length * c.text_width * d + (c.pooled_width * d + d * d) * bool(c.text_width)
    blocks = block_products(c, n, m)
    products = {
        "patch embedding": n * patch_in * d,
        "t and label embedding": FREQUENCIES * d + d * d + caption,
        "adaLN modulation": blocks.modulations * d * d,  # per image, not per token
        "attention projections": blocks.projections * d * d,
        "attention scores, values": blocks.scores * 2 * d,
        "MLP": blocks.mlp_tokens * mlp_products(c),
        "final layer": n * d * patch_out,
    }
    return {module: 2.0 * count for module, count in products.items()}


class BlockProducts(NamedTuple):
    """What all blocks and the final layer multiply: maps of a vector and of tokens, each d × d;
    pairs of tokens that attend; tokens that pass an MLP.
    """

    modulations: int
    projections: int
    scores: int
    mlp_tokens: int


def block_products(config: Any, n: int, m: int) -> BlockProducts:
    """For n tokens of the picture and m of the label; a DiT's t is one token more."""
    depth, m_and_t = config.depth, m + 1
    everything = n + m_and_t
    if config.block == "joint":  # the last block leaves the context as it is
        joint, both, dual = depth - 1, n + m, config.n_dual
        return BlockProducts(
            modulations=12 * joint + 3 * dual + 6 + 2 + 2,
            projections=4 * both * joint + 4 * n * dual + 4 * n + 2 * m,
            scores=both * both * joint + n * n * dual + n * both,
            mlp_tokens=both * joint + n,
        )
    if config.block == "cross_attention":
        projections = (4 * n + 2 * n + 2 * m_and_t) * depth
        return BlockProducts(0, projections, n * (n + m_and_t) * depth, n * depth)
    if config.block == "in_context":
        return BlockProducts(0, 4 * everything * depth, everything**2 * depth, everything * depth)
    if config.block not in COUNTED:
        raise UserError(
            f"the FLOPs of block '{config.block}' are not known: count them in profiling.py"
        )
    per_block = {"adaln_zero": 6, "adaln": 4}[config.block]
    return BlockProducts(per_block * depth + 2, 4 * n * depth, n * n * depth, n * depth)


def mlp_products(config: Any) -> int:
    """Multiply-adds of one token in one MLP."""
    d, hidden = config.width, round(config.mlp_ratio * config.width)
    if config.mlp == "swiglu":  # three products, two thirds as wide
        return 3 * d * round(hidden * 2 / 3 / 8) * 8
    return 2 * d * hidden


@dataclass(frozen=True)
class Peak:
    """What one device can do. `bytes_per_second` is None where only --peak_tflops is known."""

    flops_per_second: float
    bytes_per_second: float | None
    source: str


# (jax's device_kind, dense TFLOP/s with bf16 operands, with fp32 operands, GB/s), the makers' data
# sheets. jax multiplies fp32 in TF32 on these NVIDIA cards, so that is their fp32 peak; TPUs state
# none. Slices (MIG) and cut-down namesakes (L40S, 4090 Laptop, H200 NVL) must not match.
PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    ("NVIDIA H100 PCIe", 756, 378, 2000),
    ("NVIDIA H100 NVL", 835, 417, 3938),
    ("NVIDIA H100( 80GB HBM3)?", 989, 494, 3350),
    ("NVIDIA H200", 989, 494, 4800),
    ("NVIDIA A100 80GB PCIe", 312, 156, 1935),
    ("NVIDIA A100.*80GB", 312, 156, 2039),
    ("NVIDIA A100[^ ]*( 40GB)?", 312, 156, 1555),
    ("NVIDIA L4", 121, 60, 300),
    ("NVIDIA GeForce RTX 4090", 165, 82.6, 1008),
    ("TPU v4", 275, None, 1228),
    ("TPU v5 ?(lite|e)", 197, None, 819),
    ("TPU v5p?", 459, None, 2765),
    ("TPU v6 ?(lite|e)", 918, None, 1640),
)


def peak(device_kind: str, dtype: str, *, peak_tflops: float | None = None) -> Peak | None:
    """The peak of a device at the matrix products of `dtype`, or None if it is not known.

    `peak_tflops` is a person's word and wins over the table.
    """
    rows = [row[1:] for row in PEAKS if re.fullmatch(row[0], device_kind, re.IGNORECASE)]
    bf16, fp32, gigabytes = rows[0] if rows else (None, None, None)
    tflops = peak_tflops or {"bfloat16": bf16, "float32": fp32}.get(dtype)
    if tflops is None:
        return None
    source = "--peak_tflops" if peak_tflops else "data sheet, dense"
    return Peak(tflops * 1e12, gigabytes and gigabytes * 1e9, source)


def mfu(flops_per_second: float, peak: Peak | None) -> float | None:
    """Model FLOPs utilisation of one device: useful FLOPs per second over its peak."""
    return flops_per_second / peak.flops_per_second if peak else None
