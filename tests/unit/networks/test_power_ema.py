"""Averages by power functions have their closed forms, and any is made of snapshots of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from networks.power_ema import (
    MAX_STD,
    Profiles,
    gamma_of_std,
    inner_products,
    share_at,
    solve_weights,
    std_of_gamma,
)
from training.optim import move_average

TRACKED = (0.05, 0.1)


def averages(theta, gamma):
    """The average after each step of a path θ(1), θ(2), …, as training keeps it."""

    def step(average, at):
        t, weights = at
        average = move_average(average, weights, share_at(t, gamma))
        return average, average

    times = jnp.arange(1, len(theta) + 1)
    before = jnp.full_like(theta[0], 1e4)  # forgotten at the first step
    return np.asarray(jax.lax.scan(step, before, (times, theta))[1], np.float64)


def profiles(times, stds):
    gammas = [gamma_of_std(std) for std in stds]
    return Profiles(np.repeat(np.float64(times), len(stds)), np.tile(gammas, len(times)))


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_a_width_is_that_of_its_exponent(std):
    gamma = gamma_of_std(std)
    assert gamma > 0 and std_of_gamma(gamma) == pytest.approx(std, rel=1e-9)
    u = (np.arange(10**6) + 0.5) / 10**6
    density = (gamma + 1) * u**gamma / len(u)
    mean = density @ u
    np.testing.assert_allclose(np.sqrt(density @ (u - mean) ** 2), std, rtol=1e-5)
    assert std_of_gamma(0.0) == pytest.approx(MAX_STD)


@pytest.mark.parametrize("gamma", [0.5, 6.94, 16.97])
def test_the_average_of_a_line(gamma):
    """∫ τ p(τ) dτ = t (γ + 1) / (γ + 2), up to half a step."""
    average = averages(jnp.arange(1.0, 2001)[:, None], gamma)[-1, 0]
    assert 0 < average - 2000 * (gamma + 1) / (gamma + 2) < 1


def test_an_update_has_the_integral_of_the_profile_over_its_step():
    gamma, n = 3.0, 12
    weights = averages(jnp.eye(n), gamma)[-1]
    edges = (np.arange(n + 1) / n) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(edges), atol=1e-6)


def test_a_share_is_exact_after_millions_of_updates():
    for t in (10**5, 10**7):
        exact = -np.expm1(17.97 * np.log1p(-1 / t))
        np.testing.assert_allclose(share_at(jnp.asarray(t), 16.97), exact, rtol=1e-5)


def test_inner_products_are_integrals():
    a = Profiles(np.array([3.0, 10.0]), np.array([1.5, 4.0]))
    b = Profiles(np.array([10.0, 7.0, 2.0]), np.array([0.2, 4.0, 2.0]))
    x = (np.arange(10**6) + 0.5) / 10**5

    def curves(p):
        t, gamma = p.t[:, None], p.gamma[:, None]
        return np.where(x <= t, (gamma + 1) * x**gamma / t ** (gamma + 1), 0)

    np.testing.assert_allclose(inner_products(a, b), curves(a) @ curves(b).T / 10**5, rtol=1e-4)
    long = Profiles(np.array([1e7]), np.array([60.0]))
    assert np.isfinite(inner_products(long, a)).all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("std", [0.04, 0.07, 0.15, 0.18])
def test_an_average_made_of_snapshots_is_the_one_tracked(std, offset):
    """Of a random walk, from twenty snapshots, between the two tracked widths and outside them. A
    constant that is added stays what it is.
    """
    walk = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 8)).cumsum(0), jnp.float32)
    times = np.arange(50, 1001, 50)
    kept = np.stack([averages(walk, gamma_of_std(s))[times - 1] for s in TRACKED], axis=1)
    weights, error = solve_weights(profiles(times, TRACKED), profiles([1000], [std]))
    assert weights.sum() == pytest.approx(1, abs=1e-9) and error < 0.02
    made = weights @ (kept.reshape(-1, 8) + offset)
    tracked = averages(walk, gamma_of_std(std))[-1]
    assert np.linalg.norm(made - offset - tracked) <= 1e-3 * np.linalg.norm(tracked)


def test_a_tracked_average_is_made_of_itself_alone():
    weights, error = solve_weights(profiles([5, 10, 20], TRACKED), profiles([20], [0.1]))
    np.testing.assert_allclose(weights, [0, 0, 0, 0, 0, 1], atol=1e-12)
    assert error < 1e-6


def test_the_error_tells_a_width_that_snapshots_do_not_hold():
    """It is the norm of the difference of the profiles."""
    for times, std, low, high in (
        ([1000], 0.15, 0.2, 1),
        (range(50, 1001, 50), 0.01, 0.2, 0.4),
        (range(10, 1001, 10), 0.01, 0, 0.03),
    ):
        _, error = solve_weights(profiles([*times], TRACKED), profiles([1000], [std]))
        assert low <= error <= high, (std, error)
