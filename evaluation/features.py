"""Pictures → rows of features, on all devices: an Inception network's, or plain pixels.

Whatever the size of the batches that come, the network sees one size; the last batch is filled up,
and what filled it is dropped.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from evaluation.metrics import Gaussian, Moments
from evaluation.reference import Reference
from networks import inception
from pretrained import inception as pretrained
from runtime import parallel
from runtime.errors import UserError, unknown

IN_FLIGHT = 2  # batches on the devices whose features are not read yet
PIXELS = 16  # to a side, at most, of pictures as features
AT_A_TIME = {"cpu": 16}  # pictures on a device, if nobody says
AT_A_TIME_ELSEWHERE = 64


class Rows(NamedTuple):
    """Features of some pictures; of pixels, `pool` alone."""

    pool: Float[Any, "b d"]
    spatial: Float[Any, "b s"] | None = None
    logits: Float[Any, "b k"] | None = None


class Extractor:
    """Features of a kind, on a mesh."""

    def __init__(
        self,
        function: Callable[[Any, Array], Rows],
        params: Any,
        mesh: parallel.Mesh,
        card: dict[str, Any],
    ):
        self.mesh, self.card, self._function = mesh, card, jax.jit(function)
        self._params = parallel.replicate(params, mesh)

    def __call__(
        self, batches: Iterable[UInt8[np.ndarray, "_b h w c"]], *, batch_size: int
    ) -> Iterator[Rows]:
        """Rows for the pictures of all batches, in their order."""
        size, flying = -(-batch_size // self.mesh.size) * self.mesh.size, deque()
        for pictures in regrouped(batches, size):
            rows = np.minimum(np.arange(size), len(pictures) - 1)
            found = self._function(self._params, parallel.spread(pictures[rows], self.mesh))
            flying.append((len(pictures), found))
            if len(flying) > IN_FLIGHT:
                yield _landed(*flying.popleft())
        while flying:
            yield _landed(*flying.popleft())

    def width(self, shape: tuple[int, int, int]) -> int:
        """How many features a picture of this shape has; nothing is computed."""
        picture = jax.ShapeDtypeStruct((1, *shape), np.uint8)
        return jax.eval_shape(self._function, self._params, picture).pool.shape[1]


def batch_size(mesh: parallel.Mesh) -> int:
    """How many pictures to draw and to look at at a time."""
    return AT_A_TIME.get(jax.default_backend(), AT_A_TIME_ELSEWHERE) * mesh.size


def _landed(n: int, rows: Rows) -> Rows:
    return jax.tree.map(lambda x: x[:n], parallel.fetch(rows))


def regrouped(
    batches: Iterable[UInt8[np.ndarray, "_b h w c"]], size: int
) -> Iterator[UInt8[np.ndarray, "_b h w c"]]:
    """The same pictures, `size` at a time; the last may be fewer."""
    held: list[np.ndarray] = []
    for batch in batches:
        held.append(batch)
        while sum(map(len, held)) >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held = [joined[size:]]
    if sum(map(len, held)):
        yield np.concatenate(held)


def of_inception(
    weights: pretrained.Pretrained, mesh: parallel.Mesh, *, preparation: str
) -> Extractor:
    """Features of FID's Inception.

    Raises:
        UserError: there is no such preparation.
    """
    if preparation not in inception.PREPARATIONS:
        raise unknown("preparation", preparation, inception.PREPARATIONS)
    prepare = inception.PREPARATIONS[preparation]
    card = {"space": "inception", "preparation": preparation, "weights": weights.hash}

    def function(params: Any, image: Array) -> Rows:
        return Rows(*inception.network(params, prepare(image)))

    return Extractor(function, weights.params, mesh, card)


def of_pixels(mesh: parallel.Mesh) -> Extractor:
    """Values in 0 … 1 of the pictures themselves, shrunk to `PIXELS` to a side."""

    def function(_: Any, image: Array) -> Rows:
        height, width = (min(n, PIXELS) for n in image.shape[1:3])
        small = inception.resize(image.astype("float32"), height, width, antialias=True)
        return Rows(small.reshape(len(small), -1) / 255)

    return Extractor(function, {}, mesh, {"space": "pixels", "most_to_a_side": PIXELS})


# --- the features of a reference ------------------------------------------------------------------


def like(
    real: Reference | None,
    mesh: parallel.Mesh,
    *,
    space: str,
    weights: str | None,
    preparation: str | None = None,
) -> Extractor:
    """What makes features as those of a reference were made.

    Args:
        real: the reference; without one, anything goes.
        space: inception or pixels.
        weights: Inception's: a file, a folder or an id on the hub.
        preparation: by default the reference's.

    Raises:
        UserError: the reference was made otherwise, or there are no such weights.
    """
    made_with = real.made_with if real else {}
    if real and made_with["space"] != space:
        raise UserError(
            f"reference {real.path} is of the features '{made_with['space']}', not of '{space}'"
        )
    if space == "pixels":
        return of_pixels(mesh)
    chosen = preparation or made_with.get("preparation", "pytorch_fid")
    if real and real.card and chosen != made_with["preparation"]:
        raise UserError(f"reference {real.path} is of --preparation {made_with['preparation']}")
    found = pretrained.load(str(weights))
    if real and made_with.get("weights") not in (None, found.hash):
        raise UserError(
            f"reference {real.path} was made with other weights than '{weights}': their hash is "
            f"{made_with['weights'][:12]}…, not {found.hash[:12]}…"
        )
    return of_inception(found, mesh, preparation=chosen)


def require_fit(real: Reference, width: int) -> None:
    """Raises UserError if a reference has other features than so many."""
    if width != (known := len(real.pool.mean)):
        raise UserError(
            f"reference {real.path} has {known} features, and these pictures {width}: they have "
            "another size or colour, or it is of another network"
        )


# --- a set's features, gathered -------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """What is kept of a set: statistics of all pictures, and the features of some, in order."""

    count: int
    pool: Gaussian = field(repr=False)
    spatial: Gaussian | None = field(repr=False)
    features: Float[np.ndarray, "n d"] = field(repr=False)
    logits: Float[np.ndarray, "n k"] | None = field(repr=False)


def gather(
    rows: Iterable[Rows], count: int, *, n_features: int, keep_logits: bool, seed: int = 0
) -> Gathered:
    """Statistics of `count` pictures' features, at least two.

    Args:
        n_features: pictures whose pool features are kept; which ones depends on the count and the
            seed alone.
        keep_logits: of all pictures.
    """
    kept = np.zeros(count, bool)
    kept[np.random.default_rng(seed).permutation(count)[:n_features]] = True
    pool = spatial = None
    features, logits, start = [], [], 0
    for part in rows:
        pool = pool or Moments(part.pool.shape[1])
        pool.add(part.pool)
        features.append(part.pool[kept[start : start + len(part.pool)]])
        start += len(part.pool)
        if part.spatial is not None:
            spatial = spatial or Moments(part.spatial.shape[1])
            spatial.add(part.spatial)
        if keep_logits and part.logits is not None:
            logits.append(part.logits)
    assert pool and start == count, f"{start} pictures of {count}"
    return Gathered(
        count=count,
        pool=pool.gaussian(),
        spatial=spatial.gaussian() if spatial else None,
        features=np.concatenate(features),
        logits=np.concatenate(logits) if logits else None,
    )
