"""Inputs and helpers shared by the tests of train_vae."""

from dataclasses import replace

import pytest

from training.autoencoder.config import VaeConfig
from training.autoencoder.trainer import VaeTrainer

COMMAND = "train_vae.py"
TINY = VaeConfig(
    block_out_channels=(8, 8),
    batch_size=8,
    n_steps=8,
    warmup_steps=2,
    log_every=3,
    eval_save_steps=6,
    sample_every_n=6,
    n_eval_batches=1,
    attention=False,
    gan_weight=0.5,
    gan_start=3,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> VaeTrainer:
    """A small run from beginning to end, with a critic from its middle on."""
    trainer = VaeTrainer(replace(TINY, run_dir=tmp_path_factory.mktemp("runs") / "whole"))
    trainer.fit()
    return trainer
