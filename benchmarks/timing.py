"""Times of steps that take turns, and how they are printed.

Machines are shared and noisy. Compared steps therefore run in the same minutes, one turn of each in
every round. The first round, which warms caches, is dropped; medians, minima and ratios are of the
rest. Knows nothing about the steps.
"""

import contextlib
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any

import jax

from benchmarks.peer import Cost, PeerMissing
from runtime import processor
from runtime.errors import UserError, unknown_name

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")


@dataclass(frozen=True)
class Times:
    """Seconds of one step, in each round: by the clock, and of all cores together."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def cpu_median(self) -> float:
        return median(self.cpu_seconds)

    def times_as_fast_as(self, other: "Times") -> float:
        """Return the median over rounds of the ratio of times: above 1, this one is faster."""
        return median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def make_turn(run: Callable[[], Any], *, n: int = 1) -> Callable[[], Cost]:
    """Make a function that runs n steps and returns the cost of one.

    Steps are dispatched one after the other; it waits for the last.
    """

    def take_turn() -> Cost:
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(n):
            result = run()
        jax.block_until_ready(result)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return Cost(seconds / n, cpu_seconds / n)

    return take_turn


def run_interleaved(turns: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, Times]:
    """Take one turn of each in every round, after a round that is dropped.

    Each round starts with another one, so that none always follows the same.

    Raises:
        UserError: `rounds` is below 1.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: must be at least 1")
    names = list(turns)
    costs: dict[str, list[Cost]] = {name: [] for name in turns}
    for i in range(rounds + 1):
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            costs[name].append(turns[name]())
    return {
        name: Times(
            seconds=tuple(cost.seconds for cost in measured[1:]),
            cpu_seconds=tuple(cost.cpu_seconds for cost in measured[1:]),
        )
        for name, measured in costs.items()
    }


@contextlib.contextmanager
def skip_if_impossible(subject: str) -> Iterator[None]:
    """Print in one line why something cannot be measured, instead of raising.

    Only a missing peer and exhausted memory are skipped.
    """
    try:
        yield
    except PeerMissing as reason:
        print(f"left out: {subject}: {reason}", flush=True)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"left out: {subject}: out of memory", flush=True)


def require_known(flag: str, given: Iterable[str] | None, known: Iterable[str]) -> None:
    """Raise UserError if a flag has an unknown value."""
    for value in given or ():
        if value not in known:
            raise unknown_name(flag, value, known)


def describe_device() -> str:
    """Describe the accelerators, or the processor if there are none."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    return processor.processor_name()


def list_versions() -> dict[str, str]:
    """List the versions of Python and of those of `PACKAGES` that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Format rows as an aligned Markdown table.

    All columns but the first are aligned to the right. Columns without any value are left out.
    """
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    lines = [[], [], *([] for _ in rows)]
    for i, (name, column) in enumerate(columns.items()):
        if set(column) == {"n/a"}:
            continue
        width = max(map(len, (name, *column)))
        lines[0].append(name.rjust(width) if i else name.ljust(width))
        lines[1].append("-" * (width - 1) + ":" if i else "-" * width)
        for line, cell in zip(lines[2:], column, strict=True):
            line.append(cell.rjust(width) if i else cell.ljust(width))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_json_line(benchmark: str, **results: Any) -> str:
    """Make the last line of a benchmark: its results, the machine, the command and versions."""
    facts = {
        "benchmark": benchmark,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": describe_device(),
        "processor": processor.processor_name(),
        "instruction_sets": processor.instruction_sets(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": list_versions(),
    }
    return json.dumps(facts | results)


def format_ratios(ratios: Mapping[str, float], kinds: Iterable[str]) -> dict[str, str]:
    """Format how many times as fast as each kind of torch, and as the fastest of them."""
    cells = {f"× {kind}": format_number(ratios.get(kind)) for kind in kinds}
    return cells | {"× fastest torch": format_number(min(ratios.values(), default=None))}


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with three digits, or as n/a."""
    if value is None:
        return "n/a"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def format_percent(value: float | None) -> str:
    """Format a share as a percentage, or as n/a."""
    return "n/a" if value is None else f"{value:.0%}"
