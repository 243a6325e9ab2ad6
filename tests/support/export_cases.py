"""A run and its exported folder, shared by the tests of export."""

from dataclasses import replace

import jax
import nano  # noqa: F401  (its sizes)
import pytest

import export
from export import ExportConfig
from train import Trainer
from training.config import TrainConfig

SMALL = TrainConfig(
    model="DiT-Nano/4",
    batch_size=8,
    n_steps=2,
    warmup_steps=1,
    eval_save_steps=2,
    n_eval_batches=1,
    n_sample_steps=2,
    sample_every_n=100,
    weight_decay=0.1,
    half_precision=False,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Save a run that diffusers can compute. Its weights are moved away from their zero start."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = replace(SMALL, run_dir=folder, objective="ddpm", learned_sigma=True)
    trainer = Trainer(config)
    moved = jax.tree.map(
        lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), trainer.state.params
    )
    trainer.state = replace(trainer.state, params=moved, ema=jax.tree.map(lambda x: 2 * x, moved))
    trainer.save()
    return trainer


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Export the run."""
    out = tmp_path_factory.mktemp("out") / "my-dit"
    export.main(ExportConfig(run=trained.run_dir, out=out))
    return out
