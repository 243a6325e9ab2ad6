"""Adapters change nothing at first, equal the merged weights, and descend as the weights would."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from model_cases import TINY, VARIANTS, labels_for, t, with_random_weights, x

from model import ModelConfig, init_model_params, model_config, model_graphdef
from networks.lora import LoraConfig, LowRank, merge_adapters, split_adapter
from runtime import parallel
from runtime.errors import UserError
from training.adapters import in_precision_of_products

LORA = LoraConfig(rank=3, alpha=6.0, full_parts=("label",))
PLAIN = {"adaln_zero": TINY, "joint": VARIANTS["joint, SD3.5"]}


@partial(jax.jit, static_argnums=0)
def predict(config, params):
    return nnx.merge(model_graphdef(config), params)(x, t, labels_for(config))


def random_params(config):
    return nnx.to_pure_dict(nnx.split(with_random_weights(config))[1])


def split_of(config):
    """The weights with adapters as they start, of a base that is random."""
    base = random_params(config)
    adapted = replace(config, lora=LORA)
    own, _ = split_adapter(init_model_params(adapted, jax.random.key(0)), LORA)
    _, frozen = split_adapter(base, LORA)
    return base, adapted, own | {"label": base["label"]}, frozen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PLAIN)
def test_adapters_start_without_effect(name, dtype):
    """Bit for bit, with a base in the precision of its products."""
    config = replace(PLAIN[name], dtype=dtype)
    base, adapted, own, frozen = split_of(config)
    frozen = in_precision_of_products(frozen, config)
    leaves: dict[Any, Any] = dict(flatten_dict(frozen))
    kernels = {x.dtype for path, x in leaves.items() if path[-1] == "kernel"}
    assert jnp.dtype(dtype) in kernels
    params = parallel.join_trees(own, frozen)
    np.testing.assert_array_equal(predict(adapted, params), predict(config, base))


@pytest.mark.parametrize("name", PLAIN)
def test_merged_weights_predict_the_same(name):
    config = PLAIN[name]
    _, adapted, own, frozen = split_of(config)
    own = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), own)
    params = parallel.join_trees(own, frozen)
    merged = merge_adapters(params, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(random_params(config))
    changed = predict(config, merged)
    np.testing.assert_allclose(changed, predict(adapted, params), atol=2e-6 * abs(changed).max())
    without = merge_adapters(params, replace(LORA, alpha=0.0))
    assert abs(changed - predict(config, without)).max() > 0.01


def test_a_full_rank_adapter_descends_as_the_weights_do():
    """With A = I and α = r, y = x (W + B), so that B has W's gradient."""
    rng = np.random.default_rng(0)
    n, m = 6, 10
    data, w, g = (jnp.float32(rng.normal(size=s)) for s in ((5, n), (n, m), (5, m)))
    config = LoraConfig(rank=n, alpha=float(n))
    adapter = LowRank((n, m), 1, config, dtype="float32", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(adapter)
    weights = nnx.to_pure_dict(state) | {"a": jnp.eye(n)}

    def loss(b, w):
        return (g * (data @ w + nnx.merge(graphdef, weights | {"b": b})(data))).sum()

    of_b, of_w = jax.grad(loss, (0, 1))(weights["b"], w)
    np.testing.assert_allclose(of_b, of_w, rtol=1e-6)


def test_queries_keys_and_values_have_adapters_of_their_own():
    config = LoraConfig(rank=2, alpha=2.0)
    adapter = LowRank((4, 12), 3, config, dtype="float32", rngs=nnx.Rngs(0))
    a, b = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    b = b.reshape(2, 12)
    adapter.a[...], adapter.b[...] = jnp.asarray(a), jnp.asarray(b)
    data = jnp.ones((1, 4))
    separate = [data @ a[:, 2 * i : 2 * i + 2] @ b[:, 4 * i : 4 * i + 4] for i in range(3)]
    np.testing.assert_allclose(adapter(data), np.concatenate(separate, axis=1), rtol=1e-5)


def test_a_checkpoint_of_rank_16_is_small():
    """Weights, their average and AdamW's moments are all of the adapters alone."""

    def size(config):
        params = jax.eval_shape(lambda: init_model_params(config, jax.random.key(0)))
        own = split_adapter(params, config.lora)[0] if config.lora else params
        return sum(leaf.size for leaf in jax.tree.leaves(own))

    whole = model_config("DiT-XL/2", image_size=32, channels=4, out_channels=8, n_classes=1000)
    lora = LoraConfig(16, 16.0, full_parts=("label",))
    share = size(replace(whole, lora=lora)) / size(whole)
    assert 0.005 < share < 0.05


def test_targets_choose_the_maps():
    def maps(*targets):
        lora = LoraConfig(2, 2.0, targets)
        config = replace(TINY, lora=lora)
        params = jax.eval_shape(lambda: init_model_params(config, jax.random.key(0)))
        return {path[1] for path in flatten_dict(split_adapter(params, lora)[0])}

    assert (maps("attention"), maps("mlp")) == ({"attention"}, {"mlp"})
    assert maps("attention", "mlp") == {"attention", "mlp"}
    for targets, named in ((("bias",), "bias"), ((), "''")):
        with pytest.raises(UserError, match=f"lora_targets .*{named}"):
            LoraConfig(2, 2.0, targets)
    with pytest.raises(UserError, match="rank 0"):
        LoraConfig(0, 2.0)


def test_a_config_returns_from_json():
    config = replace(TINY, lora=LORA)
    fields = vars(config) | {
        "lora": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(LORA).items()}
    }
    assert ModelConfig.from_json(fields) == config
