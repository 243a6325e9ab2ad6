"""Path, times and losses are the formulas, and every row has independent random numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_cases import N, Spy, batch_of, gaussian_images, key, predict_mean_and_variance

from data.batch import EncodedCaption
from methods import ddpm, method
from methods.ddpm import DDPM
from methods.rectified_flow import (
    RectifiedFlow,
    heavy_tailed_mode,
    interpolate,
    logit_normal,
    shift_time,
    uniform,
)

# Between the quantiles that float32 can hold, denser than any feature of a density.
u = jnp.linspace(0, 1, 20_001)[1:-1]


def test_dropping_makes_the_null_class_or_the_empty_caption():
    drop = jnp.asarray([True, False, True])
    label = method.drop_labels(jnp.asarray([3, 4, 5]), drop, 10)
    assert label.tolist() == [10, 4, 10]
    caption = EncodedCaption(
        jnp.ones((3, 2, 4), jnp.float16), jnp.ones((3, 2), bool), jnp.ones((3, 5))
    )
    dropped = method.drop_labels(caption, drop, 0)
    for part, whole in zip(dropped, caption, strict=True):
        assert (part[0] == 0).all() and (part[2] == 0).all() and (part[1] == whole[1]).all()
        assert part.dtype == whole.dtype
    null = EncodedCaption(
        np.full((1, 2, 4), 7, np.float16), np.array([[True, False]]), np.full((1, 5), 8)
    )
    dropped = method.drop_labels(caption, drop, 0, null)
    for part, whole, own in zip(dropped, caption, null, strict=True):
        assert (part[::2] == own).all() and (part[1] == whole[1]).all()
        assert part.dtype == whole.dtype


@partial(jax.jit, static_argnames="label_dropout")
def model_inputs(batch, key, n_classes, label_dropout):
    """The inputs x_t, t and label that the objective gives a model."""
    spy = Spy(n_classes)
    RectifiedFlow("uniform").loss(spy, batch, key, label_dropout=label_dropout)
    return spy.x, spy.t, spy.label


def sampled_values(batch, *, n_classes=10, label_dropout=0.1, key=key):
    """The times, the noise and the labels of a batch."""
    x, t, label = jax.device_get(model_inputs(batch, key, n_classes, label_dropout))
    s = np.float64(t).reshape(-1, 1, 1, 1)
    return (
        np.asarray(t, np.float64),
        (x - (1 - s) * (np.asarray(batch.image) / 127.5 - 1)) / s,
        label,
    )


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


# --- the path -------------------------------------------------------------------------------------


def test_bytes_become_minus_one_to_one():
    ends = method.to_float(jnp.asarray([0, 255], jnp.uint8).reshape(2, 1, 1, 1))
    assert ends.ravel().tolist() == [-1, 1]


def test_the_path_starts_at_the_data_and_ends_at_the_noise():
    data, noise = jax.random.normal(key, (2, 3, 4, 4, 2))
    assert (interpolate(data, noise, jnp.zeros(3))[0] == data).all()
    assert (interpolate(data, noise, jnp.ones(3))[0] == noise).all()


def test_the_velocity_is_the_derivative_of_the_path():
    data, noise = jax.random.normal(key, (2, 3, 4, 4, 2))
    t = jnp.asarray([0.1, 0.5, 0.8])
    _, slope = jax.jvp(lambda t: interpolate(data, noise, t)[0], (t,), (jnp.ones(3),))
    np.testing.assert_allclose(interpolate(data, noise, t)[1], slope, atol=1e-6)


def test_larger_images_get_more_noise_by_the_root_of_their_area():
    flow = RectifiedFlow(time_shift=1.5, area=8 * 8)
    assert flow.at_shape(jnp.zeros((2, 8, 8, 3))) is flow
    larger = flow.at_shape(jnp.zeros((2, 8, 32, 3)))
    assert larger.time_shift == 3.0
    assert RectifiedFlow(time_shift=1.5).at_shape(jnp.zeros((2, 8, 32, 3))).time_shift == 1.5
    of_8, of_32 = (
        sampled_values(batch_of(N, image=np.zeros((N, 8, width, 1), np.uint8)))[0]
        for width in (8, 32)
    )
    np.testing.assert_array_equal(of_8, of_32)  # without an area, as ever


# --- densities ------------------------------------------------------------------------------------

DENSITIES = {
    "uniform": uniform(),
    "logit_normal": logit_normal(),
    "logit_normal(-1, 0.5)": logit_normal(-1.0, 0.5),
    "mode": heavy_tailed_mode(),
    "mode(-1)": heavy_tailed_mode(-1.0),
    "mode(1.7)": heavy_tailed_mode(1.7),
}


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
def test_quantile_functions_rise_from_0_to_1(density):
    t = density(jnp.linspace(0, 1, 20_001))
    assert (jnp.diff(t) > -1e-7).all()
    np.testing.assert_allclose([t[0], t[-1]], [0, 1], atol=1e-6)


def test_uniform_times_have_the_moments_of_a_uniform():
    t = np.float64(uniform()(u))
    np.testing.assert_allclose([t.mean(), t.var()], [1 / 2, 1 / 12], rtol=1e-3)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logits_of_logit_normal_times_have_the_moments_asked(mean, std):
    t = np.float64(logit_normal(mean, std)(u))
    logits = np.log(t) - np.log1p(-t)
    np.testing.assert_allclose([logits.mean(), logits.std()], [mean, std], atol=2e-3)


def test_mode_with_scale_0_is_uniform():
    np.testing.assert_allclose(heavy_tailed_mode(0.0)(u), u, atol=1e-6)


@pytest.mark.parametrize("scale", [-0.8, 0.81, 1.29])
def test_mode_is_the_papers(scale):
    """Esser et al. 2024, eq. 20: the moments by quadrature, and the density at the middle, which is
    1 / |f'(1/2)|.
    """
    w = (np.arange(10_000) + 0.5) / 10_000
    f = 1 - w - scale * (np.cos(np.pi / 2 * w) ** 2 - 1 + w)
    t = np.float64(heavy_tailed_mode(scale)(u))
    for power in (1, 2, 4):
        np.testing.assert_allclose((t**power).mean(), (f**power).mean(), rtol=1e-3)
    near = 0.002
    density = (np.abs(t - 0.5) < near).mean() / (2 * near)
    np.testing.assert_allclose(density, 1 / (1 + scale * (1 - np.pi / 2)), rtol=0.06)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifting_keeps_the_ends_and_is_undone_by_its_inverse(shift):
    assert shift_time(jnp.asarray([0.0, 1.0]), shift).tolist() == [0, 1]
    t = shift_time(u, shift)
    assert (jnp.diff(t) > 0).all()
    np.testing.assert_allclose(shift_time(t, 1 / shift), u, atol=1e-6)


def test_a_larger_shift_means_more_noise():
    """Esser et al. 2024, eq. 23: the ratio of noise to data grows by the shift."""
    t = shift_time(u, 3.0)
    np.testing.assert_allclose(t / (1 - t), 3 * u / (1 - u), rtol=1e-2)


# --- random numbers -------------------------------------------------------------------------------


def test_time_noise_and_drop_are_independent():
    """Drawn from one key, the drop was `t < 0.1` exactly, and the null class unknown elsewhere."""
    n = 20_000  # correlations of independent samples are then 0 ± 0.007
    t, noise, label = sampled_values(batch_of(n))
    drop = label == 10
    assert set(label.tolist()) == {3, 10}
    np.testing.assert_allclose(drop.mean(), 0.1, atol=0.01)
    for low in (0.0, 0.1, 0.5, 0.9):
        inside = (low <= t) & (t < low + 0.1)
        np.testing.assert_allclose(drop[inside].mean(), 0.1, atol=0.03)
    pixels = noise.reshape(n, -1).T
    for draw in (t, drop):
        for pixel in pixels:
            assert abs(correlation(draw, pixel)) < 0.03
            assert abs(correlation(draw, np.abs(pixel))) < 0.03
    assert abs(correlation(t, drop)) < 0.03
    assert abs(np.corrcoef(pixels) - np.eye(4)).max() < 0.03
    np.testing.assert_allclose([t.mean(), t.std()], [1 / 2, 12**-0.5], atol=0.01)
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)


def test_neighbouring_rows_and_steps_share_nothing():
    t, noise, _ = sampled_values(batch_of(20_000))
    later, other, _ = sampled_values(batch_of(20_000), key=jax.random.fold_in(key, 1))
    assert len(np.unique(t)) > 19_900
    assert abs(correlation(t[1:], t[:-1])) < 0.03 and abs(correlation(t, later)) < 0.03
    assert abs(correlation(noise.ravel(), other.ravel())) < 0.03


def test_random_numbers_of_a_row_depend_on_its_index_alone():
    batch = batch_of(64, label=np.arange(64, dtype=np.int32))
    whole = sampled_values(batch, label_dropout=0.5, n_classes=1000)
    second_half = np.arange(32, 64)
    for rows in (np.random.default_rng(0).permutation(64), np.tile(second_half, 2)):
        part = sampled_values(
            jax.tree.map(lambda x, r=rows: x[r], batch), label_dropout=0.5, n_classes=1000
        )
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, b[rows])


@pytest.mark.parametrize("n_classes", [0, 1, 10, 1000])
def test_the_null_label_is_the_number_of_classes(n_classes):
    batch = batch_of(64, label=np.zeros(64, np.int32))
    assert (sampled_values(batch, n_classes=n_classes, label_dropout=1.0)[2] == n_classes).all()
    assert (sampled_values(batch, n_classes=n_classes, label_dropout=0.0)[2] == 0).all()


TIMES = (np.arange(N) + 0.5) / N


class EvenTimes(RectifiedFlow):
    """Rectified flow with times spread evenly instead of sampled."""

    density = property(lambda self: lambda u: jnp.asarray(TIMES))


@jax.jit
def linear_loss(batch, slope):
    """The loss of the predictor slope(t)·x."""
    model = Spy(10, lambda x, t: slope.reshape(-1, 1, 1, 1) * x)
    return EvenTimes().loss(model, batch, key)


def best_slope(s):
    """E[noise − data | x_t] = slope(t)·x_t for data ~ N(0, s²): covariance over variance."""
    t = TIMES
    return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


@pytest.mark.parametrize("std", [0.15, 0.3])
def test_the_best_loss_on_gaussian_data_is_the_closed_form(std):
    """At t it is s² / ((1 − t)²s² + t²), whose integral over t is πs/2."""
    batch, s = gaussian_images(std)
    loss, metrics = linear_loss(batch, best_slope(s))
    np.testing.assert_allclose(loss, np.pi * s / 2, rtol=0.01)
    at_t = s**2 / ((1 - TIMES) ** 2 * s**2 + TIMES**2)
    by_bin = metrics["binned_loss"] / metrics["bin_share"]
    np.testing.assert_allclose(by_bin, at_t.reshape(10, -1).mean(1), rtol=0.02)


@pytest.mark.parametrize("error", [-0.2, 0.1])
def test_another_predictor_is_worse_by_its_distance_from_the_best(error):
    """E |error·x_t|² = error²·(s² + 1) / 3."""
    batch, s = gaussian_images(0.3)
    best, _ = linear_loss(batch, best_slope(s))
    worse, _ = linear_loss(batch, best_slope(s) + error)
    np.testing.assert_allclose(worse - best, error**2 * (s**2 + 1) / 3, rtol=0.06)


def test_the_times_bins_give_the_loss_back():
    t, error = jax.random.uniform(key, (1000,)), jax.random.exponential(key, (1000,))
    t = t.at[:2].set(jnp.asarray([0.0, 1.0]))
    metrics = method.loss_by_time(t, error)
    np.testing.assert_allclose(metrics["binned_loss"].sum(), error.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["bin_share"].sum(), 1, rtol=1e-5)
    third = (t >= 0.3) & (t < 0.4)
    mean = metrics["binned_loss"][3] / metrics["bin_share"][3]
    np.testing.assert_allclose(mean, error[third].mean(), rtol=1e-4)


# --- DDPM -----------------------------------------------------------------------------------------

BETA = np.linspace(1e-4, 2e-2, 1000)
ALPHA_BAR = np.cumprod(1 - BETA)


def run_ddpm_loss(batch, *, predict=lambda x, t: 0 * x, label_dropout=0.0, **flags):
    """The inputs that DDPM gives a model, and the loss and metrics of its predictions."""
    spy = Spy(10, predict)
    loss, metrics = DDPM(**flags).loss(spy, batch, key, label_dropout=label_dropout)
    return jax.device_get((spy.x, spy.t, spy.label, loss, metrics))


def recover_step_and_noise(batch, x, t):
    """The step and the noise of each row, in float64."""
    step = np.round(np.float64(t) * 1000).astype(int)
    a = ALPHA_BAR[step].reshape(-1, 1, 1, 1)
    data = np.asarray(batch.image) / 127.5 - 1
    return step, data, (x - np.sqrt(a) * data) / np.sqrt(1 - a)


def test_ddpms_steps_are_whole_and_all_alike_and_independent_of_noise_and_drop():
    n = 20_000
    batch = batch_of(n)
    x, t, label, _, _ = run_ddpm_loss(batch, label_dropout=0.1)
    step, _, noise = recover_step_and_noise(batch, x, t)
    np.testing.assert_allclose(np.float64(t) * 1000, step, atol=1e-3)
    assert step.min() == 0 and step.max() == 999 and len(np.unique(step)) == 1000
    np.testing.assert_allclose([step.mean(), step.std()], [499.5, 1000 / 12**0.5], rtol=0.01)
    drop = label == 10
    np.testing.assert_allclose(drop.mean(), 0.1, atol=0.01)
    assert abs(correlation(step, drop)) < 0.03
    for pixel in noise.reshape(n, -1).T:
        assert abs(correlation(step, pixel)) < 0.03 and abs(correlation(drop, pixel)) < 0.03
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)


def test_ddpms_random_numbers_of_a_row_depend_on_its_index_alone():
    batch = batch_of(64, label=np.arange(64, dtype=np.int32))
    whole = run_ddpm_loss(batch, label_dropout=0.5)[:3]
    rows = np.random.default_rng(0).permutation(64)
    part = run_ddpm_loss(jax.tree.map(lambda x: x[rows], batch), label_dropout=0.5)[:3]
    for a, b in zip(part, whole, strict=True):
        np.testing.assert_array_equal(a, b[rows])


def wave(x, t):
    return jnp.sin(3 * x) + 0 * t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_ddpms_loss_is_the_mean_square_of_its_prediction(prediction, gamma):
    batch, _ = gaussian_images(0.3)
    x, t, _, loss, metrics = run_ddpm_loss(
        batch, predict=wave, prediction=prediction, min_snr_gamma=gamma
    )
    step, data, noise = recover_step_and_noise(batch, np.float64(x), t)
    a = ALPHA_BAR[step].reshape(-1, 1, 1, 1)
    target = {"epsilon": noise, "x0": data, "v": np.sqrt(a) * noise - np.sqrt(1 - a) * data}
    error = np.square(np.sin(3 * np.float64(x)) - target[prediction]).mean((1, 2, 3))
    if gamma:
        snr = ALPHA_BAR[step] / (1 - ALPHA_BAR[step])
        over = {"epsilon": snr, "x0": 1, "v": snr + 1}
        error *= np.minimum(snr, gamma) / over[prediction]
    np.testing.assert_allclose(loss, error.mean(), rtol=1e-3)
    by_bin = [error[step // 100 == i].mean() for i in range(10)]
    np.testing.assert_allclose(metrics["binned_loss"] / metrics["bin_share"], by_bin, rtol=1e-3)


def test_the_best_noise_prediction_on_gaussian_data_has_the_closed_forms_loss():
    """For data ~ N(0, s²), Var[noise | x] = ᾱs² / (ᾱs² + 1 − ᾱ)."""
    batch, s = gaussian_images(0.3)

    def best(x, t):
        a = jnp.asarray(ALPHA_BAR, jnp.float32)[jnp.round(t * 1000).astype(int)]
        return (jnp.sqrt(1 - a) / (a * s**2 + 1 - a)).reshape(-1, 1, 1, 1) * x

    x, t, _, loss, _ = run_ddpm_loss(batch, predict=best)
    a = ALPHA_BAR[recover_step_and_noise(batch, x, t)[0]]
    np.testing.assert_allclose(loss, (a * s**2 / (a * s**2 + 1 - a)).mean(), rtol=0.01)


def test_the_bound_counts_as_a_thousandth_of_its_sum_over_the_steps():
    weights = (jnp.float32(0.4), jnp.float32(0.2))
    batch, _ = gaussian_images(0.3)
    x, t, _, loss, _ = run_ddpm_loss(
        batch, predict=partial(predict_mean_and_variance, weights), learned_sigma=True
    )
    step, data, noise = recover_step_and_noise(batch, x, t)
    steps = ddpm.gather_steps(ddpm.noise_schedule(), jnp.asarray(step), 4)
    data, x = jnp.asarray(data, jnp.float32), jnp.asarray(x)
    estimate = ddpm.interpret_output(
        predict_mean_and_variance(weights, x, t), x, steps, prediction="epsilon"
    )
    expected = (
        np.square(0.4 * x - noise).mean() + ddpm.bound_in_bits(estimate, data, x, steps).mean()
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
