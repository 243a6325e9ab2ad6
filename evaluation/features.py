"""Features of images, computed on all devices: activations of FID's Inception network or of DINOv2,
or pixels.

Batches of any size come in; the network sees one fixed size, so that it is compiled once. Computes
no distances: see `evaluation/metrics.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from evaluation.metrics import FeatureStatistics, RunningStatistics
from evaluation.protocols import DGM_EVAL
from evaluation.reference import Reference
from networks import inception
from networks.vit import vit_graphdef
from pretrained.dinov2 import PretrainedDINOv2, normalize, read_dinov2
from pretrained.inception import PretrainedInception, load_inception
from runtime import parallel, processes
from runtime.errors import UserError, unknown_name

MAX_BATCHES_IN_FLIGHT = 2  # dispatched to the devices, features not yet fetched
MAX_PIXEL_SIDE = 16  # images are shrunk to this side before their pixels serve as features
IMAGES_PER_DEVICE = {"cpu": 16}  # by backend, where no batch size is given
IMAGES_PER_ACCELERATOR = 64


class FeatureBatch(NamedTuple):
    """Features of a batch of images; all but Inception's fill `pool` only."""

    pool: Float[Any, "b d"]
    spatial: Float[Any, "b s"] | None = None
    logits: Float[Any, "b k"] | None = None


class FeatureExtractor:
    """Computes one kind of features on a mesh.

    Args:
        function: (params, uint8 images) → features; compiled here.
        params: replicated on the mesh.
        card: record of everything the features depend on, written beside each result.
        prepare: of images on the host, before they go to the devices.
    """

    def __init__(
        self,
        function: Callable[[Any, Array], FeatureBatch],
        params: Any,
        mesh: parallel.Mesh,
        card: dict[str, Any],
        prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.mesh = mesh
        self.card = card
        self._prepare = prepare or (lambda images: images)
        self._function = jax.jit(function)
        self._params = parallel.replicate(params, mesh)

    def __call__(
        self, batches: Iterable[UInt8[np.ndarray, "_b h w c"]], *, batch_size: int
    ) -> Iterator[FeatureBatch]:
        """Yield the features of all images, in their order, `batch_size` rounded up to a multiple
        of the device count at a time.
        """
        size = -(-batch_size // self.mesh.size) * self.mesh.size

        def dispatch(images: UInt8[np.ndarray, "b h w c"]) -> tuple[int, FeatureBatch]:
            # The last batch is padded by repeating its last image: one shape, one program.
            rows = np.minimum(np.arange(size), len(images) - 1)
            images_on_mesh = parallel.shard_rows(self._prepare(images)[rows], self.mesh)
            return len(images), self._function(self._params, images_on_mesh)

        dispatched = map(dispatch, rebatch(batches, size))
        yield from parallel.keep_in_flight(
            dispatched, n=MAX_BATCHES_IN_FLIGHT, read=lambda batch: _fetch_rows(*batch)
        )

    def feature_width(self, image_shape: tuple[int, int, int]) -> int:
        """Return the number of features of an image (h, w, c), without computing any."""
        image = self._prepare(np.zeros((1, *image_shape), np.uint8))
        return jax.eval_shape(self._function, self._params, image).pool.shape[1]


def default_batch_size(mesh: parallel.Mesh) -> int:
    """Return the number of images to sample and to evaluate at a time."""
    return IMAGES_PER_DEVICE.get(parallel.devices().platform, IMAGES_PER_ACCELERATOR) * mesh.size


def _fetch_rows(n: int, features: FeatureBatch) -> FeatureBatch:
    """Copy features to the host and drop those of the padding."""
    return jax.tree.map(lambda x: x[:n], parallel.fetch_to_host(features))


def rebatch(
    batches: Iterable[UInt8[np.ndarray, "_b h w c"]], size: int
) -> Iterator[UInt8[np.ndarray, "_b h w c"]]:
    """Regroup images into batches of `size`; the last may be smaller."""
    pending: list[np.ndarray] = []
    for batch in batches:
        pending.append(batch)
        while sum(map(len, pending)) >= size:
            joined = np.concatenate(pending)
            yield joined[:size]
            pending = [joined[size:]]
    if sum(map(len, pending)):
        yield np.concatenate(pending)


# --- kinds of features ----------------------------------------------------------------------------


def build_inception_extractor(
    weights: PretrainedInception, mesh: parallel.Mesh, *, preparation: str
) -> FeatureExtractor:
    """Build the extractor of FID's Inception features (Heusel et al. 2017).

    Args:
        preparation: how images are resized for it, a key of `inception.PREPARATIONS`.

    Raises:
        UserError: unknown preparation.
    """
    if preparation not in inception.PREPARATIONS:
        raise unknown_name("preparation", preparation, inception.PREPARATIONS)
    prepare = inception.PREPARATIONS[preparation]
    card = {"space": "inception", "preparation": preparation, "weights": weights.hash}

    def function(params: Any, image: Array) -> FeatureBatch:
        return FeatureBatch(*inception.inception_features(params, prepare(image)))

    return FeatureExtractor(function, weights.params, mesh, card)


def build_dinov2_extractor(encoder: PretrainedDINOv2, mesh: parallel.Mesh) -> FeatureExtractor:
    """Build the extractor of DINOv2's class tokens, computed as `protocols.DGM_EVAL`."""
    config = replace(encoder.config, position_offset=DGM_EVAL.position_offset)
    graphdef = vit_graphdef(config)
    card = {"space": "dinov2", "preparation": DGM_EVAL.name, "weights": encoder.hash}

    def function(params: Any, image: Array) -> FeatureBatch:
        # A GPU would otherwise round factors to ten bits (TF32).
        with jax.default_matmul_precision("highest"):
            class_token, _ = nnx.merge(graphdef, params)(normalize(image.astype("float32") / 255))
        return FeatureBatch(class_token)

    card |= {"encoder": asdict(config)}
    return FeatureExtractor(function, encoder.params, mesh, card, resize_by_pillow)


def resize_by_pillow(
    images: UInt8[np.ndarray, "b h w c"],
) -> UInt8[np.ndarray, "b 224 224 3"]:
    """Resize images to `DGM_EVAL.size`, in RGB and bytes, as Pillow does by bicubic interpolation:
    antialiased, clipped and rounded.

    It takes 1.6 ms of a CPU core for an image of 256 pixels to a side, while the devices compute.
    """
    side = DGM_EVAL.size

    def resize(image: np.ndarray) -> np.ndarray:
        rgb = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor() as pool:
        return np.stack([*pool.map(resize, np.broadcast_to(images, (*images.shape[:3], 3)))])


def build_pixel_extractor(mesh: parallel.Mesh) -> FeatureExtractor:
    """Build the extractor of pixel values in 0 … 1, shrunk to `MAX_PIXEL_SIDE` to a side."""

    def function(_: Any, image: Array) -> FeatureBatch:
        height, width = (min(n, MAX_PIXEL_SIDE) for n in image.shape[1:3])
        small = inception.resize(image.astype("float32"), height, width, antialias=True)
        return FeatureBatch(small.reshape(len(small), -1) / 255)

    card = {"space": "pixels", "most_to_a_side": MAX_PIXEL_SIDE}
    return FeatureExtractor(function, {}, mesh, card)


def build_matching_extractor(
    reference: Reference | None,
    mesh: parallel.Mesh,
    *,
    space: str,
    weights: str | None,
    preparation: str | None = None,
) -> FeatureExtractor:
    """Build an extractor of the features that a reference holds.

    Args:
        reference: None accepts any features.
        space: inception, dinov2 or pixels.
        weights: Inception's or DINOv2's: a file, a folder or an id on the hub.
        preparation: for Inception; defaults to the reference's.

    Raises:
        UserError: the reference holds other features, or the weights cannot be loaded.
    """
    feature_card = reference.feature_card if reference else {}
    if reference and feature_card["space"] != space:
        raise UserError(
            f"reference {reference.path} holds features '{feature_card['space']}', not '{space}'"
        )
    if space == "pixels":
        return build_pixel_extractor(mesh)
    if space == "dinov2":
        with processes.first_then_others():  # the first may download it
            encoder = read_dinov2(str(weights))
        _check_weights(reference, str(weights), encoder.hash)
        return build_dinov2_extractor(encoder, mesh)
    chosen = preparation or feature_card.get("preparation", "pytorch_fid")
    if reference and reference.card and chosen != feature_card["preparation"]:
        raise UserError(
            f"reference {reference.path} was made with --preparation "
            f"{feature_card['preparation']}, not {chosen}"
        )
    with processes.first_then_others():
        inception_weights = load_inception(str(weights))
    _check_weights(reference, str(weights), inception_weights.hash)
    return build_inception_extractor(inception_weights, mesh, preparation=chosen)


def _check_weights(reference: Reference | None, weights: str, digest: str) -> None:
    """Raise UserError if a reference records that it was made with weights of another hash."""
    recorded = reference.feature_card.get("weights") if reference else None
    if reference and recorded not in (None, digest):
        raise UserError(
            f"reference {reference.path} was made with other weights than '{weights}': their hash "
            f"is {recorded[:12]}…, not {digest[:12]}…"
        )


def check_feature_width(reference: Reference, width: int) -> None:
    """Raise UserError if a reference does not hold `width` features per image."""
    expected = len(reference.pool.mean)
    if width != expected:
        raise UserError(
            f"reference {reference.path} has {expected} features per image, and these images have "
            f"{width}: their size or number of channels differs, or the reference is of another "
            "network"
        )


# --- summary of a set of images -------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureSummary:
    """Statistics of all images of a set, and the features of a random subset, in order."""

    count: int
    pool: FeatureStatistics = field(repr=False)
    spatial: FeatureStatistics | None = field(repr=False)
    features: Float[np.ndarray, "n d"] = field(repr=False)
    logits: Float[np.ndarray, "n k"] | None = field(repr=False)


def summarize_features(
    batches: Iterable[FeatureBatch],
    count: int,
    *,
    n_features: int,
    keep_logits: bool,
    seed: int = 0,
) -> FeatureSummary:
    """Accumulate the statistics of `count` images, at least two.

    Args:
        n_features: images whose pool features are kept. The choice depends on `count` and `seed`
            only.
        keep_logits: keep the logits of all images.

    Raises:
        UserError: features are not finite.
    """
    selected = np.zeros(count, bool)
    selected[np.random.default_rng(seed).permutation(count)[:n_features]] = True
    pool = None
    spatial = None
    features = []
    logits = []
    start = 0
    for batch in batches:
        pool = pool or RunningStatistics(batch.pool.shape[1])
        pool.update(batch.pool)
        features.append(batch.pool[selected[start : start + len(batch.pool)]])
        start += len(batch.pool)
        if batch.spatial is not None:
            spatial = spatial or RunningStatistics(batch.spatial.shape[1])
            spatial.update(batch.spatial)
        if keep_logits and batch.logits is not None:
            logits.append(batch.logits)
    assert pool and start == count, f"{start} images of {count}"
    statistics = pool.statistics()
    if not np.isfinite(statistics.mean).all():
        raise UserError("features of the images are not finite: the network's weights are damaged")
    return FeatureSummary(
        count=count,
        pool=statistics,
        spatial=spatial.statistics() if spatial else None,
        features=np.concatenate(features),
        logits=np.concatenate(logits) if logits else None,
    )
