"""Width transfer: what a layer adds to an activation, at first and by a step, does not depend on
the width.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_cases import key, optimizer
from tiny_models import CAPTIONS, CLASSES

from datasets_config import DATASET_CONFIGS
from model import BLOCKS, JOINT
from runtime.errors import UserError
from training import mup
from training.config import TrainConfig
from training.muon import muon, orthogonalize_all
from training.resolve import resolve_train_config

BASE, WIDTH = 64, 256
WIDE = mup.at_width(CLASSES, WIDTH)


def rms(x):
    return float(jnp.sqrt(jnp.square(x).mean()))


def shapes_of(*configs):
    """The shapes of each leaf in several networks."""
    leaves = [mup.leaf_shapes(config) for config in configs]
    return {
        "/".join(part.key for part in path): [shapes[path] for shapes in leaves]
        for path in leaves[0]
    }


@pytest.mark.parametrize("block", [*BLOCKS, JOINT])
def test_at_the_base_width_every_factor_is_one(block):
    config = replace(CLASSES, block=block)
    for shape, base in shapes_of(config, mup.at_width(config, config.width)).values():
        assert mup.adamw_factor(shape, base) == 1
        assert len(shape) < 2 or mup.muon_factor(shape, base) == 1
    assert mup.step_factors(mup.adamw_factor, config, config.width) is None


def test_kernels_whose_inputs_grow_take_smaller_steps_and_nothing_else_does():
    narrow, wide = (mup.at_width(replace(CAPTIONS, n_classes=0), w) for w in (BASE, WIDTH))
    smaller = {
        name for name, shapes in shapes_of(wide, narrow).items() if mup.adamw_factor(*shapes) != 1
    }
    names = {name for name in shapes_of(wide) if name.endswith("kernel")}
    of_fixed_inputs = {"patch", "time/mlp/hidden", "label/tokens", "label/pooled/hidden"}
    assert smaller == names - {f"{name}/kernel" for name in of_fixed_inputs}
    assert {mup.adamw_factor(*shapes_of(wide, narrow)[name]) for name in smaller} == {1 / 4}


@pytest.mark.parametrize("config", [CLASSES, CAPTIONS], ids=["classes", "captions"])
def test_initial_values_keep_the_size_of_what_they_add(config):
    narrow, wide = (mup.at_width(config, width) for width in (BASE, WIDTH))
    base, scaled = (jax.jit(partial(mup.init_params, c, BASE))(key) for c in (narrow, wide))
    for (path, b), s in zip(
        jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(scaled), strict=True
    ):
        inputs = s.shape[-2] / b.shape[-2] if s.ndim > 1 else 1
        np.testing.assert_allclose(rms(s) * inputs**0.5, rms(b), rtol=1e-4, err_msg=str(path))


@pytest.mark.parametrize("base", [(64, 64), (64, 256), (256, 64)])
def test_a_step_of_muon_changes_every_activation_alike(base):
    """Its largest singular value is √(outputs / inputs) times what it is at the base width; those
    of the polynomials end within 8 % of one.
    """
    shape = tuple(4 * n for n in base)

    def gain(shape, factor):
        x = {"kernel": jax.random.normal(key, shape)}
        step = orthogonalize_all(x, jnp.float32, lambda maps: maps)["kernel"]
        return factor * np.linalg.norm(step, ord=2) * (shape[0] / shape[1]) ** 0.5

    np.testing.assert_allclose(gain(shape, mup.muon_factor(shape, base)), gain(base, 1), rtol=0.17)
    assert mup.muon_factor(shape, base) == pytest.approx(0.5)
    assert mup.muon_factor((3, 64, 256), (3, 64, 64)) == 1  # where the outputs alone grow


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_weight_decay_has_no_factor(rule):
    """What is forgotten in a step is learning rate × decay at every width."""
    params = jax.jit(partial(mup.init_params, WIDE, BASE))(key)
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)

    def steps(weight_decay):
        muon_factors = mup.step_factors(mup.muon_factor, WIDE, BASE)
        blocks = muon(optax.constant_schedule(0.1), weight_decay=weight_decay, factors=muon_factors)
        tx = optimizer(
            weight_decay=weight_decay,
            blocks=blocks if rule == "muon" else None,
            factors=mup.step_factors(mup.adamw_factor, WIDE, BASE),
        )
        return jax.jit(tx.update)(grads, tx.init(params), params)[0]

    forgotten = jax.tree.map(jnp.subtract, steps(0.5), steps(0.0))
    for kernel in (
        lambda p: p["patch"]["kernel"],
        lambda p: p["time"]["mlp"]["out"]["kernel"],
        lambda p: p["blocks"]["mlp"]["down"]["kernel"],
    ):
        np.testing.assert_allclose(kernel(forgotten), -0.1 * 0.5 * kernel(params), atol=1e-6)


def test_a_width_without_whole_heads_is_refused():
    def resolve(**flags):
        config = TrainConfig(model="DiT-Ti/2", **flags)
        dataset = DATASET_CONFIGS["digits"]
        return resolve_train_config(config, dataset, n_rows=64, n_devices=1, fast_bf16=False)

    assert resolve().mup == 0
    assert resolve(mup=64).mup == 64
    with pytest.raises(UserError, match=r"--mup 48: heads have 32 channels .* multiple of 32"):
        resolve(mup=48)
    with pytest.raises(UserError, match="--mup -32: must be at least 0"):
        resolve(mup=-32)
