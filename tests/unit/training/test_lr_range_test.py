"""The suggested learning rate is the known one, where there is one."""

import math
from dataclasses import replace

import numpy as np
import pytest

from datasets_config import DATASET_CONFIGS
from runtime.errors import UserError
from train import Trainer
from training import lr_range_test, resolve
from training.config import TrainConfig
from training.lr_range_test import (
    MAX_RATE,
    MIN_RATE,
    RangeTest,
    exponential_rates,
    has_diverged,
    smoothed_losses,
    train_with_rising_rate,
)

N = 300


def descent(curvature, *, noise=0.0, kick=0.0, floor=1.0):
    """Gradient descent on `floor` + curvature/2 · x² from a loss of `floor` + 1, as the `step` of
    `train_with_rising_rate`.
    """
    x, rng, rate = math.sqrt(2 / curvature), np.random.default_rng(0), exponential_rates(N)

    def step(i):
        nonlocal x
        loss = floor + curvature / 2 * x**2 + noise * rng.normal()
        x += kick * rng.normal() - rate(i) * curvature * x
        return loss

    return step


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("curvature", [10.0, 100.0, 1000.0])
def test_the_suggestion_on_a_parabola_is_that_of_the_formula(curvature, noise):
    """The rates up to r add up to r / ρ, with ρ the logarithm of their ratio from step to step. So
    the loss is exp(−2·curvature·r/ρ), and falls most steeply over log r at r = ρ / (2·curvature).
    """
    result = train_with_rising_rate(N, descent(curvature, noise=noise))
    expected = math.log(MAX_RATE / MIN_RATE) / (N - 1) / (2 * curvature)
    assert result.suggested == pytest.approx(expected, rel=0.4)


def test_the_test_stops_where_descent_diverges():
    """It does beyond a learning rate of 2 / curvature."""
    result = train_with_rising_rate(N, descent(1000.0, kick=1e-3))
    assert result.diverged and len(result.losses) < N
    assert 2e-3 < result.rates[-1] < 1e-2
    assert result.losses[-1] > lr_range_test.DIVERGED
    assert result.suggested is not None and result.suggested < 2e-3


def test_the_fall_from_a_spike_suggests_nothing():
    """A loss that rises, leaps and falls back is no better there than it was at first."""
    losses = np.concatenate([np.linspace(1, 1.2, 100), np.linspace(3, 1.5, 200)])
    rates = np.array([exponential_rates(N)(i) for i in range(N)])
    assert RangeTest(N, rates, losses).suggested is None


def test_a_non_finite_loss_ends_the_test_and_a_skipped_step_does_not():
    losses = iter([None, 1.0, None, 0.9, math.nan, 0.1])
    result = train_with_rising_rate(N, lambda i: next(losses))
    np.testing.assert_array_equal(result.losses, [1.0, 0.9, math.nan])
    np.testing.assert_allclose(result.rates, [exponential_rates(N)(i) for i in (1, 3, 4)])
    assert result.diverged and result.suggested is None


def test_the_moving_average_has_no_bias():
    np.testing.assert_allclose(smoothed_losses([2.0] * 5), 2.0)
    np.testing.assert_allclose(smoothed_losses([1.0, 0.0]), [1.0, 0.9 / 1.9])
    assert not has_diverged([]) and not has_diverged([1.0, 3.0])
    assert has_diverged([1.0, math.inf]) and has_diverged([1.0] * 50 + [100.0])


def test_rates_rise_exponentially_from_min_to_max():
    np.testing.assert_allclose(
        [exponential_rates(6)(i) for i in range(6)], [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]
    )


@pytest.mark.parametrize("other", ["resume", "profile"])
def test_resuming_and_profiling_are_refused(other):
    config = replace(TrainConfig(lr_range_test=50), **{other: True})
    with pytest.raises(UserError, match=f"trains no run: drop --{other}"):
        resolve.resolve_train_config(
            config, DATASET_CONFIGS["digits"], n_rows=100, n_devices=1, fast_bf16=False
        )


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="--lr_range_test 5: it needs at least 20 steps"):
        lr_range_test.range_test(object.__new__(Trainer), 5)
