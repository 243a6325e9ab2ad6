"""What is known of the real pictures: an .npz of means and covariances, read and written.

Ours holds `mu`, `sigma` (of pool features), `mu_s`, `sigma_s` (spatial), `features` of some of the
pictures, and a `card` that says how all that was made. pytorch-fid's and clean-fid's files have the
first two, those of Dhariwal & Nichol's suite the first four and pictures (`arr_0`): they are read
too, and ours by them.
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

from evaluation.metrics import Gaussian
from runtime.errors import UserError
from runtime.files import atomic

PICTURES = "arr_0"


@dataclass(frozen=True)
class Reference:
    """A set of real pictures, as its file tells of it."""

    pool: Gaussian = field(repr=False)
    spatial: Gaussian | None = field(repr=False)
    features: Float[np.ndarray, "n d"] | None = field(repr=False)  # of some of the pictures
    has_pictures: bool
    card: dict[str, Any]  # empty in files that are not ours
    path: Path
    sha256: str

    @property
    def made_with(self) -> dict[str, Any]:
        """What its features are of, as an `Extractor`'s card says it. Files that do not say are of
        Inception: Dhariwal & Nichol's if they have what only those have, else pytorch-fid's.
        """
        theirs = self.spatial is not None or self.has_pictures
        foreign = {"space": "inception", "preparation": "adm" if theirs else "pytorch_fid"}
        return self.card.get("features", foreign)


def read(path: Path) -> Reference:
    """A reference of any of the four kinds.

    Raises:
        UserError: the file is not there, or no such file.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if not zipfile.is_zipfile(file):
                raise UserError("it is no .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return _reference(arrays, path, sha256)
    except UserError as error:
        raise UserError(f"reference {path}: {error}") from None
    except OSError as error:
        raise UserError(f"reference {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"reference {path} is damaged: {error}") from None


def _reference(arrays: Any, path: Path, sha256: str) -> Reference:
    names = arrays.files
    if not {"mu", "sigma"} <= set(names):
        held = ", ".join(names) or "nothing"
        only = " (pictures alone are what --npz is for)" if PICTURES in names else ""
        raise UserError(f"it holds {held}, but no mu and sigma{only}")
    features = arrays["features"] if "features" in names else None
    card = json.loads(str(arrays["card"])) if "card" in names else {}
    if not isinstance(card, dict):
        raise UserError("its card is none of ours")
    pool = _gaussian(arrays, "mu", "sigma")
    if features is not None and features.shape[1:] != pool.mean.shape:
        raise UserError(f"its features have the shape {features.shape}")
    return Reference(
        pool=pool,
        spatial=_gaussian(arrays, "mu_s", "sigma_s") if "mu_s" in names else None,
        features=features,
        has_pictures=PICTURES in names,
        card=card,
        path=path,
        sha256=sha256,
    )


def _gaussian(arrays: Any, mean_name: str, covariance_name: str) -> Gaussian:
    mean = arrays[mean_name].astype(np.float64)
    covariance = arrays[covariance_name].astype(np.float64)
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise UserError(f"{mean_name} {mean.shape} and {covariance_name} {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{mean_name} or {covariance_name} has numbers that are not finite")
    return Gaussian(mean, covariance)


def write(
    path: Path,
    pool: Gaussian,
    spatial: Gaussian | None,
    features: Float[np.ndarray, "n d"],
    card: dict[str, Any],
) -> None:
    """Write a reference, whole or not at all."""
    arrays: dict[str, Any] = {"mu": pool.mean, "sigma": pool.covariance, "features": features}
    if spatial:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with atomic(path) as file:
        np.savez(file, **arrays, card=np.array(json.dumps(card, default=str)))
