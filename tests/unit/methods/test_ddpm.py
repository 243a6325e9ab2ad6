"""The schedule and every step of it are the papers' formulas, computed here anew in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from methods import ddpm
from methods.ddpm import PREDICTIONS, Estimate
from runtime.errors import UserError

BETA = [1e-4 + (2e-2 - 1e-4) * k / 999 for k in range(1000)]
ALPHA_BAR = [math.prod(1 - beta for beta in BETA[: k + 1]) for k in range(1000)]
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def some_steps(n, steps):
    """Steps k of a schedule of n, for arrays of four axes, and data, noise and x at each."""
    schedule = ddpm.gather_steps(ddpm.noise_schedule(n), jnp.asarray(steps), 4)
    data = jnp.asarray(rng.uniform(-1, 1, (len(steps), 4, 4, 2)))
    noise = jnp.asarray(rng.normal(size=data.shape))
    return schedule, data, noise, ddpm.diffuse(data, noise, schedule)


def random_output(like, n_channels=2):
    return jnp.asarray(rng.normal(size=(*like.shape[:-1], n_channels)))


# --- the schedule ---------------------------------------------------------------------------------


def test_the_full_schedule_has_the_papers_betas():
    whole = ddpm.noise_schedule()
    assert whole.step.tolist() == list(range(1000))
    np.testing.assert_allclose(np.exp(whole.log_var_max), BETA, rtol=1e-9)
    np.testing.assert_allclose(whole.signal**2, ALPHA_BAR, rtol=1e-12)
    np.testing.assert_allclose(whole.signal**2 + whole.noise**2, 1, rtol=1e-12)
    np.testing.assert_allclose(whole.signal[-1] ** 2, 4.04e-5, rtol=1e-2)  # almost pure noise


@pytest.mark.parametrize("n", [1, 2, 10, 50, 250, 999, 1000])
def test_a_shorter_schedule_strides_evenly_from_the_first_step_to_the_last(n):
    short = ddpm.noise_schedule(n)
    assert len(set(short.step.tolist())) == n
    assert short.step[-1] == 999 and (n == 1 or short.step[0] == 0)
    strides = np.diff(short.step)
    assert n == 1 or strides.max() - strides.min() <= 1
    np.testing.assert_allclose(short.signal**2, np.take(ALPHA_BAR, short.step), rtol=1e-12)
    # The noise of the steps in between adds up to that of the full schedule.
    one_by_one = np.cumprod(1 - np.exp(short.log_var_max))
    np.testing.assert_allclose(one_by_one, short.signal**2, rtol=1e-9)
    assert short.noise_prev[0] == 0 and (short.noise_prev[1:] == short.noise[:-1]).all()


def test_strides_are_those_of_the_published_code_for_every_number_of_steps():
    """It adds the stride up and rounds each sum, halves to even."""
    for n in range(2, 1001):
        place, steps = 0.0, []
        for _ in range(n):
            steps.append(round(place))
            place += 999 / (n - 1)
        assert ddpm.noise_schedule(n).step.tolist() == steps, n


def test_a_truncated_schedule_ends_at_the_step_nearest_to_a_time():
    whole = ddpm.noise_schedule(4)
    for t, n in ((1.0, 4), (0.9, 4), (0.8, 3), (0.3, 2), (0.1, 1)):
        part = ddpm.truncate_schedule(whole, t)
        assert all((a == b[:n]).all() for a, b in zip(part, whole, strict=True)), t


@pytest.mark.parametrize("n", [7, 1000])
def test_the_posterior_is_bayes_rule(n):
    """q(before | x, data) ∝ q(x | before)·q(before | data), both Gaussian: precisions add up."""
    schedule, data, _, x = some_steps(n, [1, 3, n - 1])
    alpha = (schedule.signal / schedule.signal_prev) ** 2
    from_x, from_data = alpha / (1 - alpha), 1 / schedule.noise_prev**2
    variance = 1 / (from_x + from_data)
    mean = variance * (from_x * x / jnp.sqrt(alpha) + from_data * schedule.signal_prev * data)
    np.testing.assert_allclose(ddpm.posterior_mean(data, x, schedule), mean, rtol=1e-9)
    np.testing.assert_allclose(jnp.exp(schedule.log_var_min), variance, rtol=1e-9)
    np.testing.assert_allclose(jnp.exp(schedule.log_var_max), 1 - alpha, rtol=1e-9)


def test_before_the_first_step_are_the_data_and_no_noise():
    schedule, data, _, x = some_steps(50, [0])
    np.testing.assert_allclose(ddpm.posterior_mean(data, x, schedule), data, atol=1e-12)
    assert (ddpm.step_noise_std(schedule.log_var_min, schedule) == 0).all()
    second = ddpm.noise_schedule(50).log_var_min[1]
    assert schedule.log_var_min.item() == second  # instead of the logarithm of 0


def test_model_time_is_the_step_of_the_full_schedule():
    np.testing.assert_allclose(ddpm.model_time(jnp.arange(1000)) * 1000, np.arange(1000), atol=1e-9)
    assert float(ddpm.model_time(jnp.int32(999))) < 1


# --- what is predicted ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_right_prediction_gives_the_data_back(name):
    schedule, data, noise, x = some_steps(1000, [0, 10, 500, 999])
    target = PREDICTIONS[name].target(data, noise, schedule)
    np.testing.assert_allclose(PREDICTIONS[name].to_x0(target, x, schedule), data, atol=1e-9)
    np.testing.assert_allclose((x - schedule.signal * data) / schedule.noise, noise, atol=1e-9)


def test_v_is_the_derivative_of_x_along_the_angle():
    """With √ᾱ = cos φ, √(1 − ᾱ) = sin φ, v = dx/dφ (Salimans & Ho 2022, appendix D)."""
    schedule, data, noise, _ = some_steps(1000, [5, 400, 990])
    angle = jnp.arctan2(schedule.noise, schedule.signal)
    _, v = jax.jvp(
        lambda a: jnp.cos(a) * data + jnp.sin(a) * noise, (angle,), (jnp.ones_like(angle),)
    )
    np.testing.assert_allclose(PREDICTIONS["v"].target(data, noise, schedule), v, atol=1e-9)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_an_error_of_the_data_alike_whatever_is_predicted(name, gamma):
    """Hang et al. 2023: min(SNR, γ)·|data − x0|²."""
    schedule, data, noise, x = some_steps(1000, [0, 100, 300, 999])
    snr = schedule.signal**2 / (1 - schedule.signal**2)
    output = random_output(x)
    squares = jnp.square(output - PREDICTIONS[name].target(data, noise, schedule))
    estimate = PREDICTIONS[name].to_x0(output, x, schedule)
    expected = np.minimum(snr, gamma) * jnp.square(estimate - data)
    np.testing.assert_allclose(
        ddpm.min_snr_weight(name, gamma, schedule) * squares, expected, rtol=1e-6
    )


# --- the variance ---------------------------------------------------------------------------------


def test_a_learned_variance_lies_between_the_two_that_bound_it():
    schedule, _, _, x = some_steps(100, [0, 1, 50, 99])
    output = random_output(x)

    def log_variance(raw):
        both = jnp.concatenate([output, jnp.full_like(output, raw)], axis=-1)
        return ddpm.interpret_output(both, x, schedule, prediction="epsilon").log_variance

    log_var_min = jnp.broadcast_to(schedule.log_var_min, x.shape)
    log_var_max = jnp.broadcast_to(schedule.log_var_max, x.shape)
    np.testing.assert_allclose(log_variance(-1.0), log_var_min, rtol=1e-12)
    np.testing.assert_allclose(log_variance(1.0), log_var_max, rtol=1e-12)
    np.testing.assert_allclose(log_variance(0.0), (log_var_min + log_var_max) / 2, rtol=1e-12)
    raw = jnp.linspace(-1, 1, x.size).reshape(x.shape)
    inside = ddpm.interpret_output(
        jnp.concatenate([output, raw], axis=-1), x, schedule, prediction="epsilon"
    ).log_variance
    assert (inside >= log_var_min - 1e-12).all() and (inside <= log_var_max + 1e-12).all()


def test_without_it_the_variance_is_the_posteriors_or_beta():
    schedule, _, _, x = some_steps(100, [0, 50])
    output = random_output(x)
    estimate = ddpm.interpret_output(output, x, schedule, prediction="v")
    assert (estimate.log_variance == jnp.broadcast_to(schedule.log_var_min, x.shape)).all()
    estimate = ddpm.interpret_output(output, x, schedule, prediction="v", fixed_variance="beta")
    assert (estimate.log_variance == jnp.broadcast_to(schedule.log_var_max, x.shape)).all()
    with pytest.raises(UserError, match="unknown fixed_variance 'betas'; did you mean 'beta'"):
        ddpm.DDPM(fixed_variance="betas")


def test_a_clipped_estimate_lies_in_the_range_of_pixels():
    schedule, _, _, x = some_steps(100, [99])
    output = 3 * random_output(x)
    free = ddpm.interpret_output(output, x, schedule, prediction="x0").x0
    clipped = ddpm.interpret_output(output, x, schedule, prediction="x0", clip=True).x0
    assert jnp.abs(free).max() > 1
    np.testing.assert_array_equal(clipped, np.clip(free, -1, 1))


# --- the variational bound ------------------------------------------------------------------------


def test_a_step_of_the_bound_is_the_divergence_of_two_gaussians():
    """By quadrature of p·log(p / q) over twelve standard deviations."""
    schedule, data, _, x = some_steps(1000, [1, 200, 999])
    estimate = Estimate(
        data + 0.1 * random_output(x), schedule.log_var_min + 0.3 * random_output(x)
    )
    means = [np.float64(ddpm.posterior_mean(d, x, schedule)) for d in (data, estimate.x0)]
    logs = [
        np.float64(jnp.broadcast_to(v, x.shape))
        for v in (schedule.log_var_min, estimate.log_variance)
    ]
    stds = [np.exp(log / 2) for log in logs]
    z = np.linspace(-12, 12, 4001).reshape(-1, 1, 1, 1, 1)
    y = means[0] + stds[0] * z
    log_p, log_q = (stats.norm.logpdf(y, mean, std) for mean, std in zip(means, stds))
    kl = np.trapezoid(np.exp(log_p) * (log_p - log_q) * stds[0], z, axis=0)
    expected = kl.mean((1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(ddpm.bound_in_bits(estimate, data, x, schedule), expected, rtol=1e-6)


def test_a_step_of_the_bound_is_0_where_the_estimate_is_right():
    schedule, data, _, x = some_steps(1000, [1, 500])
    right = Estimate(data, jnp.broadcast_to(schedule.log_var_min, x.shape))
    np.testing.assert_allclose(ddpm.bound_in_bits(right, data, x, schedule), 0, atol=1e-12)


def test_the_first_step_of_the_bound_is_the_cost_of_the_bytes():
    """−log₂ of the Gaussian's mass within half a level of a byte, by quadrature of its density; the
    ends have all that is beyond.
    """
    schedule, _, noise, _ = some_steps(1000, [0])
    levels = np.concatenate([[0, 1, 254, 255], rng.integers(2, 254, 28)])
    data = jnp.asarray(levels.reshape(1, 4, 4, 2) / 127.5 - 1)
    x = ddpm.diffuse(data, noise, schedule)
    estimate = Estimate(data + 0.01 * random_output(x), -8 + 0.5 * random_output(x))
    cost = []
    for value, mean, log in zip(data.ravel(), estimate.x0.ravel(), estimate.log_variance.ravel()):
        low = -50 if value < -0.999 else value - 1 / 255
        high = 50 if value > 0.999 else value + 1 / 255
        std = math.exp(log / 2)
        low, high = max(low, mean - 12 * std), min(high, mean + 12 * std)
        y = np.linspace(low, high, 20_001)
        cost.append(-np.log2(np.trapezoid(stats.norm.pdf(y, mean, std), y)))
    np.testing.assert_allclose(
        ddpm.bound_in_bits(estimate, data, x, schedule), [np.mean(cost)], rtol=1e-4
    )


def test_the_bytes_share_a_mass_of_one():
    data = jnp.asarray(np.arange(256) / 127.5 - 1)
    for mean, log in ((0.2, -4.0), (-1.3, -2.0), (0.999, -9.0)):
        logs = ddpm.log_likelihood(data, jnp.full(256, mean), jnp.full(256, log))
        np.testing.assert_allclose(jnp.exp(logs).sum(), 1, rtol=1e-6)
