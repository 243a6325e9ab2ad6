"""Training with token routing: in a step, some tokens of each image go around the blocks of the
route, which costs less and may teach more (Krause et al. 2025, TREAD).

Evaluation and samples compute all tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from methods.method import Loss, Metrics, derive_row_keys
from model import ModelConfig
from networks.routing import check_share, choose_tokens
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


def check_routing(network: ModelConfig, share: float, *, layer_sync: tuple[int, ...]) -> None:
    """Reject routes that do not fit what else a step does.

    Raises:
        UserError: the share is impossible for the grid, or a block inside the route is looked into.
    """
    if not network.route:
        return
    check_share("--route_share", share, network.grid)
    start, end = network.route
    flags = {"inner_head": (network.inner_head,), "layer_sync": layer_sync}
    for flag, blocks in flags.items():
        if any(start < block < end for block in blocks):
            raise UserError(
                f"--{flag} {' '.join(map(str, blocks))}: on --route {start} {end} some tokens are "
                "missing; choose blocks outside it"
            )


def with_routing(loss: Loss, share: float) -> Loss:
    """Let a share of each image's tokens go around the route in the network that a loss is of."""
    if not share:
        return loss

    def routed(model: Any, batch: Any, key: Any, *frozen: Any) -> tuple[Float[Array, ""], Metrics]:
        noise_keys = derive_row_keys(key, batch.row).noise
        keys = jax.vmap(lambda key: jax.random.fold_in(key, KEPT_TAG))(noise_keys)
        kept = choose_tokens(keys, model.config.grid, share)
        return loss(RoutedNetwork(model, kept), batch, key, *frozen)

    return routed


class RoutedNetwork:
    """A network that computes only the kept tokens on its route."""

    def __init__(self, model: Any, kept: Int[Array, "b k"] | None):
        self.config = model.config
        self.model = model
        self.kept = kept

    def __call__(self, x: Any, t: Any, label: Any, **options: Any) -> Any:
        return self.model(x, t, label, kept=self.kept, **options)
