"""Run `train.py` and print where the seconds between the command and its end went.

    python benchmarks/default_run.py --run_dir RUN                  # the default run
    python benchmarks/default_run.py --run_dir RUN --n_steps 200    # takes the flags of train.py

By the clock of the process that trains: what runs in the background, such as writing a checkpoint,
counts where it is waited for.
"""

# ruff: noqa: E402 (imports are a stage of their own)
import time

START = time.perf_counter()

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

import train
from benchmarks.timing import format_number, format_percent, format_table, make_json_line
from runtime import cli, processes
from training.session import RunSession


class Stages:
    """Seconds of each stage. A stage inside of another is not counted twice."""

    def __init__(self, imported: float):
        self.seconds = {"import": imported}
        self.inside = 0.0  # of stages that were called from the current one

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def watch(self, owner: type, method: str, name: str | Callable[[Any], str]) -> None:
        """Count the calls of a method as a stage, whose name may depend on the object."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(itself: Any, *args: Any, **kwargs: Any) -> Any:
            stage = name if isinstance(name, str) else name(itself)
            outside, self.inside = self.inside, 0.0
            start = time.perf_counter()
            try:
                return call(itself, *args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self.add(stage, seconds - self.inside)
                self.inside = outside + seconds

        setattr(owner, method, timed)


def watch_stages(imported: float) -> Stages:
    """Time the parts of a run, from here on."""
    stages = Stages(imported)
    step = train.Trainer.train_step

    def first_step_is_waited_for(self: train.Trainer, batch: Any) -> Any:
        report = step(self, batch)
        if self.step == 1:
            jax.block_until_ready(report)
        return report

    train.Trainer.train_step = first_step_is_waited_for
    stages.watch(train.Trainer, "__init__", "open data, create state")
    stages.watch(
        train.Trainer,
        "train_step",
        lambda run: "dispatch steps" if run.step else "first step, with its compilation",
    )
    stages.watch(RunSession, "fetch_pending", "wait for steps")
    stages.watch(train.Trainer, "evaluate", "evaluations")
    stages.watch(RunSession, "save_image_grid", "samples")
    stages.watch(RunSession, "save", "checkpoints")
    stages.watch(RunSession, "save_figures", "curves and progress")
    stages.watch(train.Trainer, "fit", "everything else of the loop")
    return stages


def main() -> None:
    stages = watch_stages(time.perf_counter() - START)
    train.main()
    total = time.perf_counter() - START
    stages.add("leave", total - sum(stages.seconds.values()))
    rows = [
        {"stage": name, "s": format_number(seconds), "": format_percent(seconds / total)}
        for name, seconds in [*stages.seconds.items(), ("command to end", total)]
    ]
    print(format_table(rows))
    print(make_json_line("default_run", rows=stages.seconds | {"total": total}))


if __name__ == "__main__":
    cli.run_command(main, processes.exit_process)
