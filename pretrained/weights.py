"""Published networks as files: a folder in diffusers' layout, or an id of the Hugging Face hub.

Tensors have the names and axes of their file here, and are float32. What they mean is known by the
family's own module beside this one. Nothing here needs torch.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from errors import UserError
from run_folder import atomic

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The second is float16, for want of the first.
WEIGHT_FILES = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors")
# NumPy has no bfloat16 of its own, and safetensors' reader for it does not know one.
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Published(NamedTuple):
    """A network as it was found."""

    id: str  # of the hub; a folder's whole path
    revision: str | None  # the hub's commit
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read(path_or_id: str, *, subfolder: str, revision: str | None = None) -> Published:
    """A network's config and weights: of a folder if there is one, else of the hub.

    Args:
        subfolder: where the network lies in a whole pipeline, such as vae.
        revision: of the hub; of no account for folders.

    Raises:
        UserError: it is not to be had, or its files are damaged.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        place = _place(folder, subfolder)
        config = _read_config(place / CONFIG)
        return Published(str(folder.resolve()), None, config, _read_tensors(_weights(place)))
    with _one_line(path_or_id, subfolder, revision):
        config, commit, weights = _download(path_or_id, subfolder, revision)
    return Published(path_or_id, commit, config, _read_tensors(weights))


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Save a network as diffusers would. Each file takes its name only when it is whole, the config
    last: a folder without one is refused.

    Raises:
        UserError: the folder cannot be written to.
    """
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / WEIGHTS) as file:
            file.write(safetensors.numpy.save(arrays, {"format": "pt"}))
        with atomic(folder / CONFIG) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write weights to '{folder}': {error.strerror}") from None


def tensors_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 of names, shapes and numbers in float32: it does not change with the order or
    precision in which a file holds them, if that loses nothing.
    """
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x, "<f4").tobytes())
    return digest.hexdigest()


def refuse_misfits(
    where: str,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    what: str = "its config",
) -> None:
    """Raises UserError unless the tensors are those of `shapes`, each of its shape.

    Args:
        what: asks for these shapes, as the error shall say.
    """
    problems = {
        "it lacks": sorted(set(shapes) - set(tensors)),
        "it has no place for": sorted(set(tensors) - set(shapes)),
        "of another shape is": [
            f"{name} {tensors[name].shape}, not {shape}"
            for name, shape in sorted(shapes.items())
            if name in tensors and tensors[name].shape != shape
        ],
    }
    said = [f"{kind} {_some(names)}" for kind, names in problems.items() if names]
    if said:
        raise UserError(f"the weights of '{where}' do not fit {what}: {'; '.join(said)}")


def _some(names: list[str], n: int = 3) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more


# --- a folder -------------------------------------------------------------------------------------


def _place(folder: Path, subfolder: str) -> Path:
    for place in (folder, folder / subfolder):
        if (place / CONFIG).is_file():
            return place
    raise UserError(f"'{folder}' holds no {CONFIG}, nor a {subfolder}/{CONFIG}")


def _weights(place: Path) -> Path:
    for name in WEIGHT_FILES:
        if (place / name).is_file():
            return place / name
    only = " (files of torch's own, such as .bin, are not read)" if any(place.glob("*.bin")) else ""
    raise UserError(f"'{place}' holds no {WEIGHTS}{only}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    return config


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} is {entry['dtype']}, which is none of {', '.join(DTYPES)}"
            )
        x = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        tensors[name] = x.reshape(entry["shape"]).astype(np.float32)
    return tensors


# --- the hub --------------------------------------------------------------------------------------


def _download(name: str, subfolder: str, revision: str | None) -> tuple[dict, str | None, Path]:
    """Config, commit and the path of the weights, which are of the same commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    config, commit, place = _download_config(name, subfolder, revision)
    for file in WEIGHT_FILES:
        try:
            path = hf_hub_download(name, file, subfolder=place, revision=commit or revision)
            return config, commit, Path(path)
        except EntryNotFoundError:
            if file == WEIGHT_FILES[-1]:
                raise
    raise AssertionError


def _download_config(
    name: str, subfolder: str, revision: str | None
) -> tuple[dict, str | None, str | None]:
    """Config, commit and where it lies: a pipeline's repository has no config of its own."""
    from huggingface_hub.errors import EntryNotFoundError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, at its import and of what it calls
        from diffusers.configuration_utils import ConfigMixin

        class Config(ConfigMixin):
            config_name = CONFIG

        def ask(place: str | None) -> Any:
            how = {"subfolder": place, "revision": revision, "return_commit_hash": True}
            return Config.load_config(name, **how)

        try:
            return *ask(None), None
        except OSError as error:
            if not any(isinstance(cause, EntryNotFoundError) for cause in _causes(error)):
                raise
        return *ask(subfolder), subfolder


@contextmanager
def _one_line(name: str, subfolder: str, revision: str | None) -> Iterator[None]:
    """What the hub's client and diffusers raise, told in one line."""
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "its owner asks who uses it; accept the terms on "
        f"https://huggingface.co/{name}, then run `hf auth login`",
        errors.RepositoryNotFoundError: "it is no folder, and no public model of the hub; for a "
        "private one, run `hf auth login`",
        errors.RevisionNotFoundError: f"the hub has no revision '{revision}' of it",
        errors.LocalEntryNotFoundError: "it is no folder, not in the hub's cache, and the hub is "
        f"out of reach; once online, run `hf download {name}`",
        errors.EntryNotFoundError: f"it holds no {CONFIG} with {WEIGHTS}, nor a {subfolder}/",
        errors.HFValidationError: "it is no folder, and cannot be an id of the hub",
    }
    try:
        yield
    except Exception as error:  # the hub's client raises its transport's kinds besides its own
        for cause in _causes(error):
            for kind, reason in reasons.items():
                if isinstance(cause, kind):
                    raise UserError(f"cannot load '{name}': {reason}") from error
        *_, root = _causes(error)
        reason = str(root).strip().partition("\n")[0] or type(root).__name__
        raise UserError(f"cannot load '{name}': {reason}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
