"""Train one network by every method on the digits; judge each with its samplers and guidances.

    python benchmarks/methods.py --out runs/methods

Every method is trained with the settings of the default run and several seeds, and 1,000 of its
samples are judged as `digits.py` does. The table has the mean over seeds, and half the range. A
repeated command goes on where it was stopped.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.designs import open_or_train
from benchmarks.digits import Judgement, judge_digits
from benchmarks.timing import format_table, make_json_line
from inference.autoguidance import plan_with_guide
from inference.labels import spread_evenly
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime import cli
from runtime.errors import unknown_name
from runtime.flags import flag, required
from train import Trainer

RESULTS_FILE = "judged.jsonl"
WEAK_STEP = 225  # a quarter of the default run


@dataclass(frozen=True)
class Variant:
    """A way to train, and the ways to sample from it, by their names in the table.

    Args:
        teacher: the variant that it is distilled and started from.
    """

    flags: dict[str, Any]
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher: str | None = None


UNGUIDED = {"cfg_scale": 1.0}
OF_FLOWS = {
    "Euler 50, no guidance": UNGUIDED,
    "Euler 50, CFG 1.25": {"cfg_scale": 1.25},
}
MORE_SOLVERS = {
    "Heun 25, CFG 1.25": {"cfg_scale": 1.25, "solver": "heun", "n_steps": 25},
    "DPM++ 2M 10, CFG 1.25": {"cfg_scale": 1.25, "solver": "dpmpp_2m", "n_steps": 10},
    "SDE 100, CFG 1.25": {"cfg_scale": 1.25, "solver": "sde", "n_steps": 100},
}
BY_WEAK = {f"Euler 50, guided by step {WEAK_STEP}, 1.5": UNGUIDED | {"guide_scale": 1.5}}
BY_INNER = {
    "Euler 50, inner guidance 1.5": UNGUIDED | {"inner_guidance": 1.5},
    "the same, in t 0.3 … 1": UNGUIDED | {"inner_guidance": 1.5, "inner_interval": (0.3, 1.0)},
    "inner guidance 1.25 and CFG 1.25": {"cfg_scale": 1.25, "inner_guidance": 1.25},
}
BY_ROUTE = {"Euler 50, route guidance 1.5": UNGUIDED | {"route_guidance": 1.5}}
OF_DDPM = {
    "DDIM 50, no guidance": UNGUIDED | {"solver": "ddim"},
    "DDIM 50, CFG 1.25": {"cfg_scale": 1.25, "solver": "ddim"},
    "DDPM 50, CFG 1.25": {"cfg_scale": 1.25, "solver": "ddpm"},
    "DPM++ 2M 10, CFG 1.25": {"cfg_scale": 1.25, "solver": "dpmpp_2m", "n_steps": 10},
}
FEW_STEPS = {
    f"{name} {n}, CFG 1.25": {"cfg_scale": 1.25, "solver": solver, "n_steps": n}
    for name, solver, counts in (("Euler", "euler", (1, 2, 4)), ("DPM++ 2M", "dpmpp_2m", (4, 10)))
    for n in counts
}
OF_MAPS = {f"map {n}": {"n_steps": n} for n in (1, 2, 4)}
SLOW_FLOW = "rectified flow, --time_scale 1"
VARIANTS = {
    "rectified flow": Variant({}, OF_FLOWS | MORE_SOLVERS | BY_WEAK),
    "the same with an inner head": Variant({"inner_head": True}, OF_FLOWS | BY_INNER),
    "the same with LayerSync": Variant({"layer_sync": (2, 4)}, OF_FLOWS),
    "the same by Muon": Variant({"optimizer": "muon", "learning_rate": 1e-2}, OF_FLOWS),
    "the same with a route": Variant({"route": (1, -1)}, OF_FLOWS | BY_ROUTE),
    "flow of the clean image": Variant({"prediction": "x0"}, OF_FLOWS | MORE_SOLVERS),
    "DDPM, ε": Variant({"objective": "ddpm"}, OF_DDPM),
    "DDPM, v": Variant({"objective": "ddpm", "prediction": "v"}, OF_DDPM),
    SLOW_FLOW: Variant({"time_scale": 1.0}, OF_FLOWS | FEW_STEPS),
    "MeanFlow distilled from it": Variant(
        {
            "objective": "meanflow",
            "time_density": "uniform",
            "equal_share": 0.25,
            "learning_rate": 1.5e-3,
        },
        OF_MAPS,
        teacher=SLOW_FLOW,
    ),
    "MeanFlow from scratch": Variant({"objective": "meanflow", "equal_share": 0.5}, OF_MAPS),
}


@dataclass(frozen=True)
class MethodsConfig:
    """Train, sample and judge every method."""

    out: Path = required("a folder of runs, one for each method and seed")
    n: int = flag(1000, "the number of samples to judge")
    n_seeds: int = flag(3, "runs of each method", at_least=1)
    n_steps: int | None = flag(None, "of training; by default as for the digits")
    only: tuple[str, ...] = flag((), "names of methods of the table; by default all")


def judge(run_dir: Path, n: int, overrides: dict[str, Any], real: list[Any]) -> Judgement:
    """Sample n digits from a run's averaged weights, as many of each, and judge them."""
    model = TrainedModel.from_run(run_dir)
    if "guide_scale" in overrides:
        overrides = overrides | {"guide": f"{run_dir}@{WEAK_STEP}"}
    labels = spread_evenly(range(10), n)
    samples = model.sample(
        labels, plan_with_guide(model, SamplingOverrides(**overrides)), batch_size=500
    )
    return judge_digits(model.to_uint8(samples.x), labels, train=real[0], test=real[1])


def train_variant(config: MethodsConfig, name: str, seed: int) -> Trainer:
    """Return the trainer of a variant's finished run, training it, and its teacher, if need be."""
    variant = VARIANTS[name]
    flags = {"seed": seed, "keep_every": WEAK_STEP, **variant.flags}
    if variant.teacher:
        teacher = str(train_variant(config, variant.teacher, seed).run_dir)
        flags |= {"teacher": teacher, "init_from": teacher}
    length = f"-{config.n_steps}" if config.n_steps else ""
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return open_or_train(config.out / f"{'-'.join(words)}-{seed}{length}", flags, config.n_steps)


def judge_all(config: MethodsConfig) -> list[dict[str, Any]]:
    """Return a row for each method, seed and sampler, and add what was missing to the record."""
    path = config.out / RESULTS_FILE
    config.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if (row["n"], row["n_steps"]) == (config.n, config.n_steps)]
    known = {(row["method"], row["seed"], row["sampler"]) for row in rows}
    real = None
    for seed in range(config.n_seeds):
        for name in config.only or VARIANTS:
            wanted = VARIANTS[name].samplers
            missing = [sampler for sampler in wanted if (name, seed, sampler) not in known]
            if not missing:
                continue
            trainer = train_variant(config, name, seed)
            real = real or [trainer.data.decode_split(split) for split in ("train", "eval")]
            settings = {"n": config.n, "n_steps": config.n_steps, "method": name, "seed": seed}
            for sampler in missing:
                result = judge(trainer.run_dir, config.n, wanted[sampler], real)
                row = settings | {"sampler": sampler, **vars(result)}
                print(json.dumps(row, ensure_ascii=False), flush=True)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
    return rows


def mean_and_spread(values: list[float], form: str) -> str:
    """Format a mean, and half the range if there are several values."""
    mean = format(float(np.mean(values)), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format((max(values) - min(values)) / 2, form)}"


SCORES = {  # column → score, format
    "asked-for digit": ("accuracy", ".1%"),
    "digit Fréchet": ("digit_frechet", ".2f"),
    "Fréchet": ("frechet", ".1f"),
    "novelty": ("novelty", ".2f"),
}


def main() -> None:
    config = cli.parse_flags(MethodsConfig)
    if unknown := next((name for name in config.only if name not in VARIANTS), None):
        raise unknown_name("method", unknown, VARIANTS)
    rows = judge_all(config)
    table: list[dict[str, str]] = []
    for name, variant in VARIANTS.items():
        for sampler in variant.samplers:
            found = [r for r in rows if (r["method"], r["sampler"]) == (name, sampler)]
            if found:
                scores = {
                    column: mean_and_spread([row[score] for row in found], form)
                    for column, (score, form) in SCORES.items()
                }
                table.append({"method": name, "sampler": sampler} | scores)
    print(format_table(table))
    print(make_json_line("methods", rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
