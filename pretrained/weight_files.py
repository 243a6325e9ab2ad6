"""Published networks as files: a folder in diffusers' layout, or an id of the Hugging Face hub.

Tensors have the names, the axes and the precision of their file here; those of safetensors lie in
the file until they are looked at. What they mean is known by the family's own module beside this
one. Nothing here needs torch.
"""

import hashlib
import json
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from pretrained import torch_file
from runtime.errors import UserError
from runtime.files import atomic

CONFIG = "config.json"
PIPELINE = "model_index.json"  # of the parts of a pipeline
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
# For want of the first: in several files, in float16, or as torch saves them.
WEIGHT_FILES = (
    *(WEIGHTS, INDEX, "diffusion_pytorch_model.fp16.safetensors"),
    "diffusion_pytorch_model.bin",
)
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
        config = _read_json(place / CONFIG)
        return Published(str(folder.resolve()), None, config, _all_tensors(_weights(place)))
    with _one_line(path_or_id, subfolder, revision):
        config, commit, weights = _download(path_or_id, subfolder, revision)
    return Published(path_or_id, commit, config, _all_tensors(weights))


def read_json(path_or_id: str, name: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """A file of facts beside a network, such as a pipeline's model_index.json, or None.

    Raises:
        UserError: the file is damaged, or the hub cannot be asked.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return _read_json(folder / name) if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _one_line(path_or_id, "", revision):
        try:
            return _read_json(Path(hf_hub_download(path_or_id, name, revision=revision)))
        except LocalEntryNotFoundError:  # the hub is out of reach
            if not _is_known_to_lack(path_or_id, name, revision):
                raise
            return None
        except EntryNotFoundError:
            return None


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Save a network as diffusers would. Each file takes its name only when it is whole, the config
    last: a folder without one is refused.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / WEIGHTS) as file:
            _write_tensors(file, tensors)
        with atomic(folder / CONFIG) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write weights to '{folder}': {error.strerror}") from None


def _write_tensors(file: IO[bytes], tensors: Mapping[str, np.ndarray]) -> None:
    """In safetensors' format and float32, with one tensor at a time in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in tensors.items():
        start, end = end, end + 4 * x.size
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight
    file.write(struct.pack("<Q", len(text)) + text)
    for x in tensors.values():
        file.write(np.ascontiguousarray(x, "<f4").data)


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


def _weights(place: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        if (place / name).is_file():
            files = [place / part for part in _parts(place / name)]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise UserError(f"'{place}' lacks {_some(missing)}, which its {INDEX} names")
            return files
    raise UserError(f"'{place}' holds no {WEIGHTS}")


def _parts(file: Path) -> list[str]:
    """The files that a file of weights stands for: itself, or those that an index names."""
    if file.name != INDEX:
        return [file.name]
    named = _read_json(file).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{file} is damaged: it names no files")
    parts = sorted(set(named.values()))
    if any(Path(part).name != part for part in parts):
        raise UserError(f"{file} is damaged: it names files elsewhere")
    return parts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    return facts


def _all_tensors(files: Iterable[Path]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in files:
        read = read_safetensors if path.suffix == ".safetensors" else torch_file.read
        found |= read(path)
    return found


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, as views of it.

    Raises:
        UserError: it is damaged, or holds other numbers than those of DTYPES.
    """
    try:
        safetensors.safe_open(path, "np")  # whose checks are thorough
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(start - 8))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} is {entry['dtype']}, which is none of {', '.join(DTYPES)}"
            )
    whole = np.memmap(path, np.uint8, "r")[start:] if header else np.zeros(0, np.uint8)

    def view(dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> np.ndarray:
        return np.asarray(whole[slice(*data_offsets)]).view(DTYPES[dtype]).reshape(shape)

    return {name: view(**entry) for name, entry in header.items()}


# --- the hub --------------------------------------------------------------------------------------


def _download(
    name: str, subfolder: str, revision: str | None
) -> tuple[dict, str | None, list[Path]]:
    """Config, commit and the paths of the weights, which are of the same commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    config, commit, place = _download_config(name, subfolder, revision)

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file, subfolder=place, revision=commit or revision))

    for file in WEIGHT_FILES:
        try:
            return config, commit, [fetch(part) for part in _parts(fetch(file))]
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


def _is_known_to_lack(name: str, file: str, revision: str | None) -> bool:
    """Whether the hub's cache tells that there is no such file: the hub was asked for it, all files
    were downloaded, git's own among them, or a pipeline names its parts, and this is of none.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    def cached(file: str) -> Any:
        return try_to_load_from_cache(name, file, revision=revision)

    if cached(file) is _CACHED_NO_EXIST or isinstance(cached(".gitattributes"), str):
        return True
    index = cached(PIPELINE)
    return isinstance(index, str) and Path(file).parts[0] not in _read_json(Path(index))


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
        errors.LocalEntryNotFoundError: "it is no folder, not whole in the hub's cache, and the "
        f"hub is out of reach; once online, run `hf download {name}`",
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
