"""Write a folder of real photographs without a download, in two classes.

    python benchmarks/crops.py --out runs/photos

They are crops of the two photographs that scikit-learn carries. Test crops come from the right
quarter of each photograph, which no training crop overlaps.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from inference import grids
from runtime import cli
from runtime.errors import UserError
from runtime.flags import flag, required

TRAIN_FRACTION = 0.75  # of a photograph's width


@dataclass(frozen=True)
class CropsConfig:
    """Cut crops of two photographs."""

    out: Path = required("the folder, which must not exist")
    size: int = flag(64, "pixels to a side")
    n_train: int = flag(1000, "training crops of each photograph")
    n_test: int = flag(100, "test crops of each")
    seed: int = flag(0, "of the crops' positions")


def crop_randomly(
    photo: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, size: int
) -> Image.Image:
    """Crop a square at a random place."""
    height, width, _ = photo.shape
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return Image.fromarray(photo[top : top + size, left : left + size])


def main(config: CropsConfig) -> None:
    from sklearn.datasets import load_sample_image

    if config.out.exists():
        raise UserError(f"--out {config.out} exists already")
    rng = np.random.default_rng(config.seed)
    for name in ("china", "flower"):
        photo = load_sample_image(f"{name}.jpg")
        edge = round(TRAIN_FRACTION * photo.shape[1])
        parts = {
            "train": (photo[:, :edge], config.n_train),
            "test": (photo[:, edge:], config.n_test),
        }
        for split, (part, n) in parts.items():
            folder = config.out / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                grids.save_png(crop_randomly(part, rng, config.size), folder / f"{i:04d}.png")
    print(f"{2 * config.n_train} training and {2 * config.n_test} test crops: {config.out}")


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(CropsConfig)))
