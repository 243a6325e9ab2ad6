"""Auxiliary losses, on states inside the network: of an inner head, of two blocks' agreement, and
of a block's with an encoder.

They wrap the loss of any method. The run's `loss` stays the method's own; each auxiliary loss is a
metric beside it. Evaluation has none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from methods.method import Loss, Metrics
from runtime.errors import UserError
from runtime.flags import setting
from training.alignment import ALIGN_LOSS, Alignment


@dataclass(frozen=True, kw_only=True)
class AuxiliaryFlags:
    """Auxiliary losses."""

    inner_weight: float = setting(
        0.5, "weight of the inner head's loss", above=0, only_with=("inner_head", None)
    )
    layer_sync: tuple[int, ...] = setting(
        (),
        "two numbers of blocks, such as 4 8: tokens after the first are pulled towards those after "
        "the second (LayerSync)",
    )
    sync_weight: float = setting(
        0.2, "weight of LayerSync", at_least=0, only_with=("layer_sync", None)
    )


def check_layer_sync(blocks: Sequence[int], depth: int) -> None:
    """Raises UserError unless `blocks` are empty or two ascending numbers of blocks."""
    if blocks and not (len(blocks) == 2 and 1 <= blocks[0] < blocks[1] <= depth):
        raise UserError(
            f"--layer_sync {' '.join(map(str, blocks))}: takes two blocks of the {depth}, the "
            f"earlier first, such as {max(1, depth // 3)} {2 * depth // 3}"
        )


def with_auxiliary(
    loss: Loss,
    *,
    inner_weight: float,
    layer_sync: Sequence[int],
    sync_weight: float,
    alignment: Alignment | None = None,
) -> Loss:
    """Add auxiliary losses to a method's loss; without any it is returned as it is.

    Args:
        inner_weight: λ of the inner head, whose loss is the method's too (Zhou et al. 2025,
            internal guidance). Nothing is stopped: it trains the blocks below as well.
        layer_sync: two numbers of blocks a < b: −λ · cos(h_a, h_b) is added, a mean over tokens,
            whose gradient reaches h_a alone (Haghighi et al. 2025, LayerSync).
        sync_weight: its λ.
        alignment: of the tokens after a block, by the network's projector, with features of an
            encoder: −λ · cos(projector(h), features) is added, a mean over tokens (Yu et al. 2024,
            REPA). The loss then takes the encoder's network as its fourth argument.
    """
    has_sync = bool(layer_sync) and sync_weight > 0
    if not inner_weight and not has_sync and not alignment:
        return loss
    taps = {*(layer_sync if has_sync else ()), *([alignment.block] if alignment else ())}

    def total(model: Any, batch: Any, key: Any, *frozen: Any) -> tuple[Float[Array, ""], Metrics]:
        forward = SharedForward(model, taps=sorted(taps), inner=inner_weight > 0)
        of_method = () if alignment else frozen
        value, metrics = loss(forward, batch, key, *of_method)
        sum_of_all, metrics = value, metrics | {"loss": value}
        if inner_weight:
            inner_loss, _ = loss(forward.inner, batch, key, *of_method)
            sum_of_all += inner_weight * inner_loss
            metrics["inner_loss"] = inner_loss
        if has_sync:
            early, late = (forward.states[block] for block in layer_sync)
            similarity = mean_cosine(early, jax.lax.stop_gradient(late))
            sum_of_all -= sync_weight * similarity
            metrics["layer_similarity"] = similarity
        if alignment:
            projected = model.projector(forward.states[alignment.block])
            align_loss = -mean_cosine(projected, alignment.targets(batch, key, *frozen))
            sum_of_all += alignment.weight * align_loss
            metrics[ALIGN_LOSS] = align_loss
        return sum_of_all, metrics

    return total


class SharedForward:
    """A network whose one forward pass serves several losses.

    A loss calls it as the network, and gets its prediction. Called again by the same loss,
    `inner` gives the inner head's prediction at the same inputs.
    """

    def __init__(self, model: Any, *, taps: Sequence[int], inner: bool):
        self.config = model.config
        self.model = model
        self.taps = taps
        self.has_inner = inner
        self.is_called = False
        self.inner = InnerHead(model.config)
        self.states: dict[int, Float[Array, "b n d"]] = {}  # by their number of blocks

    def __call__(self, x: Any, t: Any, label: Any, **options: Any) -> Float[Array, "b h w o"]:
        if self.is_called:
            raise UserError(
                "--inner_head, --layer_sync and --align need a method whose loss calls the network "
                "once"
            )
        self.is_called = True
        output = self.model(x, t, label, taps=self.taps, inner=self.has_inner, **options)
        if self.taps:
            output, states = output
            self.states = dict(zip(self.taps, states, strict=True))
        if not self.has_inner:
            return output
        self.inner.prediction = output.inner
        return output.final

    def frozen(self) -> Any:
        """Return the network's copy without gradient, which may be called as often as is needed."""
        return self.model.frozen()


class InnerHead:
    """The inner head's prediction, as a network that has been called already."""

    def __init__(self, config: Any):
        self.config = config
        self.prediction: Any = None

    def __call__(self, x: Any, t: Any, label: Any) -> Float[Array, "b h w o"]:
        return self.prediction


def mean_cosine(a: Float[Array, "b n d"], b: Float[Array, "b n d"]) -> Float[Array, ""]:
    """The cosine of the angle between two tokens, averaged over tokens and rows, in float32."""

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)

    return (unit(a) * unit(b)).sum(-1).mean()
