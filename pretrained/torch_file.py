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
    """Read the tensors of a file by their names; those of nested dictionaries are joined by dots.

    Anything but tensors is left out. Of a zip file, only the storages of returned tensors are read.

    Args:
        within: if the file's dictionary has one of these names, only the tensors under the first of
            them are returned.

    Raises:
        UserError: it is no such file, is damaged, or holds anything but tensors, numbers, text and
            containers of them.
    """
    try:
        with path.open("rb") as file:
            tree = _read_zip(file) if zipfile.is_zipfile(file) else _read_old(file)
            if isinstance(tree, dict):
                tree = next((tree[name] for name in within if name in tree), tree)
            return {name: tensor.to_array() for name, tensor in _iterate_tensors(tree, "")}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or no file of torch.save: {reason}") from error


@dataclass
class _Storage:
    """Numbers that tensors are views of. In old files they come after the tensors."""

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

    def to_array(self) -> np.ndarray:
        """Copy its numbers into a contiguous array.

        Raises:
            UserError: it does not lie within its storage.
        """
        numbers = self.storage.numbers
        extents = (self.offset, *self.shape, *self.stride)
        if numbers is None or len(self.shape) != len(self.stride) or min(extents) < 0:
            raise UserError("damaged: a tensor without numbers")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        if last >= len(numbers):
            raise UserError("damaged: a tensor reaches beyond its numbers")
        strides = [step * numbers.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides)
        # The reshape is for scalars, which `ascontiguousarray` makes rows of one.
        return np.ascontiguousarray(view).reshape(self.shape)


def _iterate_tensors(tree: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(tree, _Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _iterate_tensors(value, f"{prefix}.{name}" if prefix else str(name))


# --- the pickle -----------------------------------------------------------------------------------


def _rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise UserError("refused: a tensor of something that is no storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _IgnoredObject:
    """An object that a pickle may fill with attributes, which are never read."""


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    # Training scripts keep their flags beside the weights.
    ("argparse", "Namespace"): _IgnoredObject,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): DTYPES[name] for name in DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that refuses every name but those in `ALLOWED`.

    Args:
        make_storage: makes a storage of the fields of its reference; None where none may occur.
    """

    def __init__(
        self, file: IO[bytes] | io.BytesIO, make_storage: Callable[..., _Storage] | None = None
    ):
        super().__init__(file, encoding="latin1")  # of files that Python 2 wrote
        self.make_storage = make_storage

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ALLOWED:
            name = f"{module_name}.{global_name}"
            raise UserError(f"refused: it asks for '{name}', which no tensor needs")
        return ALLOWED[module_name, global_name]

    def persistent_load(self, pid: Any) -> _Storage:
        if self.make_storage is None or not isinstance(pid, tuple) or pid[0] != "storage":
            raise UserError("refused: it refers to something that is no tensor's storage")
        return self.make_storage(*pid[1:])


# --- the two formats ------------------------------------------------------------------------------


def _read_zip(file: IO[bytes]) -> Any:
    """Read `NAME/data.pkl`.

    The numbers of each storage are in `NAME/data/KEY`. They are read when a tensor needs them: the
    file must still be open then.
    """
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UserError("it is a zip file, but none of torch.save: it has no data.pkl")
    folder = names[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    _require_little_endian(order not in archive.namelist() or archive.read(order) == b"little")
    storages: dict[str, _Storage] = {}

    def make_storage(dtype: Any, key: str, _location: str, size: int) -> _Storage:
        def load():
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)

        return storages.setdefault(key, _Storage(dtype, size, load))

    return _Unpickler(io.BytesIO(archive.read(names[0])), make_storage).load()


def _read_old(file: IO[bytes]) -> Any:
    """Read the format from before torch 1.6.

    It is a sequence of pickles: a magic number, a version, facts of the machine, the tensors, and
    the keys of their storages. Then follow each storage's length and numbers.
    """
    file.seek(0)
    if _Unpickler(file).load() != OLD_MAGIC:
        raise UserError("it is no file of torch.save")
    _Unpickler(file).load()  # the version: there was only one
    _require_little_endian(_Unpickler(file).load()["little_endian"])
    storages: dict[str, _Storage] = {}

    def make_storage(dtype: Any, key: str, _location: str, size: int, view: Any = None) -> _Storage:
        if view is not None:
            raise UserError("a storage that is a part of another is not supported")
        return storages.setdefault(key, _Storage(dtype, size))

    tree = _Unpickler(file, make_storage).load()
    for key in _Unpickler(file).load():
        dtype = storages[key].dtype
        (size,) = struct.unpack("<q", file.read(8))
        numbers = np.frombuffer(file.read(size * np.dtype(dtype).itemsize), dtype)
        storages[key].load = partial(np.asarray, numbers)
    return tree


def _require_little_endian(is_little_endian: bool) -> None:
    if not is_little_endian:
        raise UserError("it was written by a big-endian machine, which is not supported")
