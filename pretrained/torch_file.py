"""Files of `torch.save` without torch: their tensors as NumPy arrays, and nothing else.

Such a file is a pickle, and a pickle can name any function to be called. This reader knows the few
names that tensors in dictionaries need and refuses every other, so that a file from a stranger can
do no harm. It reads zip files (torch 1.6 and later) and the older format, of CPU or GPU tensors.
"""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from runtime.errors import UserError

DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
OLD_MAGIC = 0x1950A86A20F9469CFC6C


def read_torch_file(path: Path, *, within: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The tensors of a file by their names, those of nested dictionaries joined by dots. What is no
    tensor is left out. Numbers that are not asked for stay in the file, if it is a zip file.

    Args:
        within: of a dictionary with one of these names, only what lies under the first of them.

    Raises:
        UserError: it is no such file, is damaged, or holds anything but tensors, numbers, text and
            containers of them.
    """
    try:
        with path.open("rb") as file:
            whole = _read_zip(file) if zipfile.is_zipfile(file) else _read_old(file)
            if isinstance(whole, dict):
                whole = next((whole[name] for name in within if name in whole), whole)
            return {name: tensor.array() for name, tensor in _tensors(whole, "")}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or no file of torch.save: {reason}") from error


@dataclass
class _Storage:
    """Numbers that tensors are views of. Old files tell them after the tensors."""

    dtype: Any
    size: int
    load: Callable[[], np.ndarray] | None = None

    @cached_property
    def numbers(self) -> np.ndarray | None:
        return self.load() if self.load else None


@dataclass
class _Tensor:
    """A view of a storage: where it starts, and how far apart its numbers are along each axis."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Its numbers, laid out in rows. UserError if it does not lie within its storage."""
        numbers = self.storage.numbers
        places = (self.offset, *self.shape, *self.stride)
        if numbers is None or len(self.shape) != len(self.stride) or min(places) < 0:
            raise UserError("damaged: a tensor without numbers")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        if last >= len(numbers):
            raise UserError("damaged: a tensor reaches beyond its numbers")
        strides = [step * numbers.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides)
        return np.ascontiguousarray(view).reshape(self.shape)  # which makes a scalar a row


def _tensors(tree: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(tree, _Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _tensors(value, f"{prefix}.{name}" if prefix else str(name))


# --- the pickle -----------------------------------------------------------------------------------


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise UserError("refused: a tensor of something that is no storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Settings:
    """What a pickle may fill with attributes, and nobody reads."""


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): _Settings,  # training scripts keep their flags beside the weights
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): DTYPES[name] for name in DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in `KNOWN` alone. `storage` makes a storage of what stands for it."""

    def __init__(self, file: IO[bytes], storage: Callable[..., _Storage] | None = None):
        super().__init__(file, encoding="latin1")  # of files that Python 2 wrote
        self.storage = storage

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in KNOWN:
            name = f"{module_name}.{global_name}"
            raise UserError(f"refused: it asks for '{name}', which no tensor needs")
        return KNOWN[module_name, global_name]

    def persistent_load(self, pid: Any) -> _Storage:
        if self.storage is None or not isinstance(pid, tuple) or pid[0] != "storage":
            raise UserError("refused: it refers to something that is no tensor's storage")
        return self.storage(*pid[1:])


# --- the two formats ------------------------------------------------------------------------------


def _read_zip(file: IO[bytes]) -> Any:
    """`NAME/data.pkl`, and the numbers of each storage in `NAME/data/KEY`, which are read when they
    are asked for: the file must be open then.
    """
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UserError("it is a zip file, but none of torch.save: it has no data.pkl")
    folder = names[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    _check_order(order not in archive.namelist() or archive.read(order) == b"little")
    found: dict[str, _Storage] = {}

    def storage(dtype: Any, key: str, _location: str, size: int) -> _Storage:
        def load():
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)

        return found.setdefault(key, _Storage(dtype, size, load))

    return _Unpickler(io.BytesIO(archive.read(names[0])), storage).load()


def _read_old(file: IO[bytes]) -> Any:
    """Pickles of a magic number, a version, facts of the machine, the tensors and the keys of their
    storages; then each storage's length and numbers.
    """
    file.seek(0)
    if _Unpickler(file).load() != OLD_MAGIC:
        raise UserError("it is no file of torch.save")
    _Unpickler(file).load()  # the version: there was only one
    _check_order(_Unpickler(file).load()["little_endian"])
    found: dict[str, _Storage] = {}

    def storage(dtype: Any, key: str, _location: str, size: int, view: Any = None) -> _Storage:
        if view is not None:
            raise UserError("a storage that is a part of another is not supported")
        return found.setdefault(key, _Storage(dtype, size))

    whole = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        (size,), width = struct.unpack("<q", file.read(8)), np.dtype(found[key].dtype).itemsize
        numbers = np.frombuffer(file.read(size * width), found[key].dtype)
        found[key].load = partial(np.asarray, numbers)
    return whole


def _check_order(little: bool) -> None:
    if not little:
        raise UserError("it was written by a big-endian machine, which is not supported")
