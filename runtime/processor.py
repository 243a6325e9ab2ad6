"""The machine's processor: its name, and the instructions that matter to matrix products."""

import functools
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")  # Linux; elsewhere no instruction set is known
INSTRUCTION_SETS = (  # of x86-64 and of ARM, as Linux writes them
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16"),
)
FAST_BF16 = {"avx512_bf16", "amx_bf16"}  # of those that were measured


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return the facts of the first core."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """Return the cores and the name of the processor."""
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def instruction_sets() -> tuple[str, ...]:
    """Return which of `INSTRUCTION_SETS` the processor has, as far as Linux lists them."""
    facts = _cpuinfo()
    found = set((facts.get("flags") or facts.get("Features") or "").split())
    return tuple(name for name in INSTRUCTION_SETS if name in found)


def multiplies_bf16() -> bool:
    """Return True if the processor multiplies bfloat16 faster than float32."""
    return not FAST_BF16.isdisjoint(instruction_sets())
