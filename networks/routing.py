"""Token routing: only some of an image's tokens pass the blocks of a route (Krause et al. 2025,
TREAD).

The others go around these blocks unchanged, and all meet again after them. Which tokens are kept is
an input of the network: it draws nothing at random.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from runtime.errors import UserError

GROUP = 4  # tokens of 2 × 2 places, each of which keeps equally many
SHARES = (0.0, 0.25, 0.5, 0.75)  # of the tokens that may go around


def check_share(flag: str, share: float, grid: tuple[int, int]) -> None:
    """Raises UserError unless `share` is one of `SHARES`, and the grid falls into groups of 2 × 2.

    Args:
        flag: what gives the share, for the message.
    """
    if share not in SHARES:
        raise UserError(
            f"{flag} {share:g}: of each 2×2 tokens 0 to 3 may go around; pass one of "
            f"{', '.join(map(str, SHARES))}"
        )
    if share and (grid[0] % 2 or grid[1] % 2):
        raise UserError(
            f"{flag} {share:g}: the {grid[0]}×{grid[1]} tokens of an image do not fall into groups "
            "of 2×2; choose another --patch_size"
        )


def choose_tokens(
    keys: Key[Array, "b"], grid: tuple[int, int], share: float
) -> Int[Array, "b k"] | None:
    """Choose the tokens of each row that are kept: of each 2 × 2 of the grid equally many, which
    ones at random, so that no region is left out. None if `share` is 0: all are.

    Args:
        share: of the tokens that go around, one of `SHARES`.

    Returns numbers of tokens, row by row of the grid.
    """
    n_kept = GROUP - round(share * GROUP)
    if n_kept == GROUP:
        return None
    rows, columns = grid
    places = jnp.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2)
    groups = places.swapaxes(1, 2).reshape(-1, GROUP)

    def choose(key: Key[Array, ""]) -> Int[Array, "k"]:
        order = jax.random.uniform(key, groups.shape).argsort(axis=1)
        return jnp.take_along_axis(groups, order[:, :n_kept], axis=1).reshape(-1)

    return jax.vmap(choose)(keys)


def take_tokens(x: Float[Array, "b n d"], kept: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """Take the kept tokens of each row."""
    return jnp.take_along_axis(x, kept[..., None], axis=1, mode="promise_in_bounds")


def put_tokens(
    x: Float[Array, "b n d"], kept: Int[Array, "b k"], tokens: Float[Array, "b k d"]
) -> Float[Array, "b n d"]:
    """Put tokens back into the places that they were taken from."""
    row = jnp.arange(len(x))[:, None]
    return x.at[row, kept].set(tokens, unique_indices=True, mode="promise_in_bounds")


def resolve_route(route: Sequence[int], depth: int) -> tuple[int, ...]:
    """Count a route's ends from the first block: −2 is two blocks before the last one's end.

    Raises:
        UserError: the route is not empty, nor two ascending numbers inside the network.
    """
    ends = tuple(end + depth if end < 0 else end for end in route)
    if ends and not (len(ends) == 2 and 1 <= ends[0] < ends[1] < depth):
        raise UserError(
            f"--route {' '.join(map(str, route))}: takes two numbers of blocks, of {depth}: after "
            "the first some tokens leave, after the second they are back; such as 2 -2"
        )
    return ends


def prepend(kept: Int[Array, "b k"], n: int) -> Int[Array, "b {n}+k"]:
    """Number tokens in a sequence that begins with n others, all of which are kept."""
    others = jnp.broadcast_to(jnp.arange(n), (len(kept), n))
    return jnp.concatenate([others, kept + n], axis=1)
