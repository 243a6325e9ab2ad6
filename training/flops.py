"""FLOPs of a model, counted from its config, and the peaks of devices to compare them with.

Blocks count their own matrix products (`model.BlockProducts`). Nothing is compiled or timed here:
that is `training/profiling.py`.
"""

import re
from dataclasses import dataclass

from model import ModelConfig, count_products
from networks.layers import MLPS, N_TIME_FEATURES
from runtime.errors import UserError

# The backward pass of a matrix product is two products of its size. Recomputation by remat is not
# counted, as in PaLM's MFU (Chowdhery et al. 2022, appendix B): it is a cost, not a use.
TRAIN_PER_FORWARD = 3


def flops_by_module(config: ModelConfig, *, routed_share: float = 0.0) -> dict[str, float]:
    """Forward FLOPs per image, 2 per multiply-add, with captions of the length in training.

    Counts matrix products, including attention's scores and values. Norms, activations, softmax
    and residuals are left out: XLA counts 0.7 % more for DiT-S/2. Looking up a class is free.

    Args:
        routed_share: of the image's tokens that go around the blocks of the route.

    Raises:
        UserError: the model's block does not count its products.
    """
    blocks = count_products(config, routed_share=routed_share)
    if blocks is None:
        raise UserError(
            f"the FLOPs of block '{config.block}' are unknown: give its class a static method "
            "`products`, as AdaLNZeroBlock in model.py has"
        )
    c, d, n = config, config.width, config.grid[0] * config.grid[1]
    patch_in = c.patch_size**2 * c.channels
    patch_out = c.patch_size**2 * c.out_channels
    embedding = (N_TIME_FEATURES * d + d * d) * (1 + c.takes_span)
    if c.text_width:
        embedding += c.text_length * c.text_width * d + c.pooled_width * d + d * d
    multiply_adds = {
        "patch embedding": n * ((patch_in + d) * c.bottleneck or patch_in * d),
        "t and label embedding": embedding,
        "adaLN modulation": blocks.modulations * d * d,  # per image, not per token
        "attention projections": blocks.projections * d * d,
        "attention scores, values": blocks.scores * 2 * d,
        "MLP": blocks.mlp_tokens * MLPS[c.mlp].multiply_adds(d, c.mlp_width),
        "final layer": n * d * patch_out,
    }
    return {module: 2.0 * count for module, count in multiply_adds.items()}


def forward_flops(config: ModelConfig, *, routed_share: float = 0.0) -> float | None:
    """Forward FLOPs per image, or None if the model's block does not count its products."""
    if count_products(config) is None:
        return None
    return sum(flops_by_module(config, routed_share=routed_share).values())


@dataclass(frozen=True)
class Peak:
    """Peak rates of one device. `bytes_per_second` is None where only --peak_tflops is known."""

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


def device_peak(device_kind: str, dtype: str, *, peak_tflops: float | None = None) -> Peak | None:
    """The peak of a device at the matrix products of `dtype`, or None if it is not known.

    `peak_tflops` overrides the table.
    """
    rows = [row[1:] for row in PEAKS if re.fullmatch(row[0], device_kind, re.IGNORECASE)]
    bf16, fp32, gigabytes = rows[0] if rows else (None, None, None)
    tflops = peak_tflops or {"bfloat16": bf16, "float32": fp32}.get(dtype)
    if tflops is None:
        return None
    return Peak(
        flops_per_second=tflops * 1e12,
        bytes_per_second=None if gigabytes is None else gigabytes * 1e9,
        source="--peak_tflops" if peak_tflops else "data sheet, dense",
    )


def mfu(flops_per_second: float, peak: Peak | None) -> float | None:
    """Model FLOPs utilisation of one device: useful FLOPs per second over its peak."""
    return flops_per_second / peak.flops_per_second if peak else None
