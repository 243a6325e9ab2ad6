"""Inputs and helpers shared by the tests of optim."""

from typing import Any

import jax
import optax

from training import optim

key = jax.random.key(0)


# --- updates --------------------------------------------------------------------------------------


def optimizer(**kwargs):
    settings: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0}
    settings["clip_norm"] = 0.0
    return optim.clipped_adamw(optax.constant_schedule(0.1), **settings | kwargs)


def updates(grads, params, **kwargs) -> Any:
    tx = optimizer(**kwargs)
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)
