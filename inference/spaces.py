"""Spaces that a model works in: pixels, or the latents of a VAE.

A space says what a dataset's row is to a model and what a model's output is to a person. The rows
themselves are decoded in `data/`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float, Key, Num

from datasets_config import LatentEncoding
from inference.codec import Codec
from methods.method import pixels_to_input
from model import ModelConfig
from networks import autoencoder
from runtime.errors import UserError
from runtime.image_size import ImageSize, format_shape


class Space(ABC):
    """A kind of data for a model.

    Attributes:
        is_bounded: whether they lie in −1 … 1.
        facts: everything that must be the same in a resumed run, by name.
        scales: factors between the VAE's latents and the data.
        vae_hash: hash of the VAE's weights, if there is one and it is known.
    """

    is_bounded: ClassVar[bool]
    facts: Mapping[str, Any] = {}
    scales: tuple[float, ...] = ()
    vae_hash: str = ""

    def open(self) -> None:  # noqa: B027  (nothing to load)
        """Load what converts a model's output to images, if anything does.

        Raises:
            UserError: it cannot be read, or is not the one that the data were made with.
        """

    def check_vae(self, vae: str) -> None:  # noqa: B027  (any is accepted)
        """Raises UserError if a VAE is named and there is none."""

    @abstractmethod
    def read(self, rows: Array, keys: Key[Array, "b"]) -> Float[Array, "b h w c"]:
        """The data that a model sees, from a batch's `image` and one random key for each row."""

    @abstractmethod
    def means(self, rows: Num[np.ndarray, "b h w k"]) -> Float[np.ndarray, "b h w c"]:
        """The mean of `read` over its random numbers, on the host."""

    @abstractmethod
    def to_images(self, x: Float[np.ndarray, "*b h w c"]) -> Float[np.ndarray, "*b H W C"]:
        """Convert data, or a model's output, to images in about −1 … 1."""

    @abstractmethod
    def blank_rows(self, n: int, model: ModelConfig) -> Num[np.ndarray, "n h w k"]:
        """The `image` of a batch of zeros."""

    @abstractmethod
    def image_shape(self, model: ModelConfig) -> tuple[int, int, int]:
        """(height, width, channels) of an image. The space must be open."""

    def image_size(self, model: ModelConfig) -> ImageSize:
        """Height and width of an image in pixels."""
        return model.size

    @property
    def card(self) -> dict[str, str] | None:
        """The VAE, for the record beside samples. The space must be open."""
        return None

    @property
    @abstractmethod
    def title(self) -> str:
        """A few words on what a row is."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """A few words on how the data were made."""

    @abstractmethod
    def describe(self, model: ModelConfig) -> str:
        """Sentences on a model's output, for readers of exported weights."""


class Pixels(Space):
    """Images themselves: bytes in a dataset, −1 … 1 to a model."""

    is_bounded = True

    def check_vae(self, vae: str) -> None:
        raise UserError(f"--vae {vae}: the model is of pixels, not of latents")

    def read(self, rows: Array, keys: Key[Array, "b"]) -> Float[Array, "b h w c"]:
        return pixels_to_input(rows, keys)

    def means(self, rows: Num[np.ndarray, "b h w k"]) -> Float[np.ndarray, "b h w c"]:
        return rows.astype(np.float32) / 127.5 - 1

    def to_images(self, x: Float[np.ndarray, "*b h w c"]) -> Float[np.ndarray, "*b H W C"]:
        return x

    def blank_rows(self, n: int, model: ModelConfig) -> Num[np.ndarray, "n h w k"]:
        return np.zeros((n, *self.image_shape(model)), np.uint8)

    def image_shape(self, model: ModelConfig) -> tuple[int, int, int]:
        return model.image_shape

    @property
    def title(self) -> str:
        return "images"

    @property
    def origin(self) -> str:
        return "images"

    def describe(self, model: ModelConfig) -> str:
        return f"It generates images of {format_shape(model.image_shape)} in −1 … 1."


class Latents(Space):
    """Latents of a VAE: means and log-variances in a dataset, scaled samples of them to a model.

    Args:
        encoding: how images became latents.
        load: loads the VAE, when it is first used.
    """

    is_bounded = False

    def __init__(self, encoding: LatentEncoding, load: Callable[[LatentEncoding], Codec]):
        self.encoding = encoding
        self.scales = (encoding.scaling_factor, encoding.shift_factor)
        self.vae_hash = encoding.vae_hash
        # The VAE and the images may have moved.
        self.facts = {k: v for k, v in vars(encoding).items() if k not in ("vae", "source")}
        self._load = load

    @cached_property
    def codec(self) -> Codec:
        """The VAE on the devices."""
        return self._load(self.encoding)

    def open(self) -> None:
        _ = self.codec

    def read(self, rows: Array, keys: Key[Array, "b"]) -> Float[Array, "b h w c"]:
        return autoencoder.sample_scaled_latents(
            rows,
            keys,
            scaling_factor=self.encoding.scaling_factor,
            shift_factor=self.encoding.shift_factor,
        )

    def means(self, rows: Num[np.ndarray, "b h w k"]) -> Float[np.ndarray, "b h w c"]:
        return latent_means(rows, self.encoding)

    def to_images(self, x: Float[np.ndarray, "*b h w c"]) -> Float[np.ndarray, "*b H W C"]:
        return self.codec.decode(x)

    def blank_rows(self, n: int, model: ModelConfig) -> Num[np.ndarray, "n h w k"]:
        return np.zeros((n, *model.size.sides, 2 * model.channels), np.float16)

    def image_shape(self, model: ModelConfig) -> tuple[int, int, int]:
        return *self.encoding.size.sides, self.codec.config.out_channels

    def image_size(self, model: ModelConfig) -> ImageSize:
        return self.encoding.size

    @property
    def card(self) -> dict[str, str] | None:
        return {"id": self.codec.id, "hash": self.codec.hash}

    @property
    def title(self) -> str:
        size = format_shape(self.encoding.size.sides)
        return f"latents ({size} images through {self.encoding.vae})"

    @property
    def origin(self) -> str:
        return f"latents of {self.encoding.vae}, scaled by {self.encoding.scaling_factor:g}"

    def describe(self, model: ModelConfig) -> str:
        e = self.encoding
        return (
            f"It generates latents of {format_shape(model.image_shape)}, which the VAE `{e.vae}` "
            f"decodes to images of {format_shape(e.size.sides)}\n"
            f"(SHA-256 of its weights: {e.vae_hash or 'not known'})."
            f" The VAE's input is x / {e.scaling_factor} + {e.shift_factor}."
        )


def latent_means(
    rows: Num[np.ndarray, "b h w k"], encoding: LatentEncoding
) -> Float[np.ndarray, "b h w c"]:
    """The scaled means of rows of latents, as a diffusion model sees them."""
    return autoencoder.scale_latents(
        rows[..., : encoding.shape[-1]].astype(np.float32),
        scaling_factor=encoding.scaling_factor,
        shift_factor=encoding.shift_factor,
    )


def space_of(
    encoding: LatentEncoding | Mapping[str, Any] | None,
    load: Callable[[LatentEncoding], Codec] | None = None,
) -> Space:
    """The space of a dataset.

    Args:
        encoding: of its latents, or the record of it in a `config.json`; None for images.
        load: loads the VAE of an encoding; None if nothing is decoded.
    """
    if not encoding:
        return Pixels()
    if not isinstance(encoding, LatentEncoding):
        encoding = LatentEncoding.from_record(dict(encoding))
    return Latents(encoding, load or _load_nothing)


def _load_nothing(encoding: LatentEncoding) -> Codec:
    raise AssertionError(f"the VAE {encoding.vae} is not to be used here")


def compare_spaces(ours: Space, theirs: Space) -> list[str]:
    """Describe how this run's space differs from that of the weights it starts from, if it does."""
    hashes = {ours.vae_hash, theirs.vae_hash} - {""}
    if ours.scales == theirs.scales and len(hashes) < 2:
        return []
    return [f"this run trains on {ours.origin}; the source on {theirs.origin}"]
