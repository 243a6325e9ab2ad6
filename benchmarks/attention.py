"""Time attention, forward and backward: each implementation, at the heads of the presets.

    python benchmarks/attention.py
    python benchmarks/attention.py --batch_size 128 --tokens 256 --heads 12 16 --width 64 72

`networks.ops.attention` takes cuDNN's kernel if the device has it, else its own. Padded variants
show whether a width that the kernel prefers is worth its zeros. An implementation that cannot run
here is left out, with the reason.
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

from benchmarks.timing import (
    format_number,
    format_table,
    make_json_line,
    make_turn,
    require_known,
    run_interleaved,
)
from networks import ops
from runtime import cli
from runtime.errors import UserError
from runtime.flags import flag
from training import profiling

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@dataclass(frozen=True)
class AttentionConfig:
    """Time attention, forward and backward."""

    batch_size: int = flag(16, "images")
    tokens: int = flag(256, "per image")
    heads: tuple[int, ...] = flag((6, 16), "numbers of heads, each with its width")
    width: tuple[int, ...] = flag((64, 72), "of a head")
    precision: tuple[str, ...] = flag(("fp32", "bf16"), "fp32, bf16")
    rounds: int = flag(4, "measured rounds, after one for warming up")
    calls_per_turn: int = flag(4, "dispatched one after the other before waiting")


def attend_in_jax(q, k, v):
    """Compute attention by the project's own implementation, without cuDNN."""
    with patch.object(ops, "has_cudnn_attention", lambda: False):
        return ops.attention(q, k, v)


def attend_with_cudnn(q, k, v, *, width: int):
    """Compute attention by cuDNN's kernel, with heads padded by zeros to `width`.

    The zeros change neither scores nor values.
    """
    missing = width - q.shape[-1]
    scale = q.shape[-1] ** -0.5
    q, k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing)]) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    return y[..., : width - missing]


def list_implementations(width: int, precision: str) -> dict[str, Callable]:
    """List the implementations that this device has."""
    implementations: dict[str, Callable] = {
        "own": attend_in_jax,
        "XLA": jax.nn.dot_product_attention,
    }
    if ops.has_cudnn_attention() and precision == "bf16":
        for padded_width in sorted({width, -(-width // 16) * 16, 128}):
            implementations[f"cuDNN, {padded_width} wide"] = partial(
                attend_with_cudnn, width=padded_width
            )
    return implementations


def compile_gradient(function: Callable, *arrays: Any) -> Callable[[], Any]:
    """Compile the forward and backward pass and run it once."""

    def loss(*arrays):
        return function(*arrays).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    return lambda: compiled(*arrays)


def time_attention(
    c: AttentionConfig, heads: int, width: int, precision: str
) -> list[dict[str, Any]]:
    """Time all implementations at one shape, in turns."""
    shape = (3, c.batch_size, c.tokens, heads, width)
    q, k, v = jax.random.normal(jax.random.key(0), shape, DTYPES[precision])
    turns = {
        name: make_turn(compile_gradient(implementation, q, k, v), n=c.calls_per_turn)
        for name, implementation in list_implementations(width, precision).items()
    }
    times = run_interleaved(turns, c.rounds)
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


def format_attention_row(row: dict[str, Any]) -> dict[str, str]:
    """Format one row of the table, by column."""
    return {
        "batch × tokens, heads": row["shape"],
        "implementation": row["way"],
        "ms": format_number(1e3 * row["median_s"]),
        "min": format_number(1e3 * row["min_s"]),
        "FLOP/s": profiling.format_si(row["flops_per_second"], ""),
        "× own": format_number(row["times_as_fast_as_own"]),
    }


def main() -> None:
    config = cli.parse_flags(AttentionConfig)
    require_known("precision", config.precision, DTYPES)
    if len(config.heads) != len(config.width):
        raise UserError("--heads and --width: each number of heads needs its width")
    rows = [
        row
        for heads, width in zip(config.heads, config.width, strict=True)
        for precision in config.precision
        for row in time_attention(config, heads, width, precision)
    ]
    print(format_table([format_attention_row(row) for row in rows]))
    if not ops.has_cudnn_attention():
        print("left out: cuDNN: no NVIDIA GPU of Ampere or later here")
    print(make_json_line("attention", rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
