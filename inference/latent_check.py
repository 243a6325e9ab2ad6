"""Check latents with their VAE: what `convert_imagenet.py --doctor` and `--verify` run.

    python convert_imagenet.py --doctor latents/digits

The checks that need no VAE are in `data/latents.py`. Nothing here changes the latents.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64, UInt8

from data import latents
from data.latents import LatentDataset
from data.load import open_dataset
from data.rows import Source
from inference import grids
from inference.codec import Codec
from inference.grids import NotFiniteError
from inference.spaces import latent_means
from runtime import parallel
from runtime.errors import UserError

GRID_COLUMNS = 16  # images of verify.png, above their reconstructions
# Part of the latents' variance that decoding and encoding may change; another VAE changes more.
MAX_LOST_VARIANCE = 0.5


def compare_with_images(
    dataset: LatentDataset, folder: Path, source: Source, codec: Codec, n: int
) -> str:
    """Decode n rows of the training split and compare them with their images.

    Writes `verify.png` to the folder. Returns a line with the PSNR.
    """
    split = source.full_splits()["train"]
    skipped = set(dataset.skipped["train"])
    converted = np.flatnonzero([row not in skipped for row in split.rows.tolist()])
    rows = np.unique(np.linspace(0, len(converted) - 1, min(n, len(converted))).astype(int))
    images = split.decode(converted[rows])
    decoded = decode_to_uint8(folder, codec, mean_latents(folder, dataset, rows))
    errors = np.square(decoded.astype(np.float64) - images).mean((1, 2, 3)) / 255**2
    psnr = -10 * np.log10(np.maximum(errors, 1e-10))
    both = np.concatenate([images[:GRID_COLUMNS], decoded[:GRID_COLUMNS]])
    grid = grids.image_grid(both, columns=min(GRID_COLUMNS, len(images)))
    grids.save_png(grid, folder / "verify.png")
    return (
        f"{len(rows)} rows decoded: PSNR {psnr.mean():.1f} dB on average, {psnr.min():.1f} at "
        f"worst; images above their reconstructions: {folder / 'verify.png'}"
    )


def mean_latents(
    folder: Path, dataset: LatentDataset, rows: Int64[np.ndarray, "n"]
) -> Float[np.ndarray, "n h w c"]:
    """Read the means of these training rows, scaled as a diffusion model sees them."""
    encoding = dataset.encoding
    source = open_dataset(encoding.dataset_name, latents_dir=folder)
    moments = source.full_splits()["train"].decode(rows)
    return latent_means(moments, encoding)


def decode_to_uint8(
    folder: Path, codec: Codec, x: Float[np.ndarray, "n h w z"]
) -> UInt8[np.ndarray, "n H W c"]:
    """Decode latents of a folder to images.

    Raises:
        UserError: latents or images are not finite.
    """
    if not np.isfinite(x).all():
        raise UserError(f"latents in '{folder}' are not finite; make them again")
    try:
        return grids.to_uint8(codec.decode(x), kind="image")
    except NotFiniteError as error:
        raise UserError(f"latents in '{folder}', decoded by {codec.id}: {error}") from None


def check_latents_with_vae(folder: Path, mesh: parallel.Mesh, vae: str | None = None) -> str:
    """Check a folder of latents, and that decoding and encoding them again changes little.

    Args:
        vae: where their VAE is now, if it has moved.

    Raises:
        UserError: a check failed.
    """
    dataset = latents.check_latents(folder)
    encoding = dataset.encoding
    if encoding.buckets:
        parts = [
            check_latents_with_vae(folder / name, mesh, vae=vae)
            for name in encoding.buckets
            if latents.read_latent_dataset(folder / name).n_rows["train"] > 1
        ]
        return "\n".join([*parts, f"{folder}: sound. {dataset.row_summary} in all"])
    codec = Codec.from_encoding(encoding, mesh, vae=vae)
    for name in ("scaling_factor", "shift_factor"):
        recorded, own = getattr(encoding, name), getattr(codec.config, name)
        if recorded != own:
            raise UserError(
                f"latents in '{folder}': {name} is {recorded}, and the VAE's own is {own}"
            )
    n = -(-GRID_COLUMNS // mesh.size) * mesh.size  # the devices take equal shares
    x = mean_latents(folder, dataset, np.arange(n) % dataset.n_rows["train"])
    encoded = codec.encode(decode_to_uint8(folder, codec, x))
    x_again = latent_means(np.asarray(parallel.fetch_to_host(encoded)), encoding)
    lost = float(np.square(x_again - x).mean() / x.var())
    if not lost <= MAX_LOST_VARIANCE:  # NaN neither
        raise UserError(
            f"latents in '{folder}': decoding and encoding them again changes {lost:.0%} of their "
            "variance; they are not of this VAE, or it was never trained"
        )
    shape = "×".join(map(str, encoding.shape))
    return (
        f"{folder}: sound. {dataset.row_summary} of {shape} from {encoding.vae}; scaled, their "
        f"standard deviation is {dataset.scaled_std:.2f}; decoding and encoding again changes "
        f"{lost:.0%} of their variance"
    )
