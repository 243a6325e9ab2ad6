"""Time the start of the default run until its first step, with a cold and a warm cache.

    python benchmarks/startup.py

Each time is of a fresh process that runs `train.py` up to there: imports; the trainer with its
weights; the run's folder and its data; a step with its compilation. A cold cache is an empty folder
for compiled programs and datasets; a warm one was filled by another such process. torch is timed
beside it: the same model's first step in float32, without data, folder or compilation.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(ROOT := Path(__file__).parents[1]))

import jax

from benchmarks.peer import Cost, Peer
from benchmarks.timing import (
    format_number,
    format_table,
    make_json_line,
    run_interleaved,
    skip_if_impossible,
)
from runtime import cli
from runtime.flags import flag
from train import Trainer
from training.config import TrainConfig

STAGES = ("import", "build", "open", "compile", "step")
MAX_SECONDS = {"cold": 25.0, "warm": 12.0}  # goals on two cores


@dataclass(frozen=True)
class StartupConfig:
    """Time the start of the default run."""

    model: str | None = flag(None, "instead of the default run's")
    rounds: int = flag(4, "measured rounds, after one for warming up")
    peer: bool = flag(True, "time torch too")


def start_process(cache: Path, model: str | None) -> dict[str, float]:
    """Measure the seconds of each stage of one fresh process whose caches are in `cache`."""
    flags = ["--run_dir", str(Path(tempfile.mkdtemp(dir=cache)) / "run")]
    if model:
        flags += ["--model", model]
    # train.py chooses its cache by XDG_CACHE_HOME, if none of JAX's own variables is set.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS", "HF_"))
    }
    begin = time.time()
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/first_step.py", *flags],
        env=environment | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    end_times = json.loads(result.stdout.splitlines()[-1])
    step = end_times["stepped_again"] - end_times["stepped"]
    return {
        "import": end_times["imported"] - begin,
        "build": end_times["built"] - end_times["imported"],
        "open": end_times["opened"] - end_times["built"],
        "compile": end_times["stepped"] - end_times["opened"] - step,
        "step": step,
    }


def make_start_turns(
    model: str | None, folder: Path, stages: dict[str, list[dict[str, float]]]
) -> dict[str, Callable[[], Cost]]:
    """Make turns with a cold and with a warm cache, which append their stages to `stages`."""

    def start(name: str, cache: Path) -> Cost:
        cpu_start = cpu_seconds_of_children()
        stages[name].append(start_process(cache, model))
        return Cost(sum(stages[name][-1].values()), cpu_seconds_of_children() - cpu_start)

    return {
        "cold": lambda: start("cold", Path(tempfile.mkdtemp(dir=folder))),
        "warm": lambda: start("warm", folder),
    }


def cpu_seconds_of_children() -> float:
    """Return what all processes have used that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def make_torch_turn(model: str | None) -> Callable[[], Cost]:
    """Make a turn of the peer, which builds the default run's model and takes a step.

    Raises:
        PeerMissing: there is no peer.
    """
    trainer = Trainer(TrainConfig(profile=True, model=model))  # pyright: ignore[reportArgumentType]
    m = trainer.model_config

    def take_turn() -> Cost:
        begin, cpu_start = time.time(), cpu_seconds_of_children()
        peer = Peer(
            "fp32",
            "step",
            m,
            platform=jax.default_backend(),
            batch_size=trainer.config.batch_size,
            remat=m.remat,
        )
        with contextlib.closing(peer):
            seconds = time.time() - begin
        return Cost(seconds, cpu_seconds_of_children() - cpu_start)

    take_turn()  # raises PeerMissing before anything else is timed
    return take_turn


def main() -> None:
    config = cli.parse_flags(StartupConfig)
    stages: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        turns = make_start_turns(config.model, Path(folder), stages)
        if config.peer:
            with skip_if_impossible("torch"):
                turns["torch fp32"] = make_torch_turn(config.model)
        times = run_interleaved(turns, config.rounds)
    rows: dict[str, dict[str, Any]] = {}
    for name, t in times.items():
        rows[name] = {
            "median_s": t.median,
            "min_s": t.min,
            "seconds": t.seconds,
            "cpu_s": t.cpu_median,
        }
        if name in stages:  # the first round is for warming up
            for stage in STAGES:
                rows[name][stage] = median(seconds[stage] for seconds in stages[name][1:])
    print(
        format_table(
            [
                {"first finished step": name}
                | {stage: format_number(row.get(stage)) for stage in STAGES}
                | {"s": format_number(row["median_s"]), "min": format_number(row["min_s"])}
                | {"at most": format_number(MAX_SECONDS.get(name))}
                for name, row in rows.items()
            ]
        )
    )
    print(make_json_line("startup", model=config.model, rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
