"""Routes take equally many tokens of every 2 × 2, and leave the others as they are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import TINY, VARIANTS, labels_for, t, with_random_weights, x

from inference.labels import RANDOM_LABEL_TAG
from inference.sampler import ROUTE_TAG
from networks import routing
from networks.layers import apply_rotary_positions
from runtime.errors import UserError
from sampling import STEP_NOISE_TAG
from training.flops import flops_by_module

DEEP = {"depth": 4, "route": (1, 3), "unroll": 1}
ROUTED = {
    "adaln_zero": replace(TINY, **DEEP),
    "rope": replace(VARIANTS["rope"], **DEEP),
    "in_context": replace(VARIANTS["in_context, captions"], **DEEP),
    "in_context, rope": replace(VARIANTS["in_context, rope"], **DEEP),
    "cross_attention": replace(VARIANTS["cross_attention"], **DEEP),
    "joint, rope": replace(VARIANTS["joint, rope"], **DEEP),
    "joint, SD3.5": replace(VARIANTS["joint, SD3.5"], **DEEP),
}
keys = jax.random.split(jax.random.key(3), 4)


def mark(token_ids, grid):
    """Ones where tokens are token_ids, row by row."""
    marks = np.zeros((len(token_ids), grid[0] * grid[1]), int)
    np.put_along_axis(marks, np.asarray(token_ids), 1, axis=1)
    return marks.reshape(-1, *grid)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_each_2x2_keeps_equally_many_and_every_token_has_its_turn(share):
    many = jax.random.split(jax.random.key(0), 400)
    marks = mark(routing.choose_tokens(many, (4, 6), share), (4, 6))
    groups = marks.reshape(-1, 2, 2, 3, 2).sum((2, 4))
    assert (groups == round(4 * (1 - share))).all()
    np.testing.assert_allclose(marks.mean(0), 1 - share, atol=0.1)
    fewer = mark(routing.choose_tokens(keys, (4, 6), 0.75), (4, 6))
    assert (fewer <= mark(routing.choose_tokens(keys, (4, 6), share), (4, 6))).all()


def test_routes_and_shares_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"--route_share 0\.3: of each 2×2 tokens 0 to 3"):
        routing.check_share("--route_share", 0.3, (4, 4))
    with pytest.raises(UserError, match="the 3×3 tokens of an image do not fall into groups"):
        routing.check_share("--route_share", 0.5, (3, 3))
    for route in [(2, 2), (0, 2), (1, 4), (1,), (3, -3), (1, 2, 3)]:
        with pytest.raises(UserError, match=f"--route {' '.join(map(str, route))}: takes two"):
            routing.resolve_route(route, 4)
    assert routing.resolve_route((2, -2), 12) == (2, 10)


@pytest.mark.parametrize("config", ROUTED.values(), ids=ROUTED)
def test_a_route_of_all_tokens_in_any_order_is_none(config):
    """So positions, rotary ones too, go with the tokens."""
    model, label = with_random_weights(config), labels_for(config)
    n = config.grid[0] * config.grid[1]
    order = jax.vmap(lambda key: jax.random.permutation(key, n))(keys[: len(x)])
    expected = model(x, t, label)
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(model(x, t, label, token_ids=order), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ROUTED.values(), ids=ROUTED)
def test_tokens_off_the_route_stay_bit_for_bit_and_their_order_is_free(config):
    model, label = with_random_weights(config), labels_for(config)
    token_ids = routing.choose_tokens(keys[: len(x)], config.grid, 0.5)
    assert token_ids is not None
    y, (before, after) = model(x, t, label, token_ids=token_ids, taps=config.route)
    moved = np.asarray((before != after).any(-1))
    np.testing.assert_array_equal(moved, mark(token_ids, (1, moved.shape[1]))[:, 0])
    _, (full,) = model(x, t, label, taps=(config.route[1],))
    assert jnp.abs(full - after).max() > 1e-2  # those on it see fewer others
    again = model(x, t, label, token_ids=token_ids[:, ::-1])
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-4)


def test_flops_count_what_is_computed():
    config = replace(TINY, depth=6, route=(2, 4))
    of_all, routed = (flops_by_module(config, routed_share=share) for share in (0.0, 0.5))
    ratio = {name: routed[name] / of_all[name] for name in of_all}
    assert ratio["MLP"] == ratio["attention projections"] == pytest.approx((4 + 2 / 2) / 6)
    assert ratio["attention scores, values"] == pytest.approx((4 + 2 / 4) / 6)
    assert ratio["adaLN modulation"] == ratio["patch embedding"] == ratio["final layer"] == 1


def test_calls_that_miss_tokens_are_refused():
    """A tap or a head inside the route, a network without one, a block that hides its tokens."""
    config = ROUTED["rope"]
    model, label = with_random_weights(config), labels_for(config)
    token_ids = routing.choose_tokens(keys[: len(x)], config.grid, 0.5)
    with pytest.raises(UserError, match="tap 2: on the route 1 3 tokens are missing"):
        model(x, t, label, token_ids=token_ids, taps=(1, 2))
    with pytest.raises(UserError, match="the model's config has no route"):
        with_random_weights(replace(config, route=()))(x, t, label, token_ids=token_ids)
    with pytest.raises(ValueError, match=r"token_ids=cond\.token_ids"):
        apply_rotary_positions(jnp.ones((2, 7, 2, 8)), (4, 4))


def test_keys_of_a_seed_are_of_one_use_each():
    assert len({STEP_NOISE_TAG, RANDOM_LABEL_TAG, ROUTE_TAG}) == 3
