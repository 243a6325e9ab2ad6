"""Small trained models to sample from, with random weights, made without training."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import nano  # noqa: F401  (its sizes)

from inference.trained_model import TrainedModel
from model import ModelConfig, init_model_params, model_config
from runtime import parallel

DIGITS = [str(i) for i in range(10)]
SHAPE = {"image_size": 8, "channels": 1}
CLASSES = model_config("DiT-Nano/4", **SHAPE, out_channels=1, n_classes=10)
SIGMA = model_config("DiT-Nano/4", **SHAPE, out_channels=2, n_classes=10)  # learned variance
SPAN = replace(CLASSES, takes_span=True, time_scale=1.0)  # mean velocity
UNCONDITIONAL = model_config("DiT-Nano/4", **SHAPE, out_channels=1, n_classes=0)  # unconditional
CAPTIONS = model_config(
    "DiT-Nano/8",
    **SHAPE,
    out_channels=1,
    n_classes=0,
    block="cross_attention",
    text_length=24,
    text_width=6,
    pooled_width=4,
)
FLOW = {"solver": "euler", "n_sample_steps": 3, "sample_shift": 1.0, "cfg_scale": 2.0}
DDPM = FLOW | {"solver": "ddpm", "sample_shift": None}
DDPM |= {"objective": "ddpm", "prediction": "epsilon"}
MEAN = {"objective": "meanflow", "solver": "map", "n_sample_steps": 1, "cfg_scale": 1.0}


@lru_cache
def weights(config: ModelConfig) -> Any:
    """Random weights away from their zero start, at which the output is zero."""
    fresh = init_model_params(config, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), fresh)


def tiny_model(config: ModelConfig = CLASSES, **settings: Any) -> TrainedModel:
    """A model as of a run on the digits."""
    dataset = {"encoding": None, "label_names": DIGITS if config.n_classes else []}
    data = {"dataset_name": "digits", "conditioning": "class", "dataset": dataset}
    settings = FLOW | data | settings
    return TrainedModel(
        "digits", settings, config, parallel.make_mesh(), lambda: (7, weights(config))
    )
