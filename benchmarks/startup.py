"""How long until the default run has finished its first step? With a cold and a warm cache, beside
torch.

    python benchmarks/startup.py

Each figure is of a fresh process that is `train.py` up to there: imports; the trainer, with its
weights; the run's folder and its data; a step with its compilation. Cold is an empty cache folder,
of compiled programs and of datasets; warm is the folder that another such process has left. torch
is the same model's first step in float32, without data, folder or compilation.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(ROOT := Path(__file__).parents[1]))

import jax

from benchmarks.peer import Peer
from benchmarks.timing import (
    format_number,
    format_table,
    make_json_line,
    run_interleaved,
    skip_if_impossible,
)
from runtime import cli
from train import Trainer
from training.config import TrainConfig

STAGES = ("import", "build", "open", "compile", "step")
MAX_SECONDS = {"cold": 25.0, "warm": 12.0}  # seconds, on two cores


@dataclass(frozen=True)
class StartupConfig:
    """Time the start of the default run.

    Args:
        model: instead of the default run's.
        rounds: that count, after one that does not.
        peer: whether torch is timed too.
    """

    model: str | None = None
    rounds: int = 4
    peer: bool = True


def start_process(cache: Path, model: str | None) -> dict[str, float]:
    """Seconds of each stage of one fresh process that keeps everything in `cache`."""
    flags = ["--run_dir", str(Path(tempfile.mkdtemp(dir=cache)) / "run")]
    flags += ["--model", model] if model else []
    # train.py chooses its cache by XDG_CACHE_HOME, if none of JAX's own variables is set.
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS", "HF_"))
    }
    begin = time.time()
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/first_step.py", *flags],
        env=kept | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    at = json.loads(done.stdout.splitlines()[-1])
    step = at["stepped_again"] - at["stepped"]
    return {
        "import": at["imported"] - begin,
        "build": at["built"] - at["imported"],
        "open": at["opened"] - at["built"],
        "compile": at["stepped"] - at["opened"] - step,
        "step": step,
    }


def make_start_turns(
    model: str | None, folder: Path, found: dict[str, list[dict[str, float]]]
) -> dict[str, Callable[[], float]]:
    """Turns with a cold and with a warm cache, which write their stages into `found`."""

    def cold() -> float:
        found["cold"].append(start_process(Path(tempfile.mkdtemp(dir=folder)), model))
        return sum(found["cold"][-1].values())

    def warm() -> float:
        found["warm"].append(start_process(folder, model))
        return sum(found["warm"][-1].values())

    return {"cold": cold, "warm": warm}


def make_torch_turn(model: str | None) -> Callable[[], float]:
    """A turn of the peer, which builds the default run's model and takes a step.

    Raises:
        PeerMissing: there is none.
    """
    trainer = Trainer(TrainConfig(profile=True, model=model))  # pyright: ignore[reportArgumentType]
    m, batch_size = trainer.model_config, trainer.config.batch_size

    def seconds() -> float:
        begin = time.time()
        peer = Peer(
            "fp32", "step", m, platform=jax.default_backend(), batch_size=batch_size, remat=m.remat
        )
        with contextlib.closing(peer):
            return time.time() - begin

    seconds()
    return seconds


def main() -> None:
    config = cli.parse_flags(StartupConfig)
    stages: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        turns = make_start_turns(config.model, Path(folder), stages)
        if config.peer:
            with skip_if_impossible("torch"):
                turns["torch fp32"] = make_torch_turn(config.model)
        times = run_interleaved(turns, config.rounds)
    rows = {
        name: {"median_s": t.median, "min_s": t.min, "seconds": t.seconds}
        | {stage: median(s[stage] for s in stages[name][1:]) for stage in STAGES if name in stages}
        for name, t in times.items()
    }
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
