"""Files of `torch.save` without torch: their tensors and arrays as NumPy's, and nothing else.

Such a file is a pickle, and a pickle can name any function to be called. This reader calls none: it
knows the few names that tensors need, puts an inert stand-in in the place of every other class (the
paths and configs that scripts save beside the weights), and refuses names that only
an attack asks for. It reads zip files (torch 1.6 and later) and the older format, of CPU or GPU
tensors.
"""

import collections
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from runtime.errors import UserError

DTYPES: dict[str, Any] = {
    "ComplexDoubleStorage": np.complex128,
    "ComplexFloatStorage": np.complex64,
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
# Newer types have no storage of their own: theirs is of bytes, and each tensor names its type.
BYTES = "UntypedStorage"
NAMED_DTYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
ZIP_START = b"PK\3\4"
OLD_MAGIC = 0x1950A86A20F9469CFC6C


# Every name of these modules is refused, though an inert stand-in could do no harm.
REFUSED_MODULES = {
    *("builtins", "__builtin__", "os", "posix", "nt", "sys", "subprocess", "shutil", "socket"),
    *("runpy", "pty", "ctypes", "code", "importlib", "operator", "pickle", "functools", "types"),
}
HARMLESS_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "long"),
    *("object", "range", "set", "slice", "str", "tuple", "xrange"),
}
HARMLESS = {("functools", "partial"), ("types", "SimpleNamespace")}
# A pickled module keeps its tensors in these dictionaries, which are no part of their names.
MODULE_PARTS = ("_parameters", "_buffers", "_modules")
Select = Callable[["TorchContents"], Mapping[str, str]]


class TorchContents(NamedTuple):
    """The contents of a file, flattened: names of nested containers are joined by dots.

    Args:
        shapes: of the tensors by name, in the order of the file.
        facts: its other numbers and texts, such as the arguments of the training script.
    """

    shapes: dict[str, tuple[int, ...]]
    facts: dict[str, Any]


def read_torch_file(path: Path, *, select: Select | None = None) -> dict[str, np.ndarray]:
    """Read the tensors of a file by their names; those of nested containers are joined by dots.

    Anything but tensors is left out. Of a zip file, only the storages of returned tensors are read.

    Args:
        select: chooses tensors by their names in the file, and gives the names to return them
            under. By default all are returned.

    Raises:
        UserError: it is no such file, is damaged, or names what no file of weights needs.
    """
    try:
        with path.open("rb") as file:
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            if not is_zip and file.read(4) == ZIP_START:
                raise UserError("its end is missing: copy or download it again")
            file.seek(0)
            tree = _read_zip(file) if is_zip else _read_old(file)
            leaves = dict(_iterate_leaves(tree, "", ()))
            tensors = {
                name: leaf for name, leaf in leaves.items() if isinstance(leaf, (_Tensor, _Array))
            }
            names = {name: name for name in tensors}
            if select:
                facts = {name: leaf for name, leaf in leaves.items() if name not in tensors}
                shapes = {name: tensor.shape for name, tensor in tensors.items()}
                names = select(TorchContents(shapes, facts))
            return {ours: tensors[name].to_array() for name, ours in names.items()}
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
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
        start = self.offset * numbers.itemsize
        view = np.ndarray(self.shape, numbers.dtype, numbers, start, strides)
        # The reshape is for scalars, which `ascontiguousarray` makes rows of one.
        return np.ascontiguousarray(view).reshape(self.shape)


def _iterate_leaves(tree: Any, prefix: str, parents: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yield tensors, numbers and texts by their names. `parents` ends cycles of objects."""
    is_array = isinstance(tree, _Array) and tree.numbers is not None
    if is_array or isinstance(tree, (_Tensor, bool, int, float, str)):
        yield prefix, tree
    if id(tree) in parents:
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    for name, value in items:
        if isinstance(tree, _Inert) and name in MODULE_PARTS:
            place = prefix
        else:
            place = f"{prefix}.{name}" if prefix else str(name)
        yield from _iterate_leaves(value, place, (*parents, id(tree)))


# --- the pickle -----------------------------------------------------------------------------------


def _rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise UserError("refused: a tensor of something that is no storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_typed_tensor(
    storage: Any,
    offset: int,
    shape: Any,
    stride: Any,
    _gradient: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> _Tensor:
    if dtype not in NAMED_DTYPES.values() or not isinstance(storage, _Storage):
        raise UserError("it has tensors of a type that is not supported")
    typed = _Storage(dtype, storage.size, lambda: np.asarray(storage.numbers).view(dtype))
    return _rebuild_tensor(typed, offset, shape, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_subclass(rebuild: Any, _type: Any, args: Any, *_: Any) -> Any:
    return rebuild(*args)


class _Inert(dict[Any, Any]):
    """A stand-in for an object of any class: it keeps the items and attributes that a pickle gives
    it, whatever they are, and does nothing.
    """

    def __new__(cls, *_: Any, **__: Any):
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # attributes, and slots
            if isinstance(part, dict):
                self.update(part)

    def append(self, value: Any) -> None:
        self[len(self)] = value

    def extend(self, values: Iterable[Any]) -> None:
        for value in values:
            self.append(value)

    add = append


class _Dtype:
    """The type of a NumPy array's numbers, as a pickle writes one: "f4", then the byte order."""

    def __init__(self, code: Any, *_: Any):
        is_known = isinstance(code, str) and re.fullmatch("[fiu][1248]|b1|c8|c16", code)
        self.numpy = np.dtype(code) if is_known else None

    def __setstate__(self, state: Any) -> None:
        if self.numpy and state[1] == ">":
            self.numpy = self.numpy.newbyteorder(">")

    def read(self, content: Any) -> np.ndarray | None:
        """Return the numbers that bytes hold; None if they are of another kind, such as objects."""
        if self.numpy is None or not isinstance(content, bytes):
            return None
        return np.frombuffer(content, self.numpy).astype(self.numpy.newbyteorder("="))


class _Array:
    """A NumPy array, as a pickle writes one: made empty, then its state."""

    numbers: np.ndarray | None = None
    shape: tuple[int, ...] = ()

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, content = state
        numbers = dtype.read(content) if isinstance(dtype, _Dtype) else None
        if numbers is not None:
            self.numbers = numbers.reshape(shape, order="F" if is_fortran else "C")
            self.shape = self.numbers.shape

    def to_array(self) -> np.ndarray:
        """Return its numbers as a contiguous array."""
        return np.ascontiguousarray(self.numbers).reshape(self.shape)


def _make_array(*_: Any) -> _Array:
    return _Array()


def _make_scalar(dtype: Any, content: Any = None) -> Any:
    numbers = dtype.read(content) if isinstance(dtype, _Dtype) else None
    return None if numbers is None or numbers.size != 1 else numbers.item()


def _encode(text: Any, *_: Any) -> bytes:
    """Return the bytes that protocol 2 writes as a text of Latin-1."""
    return text.encode("latin1") if isinstance(text, str) else b""


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    **{("torch", name): DTYPES[name] for name in DTYPES},
    **{("torch", name): NAMED_DTYPES[name] for name in NAMED_DTYPES},
    ("torch.storage", BYTES): np.uint8,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _make_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _make_scalar for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that calls nothing but what is in `ALLOWED`: see the module's docstring.

    Args:
        make_storage: makes a storage of the fields of its reference; None where none may occur.
    """

    def __init__(
        self, file: IO[bytes] | io.BytesIO, make_storage: Callable[..., _Storage] | None = None
    ):
        super().__init__(file, encoding="latin1")  # of files that Python 2 wrote
        self.make_storage = make_storage

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if (module_name, global_name) in ALLOWED:
            return ALLOWED[module_name, global_name]
        if module_name.startswith("torch") and "_rebuild" in global_name:
            raise UserError(f"it has tensors of a kind that is not supported: '{name}'")
        is_builtin = module_name in ("builtins", "__builtin__") and global_name in HARMLESS_BUILTINS
        is_harmless = is_builtin or (module_name, global_name) in HARMLESS
        if module_name.split(".")[0] in REFUSED_MODULES and not is_harmless:
            raise UserError(f"refused: it asks for '{name}', which no tensor needs")
        return type(global_name, (_Inert,), {})

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
