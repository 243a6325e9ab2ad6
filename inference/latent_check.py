"""Are latents what they are said to be? What is known with the VAE; `latents.examine` is the half
that needs none.

    python convert_imagenet.py --doctor latents/digits
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from data import latents
from data.latents import LatentDataset
from data.load import open_dataset
from data.rows import Source
from inference import grids
from inference.codec import Codec
from networks.autoencoder import scale
from runtime import parallel
from runtime.errors import UserError

GRID_ROWS = 16  # pictures of a contact sheet
MAX_LOST_VARIANCE = 0.5  # of the latents' variance: more is lost by decoding and encoding with another VAE


def compare_with_images(done: LatentDataset, folder: Path, source: Source, codec: Codec, n: int) -> str:
    """Decode n rows, compare them with their pictures, and lay some side by side."""
    split, skipped = source.whole()["train"], set(done.skipped["train"])
    kept = np.flatnonzero([row not in skipped for row in split.rows.tolist()])
    places = np.unique(np.linspace(0, len(kept) - 1, min(n, len(kept))).astype(int))
    pictures = split.images(kept[places])
    x = codec.decode(mean_latents(folder, done, places))
    decoded = grids.to_uint8(x)
    errors = np.square(decoded.astype(np.float64) - pictures).mean((1, 2, 3)) / 255**2
    psnr = -10 * np.log10(np.maximum(errors, 1e-10))
    sheet = np.concatenate([pictures[:GRID_ROWS], decoded[:GRID_ROWS]])
    grids.save_png(grids.image_grid(sheet, columns=min(GRID_ROWS, len(pictures))), folder / "verify.png")
    return (
        f"{len(places)} rows decoded: PSNR {psnr.mean():.1f} dB on average, {psnr.min():.1f} at "
        f"worst; pictures above what became of them: {folder / 'verify.png'}"
    )


def mean_latents(
    folder: Path, done: LatentDataset, places: Int64[np.ndarray, "n"]
) -> Float[np.ndarray, "n h w c"]:
    """The likeliest latents of these training rows, scaled as a model sees them."""
    e = done.encoding
    opened = open_dataset(e.dataset_name, latents_dir=folder)
    moments = opened.whole()["train"].images(places)
    mean = moments[..., : e.shape[-1]].astype(np.float32)
    return scale(mean, scaling_factor=e.scaling_factor, shift_factor=e.shift_factor)


def check_latents_with_vae(folder: Path, mesh: parallel.Mesh, vae: str | None = None) -> str:
    """All that can be found wrong with latents, and their VAE.

    Raises:
        UserError: what is wrong.
    """
    done = latents.check_latents(folder)
    e, codec = done.encoding, Codec.from_encoding(done.encoding, mesh, vae=vae)
    for name in ("scaling_factor", "shift_factor"):
        said, own = getattr(e, name), getattr(codec.config, name)
        if said != own:
            raise UserError(f"latents in '{folder}': {name} is {said}, and the VAE's own is {own}")
    n = -(-GRID_ROWS // mesh.size) * mesh.size  # the devices share them out
    x = mean_latents(folder, done, np.arange(n) % done.n_rows["train"])
    again = codec.encode(grids.to_uint8(codec.decode(x)))
    found = scale(
        np.asarray(parallel.fetch_to_host(again))[..., : e.shape[-1]].astype(np.float32),
        scaling_factor=e.scaling_factor,
        shift_factor=e.shift_factor,
    )
    lost = float(np.square(found - x).mean() / x.var())
    if lost > MAX_LOST_VARIANCE:
        raise UserError(
            f"latents in '{folder}': decoding and encoding them again changes {lost:.0%} of their "
            "variance; they are not of this VAE, or it was never trained"
        )
    return (
        f"{folder}: sound. {done.counts} of {'×'.join(map(str, e.shape))} from {e.vae}; scaled, "
        f"their standard deviation is {done.scaled_std:.2f}; decoding and encoding again changes "
        f"{lost:.0%} of their variance"
    )
