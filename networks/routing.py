"""Token routing: only some of an image's tokens pass the blocks of a route (Krause et al. 2025,
TREAD).

The others go around these blocks unchanged, and all meet again after them. Which tokens pass is an
input of the network, which takes no random key.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from runtime.errors import UserError

GROUP = 4  # tokens of 2 × 2 places
SHARES = (0.0, 0.25, 0.5, 0.75)  # of a group, that may go around


def resolve_route(route: Sequence[int], depth: int) -> tuple[int, ...]:
    """Count a route's ends from the first block: −2 stands before the last two.

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


def check_share(flag: str, share: float, grid: tuple[int, int]) -> None:
    """Raises UserError unless `share` is one of `SHARES`, and the grid falls into groups of 2 × 2.

    Args:
        flag: the flag that gives the share, for the message.
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


def choose_tokens(keys: Key[Array, "b"], grid: tuple[int, int], share: float) -> Int[Array, "b k"]:
    """Choose the tokens of each row that pass a route: of each 2 × 2 of the grid equally many,
    which ones at random, so that no region is left out.

    Args:
        share: the share that goes around instead, one of `SHARES`. With one key, the tokens of a
            larger share are among those of a smaller one.

    Returns numbers of tokens, row by row of the grid.
    """
    rows, columns = grid
    numbers = jnp.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2)
    groups = numbers.swapaxes(1, 2).reshape(-1, GROUP)

    def choose(key: Key[Array, ""]) -> Int[Array, "k"]:
        order = jax.random.uniform(key, groups.shape).argsort(axis=1)
        chosen = order[:, : GROUP - round(share * GROUP)]
        return jnp.take_along_axis(groups, chosen, axis=1).reshape(-1)

    return jax.vmap(choose)(keys)


def prepend_others(token_ids: Int[Array, "b k"], n: int) -> Int[Array, "b {n}+k"]:
    """Number tokens in a sequence that begins with n others, which all pass."""
    others = jnp.broadcast_to(jnp.arange(n), (len(token_ids), n))
    return jnp.concatenate([others, token_ids + n], axis=1)


def take_tokens(x: Float[Array, "b n d"], token_ids: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """Take some tokens of each row, by their numbers."""
    return jnp.take_along_axis(x, token_ids[..., None], axis=1, mode="promise_in_bounds")


def put_tokens(
    x: Float[Array, "b n d"], token_ids: Int[Array, "b k"], tokens: Float[Array, "b k d"]
) -> Float[Array, "b n d"]:
    """Put tokens back where they were taken from."""
    row = jnp.arange(len(x))[:, None]
    return x.at[row, token_ids].set(tokens, unique_indices=True, mode="promise_in_bounds")
