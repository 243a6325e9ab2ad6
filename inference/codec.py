"""Images ↔ latents on all devices: a VAE's weights on a mesh, and its compiled functions.

    codec = Codec.open("stabilityai/sdxl-vae", mesh)
    moments = codec.encode(images)      # uint8 → means and log-variances, float16
    images = codec.decode(x)            # a diffusion model's output → float32 in about −1 … 1

Knows nothing of files: latents are written by `latent_writer.py`.
"""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float16, UInt8

from datasets_config import LatentEncoding
from methods.method import to_float
from networks import autoencoder
from networks.autoencoder import AutoencoderConfig
from pretrained import autoencoder as pretrained
from pretrained.weight_files import print_notices
from runtime import parallel
from runtime.errors import UserError

DECODED_PER_DEVICE = 16  # images at a time
TILE, OVERLAP = 128, 16  # latents a side; larger ones are decoded in tiles, which are blended
MAX_FLOAT16 = 65_504.0


class Codec:
    """A VAE on a mesh, with the scale and shift from its latents to a diffusion model's."""

    def __init__(
        self,
        vae: pretrained.PretrainedAutoencoder,
        mesh: parallel.Mesh,
        *,
        dtype: str = "float32",
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
    ):
        """Args:
        scaling_factor, shift_factor: by default those of the VAE's own config.
        """
        config: AutoencoderConfig = vae.config
        self.config = config
        self.id, self.hash = vae.id, vae.hash
        self.scaling_factor = config.scaling_factor if scaling_factor is None else scaling_factor
        self.shift_factor = config.shift_factor if shift_factor is None else shift_factor
        self.mesh, self.dtype = mesh, dtype
        self._graphdef = autoencoder.autoencoder_graphdef(config, dtype)
        self._params = parallel.replicate(vae.params, mesh)

    @classmethod
    def open(cls, path_or_id: str, mesh: parallel.Mesh, *, dtype: str = "float32") -> "Codec":
        """Load a VAE from a folder, a file or the hub.

        Raises:
            UserError: it cannot be read, or is not an AutoencoderKL.
        """
        return cls(pretrained.load_autoencoder(path_or_id), mesh, dtype=dtype)

    @classmethod
    def from_encoding(
        cls, encoding: LatentEncoding, mesh: parallel.Mesh, *, vae: str | None = None
    ) -> "Codec":
        """Load the VAE that latents were made with. Warns of one of another scale, where its
        weights are not known.

        Args:
            vae: where it is now, if it has moved.

        Raises:
            UserError: it cannot be read, or has other weights.
        """
        path_or_id = vae or encoding.vae
        if not path_or_id:
            raise UserError("it is not recorded which VAE made these latents: name it by --vae")
        scale = encoding.scaling_factor, encoding.shift_factor
        try:
            loaded = pretrained.load_autoencoder(path_or_id, scale=scale)
        except UserError as error:
            hint = "" if vae else "; if the VAE has moved, name its new place by --vae"
            raise UserError(f"{error}{hint}") from None
        if encoding.vae_hash and loaded.hash != encoding.vae_hash:
            raise UserError(
                f"the VAE '{path_or_id}' is not the one that the latents of "
                f"{encoding.dataset_name} were made with: its weights' hash is "
                f"{loaded.hash[:12]}…, not {encoding.vae_hash[:12]}…; name the right one by --vae"
            )
        own = loaded.config.scaling_factor, loaded.config.shift_factor
        # Latents of these very weights may have been scaled otherwise on purpose.
        if not encoding.vae_hash and own != scale:
            warning = (
                f"warning: scale and shift of its latents are {own[0]:g} and {own[1]:g}, those of "
                f"the model's latents {scale[0]:g} and {scale[1]:g}: it may be another model's VAE"
            )
            print_notices(loaded.id, [warning])
        return cls(
            loaded,
            mesh,
            scaling_factor=encoding.scaling_factor,
            shift_factor=encoding.shift_factor,
        )

    def encode(self, image: UInt8[np.ndarray, "b H W c"]) -> Float16[Array, "b h w k"]:
        """Encode uint8 images to means and log-variances, side by side in the channels.

        The number of devices must divide b. The result is not waited for.
        """
        return self._encode(self._params, parallel.shard_rows(image, self.mesh))

    def decode(self, x: Float[np.ndarray, "*b h w z"]) -> Float[np.ndarray, "*b H W c"]:
        """Decode a diffusion model's latents to images in about −1 … 1."""
        *leading, _, _, _ = x.shape
        x = np.asarray(x, np.float32).reshape(-1, *x.shape[-3:])
        large = max(x.shape[1:3]) > TILE
        n_devices = self.mesh.size
        size = n_devices * min(1 if large else DECODED_PER_DEVICE, -(-len(x) // n_devices))
        batches = []
        for start in range(0, len(x), size):
            # The last batch is filled up with the last row.
            rows = np.minimum(np.arange(start, start + size), len(x) - 1)
            batches.append(self._decode_tiles(x[rows]) if large else self._decode_whole(x[rows]))
        images = np.concatenate([parallel.fetch_to_host(batch) for batch in batches])[: len(x)]
        return images.reshape(*leading, *images.shape[1:])

    def _decode_whole(self, x: Float[np.ndarray, "b h w z"]) -> Float[Array, "b H W c"]:
        return self._decode(self._params, parallel.shard_rows(x, self.mesh))

    def _decode_tiles(self, x: Float[np.ndarray, "b h w z"]) -> Float[np.ndarray, "b H W c"]:
        def decode(tiles: Any) -> Any:
            return parallel.fetch_to_host(self._decode_whole(tiles))

        return autoencoder.decode_tiled(
            decode, x, tile=TILE, overlap=OVERLAP, downsampling=self.config.downsampling
        )

    @cached_property
    def _encode(self):
        def encode(params: Any, image: Array) -> Array:
            vae = nnx.merge(self._graphdef, params)
            moments = jnp.concatenate(vae.encode(to_float(image)), axis=-1)
            # Infinity is no large number: it stays recognisable, and whoever writes it refuses it.
            is_finite = jnp.isfinite(moments)
            clipped = jnp.clip(moments, -MAX_FLOAT16, MAX_FLOAT16)
            return jnp.where(is_finite, clipped, jnp.nan).astype(jnp.float16)

        return jax.jit(encode)

    @cached_property
    def _decode(self):
        def decode(params: Any, x: Array) -> Array:
            vae = nnx.merge(self._graphdef, params)
            z = autoencoder.unscale_latents(
                x, scaling_factor=self.scaling_factor, shift_factor=self.shift_factor
            )
            return vae.decode(z)

        return jax.jit(decode)
