"""Models, weights and a run, shared by the tests of training.warm_start."""

from dataclasses import replace

import jax
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest

from model import init_model_params, model_config
from runtime import parallel
from train import Trainer
from training.config import TrainConfig
from training.warm_start import StartingWeights

CONFIG = model_config("DiT-Nano/4", image_size=8, channels=1, out_channels=1, n_classes=10)
TINY = TrainConfig(
    batch_size=8,
    n_steps=4,
    warmup_steps=2,
    eval_save_steps=4,
    n_eval_batches=1,
    n_sample_steps=2,
    sample_every_n=100,
    half_precision=False,
)
FLAGS = {"mlp": "swiglu", "position": "learned", "rope": True, "block": "adaln"}


def weights(config, seed=0):
    """Return weights in host memory, none of them zero."""
    fresh = init_model_params(config, jax.random.key(seed))
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(9), p.shape), fresh)
    return jax.device_get(moved)


def source(config=CONFIG, *, names=(), **settings):
    return StartingWeights(
        config,
        weights(config),
        {"dataset": {"label_names": names}} | settings,
        "a source",
        "a source",
    )


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Save a small run with flags of its own, as if it had been trained."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    trainer = Trainer(replace(TINY, model="DiT-Nano/4", run_dir=folder, **FLAGS))
    ema = weights(trainer.model_config)
    trainer.state = replace(trainer.state, ema=parallel.shard_params(ema, trainer.mesh))
    trainer.save()
    return folder, ema
