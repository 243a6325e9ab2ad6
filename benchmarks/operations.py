"""List where the time of a train step goes, by the function that asked for the operation.

    python benchmarks/operations.py
    python benchmarks/operations.py --model DiT-Ti/2 --image_size 8 --batch_size 64 --precision bf16

Takes a trace of a few steps on a CPU. XLA names in it the operations that it runs; the compiled
program says which function of this project each of them is of, and what it does. The time is that
between an operation's beginning and its end, in whichever thread: operations side by side overlap,
so that the sum may exceed the time of a step. The floor is what the step's products would take at
the speed of a large one.
"""

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.step import (
    PRECISIONS,
    build_trainer,
    describe_model,
    make_matmul_turn,
    make_random_batch,
)
from benchmarks.timing import format_table, make_json_line, make_turn, require_known
from runtime import cli
from runtime.errors import UserError
from runtime.flags import flag
from training.config import TrainConfig

ROOT = Path(__file__).parents[1]
PRODUCTS, COPIES, REST = "products", "copies", "other"
KINDS = (PRODUCTS, COPIES, REST)
ADDED = "(added by XLA)"  # copies, for the most part
INSTRUCTION = re.compile(r" +(?:ROOT )?%?([\w.-]+) = ")
COPYING = re.compile(r"(wrapped_)?(copy|transpose|broadcast|slice|dynamic|concatenate|pad|gather)")


@dataclass(frozen=True)
class OperationsConfig:
    """List where the time of a train step goes, on a CPU."""

    model: str = flag("DiT-S/2", "preset such as DiT-S/2")
    batch_size: int = flag(16, "images of a step")
    precision: tuple[str, ...] = flag(("fp32", "bf16"), "of matrix products: fp32, bf16, fp8")
    image_size: int = flag(32, "pixels, or latents, to a side")
    channels: int = flag(4, "of images")
    n_steps: int = flag(3, "steps of the trace")
    n_functions: int = flag(24, "rows of the table")


class Operation(NamedTuple):
    """An operation of the compiled program: the function that asked for it, and its kind."""

    function: str
    kind: str


def read_table(hlo: str, name: str) -> dict[str, str]:
    """Read a table of names or places above the computations of a program's text."""
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", hlo, re.MULTILINE)
    return dict(line.split(" ", 1) for line in found[1].splitlines()) if found else {}


def find_function(hlo: str) -> Callable[[str], str]:
    """Return what finds, for the number of a stack frame, the innermost function of this project,
    as "networks/ops.py gelu".
    """
    files, functions = read_table(hlo, "FileNames"), read_table(hlo, "FunctionNames")
    places, frames = read_table(hlo, "FileLocations"), read_table(hlo, "StackFrames")

    def find(frame: str) -> str:
        while frame in frames:
            place, parent = re.findall(r"(?:location|parent_frame)_id=(\d+)", frames[frame])
            file, function = re.findall(r"(?:file|function)_name_id=(\d+)", places[place])
            path = Path(files[file].strip('"'))
            if path.is_relative_to(ROOT) and ".venv" not in path.parts:
                name = functions[function].strip('"').replace(".<locals>", "")
                return f"{path.relative_to(ROOT)} {name}"
            if parent == frame:
                break
            frame = parent
        return ADDED

    return find


def list_operations(hlo: str) -> dict[str, Operation]:
    """List the operations of a compiled program by name."""
    find = find_function(hlo)
    operations: dict[str, Operation] = {}
    for line in hlo.splitlines():
        found = INSTRUCTION.match(line)
        if not found:
            continue
        name, source = found[1], re.search(r'op_name="([^"]*)"', line)
        frame = re.search(r"stack_frame_id=(\d+)", line)
        function = find(frame[1]) if frame else ADDED
        if source and "transpose(" in source[1]:
            function += ", backward"
        if " dot(" in line or (source and source[1].endswith("dot_general")):
            kind = PRODUCTS
        else:
            kind = COPIES if COPYING.match(name) else REST
        operations[name] = Operation(function, kind)
    return operations


def read_trace(folder: Path) -> Counter[str]:
    """Add up the nanoseconds of each operation in a trace."""
    (file,) = folder.rglob("*.xplane.pb")
    nanoseconds: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation and event.name == operation:
                    nanoseconds[str(operation)] += int(event.duration_ns)
    return nanoseconds


def profile_step(c: OperationsConfig, precision: str) -> dict[str, Any]:
    """Trace steps of a model in one precision.

    Returns seconds of a step: of the whole, of the floor, and of each function by kind.
    """
    config = TrainConfig(
        model=c.model, batch_size=c.batch_size, image_size=c.image_size, channels=c.channels
    )
    trainer = build_trainer(config, precision)
    batch = make_random_batch(trainer)
    update = trainer.update.lower(trainer.state, batch, trainer.train_key).compile()

    def step() -> Any:
        trainer.state, report = update(trainer.state, batch, trainer.train_key)
        return report

    take_turn, (multiply, flops) = make_turn(step, n=c.n_steps), make_matmul_turn(precision)
    for turn in (take_turn, multiply):
        turn()  # for the first time, which is not measured
    speed = flops / min(multiply().seconds for _ in range(3))
    whole = take_turn()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            take_turn()
        found = read_trace(Path(folder))
    operations = list_operations(update.as_text())
    seconds: dict[str, dict[str, float]] = {}
    for name, nanoseconds in found.items():
        function, kind = operations.get(name, Operation(ADDED, REST))
        kinds = seconds.setdefault(function, dict.fromkeys(KINDS, 0.0))
        kinds[kind] += nanoseconds / 1e9 / c.n_steps
    train_flops = describe_model(trainer.model_config)["train_flops_per_image"] * c.batch_size
    return {
        "precision": precision,
        "step_s": whole.seconds,
        "cpu_s": whole.cpu_seconds,
        "floor_s": train_flops / speed,
        "matmul_flops_per_second": speed,
        "functions": seconds,
    }


def format_profile(profile: dict[str, Any], n_functions: int) -> str:
    """Format a profile: a line about the whole step, and a table of its costliest functions."""
    functions: dict[str, dict[str, float]] = profile["functions"]
    total = sum(sum(kinds.values()) for kinds in functions.values())

    def row(name: str, kinds: dict[str, float]) -> dict[str, str]:
        cells = {kind: f"{1000 * kinds[kind]:.1f}" for kind in KINDS}
        share = sum(kinds.values()) / total
        return {"function": name} | cells | {"share": f"{share:.1%}"}

    ordered = sorted(functions, key=lambda name: -sum(functions[name].values()))
    sums = {kind: sum(kinds[kind] for kinds in functions.values()) for kind in KINDS}
    rows = [row("all", sums), *(row(name, functions[name]) for name in ordered[:n_functions])]
    return (
        f"{profile['precision']}: a step takes {1000 * profile['step_s']:.0f} ms, and "
        f"{1000 * profile['cpu_s']:.0f} ms of all cores; its products would take "
        f"{1000 * profile['floor_s']:.0f} ms at {profile['matmul_flops_per_second'] / 1e9:.0f} "
        f"GFLOP/s. Milliseconds of operations by function:\n{format_table(rows)}"
    )


def main() -> None:
    c = cli.parse_flags(OperationsConfig)
    require_known("precision", c.precision, PRECISIONS)
    if jax.default_backend() != "cpu":
        raise UserError("traces of a CPU alone are read", how="set JAX_PLATFORMS=cpu")
    profiles = [profile_step(c, precision) for precision in c.precision]
    for profile in profiles:
        print(format_profile(profile, c.n_functions), end="\n\n")
    print(make_json_line("operations", profiles=profiles))


if __name__ == "__main__":
    cli.run_command(main)
