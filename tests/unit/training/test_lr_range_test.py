"""The suggested rate is the known one, where there is one."""

import math
from dataclasses import replace

import numpy as np
import pytest

from datasets_config import DATASET_CONFIGS
from runtime.errors import UserError
from training import lr_range_test, resolve
from training.config import TrainConfig
from training.lr_range_test import (
    HIGHEST,
    LOWEST,
    RangeTest,
    diverged,
    exponential,
    rising,
    smoothed,
)

N = 300


def descent(curvature, *, noise=0.0, kick=0.0, floor=1.0):
    """Gradient descent on `floor` + curvature/2 · x², which begins at `floor` + 1, as `rising` asks
    for it.
    """
    x, rng, rate = math.sqrt(2 / curvature), np.random.default_rng(0), exponential(N)

    def step(i):
        nonlocal x
        loss = floor + curvature / 2 * x**2 + noise * rng.normal()
        x += kick * rng.normal() - rate(i) * curvature * x
        return loss

    return step


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("curvature", [10.0, 100.0, 1000.0])
def test_on_a_parabola_it_is_where_the_formula_has_it(curvature, noise):
    """The rates up to r add up to r / ρ, with ρ the logarithm of their ratio from step to step. So
    the loss is exp(−2·curvature·r/ρ), and falls most steeply over log r at r = ρ / (2·curvature).
    """
    found = rising(N, descent(curvature, noise=noise))
    expected = math.log(HIGHEST / LOWEST) / (N - 1) / (2 * curvature)
    assert found.suggested == pytest.approx(expected, rel=0.4)


def test_it_stops_where_descent_diverges():
    """Beyond a rate of 2 / curvature."""
    found = rising(N, descent(1000.0, kick=1e-3))
    assert found.diverged and len(found.losses) < N
    assert 2e-3 < found.rates[-1] < 1e-2
    assert found.losses[-1] > lr_range_test.DIVERGED
    assert found.suggested is not None and found.suggested < 2e-3


def test_the_fall_from_a_spike_suggests_nothing():
    """A loss that rises, leaps and falls back is no better there than it was at first."""
    losses = np.concatenate([np.linspace(1, 1.2, 100), np.linspace(3, 1.5, 200)])
    rates = np.array([exponential(N)(i) for i in range(N)])
    assert RangeTest(N, rates, losses).suggested is None


def test_a_loss_that_is_not_finite_ends_it_and_a_step_left_out_does_not():
    losses = iter([None, 1.0, None, 0.9, math.nan, 0.1])
    found = rising(N, lambda i: next(losses))
    np.testing.assert_array_equal(found.losses, [1.0, 0.9, math.nan])
    np.testing.assert_allclose(found.rates, [exponential(N)(i) for i in (1, 3, 4)])
    assert found.diverged and found.suggested is None


def test_the_average_is_of_all_so_far():
    np.testing.assert_allclose(smoothed([2.0] * 5), 2.0)
    np.testing.assert_allclose(smoothed([1.0, 0.0]), [1.0, 0.9 / 1.9])
    assert not diverged([]) and not diverged([1.0, 3.0])
    assert diverged([1.0, math.inf]) and diverged([1.0] * 50 + [100.0])


def test_rates_rise_from_the_lowest_to_the_highest():
    np.testing.assert_allclose(
        [exponential(6)(i) for i in range(6)], [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]
    )


@pytest.mark.parametrize("other", ["resume", "profile"])
def test_it_is_of_fresh_weights_and_nothing_else(other):
    asked = replace(TrainConfig(lr_range_test=50), **{other: True})
    how = {"n_rows": 100, "n_devices": 1, "platform": "cpu"}
    with pytest.raises(UserError, match=f"and then stops: drop --{other}"):
        resolve.resolve_train_config(asked, DATASET_CONFIGS["digits"], **how)


def test_it_takes_some_steps():
    with pytest.raises(UserError, match="--lr_range_test 5: it takes at least 20 steps"):
        lr_range_test.range_test(None, 5)  # pyright: ignore
