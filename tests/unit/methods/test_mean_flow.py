"""The mean velocity obeys its identity, is learned by it, and leads to data in one step."""

from functools import partial

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_cases import batch_of, key
from tiny_models import CLASSES

from inference.sampler import SamplerConfig, check_guidance, integrate_from_noise
from methods.mean_flow import MeanFlow, derivative, sample_times
from methods.rectified_flow import RectifiedFlow
from runtime.errors import UserError

MEAN, STD = 0.3, 0.6
U = partial(closed_forms.mean_velocity, mean=MEAN, std=STD)
V = partial(closed_forms.velocity, mean=MEAN, std=STD)


def points():
    """x_t, t and r at 200 places, with spans from 0.1 up."""
    rng = np.random.default_rng(0)
    t = rng.uniform(0.3, 0.99, 200)
    r = rng.uniform(0, t - 0.1)
    x = (1 - t) * MEAN + closed_forms.path_std(t, STD) * rng.normal(size=200)
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, t, r))


def exact(x, t, span):
    return U(x, t, t - span)


def test_the_identity_holds_for_the_exact_mean_velocity():
    x, t, r = points()
    slope = derivative(exact, x, t, r, V(x, t))
    np.testing.assert_allclose(U(x, t, r), V(x, t) - (t - r) * slope, atol=1e-4)
    # At t = 1 both times lie before it: right to δ.
    end = jnp.ones_like(t)
    slope = derivative(exact, x, end, r, V(x, end))
    np.testing.assert_allclose(U(x, end, r), V(x, end) - (1 - r) * slope, atol=0.02)
    # In float64, by jvp: to rounding.
    with jax.enable_x64(True):
        x, t, r = (jnp.asarray(np.float64(a)) for a in (x, t, r))
        _, slope = jax.jvp(lambda x, t: U(x, t, r), (x, t), (V(x, t), jnp.ones_like(t)))
        np.testing.assert_allclose(U(x, t, r), V(x, t) - (t - r) * slope, atol=1e-10)


def test_over_a_short_span_it_is_the_velocity():
    x, t, _ = points()
    with jax.enable_x64(True):
        x, t = np.float64(x), np.float64(t)
        np.testing.assert_allclose(U(x, t, t - 1e-6), V(x, t), atol=1e-5)


def test_times_of_a_difference_stay_between_r_and_1():
    seen = []

    def u(x, t, span):
        seen.append((t, t - span))
        return x

    t, r = jnp.asarray([1.0, 0.5, 0.5, 0.002]), jnp.asarray([0.3, 0.1, 0.498, 0.0])
    derivative(u, jnp.zeros(4), t, r, jnp.ones(4))
    for time, start in seen:
        np.testing.assert_allclose(start, r, atol=1e-6)
        assert (time <= 1 + 1e-6).all() and (time >= r - 1e-6).all()


def test_a_difference_is_the_derivative_of_a_network_unless_its_features_turn_fast():
    """A wide perceptron of x and of sinusoids of t and of the span, as the time embedding has."""
    keys = jax.random.split(key, 3)
    frequencies = jnp.exp(-jnp.arange(16) / 16 * jnp.log(1e4))
    w = [
        jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, [(65, 64), (64, 64), (64, 1)])
    ]

    def errors(scale):
        def u(x, t, span):
            angles = scale * jnp.outer(t, frequencies), scale * jnp.outer(span, frequencies)
            features = [f(a) for a in angles for f in (jnp.sin, jnp.cos)]
            h = jnp.concatenate([x, *features], -1)
            return jnp.tanh(jnp.tanh(h @ w[0]) @ w[1]) @ w[2]

        x, t, r = points()
        x = x[:, None]
        v = jnp.cos(x)
        _, slope = jax.jvp(lambda x, t: u(x, t, t - r), (x, t), (v, jnp.ones_like(t)))
        found = derivative(u, x, t, r, v)
        return float(jnp.linalg.norm(found - slope) / jnp.linalg.norm(slope))

    assert errors(1.0) < 1e-2
    assert errors(1000.0) > 0.5
    with pytest.raises(UserError, match="--time_scale 1000: the features of t turn too fast"):
        check(MeanFlow(), time_scale=1000.0)
    check(MeanFlow(), time_scale=1.0)


def check(method, **changes):
    method.check_training(**{"time_scale": 1.0, "label_dropout": 0.1, "is_taught": False} | changes)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"tangent": "data"}, {"is_taught": True}, "--tangent data: with --teacher the tangent is"),
        ({"target_mix": 0.5}, {"is_taught": True}, "--target_scale and --target_mix are for"),
        (
            {"target_scale": 2.0},
            {"label_dropout": 0.0},
            "--target_scale 2 .* guidance needs labels",
        ),
        ({"equal_share": 0.05}, {}, "--label_dropout 0.1: labels are dropped in rows with equal"),
        ({"target_interval": (0.2, 0.7)}, {}, "--target_interval has no effect without"),
    ],
)
def test_what_cannot_be_trained_is_refused(fields, changes, message):
    with pytest.raises(UserError, match=message):
        check(MeanFlow(**fields), **changes)


def test_other_methods_have_no_teacher():
    with pytest.raises(UserError, match="--teacher is not for rectified flow"):
        check(RectifiedFlow(), is_taught=True)


@partial(jax.jit, static_argnames=("n_steps", "predict"))
def samples(n_steps, predict):
    sampler = SamplerConfig("map", n_steps, MeanFlow())
    return integrate_from_noise(
        predict, jnp.arange(64), 3, (4, 4, 1), sampler=sampler, trajectory=True
    )


def test_one_step_of_the_exact_map_is_the_flow_and_so_are_two():
    def predict(x, t, span):
        return U(x, t, t - span)

    one, two = samples(1, predict), samples(2, predict)
    noise = one.trajectory[0]
    expected = MEAN + STD * noise
    np.testing.assert_allclose(one.x, expected, atol=1e-5)
    np.testing.assert_allclose(two.x, expected, atol=1e-5)
    np.testing.assert_allclose(two.estimates, np.stack([expected] * 2), atol=1e-5)
    np.testing.assert_allclose(
        two.trajectory[1], closed_forms.flow_map(noise, 1.0, 0.5, MEAN, STD), atol=1e-5
    )


# --- the loss -------------------------------------------------------------------------------------


class Exact:
    """A network that gives a function of (x, t, span), and records its inputs."""

    def __init__(self, u):
        self.config, self.u, self.calls = type("Config", (), {"n_classes": 10}), u, []

    def __call__(self, x, t, label, span=None):
        span = jnp.zeros_like(t) if span is None else span
        self.calls.append((x, t, label, span))
        axes = (-1, 1, 1, 1)
        return self.u(x, t.reshape(axes), span.reshape(axes))

    def frozen(self):
        return self


def test_the_share_of_equal_times_and_the_order_of_the_others():
    keys = jax.random.split(key, 20_000)
    t, r = sample_times(keys, MeanFlow().quantile, 0.75)
    assert (r <= t).all()
    np.testing.assert_allclose((t == r).mean(), 0.75, atol=0.01)
    # In the other rows t is the larger of two draws.
    u = jnp.linspace(0, 1, 2001)[1:-1]
    larger = np.sort(np.asarray(t[t != r]))
    quantiles = MeanFlow().quantile(jnp.sqrt(u))
    np.testing.assert_allclose(np.quantile(larger, u[::400]), quantiles[::400], atol=0.02)


def test_labels_are_dropped_in_rows_with_equal_times_alone():
    network = Exact(lambda x, t, s: 0 * x)
    image = np.zeros((4000, 2, 2, 1), np.uint8)
    MeanFlow(equal_share=0.5).loss(network, batch_of(4000, image=image), key, label_dropout=0.2)
    _, _, label, span = network.calls[-1]
    dropped = label == 10
    assert (span[dropped] == 0).all()
    np.testing.assert_allclose(dropped.mean(), 0.2, atol=0.02)


def test_with_equal_times_the_loss_is_that_of_the_flow():
    u = lambda x, t, s: jnp.sin(3 * x) - t  # noqa: E731
    network = Exact(u)
    image = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), np.uint8)
    batch = batch_of(64, image=image)
    loss, _ = MeanFlow("uniform", equal_share=1.0).loss(network, batch, key)
    x, t, _, span = network.calls[-1]
    assert (span == 0).all()
    t = np.float64(t).reshape(-1, 1, 1, 1)
    data = image / 127.5 - 1
    v = (np.float64(x) - data) / t
    np.testing.assert_allclose(loss, np.square(np.sin(3 * np.float64(x)) - t - v).mean(), rtol=1e-4)


class ByLabel(Exact):
    """A network whose prediction is its function's times 1, or times 3 without a label."""

    def __init__(self, function, null=10):
        super().__init__(function)
        self.null = null

    def __call__(self, x, t, label, span=None):
        factor = jnp.where(label == self.null, 3.0, 1.0).reshape(-1, 1, 1, 1)
        return factor * super().__call__(x, t, label, span)


@pytest.mark.parametrize("k", [0.0, 0.3])
def test_the_target_is_guided_in_an_interval_except_for_dropped_labels(k):
    """By ω·v + κ·u(x_t, t, t; label) + (1 − ω − κ)·u(x_t, t, t; null)."""
    image = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), np.uint8)
    network = ByLabel(lambda x, t, s: 0.5 * x)
    guidance = {"target_scale": 1.5, "target_mix": k, "target_interval": [0.2, 0.7]}
    method = MeanFlow.from_flags({"time_density": "uniform", "equal_share": 1.0, **guidance})
    loss, _ = method.loss(network, batch_of(64, image=image), key, label_dropout=0.5)
    x, t, label, _ = network.calls[-1]
    t, x, label = (np.float64(a).reshape(64, *[1] * 3) if a.ndim == 1 else a for a in (t, x, label))
    v = (np.float64(x) - (image / 127.5 - 1)) / t
    guided = 1.5 * v + k * 0.5 * x + (1 - 1.5 - k) * 1.5 * x
    is_guided = (label != 10) & (t >= 0.2) & (t <= 0.7)
    assert 0 < is_guided.mean() < 0.5
    prediction = np.where(label == 10, 1.5, 0.5) * x
    expected = np.square(prediction - np.where(is_guided, guided, v)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    own_null = ByLabel(lambda x, t, s: 0.5 * x, null=4)
    of_own, _ = method.loss(
        own_null, batch_of(64, image=image), key, label_dropout=0.5, null=jnp.asarray([4])
    )
    assert of_own == loss and (own_null.calls[-1][2] == 4).any()
    with pytest.raises(UserError, match=r"--target_interval 0\.7 0\.2: must be two times"):
        MeanFlow(target_interval=(0.7, 0.2))


def test_the_adaptive_loss_weighs_rows_by_their_error_and_only_the_error_has_a_gradient():
    """The gradient is that of e over e + c, a constant; the value is the mean error."""
    image = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), np.uint8)
    batch = batch_of(64, image=image)

    def row_errors(scale, power):
        network = Exact(lambda x, t, s: scale * x)
        method = MeanFlow("uniform", equal_share=1.0, adaptive_power=power)
        return method.loss(network, batch, key)[0]

    scale = jnp.float32(0.5)
    network = Exact(lambda x, t, s: scale * x)
    MeanFlow("uniform", equal_share=1.0).loss(network, batch, key)
    x, t, *_ = network.calls[-1]
    v = (np.float64(x) - (image / 127.5 - 1)) / np.float64(t).reshape(-1, 1, 1, 1)
    error = np.square(0.5 * x - v).mean((1, 2, 3))
    slope = (2 * (0.5 * x - v) * x).mean((1, 2, 3))
    for power in (0.0, 0.5, 1.0):
        weight = (error + 0.01 / 16) ** -power
        loss, gradient = jax.value_and_grad(row_errors)(scale, power)
        np.testing.assert_allclose(loss, error.mean(), rtol=1e-4)
        np.testing.assert_allclose(gradient, (weight * slope).mean(), rtol=1e-3)


def test_guidance_of_a_mean_flow_is_refused():
    sampler = SamplerConfig("map", 1, MeanFlow())
    with pytest.raises(UserError, match="cfg_scale 2: guidance of MeanFlow is in its weights"):
        check_guidance(sampler, CLASSES, 2.0)
    with pytest.raises(UserError, match=r"--solver euler is not for .* MeanFlow, .* one of: map"):
        SamplerConfig("euler", 1, MeanFlow())
