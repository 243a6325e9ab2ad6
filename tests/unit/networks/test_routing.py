"""Routes take equally many tokens of every 2 × 2, and leave the others as they are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import TINY, VARIANTS, labels_for, t, with_random_weights, x

from networks import routing
from runtime.errors import UserError
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


def grid_of_kept(kept, grid):
    """Ones where tokens are kept, row by row."""
    marks = np.zeros((len(kept), grid[0] * grid[1]), int)
    np.put_along_axis(marks, np.asarray(kept), 1, axis=1)
    return marks.reshape(-1, *grid)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_each_2x2_keeps_equally_many_and_every_token_has_its_turn(share):
    many = jax.random.split(jax.random.key(0), 400)
    marks = grid_of_kept(routing.choose_tokens(many, (4, 6), share), (4, 6))
    groups = marks.reshape(-1, 2, 2, 3, 2).sum((2, 4))
    assert (groups == round(4 * (1 - share))).all()
    np.testing.assert_allclose(marks.mean(0), 1 - share, atol=0.1)
    fewer = grid_of_kept(routing.choose_tokens(keys, (4, 6), 0.75), (4, 6))
    assert (fewer <= grid_of_kept(routing.choose_tokens(keys, (4, 6), share), (4, 6))).all()


def test_no_share_keeps_all_and_others_are_refused():
    assert routing.choose_tokens(keys, (3, 3), 0.0) is None
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
    np.testing.assert_allclose(model(x, t, label, kept=order), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ROUTED.values(), ids=ROUTED)
def test_tokens_off_the_route_stay_bit_for_bit_and_their_order_is_free(config):
    model, label = with_random_weights(config), labels_for(config)
    kept = routing.choose_tokens(keys[: len(x)], config.grid, 0.5)
    assert kept is not None
    y, (before, after) = model(x, t, label, kept=kept, taps=config.route)
    moved = np.asarray((before != after).any(-1))
    np.testing.assert_array_equal(moved, grid_of_kept(kept, (1, moved.shape[1]))[:, 0])
    _, (whole,) = model(x, t, label, taps=(config.route[1],))
    assert jnp.abs(whole - after).max() > 1e-2  # those on it see fewer others
    again = model(x, t, label, kept=kept[:, ::-1])
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-4)


def test_flops_count_what_is_computed():
    config = replace(TINY, depth=6, route=(2, 4))
    whole, routed = (flops_by_module(config, routed_share=share) for share in (0.0, 0.5))
    ratio = {name: routed[name] / whole[name] for name in whole}
    assert ratio["MLP"] == ratio["attention projections"] == pytest.approx((4 + 2 / 2) / 6)
    assert ratio["attention scores, values"] == pytest.approx((4 + 2 / 4) / 6)
    assert ratio["adaLN modulation"] == ratio["patch embedding"] == ratio["final layer"] == 1
