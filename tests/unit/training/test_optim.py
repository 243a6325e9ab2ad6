"""Learning-rate schedules, AdamW against optax, clipping, EMA and loss scaling."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_cases import key, optimizer, updates

from model import ModelConfig, init_model_params
from networks.lora import LoraConfig
from training import optim

PEAK = 3e-3


def rate(name, step, *, warmup_steps=10, n_steps=110):
    schedule = optim.learning_rate_schedule(name, PEAK, warmup_steps=warmup_steps, n_steps=n_steps)
    return float(np.asarray(schedule(step)))


# --- the learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_the_warm_up_starts_above_zero_and_ends_at_the_peak(name):
    rates = [rate(name, step) for step in range(11)]
    np.testing.assert_allclose(rates[0], PEAK / 11, rtol=1e-5)
    np.testing.assert_allclose(rates[10], PEAK, rtol=1e-5)
    np.testing.assert_allclose(np.diff(rates), PEAK / 11, rtol=1e-3)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_without_warm_up_the_first_step_is_at_the_peak(name):
    np.testing.assert_allclose(rate(name, 0, warmup_steps=0), PEAK, rtol=1e-6)


@pytest.mark.parametrize(
    "name, halfway, end",
    [("constant", 1, 1), ("cosine", 0.5, 0), ("linear", 0.5, 0), ("wsd", 1, 0)],
)
def test_schedules_pass_through_their_corners(name, halfway, end):
    np.testing.assert_allclose(rate(name, 60), halfway * PEAK, rtol=1e-5)
    np.testing.assert_allclose([rate(name, 110), rate(name, 500)], end * PEAK, atol=1e-9)


def test_wsd_is_constant_and_then_falls_to_zero_in_a_line():
    """From four fifths on, or from where it is told to: the step of a checkpoint, say."""
    steps = [10, 50, 88, 99, 110, 200]
    np.testing.assert_allclose(
        [rate("wsd", s) / PEAK for s in steps], [1, 1, 1, 0.5, 0, 0], atol=1e-6
    )
    schedule = optim.learning_rate_schedule(
        "wsd", PEAK, warmup_steps=10, n_steps=110, decay_from=60
    )
    falling = [float(np.asarray(schedule(s))) / PEAK for s in (60, 85, 110)]
    np.testing.assert_allclose(falling, [1, 0.5, 0], atol=1e-6)


def test_a_cosine_is_a_cosine():
    np.testing.assert_allclose(rate("cosine", 35), PEAK * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-5)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_a_run_shorter_than_its_warm_up_still_works(name):
    rates = [rate(name, step, warmup_steps=5, n_steps=3) for step in range(4)]
    assert (np.diff(rates) > 0).all() and rates[-1] < PEAK


def test_weight_decay_shrinks_the_kernels_of_a_model_and_nothing_else():
    config = ModelConfig(
        width=16,
        depth=1,
        n_heads=2,
        patch_size=2,
        image_size=4,
        channels=1,
        out_channels=1,
        n_classes=3,
        qk_norm=True,
        position="learned",
        lora=LoraConfig(2, 2.0),  # whose maps are kernels too
    )
    shapes = jax.eval_shape(lambda: init_model_params(config, key))
    params = jax.tree.map(lambda p: jnp.ones(p.shape), shapes)
    moved = updates(jax.tree.map(jnp.zeros_like, params), params, weight_decay=0.5)
    names = set()
    for (path, update), p in zip(
        jax.tree.leaves_with_path(moved), jax.tree.leaves(params), strict=True
    ):
        names.add(path[-1].key)
        expected = -0.1 * 0.5 * p if path[-1].key in ("kernel", "a", "b") else 0 * p
        np.testing.assert_allclose(update, expected, rtol=1e-5)
    assert names == {"kernel", "bias", "scale", "table", "a", "b"}


def test_the_first_update_of_adam_is_the_sign_times_the_rate():
    grads = {"kernel": jnp.asarray([3.0, -0.002, 100.0])}
    update = updates(grads, jax.tree.map(jnp.ones_like, grads))["kernel"]
    np.testing.assert_allclose(update, [-0.1, 0.1, -0.1], rtol=1e-4)


def gradients_in_adam(grads, **kwargs) -> Any:
    """The sizes of the gradients that reached Adam: √(second moment / (1 − β₂)) after one step."""
    tx = optimizer(**kwargs)
    state = tx.update(grads, tx.init(grads), grads)[1]
    return jax.tree.map(lambda nu: jnp.sqrt(nu / (1 - 0.999)), optax.tree.get(state, "nu"))


def test_clipping_bounds_the_norm_of_all_gradients_together():
    grads = {"a": {"kernel": jnp.asarray([3.0])}, "b": {"bias": jnp.asarray([4.0])}}
    seen = gradients_in_adam(grads, clip_norm=1.0)
    np.testing.assert_allclose(
        [seen["a"]["kernel"][0], seen["b"]["bias"][0]], [0.6, 0.8], rtol=1e-4
    )
    small = gradients_in_adam(grads, clip_norm=6.0)
    np.testing.assert_allclose([small["a"]["kernel"][0], small["b"]["bias"][0]], [3, 4], rtol=1e-4)


def test_clip_norm_0_never_clips():
    seen = gradients_in_adam({"kernel": jnp.asarray([3e4, 4e4])}, clip_norm=0.0)
    np.testing.assert_allclose(seen["kernel"], [3e4, 4e4], rtol=1e-4)


# --- moments in bfloat16 --------------------------------------------------------------------------


def test_rounding_at_random_is_exact_on_average_and_to_a_neighbour():
    """The mean of n draws of a fraction f deviates by √(f (1 − f) / n) of a last bit: 6σ here."""
    n = 10_000
    for x in (1.0 + 2.0**-9, -1.0 - 2.0**-7 / 3, 1e-30, 3e38, 2.0**-140):
        rounded = optim.round_at_random({"x": jnp.full(n, x)}, key)["x"]
        assert rounded.dtype == jnp.bfloat16
        found = np.unique(np.asarray(rounded, np.float64))
        last_bit = np.ptp(found)
        assert len(found) == 2 and found[0] <= np.float32(x) <= found[1]
        error = np.asarray(rounded, np.float64).mean() - np.float64(np.float32(x))
        assert abs(error) < 6 * last_bit * 0.5 / np.sqrt(n)
    exact = jnp.asarray([0.0, -1.5, 2.0**-100])
    np.testing.assert_array_equal(optim.round_at_random([exact], key)[0], exact)


def test_moments_in_bfloat16_follow_those_in_float32():
    """A gradient of 1, then of 0.5: the second moment forgets by 0.1 % a step, a quarter of its
    last bit, and arrives all the same.
    """
    params = {"kernel": jnp.zeros(4096)}

    def train(moments):
        tx = optimizer(moments=moments)
        update = jax.jit(lambda g, state: tx.update(g, state, params)[1])
        state = tx.init(params)
        for gradient, n in ((1.0, 300), (0.5, 700)):
            for _ in range(n):
                state = update({"kernel": jnp.full(4096, gradient)}, state)
        return {name: optax.tree.get(state, name)["kernel"] for name in ("mu", "nu")}

    half, full = train("bf16"), train("fp32")
    for name in half:
        assert half[name].dtype == jnp.bfloat16 and full[name].dtype == jnp.float32
        np.testing.assert_allclose(half[name].astype(jnp.float32).mean(), full[name][0], rtol=2e-3)


def test_a_step_that_is_not_finite_changes_no_moment_in_bfloat16():
    params = {"kernel": jnp.zeros(64)}
    tx = optimizer(moments="bf16")
    state = tx.update({"kernel": jnp.linspace(-1, 1, 64)}, tx.init(params), params)[1]
    nan = {"kernel": jnp.full(64, jnp.nan)}
    after = tx.update(nan, state, params, finite=jnp.asarray(False))[1]
    jax.tree.map(np.testing.assert_array_equal, after, state)


# --- EMA ------------------------------------------------------------------------------------------


def test_the_ema_decay_warms_up_to_its_cap():
    decays = [
        float(optim.ema_decay_at(jnp.asarray(step), 0.99)) for step in (0, 10, 889, 891, 10**6)
    ]
    np.testing.assert_allclose(decays, [1 / 10, 11 / 20, 890 / 899, 0.99, 0.99], rtol=1e-6)


def test_the_ema_of_constant_weights_is_constant():
    params = jax.random.normal(key, (1000,))
    ema = params
    for step in range(5):
        ema = optim.update_ema(ema, params, optim.ema_decay_at(jnp.asarray(step), 0.9999))
    assert (ema == params).all()


def test_the_ema_is_the_weighted_sum():
    """With a fixed decay d: dⁿ·start + (1 − d)·Σ dⁿ⁻ⁱ·paramsᵢ."""
    d, start, params = 0.8, np.asarray([2.0]), np.random.default_rng(0).normal(size=(6, 1))
    ema = {"w": jnp.asarray(start)}
    for p in params:
        ema = optim.update_ema(ema, {"w": jnp.asarray(p)}, jnp.asarray(d))
    weights = (1 - d) * d ** np.arange(5, -1, -1)
    expected = d**6 * start + (weights[:, None] * params).sum(0)
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-5)


def test_after_a_thousand_steps_the_ema_has_forgotten_its_start():
    """Without the warm-up of 0.9999 the start would still weigh 90 %."""
    ema = {"w": jnp.ones(1)}
    for step in range(1000):
        ema = optim.update_ema(
            ema, {"w": jnp.zeros(1)}, optim.ema_decay_at(jnp.asarray(step), 0.9999)
        )
    assert ema["w"][0] < 1e-6


# --- loss scaling ---------------------------------------------------------------------------------


def scales(*finite, start=None):
    state = start or optim.initial_loss_scale()
    for ok in finite:
        state = optim.next_loss_scale(state, jnp.asarray(ok))
    return state


def test_the_loss_scale_is_halved_after_each_overflow_but_not_below_one():
    assert scales(False, False, True).scale == optim.INITIAL_LOSS_SCALE / 4
    assert scales(*[False] * 40).scale == 1


def test_the_loss_scale_is_doubled_after_enough_good_steps_in_a_row(monkeypatch):
    monkeypatch.setattr(optim, "LOSS_SCALE_GROWTH_STEPS", 3)
    assert scales(True, True).scale == optim.INITIAL_LOSS_SCALE
    assert scales(True, True, True).scale == 2 * optim.INITIAL_LOSS_SCALE
    assert scales(*[True] * 6).scale == 4 * optim.INITIAL_LOSS_SCALE
    assert scales(True, True, False, True, True).scale == optim.INITIAL_LOSS_SCALE / 2
