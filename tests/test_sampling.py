"""On Gaussian data the flow is known in closed form: the solvers must follow it, at their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sampling import SOLVERS, euler, guided, initial_noise, time_grid

MEAN, STD = 0.3, 0.5
noise = jax.random.normal(jax.random.key(0), (8, 4))


def velocity(x, t):
    """E[noise − data | x_t = x] for data ~ N(MEAN, STD²). The flow of it carries noise z to
    (1 − t)·MEAN + √((1 − t)²·STD² + t²)·z.
    """
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def error(solver, n_steps):
    with jax.enable_x64(True):
        z = jnp.asarray(np.float64(noise))
        return float(jnp.abs(solver(velocity, z, time_grid(n_steps)).x - (MEAN + STD * z)).max())


# --- solvers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_doubling_the_steps_divides_the_error_by_two_to_the_order(solver, order):
    errors = [error(SOLVERS[solver], n) for n in (64, 128, 256)]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2**order, rtol=0.05)
    assert errors[-1] < (1e-2, 1e-4)[order - 1]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_constant_velocity_is_followed_exactly(solver):
    solution = solver(lambda x, t: jnp.full_like(x, 2.0), noise, time_grid(3, shift=3.0))
    np.testing.assert_allclose(solution.x, noise - 2, rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_trajectory_is_every_state_from_the_noise_to_the_result(solver):
    times = time_grid(6)
    x, states = solver(velocity, noise, times, trajectory=True)
    assert len(states) == 7
    assert (states[0] == noise).all() and (states[-1] == x).all()
    assert (x == solver(velocity, noise, times).x).all()
    # Each state is one step from the one before.
    np.testing.assert_allclose(solver(velocity, states[2], times[2:]).x, x, rtol=1e-5)
    assert solver(velocity, noise, times).trajectory is None


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


def test_a_pictures_noise_is_the_same_in_any_batch():
    whole = initial_noise(0, jnp.arange(6), (4, 4, 3))
    index = jnp.asarray([5, 0, 2])
    assert (initial_noise(0, index, (4, 4, 3)) == whole[index]).all()


def test_pictures_and_seeds_have_noise_of_their_own():
    a, b = (np.asarray(initial_noise(seed, jnp.arange(64), (8, 8, 1))) for seed in (0, 1))
    both = np.concatenate([a, b]).reshape(128, 64)
    assert len(np.unique(both)) > 0.99 * both.size
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06
    np.testing.assert_allclose([both.mean(), both.std()], [0, 1], atol=0.05)


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


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_both_halves_in_one_call_are_as_good_as_two(scale):
    one, two = (guided_at(scale, together=together) for together in (True, False))
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
