"""Pictures ↔ latents on all devices: the weights of a VAE, where they are needed.

codec = Codec.open("stabilityai/sdxl-vae", mesh)
moments = codec.encode(pictures)     # bytes → means and log-variances, float16
pictures = codec.decode(x)           # what a diffusion model draws → −1 … 1
"""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float16, UInt8

from datasets_config import LatentEncoding
from methods.rectified_flow import to_float
from networks import autoencoder
from networks.autoencoder import AutoencoderConfig
from pretrained import autoencoder as pretrained
from runtime import parallel
from runtime.errors import UserError

DECODED_PER_DEVICE = 16  # pictures on a device
TILE, OVERLAP = 128, 16  # latents to a side: of larger ones, tiles are decoded and blended
MAX_FLOAT16 = 65_504.0  # of a float16


class Codec:
    """A VAE on a mesh, with the scale and the shift between its latents and a model's."""

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
        scaling_factor, shift_factor: by default those of the VAE's own configuration.
        """
        c = vae.config
        self.config: AutoencoderConfig = c
        self.id, self.hash = vae.id, vae.hash
        self.scaling_factor = c.scaling_factor if scaling_factor is None else scaling_factor
        self.shift_factor = c.shift_factor if shift_factor is None else shift_factor
        self.mesh, self.dtype = mesh, dtype
        self._graphdef = autoencoder.graphdef(c, dtype)
        self._params = parallel.replicate(vae.params, mesh)

    @classmethod
    def open(cls, path_or_id: str, mesh: parallel.Mesh, *, dtype: str = "float32") -> "Codec":
        """The VAE of a folder or of the hub.

        Raises:
            UserError: it cannot be read, or is no AutoencoderKL.
        """
        return cls(pretrained.load_autoencoder(path_or_id), mesh, dtype=dtype)

    @classmethod
    def from_encoding(
        cls, encoding: LatentEncoding, mesh: parallel.Mesh, *, vae: str | None = None
    ) -> "Codec":
        """The VAE that latents were made with, wherever it is now.

        Raises:
            UserError: it cannot be read, or has other weights.
        """
        e = encoding
        if not (vae or e.vae):
            raise UserError("these latents do not say what VAE made them: name it by --vae")
        try:
            found = pretrained.load_autoencoder(vae or e.vae)
        except UserError as error:
            hint = "" if vae else "; if the VAE has moved, say where to by --vae"
            raise UserError(f"{error}{hint}") from None
        if e.vae_hash and found.hash != e.vae_hash:
            raise UserError(
                f"the VAE '{vae or e.vae}' is not the one that the latents of {e.dataset_name} "
                f"were made with: its weights' hash is {found.hash[:12]}…, not {e.vae_hash[:12]}…; "
                "name the right one by --vae"
            )
        return cls(found, mesh, scaling_factor=e.scaling_factor, shift_factor=e.shift_factor)

    def encode(self, image: UInt8[np.ndarray, "b H W c"]) -> Float16[Array, "b h w k"]:
        """Means and log-variances, side by side; not waited for. The devices must divide b."""
        return self._encode(self._params, parallel.shard_rows(image, self.mesh))

    def decode(self, x: Float[np.ndarray, "*b h w z"]) -> Float[np.ndarray, "*b H W c"]:
        """Pictures in about −1 … 1 of latents as a model draws them."""
        *leading, _, _, _ = x.shape
        x = np.asarray(x, np.float32).reshape(-1, *x.shape[-3:])
        large = max(x.shape[1:3]) > TILE
        size = min(1 if large else DECODED_PER_DEVICE, -(-len(x) // self.mesh.size)) * self.mesh.size
        parts = []
        for start in range(0, len(x), size):
            rows = np.minimum(np.arange(start, start + size), len(x) - 1)
            parts.append(self._decode_tiles(x[rows]) if large else self._decode_whole(x[rows]))
        pictures = np.concatenate([parallel.fetch_to_host(part) for part in parts])[: len(x)]
        return pictures.reshape(*leading, *pictures.shape[1:])

    def _decode_whole(self, x: Float[np.ndarray, "b h w z"]) -> Float[Array, "b H W c"]:
        return self._decode(self._params, parallel.shard_rows(x, self.mesh))

    def _decode_tiles(self, x: Float[np.ndarray, "b h w z"]) -> Float[np.ndarray, "b H W c"]:
        def decode(tiles):
            return parallel.fetch_to_host(self._decode_whole(tiles))

        how = {"tile": TILE, "overlap": OVERLAP, "downsampling": self.config.downsampling}
        return autoencoder.decode_tiled(decode, x, **how)

    @cached_property
    def _encode(self):
        def encode(params: Any, image: Array) -> Array:
            vae = nnx.merge(self._graphdef, params)
            moments = jnp.concatenate(vae.encode(to_float(image)), axis=-1)
            return jnp.clip(moments, -MAX_FLOAT16, MAX_FLOAT16).astype(jnp.float16)

        return jax.jit(encode)

    @cached_property
    def _decode(self):
        factors = {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}

        def decode(params: Any, x: Array) -> Array:
            vae = nnx.merge(self._graphdef, params)
            return vae.decode(autoencoder.unscale(x, **factors))

        return jax.jit(decode)
