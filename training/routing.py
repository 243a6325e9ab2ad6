"""Training with token routing: in a step, some tokens of each image go around the blocks of the
route, which costs less and may teach more (Krause et al. 2025, TREAD).

Evaluation and samples compute all tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from methods.method import Loss, Metrics, derive_row_keys
from networks.routing import check_share, choose_tokens, resolve_route
from runtime.errors import UserError
from runtime.flags import setting

KEPT_TAG = 1  # folded into a row's key of noise, for the choice of its tokens


@dataclass(frozen=True, kw_only=True)
class RouteFlags:
    """Token routing."""

    route: tuple[int, ...] = setting(
        (),
        "two numbers of blocks, such as 2 -2: after the first some tokens of an image leave, in "
        "training, and after the second they are back (TREAD); negative ones count from the end",
    )
    route_share: float = setting(
        0.5,
        "share of the tokens that leave: 0.25, 0.5 or 0.75 of each 2×2; 0 for none",
        at_least=0,
        at_most=0.75,
        only_with=("route", None),
    )


def check_routing(
    route: Sequence[int],
    share: float,
    *,
    depth: int,
    grid: tuple[int, int],
    taps: Mapping[str, Sequence[int]],
) -> None:
    """Reject a route that does not fit the network or what else a step does.

    Args:
        share: of the tokens that leave.
        taps: blocks whose tokens are used after them, by the flags that say so.

    Raises:
        UserError: the route or the share is impossible, or a tap lies inside the route.
    """
    start, end = resolve_route(route, depth)
    check_share("--route_share", share, grid)
    for flag, blocks in taps.items():
        if any(start < block < end for block in blocks):
            raise UserError(
                f"--{flag} {' '.join(map(str, blocks))}: on --route {' '.join(map(str, route))} "
                "tokens are missing; choose blocks outside it"
            )


def with_routing(loss: Loss, share: float) -> Loss:
    """Make the loss of a network in which a share of each image's tokens goes around the route."""
    if not share:
        return loss

    def routed(model: Any, batch: Any, key: Any, *frozen: Any) -> tuple[Float[Array, ""], Metrics]:
        noise_keys = derive_row_keys(key, batch.row).noise
        keys = jax.vmap(lambda key: jax.random.fold_in(key, KEPT_TAG))(noise_keys)
        token_ids = choose_tokens(keys, model.config.grid, share)
        return loss(RoutedNetwork(model, token_ids), batch, key, *frozen)

    return routed


class RoutedNetwork:
    """A network whose route only some tokens pass."""

    def __init__(self, model: Any, token_ids: Int[Array, "b k"]):
        self.config = model.config
        self.model = model
        self.token_ids = token_ids

    def __call__(self, x: Any, t: Any, label: Any, **options: Any) -> Any:
        return self.model(x, t, label, token_ids=self.token_ids, **options)

    @property
    def projector(self) -> Any:
        """The network's projector, of a run that is aligned."""
        return self.model.projector

    def frozen(self) -> Any:
        """Return the network's copy without gradient, which computes all tokens."""
        return self.model.frozen()
