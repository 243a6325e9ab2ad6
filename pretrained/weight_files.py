"""Published networks as files: a folder in diffusers' layout, a file, or an id of the hub.

Tensors keep the names, axes and precision of their file; those of safetensors are memory-mapped.
Their meaning is known by the module of each family. Nothing here needs torch.
"""

import contextlib
import hashlib
import json
import re
import struct
import sys
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from data.images import name_content
from pretrained import eight_bits, hub
from pretrained.state_dicts import find_weights
from pretrained.torch_file import ZIP_START, Select, TorchContents, read_torch_file
from runtime import processes
from runtime.errors import UserError
from runtime.files import atomic_file

CONFIG = "config.json"
PIPELINE = "model_index.json"  # lists the parts of a pipeline
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
# In order of preference: one file, several, float16, and torch's own format.
WEIGHT_FILES = (
    WEIGHTS,
    INDEX,
    "diffusion_pytorch_model.fp16.safetensors",
    f"{WEIGHTS}.index.fp16.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.bin.index.fp16.json",
)
TRANSFORMERS_FILES = (  # the same of transformers
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
INDEX_SUFFIX = ".index.json"
BARE_PATTERNS = ("*.pth", "*.pt", "*.bin", "*.safetensors")  # of weights without a config
# NumPy has no bfloat16 of its own, and safetensors' reader for it does not know one.
FLOAT_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    **eight_bits.DTYPES,
}
WEIGHT_DTYPES = FLOAT_DTYPES | {"F64": np.float64}
DTYPES = WEIGHT_DTYPES | {
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class PublishedNetwork(NamedTuple):
    """A network's files, as they were found."""

    id: str  # of the hub; a folder's whole path
    revision: str | None  # the hub's commit
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    notices: tuple[str, ...] = ()  # lines for a person on how the weights were found


class FileWeights(NamedTuple):
    """The weights of one network in a file.

    Args:
        tensors: by the network's names.
        facts: other numbers and texts in the file: see `TorchContents`.
        notices: lines for a person on how they were found.
        shapes: of all tensors in the file, by their names there.
        unused: names of the tensors in the file that are none of the network's.
    """

    tensors: dict[str, np.ndarray]
    facts: dict[str, Any]
    notices: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    unused: tuple[str, ...]


def read_network(
    path_or_id: str,
    *,
    subfolder: str | None = None,
    anchors: Iterable[str],
    revision: str | None = None,
    dtypes: Mapping[str, Any] = FLOAT_DTYPES,
    files: Sequence[str] = WEIGHT_FILES,
) -> PublishedNetwork:
    """Read a network's config and weights from a folder if there is one, else from the hub.

    Prefixes are taken off the names of weights, and the average is chosen if there is one.

    Args:
        subfolder: where the network lies in a whole pipeline, such as vae; None if it is in none.
        anchors: tensors that such a network has: see `state_dicts.find_weights`.
        revision: of the hub: a branch, tag or commit. Ignored for folders.
        dtypes: of safetensors, the number formats that are accepted.
        files: names that its weights may have, in order of preference.

    Raises:
        UserError: it cannot be had, or its files are damaged.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        place = _find_network_folder(folder, subfolder)
        config = _read_json_object(place / CONFIG)
        network_id, commit = str(folder.resolve()), None
        paths = _find_weight_files(place, files)
    else:
        required = f"{CONFIG} with {files[0]}{f', nor a {subfolder}/' if subfolder else ''}"
        with hub.explain_failures(path_or_id, required=required, revision=revision):
            config, commit, part = hub.download_config(path_or_id, subfolder, revision, file=CONFIG)
            paths = _download_weight_files(path_or_id, part, commit or revision, files)
        network_id = path_or_id
    tensors = _read_tensor_files(paths, dtypes)
    found = find_weights({n: x.shape for n, x in tensors.items()}, anchors, network_id)
    tensors = {ours: tensors[name] for name, ours in found.names.items()}
    notices = (*found.notices, *eight_bits.apply_scales(tensors, network_id))
    require_floats(tensors, network_id)
    return PublishedNetwork(network_id, commit, config, tensors, notices)


def read_optional_json(
    path_or_id: str, name: str, *, revision: str | None = None
) -> dict[str, Any] | None:
    """Read a JSON file beside a network, such as a pipeline's model_index.json; None if absent.

    Raises:
        UserError: the file is damaged, or the hub is out of reach and its cache does not tell
            whether there is such a file.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return _read_json_object(folder / name) if (folder / name).is_file() else None
    from huggingface_hub.errors import LocalEntryNotFoundError

    with hub.explain_failures(path_or_id, required=name, revision=revision):
        try:
            file = hub.download_optional_file(path_or_id, name, revision=revision)
        except LocalEntryNotFoundError:  # the hub is out of reach
            if not _is_known_to_lack(path_or_id, name, revision):
                raise
            return None
        return _read_json_object(file) if file else None


def read_bare_weights(path_or_id: str, purpose: str) -> dict[str, np.ndarray]:
    """Read the tensors of weight files without a config: a file, a folder's, or a repository's.

    Args:
        purpose: what they are for, for the messages of errors.

    Raises:
        UserError: there are no such files, one is damaged or holds more than tensors, or two hold
            different tensors of one name.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        tensors = read_tensor_file(path)
        eight_bits.apply_scales(tensors, path_or_id)
        return tensors
    folder, patterns = path, ", ".join(BARE_PATTERNS)
    if not path.is_dir():
        with hub.explain_failures(path_or_id, required=patterns, purpose=purpose):
            folder = hub.download_matching(path_or_id, BARE_PATTERNS)
    files = sorted(file for pattern in BARE_PATTERNS for file in folder.glob(pattern))
    if not files:
        raise UserError(f"{purpose} '{path_or_id}': it holds no {patterns}")
    tensors: dict[str, np.ndarray] = {}
    sources: dict[str, Path] = {}
    for file in files:
        for name, x in read_tensor_file(file).items():
            # The same weights in two formats are one network.
            if name in tensors and not np.array_equal(tensors[name], x):
                raise UserError(
                    f"{purpose} '{path_or_id}': {sources[name].name} and {file.name} hold "
                    "different weights of the same names",
                    how=f"name one of the files, such as {file}",
                )
            tensors[name], sources[name] = x, file
    eight_bits.apply_scales(tensors, path_or_id)
    return tensors


def write_network(folder: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Save a network as diffusers would.

    Each file takes its name only when it is complete. The config comes last: a folder without one
    is refused.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / WEIGHTS) as file:
            _write_safetensors(file, tensors)
        with atomic_file(folder / CONFIG) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write weights to '{folder}': {error.strerror}") from None


def hash_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 of names, shapes and numbers in float32.

    It does not depend on the order in which a file holds them, nor on its precision as long as
    that loses nothing.
    """
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x, "<f4").tobytes())
    return digest.hexdigest()


def require_shapes(
    where: str,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    reference: str = "its config",
) -> None:
    """Raise UserError unless the tensors have exactly these names and shapes.

    Args:
        where: the network, for the error's message.
        reference: where the shapes come from, for the error's message.
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
    parts = [f"{problem} {_list_some(names)}" for problem, names in problems.items() if names]
    if parts:
        raise UserError(f"the weights of '{where}' do not fit {reference}: {'; '.join(parts)}")


def fill_missing_biases(
    tensors: MutableMapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Add the zeros that a network without some of its biases computes with.

    A map has its bias in all blocks or in none: a bias that only some blocks lack is left missing.

    Args:
        shapes: of the tensors of a network with all biases, by name.

    Returns a notice that names them, if there are any.
    """
    kinds: dict[str, list[str]] = {}
    for name in shapes:
        if name.endswith(".bias"):
            kinds.setdefault(re.sub(r"blocks\.\d+\.", "blocks.*.", name), []).append(name)
    missing = {kind: names for kind, names in kinds.items() if not {*names} & {*tensors}}
    for name in (name for names in missing.values() for name in names):
        tensors[name] = np.zeros(shapes[name], np.float32)
    if not missing:
        return ()
    return (f"biases that are not in the file are zero: {_list_some([*missing])}",)


def print_notices(network_id: str, notices: Iterable[str]) -> None:
    """Print lines on how a network's weights were found, on process 0."""
    for notice in notices if processes.is_first() else ():
        print(f"{network_id}: {notice}", file=sys.stderr)


def _list_some(names: list[str], n: int = 3) -> str:
    rest = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + rest


# --- one file of tensors --------------------------------------------------------------------------


def read_tensor_file(
    path: Path, *, select: Select | None = None, dtypes: Mapping[str, Any] = DTYPES
) -> dict[str, np.ndarray]:
    """Read the tensors of a file of safetensors or of torch.save, whatever its name, or of all
    files that an index names.

    Args:
        select: see `read_torch_file`.
        dtypes: of safetensors, the number formats that are accepted.

    Raises:
        UserError: it cannot be read, is damaged, or holds anything but such tensors.
    """
    if path.suffix == ".json":
        tensors, facts = _read_tensor_files(_locate_parts(path), dtypes), {}
    else:
        _require_content(path)
        if not _is_safetensors(path):
            return read_torch_file(path, select=select)
        tensors, facts = read_safetensors(path, dtypes), read_safetensors_metadata(path)
    if select is None:
        return tensors
    names = select(TorchContents({name: x.shape for name, x in tensors.items()}, facts))
    return {ours: tensors[name] for name, ours in names.items()}


def _is_safetensors(path: Path) -> bool:
    """Return True for a file of safetensors, by its content as far as that tells."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:  # reading it says what is wrong
        start = file.read(9)
    if start.startswith(ZIP_START):
        return False
    return path.suffix == ".safetensors" or start[8:] == b"{"  # after the length of its header


def _require_content(path: Path) -> None:
    """Raise UserError for an LFS pointer, a web page or an empty file in place of weights."""
    with contextlib.suppress(OSError), path.open("rb") as file:  # reading it says what is wrong
        if content := name_content(file.read(1000)):
            raise UserError(f"{path} holds no weights: {content.replace('the image', 'it')}")


def read_file_weights(
    path: Path,
    anchors: Sequence[str],
    *,
    fixed: Collection[str] = (),
    places: Collection[str] = (),
) -> FileWeights:
    """Read the weights of one network from a file, however they are wrapped: see `state_dicts`.

    Args:
        path: the file, or the index of several.
        anchors: tensors that such a network has; the first that occurs is used.
        fixed: tensors that are never trained, which an average may lack.
        places: parts of names under which files of several networks hold this one. If there are
            any such names, the rest of the file is not looked at.

    Returns no tensors if the file holds no such network.

    Raises:
        UserError: the file cannot be read, holds several copies of the weights, or weights that
            are no floating-point numbers.
    """
    _refuse_single_part(path)
    all_shapes: dict[str, tuple[int, ...]] = {}
    facts: dict[str, Any] = {}
    notices: list[str] = []
    used: list[str] = []

    def select(contents: TorchContents) -> dict[str, str]:
        own = {n: s for n, s in contents.shapes.items() if {*n.split(".")} & {*places}}
        found = find_weights(own or contents.shapes, anchors, str(path), fixed=fixed)
        all_shapes.update(contents.shapes)
        facts.update(contents.facts)
        if not {*anchors} & {*found.names.values()}:
            return {}
        notices.extend(found.notices)
        used.extend(found.names)
        return found.names

    tensors = read_tensor_file(path, select=select)
    notices.extend(eight_bits.apply_scales(tensors, str(path)))
    require_floats(tensors, str(path))
    unused = tuple(all_shapes.keys() - {*used})
    return FileWeights(tensors, facts, tuple(notices), all_shapes, unused)


def _refuse_single_part(path: Path) -> None:
    """Refuse one of the files that hold the weights together."""
    if match := re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name):
        index = path.with_name(f"{match[1]}{match[2]}{INDEX_SUFFIX}")
        raise UserError(f"'{path}' is one part of several: name their index, such as {index}")


def rounding_of_positions(dtype: Any) -> float:
    """Return how far sines and cosines may be off in a file of this precision: less than 2⁻⁸ in
    half precision of either kind, a quarter of their ε in eight bits.
    """
    return max(2**-8, float(ml_dtypes.finfo(dtype).eps) / 3)


def require_floats(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raise UserError for weights that are no floating-point numbers."""
    for name, x in tensors.items():
        if x.dtype not in [np.dtype(dtype) for dtype in WEIGHT_DTYPES.values()]:
            raise UserError(
                f"'{where}': {name} is {x.dtype}; weights are {', '.join(WEIGHT_DTYPES)}"
            )


def _read_tensor_files(files: Iterable[Path], dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        part = read_tensor_file(path, dtypes=dtypes)
        if both := sorted(part.keys() & tensors.keys()):
            raise UserError(
                f"{path}: {_list_some(both)} is in another file of the same weights too"
            )
        tensors |= part
    return tensors


def read_safetensors(path: Path, dtypes: Mapping[str, Any] = DTYPES) -> dict[str, np.ndarray]:
    """Read the tensors of a safetensors file, as read-only views of the file.

    Raises:
        UserError: it cannot be read, is damaged, or holds numbers of other formats than `dtypes`.
    """
    header, start = _read_safetensors_header(path)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in dtypes:
            raise UserError(
                f"{path}: {name} is {entry['dtype']}, which is none of {', '.join(dtypes)}"
            )
    buffer = np.memmap(path, np.uint8, "r")[start:] if header else np.zeros(0, np.uint8)

    def view(dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        start, end = data_offsets
        return np.asarray(buffer[start:end]).view(dtypes[dtype]).reshape(shape)

    return {
        name: view(entry["dtype"], entry["shape"], entry["data_offsets"])
        for name, entry in header.items()
    }


def read_safetensors_metadata(path: Path) -> dict[str, Any]:
    """Read the texts that a safetensors file holds beside its tensors.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    return _read_safetensors_header(path)[0].get("__metadata__") or {}


def _read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what describes the tensors of a file, and where their numbers start."""
    try:
        safetensors.safe_open(path, "np")  # checks the file thoroughly
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            return json.loads(file.read(start - 8)), start
    except FileNotFoundError:
        raise UserError(f"{path}: No such file or directory") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a file of tensors in float32, and texts beside them.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_file(path) as file:
            _write_safetensors(file, tensors, metadata)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from None


def _write_safetensors(
    file: IO[bytes], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors in float32, with one at a time in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, x in tensors.items():
        start, end = end, end + 4 * x.size
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight
    file.write(struct.pack("<Q", len(text)) + text)
    for x in tensors.values():
        file.write(np.ascontiguousarray(x, "<f4").data)


# --- the files of a network -----------------------------------------------------------------------


def _find_network_folder(folder: Path, subfolder: str | None) -> Path:
    places = (folder, folder / subfolder) if subfolder else (folder,)
    for place in places:
        if (place / CONFIG).is_file():
            return place
    nor = f", nor a {subfolder}/{CONFIG}" if subfolder else ""
    raise UserError(f"'{folder}' holds no {CONFIG}{nor}")


def _find_weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        if (folder / name).is_file():
            return _locate_parts(folder / name)
    raise UserError(f"'{folder}' holds no {names[0]}")


def _locate_parts(file: Path) -> list[Path]:
    """Locate the files that hold the weights: the file itself, or those that an index names."""
    files = [file.parent / part for part in _list_parts(file)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"'{file.parent}' lacks {_list_some(missing)}, which its {file.name} names")
    return files


def _download_weight_files(
    name: str, subfolder: str | None, revision: str | None, names: Sequence[str]
) -> list[Path]:
    from huggingface_hub.errors import EntryNotFoundError

    def download(file: str) -> Path:
        return hub.download_file(name, file, subfolder=subfolder, revision=revision)

    for file in names:
        try:
            return [download(part) for part in _list_parts(download(file))]
        except EntryNotFoundError:
            if file == names[-1]:
                raise
    raise AssertionError


def _list_parts(file: Path) -> list[str]:
    """List the files that hold the weights: the file itself, or those that an index names."""
    if file.suffix != ".json":
        return [file.name]
    file_by_tensor = _read_json_object(file).get("weight_map")
    if not isinstance(file_by_tensor, dict) or not all(
        isinstance(name, str) for name in file_by_tensor.values()
    ):
        raise UserError(f"{file} is damaged: it names no files")
    parts = sorted(set(file_by_tensor.values()))
    if any(Path(part).name != part for part in parts):
        raise UserError(f"{file} is damaged: it names files elsewhere")
    return parts


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        content = name_content(path.read_bytes()[:1000]).replace("the image", "it")
        reason = error if content.startswith("text") else content or error
        raise UserError(f"{path} is damaged: {reason}") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return facts


def _is_known_to_lack(name: str, file: str, revision: str | None) -> bool:
    """Return True if the hub's cache proves that the repository has no such file.

    The proof is one of three: the hub was asked for it; all files were downloaded, git's own among
    them; or a pipeline's index names its parts, and the file belongs to none.
    """
    if hub.is_recorded_absent(name, file, revision):
        return True
    if hub.find_cached(name, ".gitattributes", revision):
        return True
    index = hub.find_cached(name, PIPELINE, revision)
    return index is not None and Path(file).parts[0] not in _read_json_object(index)
