"""Alignment: tokens of the network learn what an encoder sees in the clean image (Yu et al. 2024,
REPA, arXiv 2410.06940), by a convolution and towards spatially normalised features (Singh et al.
2025, iREPA, arXiv 2512.10794).

The encoder is not trained. Its weights are sharded as the network's are, and go into every step
with the term. The convolution belongs to training alone: no sampler and no export has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from data.batch import EncodedCaption
from inference.spaces import Pixels, Space, compare_spaces
from inference.trained_model import TrainedModel
from methods.method import ToModelInput, derive_row_keys
from model import Label, ModelConfig, build_model, model_graphdef
from networks.autoencoder import Conv
from pretrained import dinov2
from runtime import parallel, processes
from runtime.checkpoint import array_checksums, json_checksum
from runtime.errors import UserError
from runtime.flags import Derived, flag, setting
from runtime.image_size import ImageSize, format_shape
from runtime.run_folder import find_run
from training.step import PROJECTOR, TrainState

MEAN_SHARE = 0.6  # γ of iREPA, as its authors set it
EPSILON = 1e-6
ENCODER_DEPTH = 2 / 3  # of a run's blocks, after which its tokens are the features
CLEAN_TIME = 0.05  # of a run that sees a clean image: flows are hardly trained below
DEFAULT_DEPTH = 0.3  # of the network's blocks
ALIGN_LOSS = "align_loss"  # the name of the metric
PROJECTOR_TAG = 1  # folded into the key of the network's initial weights


@dataclass(frozen=True, kw_only=True)
class AlignFlags:
    """Alignment."""

    align: str | None = flag(
        None,
        "an encoder whose features of the clean image a block's tokens learn (REPA): dinov2-base "
        "or another DINOv2, by name, folder or file; or a run of the same data, RUN or RUN@STEP",
        may_change=True,
    )
    align_at: int = setting(
        Derived("three tenths of the blocks"),
        "number of blocks after which the tokens are aligned",
        above=0,
        only_with=("align", None),
    )
    align_weight: float = setting(
        0.5, "weight of the alignment", above=0, only_with=("align", None)
    )
    align_until: float = setting(
        1.0,
        "share of n_steps after which the alignment ends, such as 0.4",
        above=0,
        at_most=1,
        only_with=("align", None),
    )


def check_alignment(align_at: int, *, depth: int, is_taught: bool) -> None:
    """Raises UserError unless the network has this block, and no teacher."""
    if align_at > depth:
        raise UserError(f"--align_at {align_at}: the network has {depth} blocks")
    if is_taught:
        raise UserError("--align and --teacher are mutually exclusive: a step takes one network")


# --- the projector --------------------------------------------------------------------------------


class Projector(nnx.Module):
    """Tokens of the network → features of the encoder, by one 3×3 convolution over their grid."""

    def __init__(self, config: ModelConfig, n_features: int, *, rngs: nnx.Rngs):
        self.convolution = Conv(config.width, n_features, dtype=config.dtype, rngs=rngs)
        self.rows = config.grid[0]

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n f"]:
        grid = rearrange(tokens, "b (h w) d -> b h w d", h=self.rows)
        return rearrange(self.convolution(grid), "b h w f -> b (h w) f")


@lru_cache
def aligned_graphdef(config: ModelConfig, n_features: int) -> nnx.GraphDef[Any]:
    """A network that has a projector among its parts, without its weights."""

    def build() -> nnx.Module:
        network = build_model(config, nnx.Rngs(0))
        setattr(network, PROJECTOR, Projector(config, n_features, rngs=nnx.Rngs(0)))
        return network

    return nnx.split(nnx.eval_shape(build))[0]


# --- the features ---------------------------------------------------------------------------------


def normalize_over_patches(features: Float[Array, "b h w f"]) -> Float[Array, "b h w f"]:
    """Subtract γ of each channel's mean over an image's patches, and divide by its standard
    deviation over them: what differs between places is left (Singh et al. 2025, §4).
    """
    mean, std = (moment((1, 2), keepdims=True) for moment in (features.mean, features.std))
    return (features - MEAN_SHARE * mean) / (std + EPSILON)


def resize_grid(
    features: Float[Array, "b h w f"], grid: tuple[int, int]
) -> Float[Array, "b {grid[0]} {grid[1]} f"]:
    """Resize a grid of features bilinearly."""
    b, *own, f = features.shape
    return features if tuple(own) == grid else jax.image.resize(features, (b, *grid, f), "linear")


def null_label(config: ModelConfig, null: EncodedCaption | None, n: int) -> Label:
    """The null label of a network, n times: the null class, or `null` or the empty caption."""
    if not config.text_width:
        return jnp.full(n, config.n_classes)
    null = null or EncodedCaption(
        tokens=np.zeros((1, 1, config.text_width), np.float16),
        mask=np.zeros((1, 1), bool),
        pooled=np.zeros((1, config.pooled_width), np.float16),
    )
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), null)


# --- the encoder ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A frozen network that sees clean images.

    Args:
        weights: on the devices of the network to train.
        look: `look(network, data)`, with this network's weights merged, returns the grid of its
            features, (b h w f), of data as the trained network sees them.
        n_features: f.
        reference: where it is: of a run with the step of its checkpoint, `RUN@STEP`.
        fingerprint: a checksum of its weights.
    """

    graphdef: nnx.GraphDef[Any]
    weights: Any
    look: Callable[[Any, Array], Array]
    n_features: int
    reference: str
    fingerprint: str

    def merge(self) -> Any:
        """Return the network with its weights."""
        return nnx.merge(self.graphdef, self.weights)


def open_encoder(
    reference: str, *, network: ModelConfig, space: Space, mesh: parallel.Mesh
) -> Encoder:
    """Open the encoder that a network is aligned with.

    Args:
        reference: a run's folder, or `RUN@STEP` for an earlier checkpoint of it; or a DINOv2.
        network, space, mesh: of the run to train.

    Raises:
        UserError: there is no such encoder, or it does not see the run's data.
    """
    try:
        if run := find_run(reference, "--align"):
            folder, step = run
            return open_run(folder, step, network=network, space=space, mesh=mesh)
        return open_dinov2(reference, network=network, space=space, mesh=mesh)
    except UserError as error:
        raise UserError(f"--align {reference}: {error}") from None


def open_dinov2(
    path_or_id: str, *, network: ModelConfig, space: Space, mesh: parallel.Mesh
) -> Encoder:
    """Open a DINOv2, which sees images at the size that has one of its patches for each token.

    Raises:
        UserError: it cannot be read, or there are no images.
    """
    if not isinstance(space, Pixels):
        raise UserError(
            "it sees images, and --latents has none; align with a run of these latents, or train "
            "on the images themselves"
        )
    with processes.first_then_others():  # the first may download it
        published = dinov2.read_dinov2(path_or_id)
    dtype = "float32" if network.dtype == "float32" else "bfloat16"
    graphdef, weights = nnx.split(published.model(dtype))
    size = ImageSize(*network.grid).times(published.config.patch)
    return Encoder(
        graphdef=graphdef,
        weights=parallel.shard_params(nnx.to_pure_dict(weights), mesh),
        look=lambda vit, images: vit(dinov2.vit_inputs(images, size))[1],
        n_features=published.config.width,
        reference=published.id,
        fingerprint=published.hash,
    )


def open_run(
    folder: Path, step: int | None, *, network: ModelConfig, space: Space, mesh: parallel.Mesh
) -> Encoder:
    """Open a run as an encoder: its averaged weights see the clean image at a small time and
    without a label, and the features are the tokens after two thirds of the blocks.

    Raises:
        UserError: there is no such checkpoint, it sees other data, or has no null label.
    """
    model = TrainedModel.from_run(folder, step=step, fsdp=mesh.shape["fsdp"])
    ours, theirs = network.image_shape, model.model.image_shape
    if ours != theirs:
        raise UserError(
            f"its images are {format_shape(theirs)}, this run's are {format_shape(ours)}: they "
            "must be the same"
        )
    if differences := compare_spaces(space, model.space):
        raise UserError(differences[0])
    if model.model.is_conditional and not model.null_is_trained:
        raise UserError(
            "it was trained without label dropout, so that it sees no image without a label; take "
            "a run with --label_dropout above 0"
        )
    config = replace(model.model, dtype=network.dtype, fp8=False)
    weights = model.params
    return Encoder(
        graphdef=model_graphdef(config),
        weights=weights,
        look=partial(look_by_run, config=config, null=model.conditioning.null),
        n_features=config.width,
        reference=f"{folder}@{model.step}",
        fingerprint=str(json_checksum(array_checksums(weights))),
    )


def look_by_run(
    network: Any,
    data: Float[Array, "b h w c"],
    *,
    config: ModelConfig,
    null: EncodedCaption | None = None,
) -> Float[Array, "b H W f"]:
    """A diffusion transformer's tokens of clean data, as a grid.

    Args:
        null: its null label, if it has one of its own, as SD3.
    """
    n, block = len(data), max(1, round(ENCODER_DEPTH * config.depth))
    label = null_label(config, null, n)
    _, (tokens,) = network(data, jnp.full(n, CLEAN_TIME), label, taps=(block,))
    return rearrange(tokens, "b (h w) f -> b h w f", h=config.grid[0])


def require_same_encoder(encoder: Encoder, saved: Mapping[str, Any]) -> None:
    """Reject resuming with another encoder, wherever it is now.

    Args:
        saved: `config.json` of the run to resume; empty for a new one.

    Raises:
        UserError: its weights are not those that the run began with.
    """
    if saved and saved.get("encoder") != encoder.fingerprint:
        raise UserError(
            f"cannot resume: --align {encoder.reference} is not the encoder that the run began "
            f"with, {saved.get('align')}"
        )


# --- the loss -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """The alignment of a network's tokens with an encoder.

    Args:
        to_input: converts a batch's `image` to the data that the network sees.
        block: number of blocks after which its tokens are aligned.
        end: the first step without the alignment.
    """

    encoder: Encoder
    network: ModelConfig
    to_input: ToModelInput
    block: int
    weight: float
    end: int

    @property
    def graphdef(self) -> nnx.GraphDef[Any]:
        """The network with a projector among its parts, without its weights."""
        return aligned_graphdef(self.network, self.encoder.n_features)

    def init_projector(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Initialize the projector's weights as a plain tree.

        Args:
            key: that of the network's initial weights.
        """
        rngs = nnx.Rngs(params=jax.random.fold_in(key, PROJECTOR_TAG))
        projector = Projector(self.network, self.encoder.n_features, rngs=rngs)
        return nnx.to_pure_dict(nnx.split(projector)[1])

    def targets(self, batch: Any, key: Key[Array, ""], network: Any) -> Float[Array, "b n f"]:
        """The features of a batch's clean images, one for each token.

        Args:
            network: the encoder's.
        """
        # The keys of the loss: an aligned network and its encoder see the same sample of a latent.
        data = self.to_input(batch.image, derive_row_keys(key, batch.row).data)
        features = self.encoder.look(network, data).astype(jnp.float32)
        normalized = normalize_over_patches(resize_grid(features, self.network.grid))
        return rearrange(normalized, "b h w f -> b (h w) f")


def without_alignment(update: Callable[..., tuple[TrainState, Any]]) -> Callable[..., Any]:
    """Make the step of a run without alignment one for the state of a run whose alignment has
    ended. It is the same compiled program, with the same bits: the projector and the metric are
    set aside meanwhile, and the encoder's weights are not read.
    """

    def update_rest(state: TrainState, batch: Any, key: Any, frozen: dict[str, Any]) -> Any:
        others = {name: weights for name, weights in frozen.items() if name != "frozen"}
        window = dict(state.window)
        ended = {ALIGN_LOSS: window.pop(ALIGN_LOSS)}
        rest, report = update(replace(state, projector=(), window=window), batch, key, others)
        return replace(rest, projector=state.projector, window=rest.window | ended), report

    return update_rest
