"""Reference statistics of real images: an .npz of means and covariances, read and written.

Our files hold `mu` and `sigma` of the pool features, `mu_s` and `sigma_s` of the spatial ones,
`features` of some of the images, and `card`, a JSON record of how they were made. Files of
pytorch-fid and clean-fid hold the first two; those of the ADM suite (Dhariwal & Nichol 2021) the
first four and images (`arr_0`). All are read here, and those tools read ours. Computes nothing.
"""

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data import image_sets
from evaluation.metrics import FeatureStatistics
from runtime.errors import UserError
from runtime.files import atomic_file

IMAGE_ARRAY = "arr_0"


@dataclass(frozen=True)
class Reference:
    """Statistics of a set of real images, as read from a file.

    Args:
        features: pool features of some of the images.
        has_images: the file holds images too, in `IMAGE_ARRAY`.
        card: record of how the file was made; empty in files of other tools.
    """

    pool: FeatureStatistics = field(repr=False)
    spatial: FeatureStatistics | None = field(repr=False)
    features: Float[np.ndarray, "n d"] | None = field(repr=False)
    has_images: bool
    card: dict[str, Any]
    path: Path
    sha256: str

    @property
    def feature_card(self) -> dict[str, Any]:
        """The `FeatureExtractor.card` of its features.

        Files of other tools have no card and are Inception features: the ADM suite's if they hold
        spatial statistics or images, else pytorch-fid's.
        """
        is_adm = self.spatial is not None or self.has_images
        foreign = {"space": "inception", "preparation": "adm" if is_adm else "pytorch_fid"}
        return self.card.get("features", foreign)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of its images, if they are in the file or on record."""
        if self.has_images:
            return image_sets.image_set_from_npz(self.path).shape
        shape = self.card.get("pictures", {}).get("shape")
        return tuple(shape) if shape else None

    def compare_sizes(self, shape: tuple[int, int, int]) -> str:
        """Return a warning if images of another size are to be compared with the reference; ""
        if they are not, or if its size is not known.
        """
        own = self.image_shape
        if own is None or own[:2] == shape[:2]:
            return ""
        theirs, size = (image_sets.format_size(s[:2]) for s in (own, shape))
        return (
            f"warning: these images have {size} pixels, those of the reference {theirs}; all are "
            "resized before features are computed, and the score counts the difference"
        )

    def compare_crop(self, crop: str) -> str:
        """Return a warning if only one of the reference's images and those that a model was trained
        on were shown whole, between black bars; "" if not, or if it is not known.

        Args:
            crop: of the model's training.
        """
        images = self.card.get("pictures", {})
        are_whole = [kind == "letterbox" for kind in (crop, images.get("crop"))]
        if not images.get("image_size") or are_whole[0] == are_whole[1]:
            return ""
        words = ["shown whole, between black bars" if whole else "cropped" for whole in are_whole]
        return (
            f"warning: the images of the training are {words[0]}, those of the reference "
            f"{words[1]}; unless all have the same proportions, make a reference with the --crop "
            "of the training"
        )


def read_reference(path: Path) -> Reference:
    """Read a reference of this project, pytorch-fid, clean-fid or the ADM suite.

    Raises:
        UserError: the file is missing, damaged, or no reference.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if not zipfile.is_zipfile(file):
                raise UserError("not an .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return _parse_reference(arrays, path, sha256)
    except UserError as error:
        raise UserError(f"reference {path}: {error}") from None
    except OSError as error:
        raise UserError(f"reference {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"reference {path} is damaged: {error}") from None


def _parse_reference(arrays: Any, path: Path, sha256: str) -> Reference:
    names = arrays.files
    if not {"mu", "sigma"} <= set(names):
        contents = ", ".join(names) or "nothing"
        hint = " (to evaluate a file of images, pass it by --npz)" if IMAGE_ARRAY in names else ""
        raise UserError(f"it holds {contents}, but no mu and sigma{hint}")
    features = arrays["features"] if "features" in names else None
    card = json.loads(str(arrays["card"])) if "card" in names else {}
    if not isinstance(card, dict):
        raise UserError("its card is not a JSON object")
    pool = _read_statistics(arrays, "mu", "sigma")
    if features is not None and features.shape[1:] != pool.mean.shape:
        raise UserError(f"features of shape {features.shape} do not fit mu {pool.mean.shape}")
    return Reference(
        pool=pool,
        spatial=_read_statistics(arrays, "mu_s", "sigma_s") if "mu_s" in names else None,
        features=features,
        has_images=IMAGE_ARRAY in names,
        card=card,
        path=path,
        sha256=sha256,
    )


def _read_statistics(arrays: Any, mean_name: str, covariance_name: str) -> FeatureStatistics:
    mean = arrays[mean_name].astype(np.float64)
    covariance = arrays[covariance_name].astype(np.float64)
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise UserError(
            f"{mean_name} {mean.shape} and {covariance_name} {covariance.shape} are not a vector "
            "and its covariance"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{mean_name} or {covariance_name} holds numbers that are not finite")
    return FeatureStatistics(mean, covariance)


def write_reference(
    path: Path,
    pool: FeatureStatistics,
    spatial: FeatureStatistics | None,
    features: Float[np.ndarray, "n d"],
    card: dict[str, Any],
) -> None:
    """Write a reference atomically.

    Args:
        features: pool features of some of the images, for KID, precision and recall.
    """
    arrays: dict[str, Any] = {"mu": pool.mean, "sigma": pool.covariance, "features": features}
    if spatial:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with atomic_file(path) as file:
        np.savez(file, **arrays, card=np.array(json.dumps(card, default=str)))
