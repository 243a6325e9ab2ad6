"""Inputs and helpers shared by the tests of train."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import nano  # noqa: F401  (its preset)
import numpy as np
import pytest

from train import Trainer
from training.config import TrainConfig
from training.step import TrainState

TIMES = {"images_per_second", "seconds_per_step", "mfu"}
TINY = TrainConfig(
    model="DiT-Nano/8",
    batch_size=8,
    n_steps=12,
    warmup_steps=2,
    log_every=5,
    eval_save_steps=6,
    sample_every_n=100,
    n_eval_batches=1,
    n_sample_steps=2,
    half_precision=False,
)


def metrics(run_dir: Path) -> list[dict]:
    """A run's logged metrics without the times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name not in TIMES} for line in lines]


def assert_same(a: TrainState, b: TrainState) -> None:
    """Check that two trees are equal bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    """A small finished run."""
    trainer = Trainer(replace(TINY, run_dir=tmp_path_factory.mktemp("runs") / "whole"))
    trainer.fit()
    return trainer


def break_weights(trainer):
    """Make the weights NaN."""
    broken = jax.tree.map(lambda x: x * np.nan, trainer.state.params)
    trainer.state = replace(trainer.state, params=broken)
