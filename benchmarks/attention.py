"""How fast is attention, forward and backward? Each way to compute it, at the heads of the presets.

    python benchmarks/attention.py
    python benchmarks/attention.py --batch_size 128 --tokens 256 --heads 12 16 --width 64 72

`layers.attention` takes cuDNN's kernel where that is, else its own; padding tells whether a width
that the kernel likes better is worth its zeros. What cannot run here is left out with the reason.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import interleaved, json_line, number, require, table, turn
from networks import ops
from runtime import cli
from runtime.errors import UserError
from training import profiling

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@dataclass(frozen=True)
class AttentionConfig:
    """Time attention, forward and backward.

    Args:
        batch_size: pictures.
        tokens: of each.
        heads: numbers of heads, each with its width.
        width: of a head.
        precision: fp32, bf16.
        rounds: that count, after one that does not.
        calls_per_turn: sent off one after the other before waiting.
    """

    batch_size: int = 16
    tokens: int = 256
    heads: tuple[int, ...] = (6, 16)
    width: tuple[int, ...] = (64, 72)
    precision: tuple[str, ...] = ("fp32", "bf16")
    rounds: int = 4
    calls_per_turn: int = 4


def own(q, k, v):
    with patch.object(ops, "has_cudnn_attention", lambda: False):
        return ops.attention(q, k, v)


def fused(q, k, v, *, width: int):
    """cuDNN's kernel on heads with zeros up to `width`, which change neither scores nor values."""
    missing = width - q.shape[-1]
    scale = q.shape[-1] ** -0.5
    q, k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing)]) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    return y[..., : width - missing]


def ways(width: int, precision: str) -> dict[str, Callable]:
    """Each way to compute it that this device has."""
    found: dict[str, Callable] = {"own": own, "XLA": jax.nn.dot_product_attention}
    if ops.has_cudnn_attention() and precision == "bf16":
        padded = sorted({width, -(-width // 16) * 16, 128})
        found |= {f"cuDNN, {w} wide": partial(fused, width=w) for w in padded}
    return found


def gradient(function: Callable, *arrays: Any) -> Callable[[], Any]:
    """Forward and backward, compiled and done once."""

    def loss(*arrays):
        return function(*arrays).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    return lambda: compiled(*arrays)


def measure(c: AttentionConfig, heads: int, width: int, precision: str) -> list[dict[str, Any]]:
    """All ways at one shape, taking turns."""
    shape = (3, c.batch_size, c.tokens, heads, width)
    q, k, v = jax.random.normal(jax.random.key(0), shape, DTYPES[precision])
    runs = {name: gradient(way, q, k, v) for name, way in ways(width, precision).items()}
    times = interleaved(
        {name: turn(run, n=c.calls_per_turn) for name, run in runs.items()}, c.rounds
    )
    flops = 3 * 4 * c.batch_size * heads * c.tokens**2 * width  # backward is twice forward
    return [
        {
            "shape": f"{c.batch_size} × {c.tokens}, {heads} × {width}, {precision}",
            "way": name,
            "median_s": t.median,
            "min_s": t.min,
            "flops_per_second": flops / t.median,
            "times_as_fast_as_own": t.times_as_fast_as(times["own"]),
        }
        for name, t in times.items()
    ]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A line of the table, by column."""
    return {
        "batch × tokens, heads": row["shape"],
        "way": row["way"],
        "ms": number(1e3 * row["median_s"]),
        "min": number(1e3 * row["min_s"]),
        "FLOP/s": profiling.si(row["flops_per_second"], ""),
        "× own": number(row["times_as_fast_as_own"]),
    }


def main() -> None:
    config = cli.parse_flags(AttentionConfig)
    require("precision", config.precision, DTYPES)
    if len(config.heads) != len(config.width):
        raise UserError("--heads and --width: each number of heads needs its width")
    shapes = list(zip(config.heads, config.width, strict=True))
    rows = [row for s in shapes for p in config.precision for row in measure(config, *s, p)]
    print(table([cells(row) for row in rows]))
    if not ops.has_cudnn_attention():
        print("left out: cuDNN: no NVIDIA GPU of Ampere or later here")
    print(json_line("attention", rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
