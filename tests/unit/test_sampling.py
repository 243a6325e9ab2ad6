"""On Gaussian data the flow is known in closed form: the solvers follow it, at their order. The
solvers of DDPM equal an independent implementation of the papers' algorithms.
"""

import math
from functools import partial
from typing import Any

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_COMPILE
from sampling_cases import MEAN, STD, noise, optimal_denoise, sample_ancestral, sample_moments

from methods import ddpm
from methods.ddpm import ancestral, ddim
from sampling import (
    SDE_LAST_TIME,
    SOLVERS,
    euler,
    euler_maruyama,
    extrapolate,
    extrapolate_pair,
    guided,
    initial_noise,
    step_noise,
    time_grid,
)

velocity = partial(closed_forms.velocity, mean=MEAN, std=STD)
ODE_SOLVERS = {name: solver for name, solver in SOLVERS.items() if name != "sde"}


def noise_of(solver):
    """The noise that a solver takes besides the initial one, if it does."""
    fresh_noise = step_noise(0, jnp.arange(8), (4,))
    return {"fresh_noise": fresh_noise} if solver is euler_maruyama else {}


def test_the_closed_forms_solve_their_equations():
    """By differences, in float64."""
    x, data = np.linspace(-2, 2, 9), {"mean": MEAN, "std": STD}
    for t, r in ((0.9, 0.2), (0.5, 0.05), (1.0, 0.0)):
        v, h = closed_forms.velocity(x, t, **data), 1e-6
        flow = partial(closed_forms.flow_map, x, t, **data)
        np.testing.assert_allclose((flow(t) - flow(t - h)) / h, v, atol=1e-5)
        np.testing.assert_allclose(x - t * v, closed_forms.clean_image(x, t, **data), atol=1e-12)
        score = closed_forms.score(x, t, **data)
        np.testing.assert_allclose(score, -(x + (1 - t) * v) / t, atol=1e-12)
        # The mean flow's identity: u = v − (t − r)·du/dt along the flow.
        u = partial(closed_forms.mean_velocity, r=r, **data)
        change = (u(x, t) - u(flow(t - h), t - h)) / h
        np.testing.assert_allclose(u(x, t), v - (t - r) * change, atol=1e-5)


def error(solver, times):
    """The largest error of a solver between the first time and the last."""
    with jax.enable_x64(True):
        z = jnp.asarray(np.float64(noise))
        exact = closed_forms.flow_map(z, times[0], times[-1], MEAN, STD)
        return float(jnp.abs(solver(velocity, z, jnp.asarray(times)).x - exact).max())


# --- solvers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver, order, bound", [("euler", 1, 1e-2), ("heun", 2, 1e-4), ("dpmpp_2m", 2, 3e-4)]
)
def test_doubling_the_steps_divides_the_error_by_two_to_the_order(solver, order, bound):
    errors = [error(SOLVERS[solver], np.linspace(0.9, 0.1, n + 1)) for n in (64, 128, 256)]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2**order, rtol=0.05)
    # From noise to data the multistep solver takes steps in log-SNR that do not shrink at the ends.
    errors = [error(SOLVERS[solver], np.linspace(1, 0, n + 1)) for n in (64, 128, 256)]
    assert (np.divide(errors[:-1], errors[1:]) > 0.8 * 2**order).all()
    assert errors[-1] < bound


@pytest.mark.parametrize("solver", ODE_SOLVERS.values(), ids=ODE_SOLVERS)
def test_a_constant_velocity_is_followed_exactly(solver):
    solution = solver(lambda x, t: jnp.full_like(x, 2.0), noise, time_grid(3, shift=3.0))
    np.testing.assert_allclose(solution.x, noise - 2, rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_trajectory_is_every_state_from_the_noise_to_the_result(solver):
    times = time_grid(6)
    solve = jax.jit(
        partial(solver, velocity, **noise_of(solver)),
        static_argnames="trajectory",
        compiler_options=AS_USERS_COMPILE,
    )
    x, states, estimates = solve(noise, times, trajectory=True)
    assert len(states) == 7 and len(estimates) == 6
    assert (states[0] == noise).all() and (states[-1] == x).all()
    if solver in (SOLVERS["euler"], SOLVERS["heun"]):  # each state is one step from the one before
        np.testing.assert_allclose(solver(velocity, states[2], times[2:]).x, x, rtol=1e-5)
    plain = solve(noise, times)
    assert (x == plain.x).all()
    assert plain.trajectory is None and plain.estimates is None
    # The estimates are where the velocity leads: on Gaussian data, E[data | x_t].
    for x, t, estimate in zip(states, times, estimates):
        expected = closed_forms.clean_image(x, t, MEAN, STD)
        np.testing.assert_allclose(estimate, expected, atol=1e-5)


def test_few_steps_of_the_multistep_solver_are_as_good_as_many_of_eulers():
    few, many = np.linspace(1, 0, 11), np.linspace(1, 0, 101)
    assert error(SOLVERS["dpmpp_2m"], few) < error(euler, many)


@pytest.mark.parametrize("n_steps", [10, 100])
def test_the_sde_spreads_its_samples_as_the_recursion_says(n_steps):
    times, index = time_grid(n_steps, last=SDE_LAST_TIME), jnp.arange(100_000)
    fresh_noise = step_noise(0, index, (1,))
    z = initial_noise(0, index, (1,))
    x = np.asarray(jax.jit(lambda z: euler_maruyama(velocity, z, times, fresh_noise).x)(z))
    variance = closed_forms.euler_maruyama_variance(np.asarray(times, np.float64), STD)
    np.testing.assert_allclose(x.var(), variance, rtol=0.01)
    np.testing.assert_allclose(x.mean(), MEAN, atol=0.01 if n_steps == 100 else 0.05)


def test_the_sdes_variance_is_that_of_the_data_in_the_limit():
    spreads = [
        closed_forms.euler_maruyama_variance(np.linspace(1, 0, n + 1), STD) for n in (100, 1000)
    ]
    errors = np.abs(np.divide(spreads, STD**2) - 1)
    assert errors[1] < 0.002 and errors[1] < errors[0] / 5


# --- times and noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 2, 50, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_fall_from_1_to_0(n_steps, shift):
    times = time_grid(n_steps, shift=shift)
    assert times.shape == (n_steps + 1,)
    assert times[0] == 1 and times[-1] == 0 and (jnp.diff(times) < 0).all()


def test_a_shift_above_1_spends_its_steps_near_the_noise():
    """The ratio of noise to data grows by the shift."""
    plain, shifted = time_grid(10)[1:-1], time_grid(10, shift=3.0)[1:-1]
    np.testing.assert_allclose(shifted / (1 - shifted), 3 * plain / (1 - plain), rtol=1e-5)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_may_start_later_and_are_then_shifted_as_if_they_did_not(shift):
    """Half of a grid's steps, from its middle on, are the grid that starts there."""
    whole = time_grid(10, shift=shift)
    np.testing.assert_allclose(
        time_grid(5, shift=shift, start=float(whole[5])), whole[5:], atol=1e-6
    )


def test_noise_of_an_image_is_the_same_in_any_batch():
    whole = initial_noise(0, jnp.arange(6), (4, 4, 3))
    seeds = jnp.array([1, 0, 0])
    indices = jnp.array([4, 4, 2])
    each = initial_noise(seeds, indices, (4, 4, 3))
    assert (each[1:] == whole[indices[1:]]).all() and (each[0] != whole[4]).any()
    index = jnp.asarray([5, 0, 2])
    assert (initial_noise(0, index, (4, 4, 3)) == whole[index]).all()


def test_images_and_seeds_have_independent_noise():
    a, b = (np.asarray(initial_noise(seed, jnp.arange(64), (8, 8, 1))) for seed in (0, 1))
    both = np.concatenate([a, b]).reshape(128, 64)
    assert len(np.unique(both)) > 0.99 * both.size
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06
    np.testing.assert_allclose([both.mean(), both.std()], [0, 1], atol=0.05)


# --- solvers of DDPM ------------------------------------------------------------------------------

BETA = np.linspace(1e-4, 2e-2, 1000)
ALPHA_BAR = np.cumprod(1 - BETA)
fresh = np.random.default_rng(0).normal(size=(1000, 8, 4))  # the noise of every step


def raw_output(x, t, module):
    """A noise prediction and a raw variance, as a network might give them."""
    return module.tanh(x) * (0.5 + t) + 0.1, module.cos(5 * x)


def denoise(x, schedule, *, learned):
    noise, variance = raw_output(x, jnp.float64(schedule.step) / 1000, jnp)
    output = jnp.concatenate([noise, variance], axis=-1) if learned else noise
    return ddpm.interpret_output(output, x, schedule, prediction="epsilon")


def strides(n):
    return [round(999 * i / (n - 1)) for i in range(n)]


def reference_ancestral(x, steps, *, learned):
    """Ho et al. 2020, algorithm 2, on the betas that are left (Nichol & Dhariwal 2021)."""
    for i in reversed(range(len(steps))):
        a = ALPHA_BAR[steps[i]]
        before = ALPHA_BAR[steps[i - 1]] if i else 1.0
        beta = 1 - a / before
        noise, raw_variance = raw_output(x, steps[i] / 1000, np)
        x = (x - beta / math.sqrt(1 - a) * noise) / math.sqrt(1 - beta)
        if i:
            small = (1 - before) / (1 - a) * beta
            v = (raw_variance + 1) / 2 if learned else 0
            variance = np.exp(v * np.log(beta) + (1 - v) * np.log(small))
            x = x + np.sqrt(variance) * fresh[steps[i]]
    return x


def reference_ddim(x, steps, *, eta):
    """Song et al. 2021, eq. 12 and 16."""
    for i in reversed(range(len(steps))):
        a = ALPHA_BAR[steps[i]]
        before = ALPHA_BAR[steps[i - 1]] if i else 1.0
        sigma = eta * math.sqrt((1 - before) / (1 - a)) * math.sqrt(1 - a / before)
        noise, _ = raw_output(x, steps[i] / 1000, np)
        data = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
        x = math.sqrt(before) * data + math.sqrt(1 - before - sigma**2) * noise
        x = x + sigma * fresh[steps[i]]
    return x


def solve_in_float64(solver, n_steps, *, learned=False, **options):
    """Run a solver in float64, always from the same noise."""
    with jax.enable_x64(True):
        table = jnp.asarray(fresh)
        solution = solver(
            partial(denoise, learned=learned),
            jnp.asarray(np.float64(noise)),
            ddpm.noise_schedule(n_steps),
            lambda step: table[step],
            trajectory=True,
            **options,
        )
        return jax.device_get(solution)


@pytest.mark.parametrize("n_steps", [2, 50, 1000])
@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_sampling_is_the_papers_algorithm(n_steps, learned):
    expected = reference_ancestral(np.float64(noise), strides(n_steps), learned=learned)
    result = solve_in_float64(ancestral, n_steps, learned=learned).x
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_steps", [2, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_papers_equation(n_steps, eta):
    expected = reference_ddim(np.float64(noise), strides(n_steps), eta=eta)
    np.testing.assert_allclose(
        solve_in_float64(ddim, n_steps, eta=eta).x, expected, rtol=1e-6, atol=1e-6
    )


def test_ddim_with_all_of_the_noise_is_ancestral_sampling():
    a, b = solve_in_float64(ddim, 20, eta=1.0).x, solve_in_float64(ancestral, 20).x
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("n_steps", [2, 20])
def test_the_multistep_solver_is_the_papers_algorithm(n_steps):
    """Lu et al. 2022, algorithm 2, written by its λ; the last step, to no noise, is of order 1."""
    steps, x, before = [*reversed(strides(n_steps))], np.float64(noise), None
    signal, sigma = (
        np.append(np.sqrt(a), end)
        for a, end in ((ALPHA_BAR[steps], 1.0), (1 - ALPHA_BAR[steps], 0.0))
    )
    for i, step in enumerate(steps):
        x0 = (x - sigma[i] * raw_output(x, step / 1000, np)[0]) / signal[i]
        if sigma[i + 1] == 0:
            x = x0
            break
        lam = np.log(signal[: i + 2] / sigma[: i + 2])
        h = lam[-1] - lam[-2]
        d = x0
        if i:
            r = (lam[-2] - lam[-3]) / h
            d = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - signal[i + 1] * np.expm1(-h) * d
        before = x0
    np.testing.assert_allclose(solve_in_float64(ddpm.dpmpp_2m, n_steps).x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [ancestral, ddim, ddpm.dpmpp_2m])
def test_a_ddpm_trajectory_starts_at_the_noise_and_ends_at_the_last_estimate(solver):
    x, states, estimates = solve_in_float64(solver, 6)
    assert len(states) == 7 and len(estimates) == 6
    np.testing.assert_array_equal(states[0], np.float64(noise))
    np.testing.assert_array_equal(states[-1], x)
    np.testing.assert_allclose(estimates[-1], x, atol=1e-9)  # before the first step are the data
    for state, estimate, step in zip(states, estimates, reversed(strides(6))):
        a = ALPHA_BAR[step]
        expected = (state - math.sqrt(1 - a) * raw_output(state, step / 1000, np)[0]) / math.sqrt(a)
        np.testing.assert_allclose(estimate, expected, rtol=1e-9)


def test_the_optimal_variance_samples_gaussian_data_in_few_steps():
    """The fixed variance, which ignores the error of the estimate, gives samples too much alike."""
    np.testing.assert_allclose(
        sample_moments(sample_ancestral, 10, learned=True), [MEAN, STD], atol=0.01
    )
    assert sample_moments(sample_ancestral, 10)[1] < 0.9 * STD


def test_ddim_carries_each_noise_to_its_own_data():
    """(x − √ᾱ·m) / √(ᾱs² + 1 − ᾱ) is constant along the flow."""
    a = ALPHA_BAR[-1]
    constant = (noise - math.sqrt(a) * MEAN) / math.sqrt(a * STD**2 + 1 - a)
    x = ddim(optimal_denoise, noise, ddpm.noise_schedule(), lambda step: noise).x
    np.testing.assert_allclose(x, MEAN + STD * constant, atol=0.01)


def test_the_noise_of_a_step_is_the_same_in_any_batch_and_no_other():
    index = jnp.arange(6)
    whole = step_noise(0, index, (4, 4, 3))
    each = step_noise(jnp.zeros_like(index), index, (4, 4, 3))
    assert (each(jnp.int32(7)) == whole(jnp.int32(7))).all()
    some = jnp.asarray([5, 0, 2])
    assert (step_noise(0, some, (4, 4, 3))(jnp.int32(7)) == whole(jnp.int32(7))[some]).all()
    samples = [whole(jnp.int32(step)) for step in range(8)]
    samples += [initial_noise(seed, index, (4, 4, 3)) for seed in range(8)]
    samples += [step_noise(1, index, (4, 4, 3))(jnp.int32(7))]
    each = np.asarray(samples).reshape(-1, 48)
    assert len(np.unique(each)) > 0.999 * each.size
    assert abs(np.corrcoef(each) - np.eye(len(each))).max() < 0.75
    np.testing.assert_allclose([each.mean(), each.std()], [0, 1], atol=0.05)


# --- guidance -------------------------------------------------------------------------------------

cond, null = jnp.arange(8.0), jnp.full(8, -1.0)


def conditional(x, t, c):
    return x * t + c[:, None]


def guided_at(scale, t=0.5, **kwargs):
    return guided(conditional, cond, null, scale, **kwargs)(noise, jnp.asarray(t))


def test_scale_1_is_the_condition_and_scale_0_its_absence():
    t = jnp.asarray(0.5)
    np.testing.assert_allclose(guided_at(1.0), conditional(noise, t, cond), rtol=1e-5)
    np.testing.assert_allclose(guided_at(0.0), conditional(noise, t, null), rtol=1e-5)


def test_guidance_is_linear_in_its_scale():
    np.testing.assert_allclose(
        guided_at(4.0) - guided_at(1.0), 3 * (guided_at(1.0) - guided_at(0.0)), rtol=1e-4
    )


@pytest.mark.parametrize("t, inside", [(0.19, 0), (0.2, 1), (0.5, 1), (0.7, 1), (0.71, 0)])
def test_outside_its_interval_guidance_is_the_condition(t, inside):
    expected = guided_at(3.0, t) if inside else guided_at(1.0, t)
    np.testing.assert_allclose(guided_at(3.0, t, interval=(0.2, 0.7)), expected, rtol=1e-5)


@pytest.mark.parametrize("n_steps", [10, 20, 50])
def test_times_of_a_grid_at_the_ends_of_the_interval_are_guided(n_steps):
    velocity, times = guided(conditional, cond, null, 3.0, interval=(0.2, 0.7)), time_grid(n_steps)
    led = [abs(velocity(noise, t) - conditional(noise, t, cond)).max() > 1 for t in times]
    assert led == [2 * n_steps <= 10 * i <= 7 * n_steps for i in range(n_steps, -1, -1)]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_limits_guidance_to_the_first(channels):
    some, every = guided_at(3.0, channels=channels), guided_at(3.0)
    np.testing.assert_array_equal(some[..., :channels], every[..., :channels])
    plain = conditional(noise, 0.5, cond)
    np.testing.assert_allclose(some[..., channels:], plain[..., channels:], rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_one_call_with_both_halves_equals_two_calls(scale):
    one, two = (guided_at(scale, one_call=one_call) for one_call in (True, False))
    np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("solver, calls_per_step", [("euler", 1), ("heun", 2)])
def test_a_guided_step_calls_the_model_once_with_both_halves(solver, calls_per_step):
    calls = []

    def counted(x, t, c):
        jax.debug.callback(lambda x, t, c: calls.append((x.shape, t, c)), x, t, c)
        return conditional(x, t, c)

    @jax.jit
    def solve(noise):
        return SOLVERS[solver](guided(counted, cond, null, 2.0), noise, time_grid(5)).x

    solve(noise).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 5 * calls_per_step
    for shape, _, c in calls:
        assert shape == (16, 4)
        assert c.tolist() == [*cond.tolist(), *null.tolist()]


def test_the_condition_may_be_a_tree():
    def velocity(x, t, c):
        return x * 0 + c["label"][:, None] + c["tokens"].sum(1, keepdims=True)

    tree = {"label": cond, "tokens": jnp.ones((8, 3))}
    nothing = {"label": null, "tokens": jnp.zeros((8, 3))}
    result = guided(velocity, tree, nothing, 2.0)(noise, jnp.asarray(0.5))
    np.testing.assert_allclose(result[:, 0], -1 + 2 * (cond + 3 + 1), rtol=1e-6)


# A worse model than `velocity`: that of data as wide as the noise.
weak = partial(closed_forms.velocity, mean=MEAN, std=1.0)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_a_weak_model_guides_a_strong_one_along_the_guidance_law(scale, interval):
    """Both velocities are affine in x, so Euler's steps are a product, here in float64."""
    times = time_grid(40)
    guided_velocity = extrapolate(weak, velocity, scale, interval=interval)
    x = jax.jit(lambda z: euler(guided_velocity, z, times).x)(noise)
    stds = {"weak_std": 1.0, "strong_std": STD}
    expected = closed_forms.guided_euler(
        np.float64(noise), np.asarray(times, np.float64), scale, interval, mean=MEAN, **stds
    )
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
    # With ever smaller steps the law, here of the steps that are guided: the interval's, and one.
    many = np.linspace(1, 0, 4001)
    limit = closed_forms.guided_euler(1.0, many, scale, interval, mean=0.0, **stds)
    law = closed_forms.guided_ratio(scale, interval, weak=1.0, strong=STD)
    np.testing.assert_allclose(limit, law, rtol=5e-3)
    # The strong model at scale 1; away from the weak model, samples are less spread beyond it.
    plain = jax.jit(lambda z: euler(velocity, z, times).x)(noise)
    if scale == 1:
        np.testing.assert_allclose(x, plain, rtol=1e-5, atol=1e-5)
    else:
        assert jnp.std(x) < 0.95 * jnp.std(plain)


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_at_scale_1_is_the_strong_model_for_every_solver(solver):
    solve, times = SOLVERS[solver], time_grid(8)
    alone, led = (
        solve(v, noise, times, **noise_of(solve)).x
        for v in (velocity, extrapolate(weak, velocity, 1.0))
    )
    np.testing.assert_allclose(alone, led, rtol=1e-4, atol=1e-5)


def test_guidance_by_labels_is_guidance_of_a_weak_model():
    weak, strong = (partial(conditional, c=c) for c in (null, cond))
    cases: list[dict[str, Any]] = [{}, {"channels": 3}, {"interval": (0.2, 0.4)}]
    for options in cases:
        v = extrapolate(weak, strong, 2.5, **options)(noise, jnp.asarray(0.5))
        by_labels = guided_at(2.5, one_call=False, **options)
        np.testing.assert_array_equal(v, by_labels)
        one_call = extrapolate_pair(lambda x, t: (weak(x, t), strong(x, t)), 2.5, **options)
        np.testing.assert_array_equal(one_call(noise, jnp.asarray(0.5)), by_labels)


def test_guidance_nests_and_the_inner_acts_first():
    """In both branches of the labels, then between them, each in an interval of its own."""

    def inner(x, t, c):
        return extrapolate(
            lambda x, t: jnp.sin(conditional(x, t, c)),
            lambda x, t: conditional(x, t, c),
            1.5,
            interval=(0.5, 1.0),
        )(x, t)

    outer = guided(inner, cond, null, 3.0, interval=(0.0, 0.7))
    for t, inner_scale, outer_scale in [(0.2, 1, 3), (0.6, 1.5, 3), (0.9, 1.5, 1)]:
        v_cond, v_null = (
            np.sin(v) + inner_scale * (v - np.sin(v))
            for v in (np.asarray(conditional(noise, t, c)) for c in (cond, null))
        )
        expected = v_null + outer_scale * (v_cond - v_null)
        np.testing.assert_allclose(outer(noise, jnp.asarray(t)), expected, rtol=1e-5, atol=1e-5)


def test_solving_runs_the_times_it_is_given():
    seen = []
    jax.block_until_ready(
        euler(
            lambda x, t: (jax.debug.callback(lambda t: seen.append(float(t)), t), x)[1],
            noise,
            jnp.asarray([1.0, 0.7, 0.1, 0.0]),
        )
    )
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen, reverse=True), [1.0, 0.7, 0.1], rtol=1e-6)
