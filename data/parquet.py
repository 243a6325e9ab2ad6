"""Datasets in Parquet files that are read where they lie, a row group at a time.

Nothing is downloaded or converted first. Any row can be had, in any order; rows of one group after
another come cheaply.
"""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from runtime.errors import UserError

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

FILES_AT_ONCE = 32  # files that are looked into at the start
RETRY_SECONDS = (1, 4, 16, 60)  # seconds before a file elsewhere is tried again


class ParquetSplit:
    """A split in Parquet files, by path or by address (`hf://…`)."""

    def __init__(self, files: Sequence[str], features: "Features | None" = None):
        """Reads the files' ends, which tell their row groups.

        Args:
            features: by default what the first file tells.

        Raises:
            UserError: a file cannot be read or is not Parquet.
        """
        from datasets import Features

        self.files, self.capacity = list(files), 16
        ends = self._at_once(lambda file: file.metadata, "looking into files")
        groups = [
            (i, k, end.row_group(k))
            for i, end in enumerate(ends)
            for k in range(end.num_row_groups)
        ]
        self.places = [(i, k) for i, k, group in groups if group.num_rows]
        self.sizes = np.array([g.num_rows for _, _, g in groups if g.num_rows], np.int64)
        self.bytes = np.array([g.total_byte_size for _, _, g in groups if g.num_rows], np.int64)
        self.ends = np.cumsum(self.sizes)
        self.features = features or Features.from_arrow_schema(ends[0].schema.to_arrow_schema())
        self._pictures = ""
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self._columns: dict[str, pyarrow.ChunkedArray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")} | {
            "_pictures": self._pictures
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def group(self, rows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Which row group each row is in."""
        return np.searchsorted(self.ends, rows, side="right")

    def column(self, name: str) -> "pyarrow.ChunkedArray":
        """A whole column, which is kept: for labels and captions, not for pictures."""
        import pyarrow

        if name not in self._columns:
            read = self._at_once(lambda file: file.read(columns=[name])[name], f"reading {name}")
            chunks = [chunk for column in read for chunk in column.chunks]
            self._columns[name] = pyarrow.chunked_array(chunks, read[0].type)
        return self._columns[name]

    def pictures(self, name: str) -> "ParquetSplit":
        """The same rows, of which `cells` are those of this column.

        Raises:
            TypeError: the column holds no pictures.
        """
        import pyarrow.types as types

        of = self.features.arrow_schema.field(name).type
        stored = [of.field(i).name for i in range(of.num_fields)] if types.is_struct(of) else []
        if not (types.is_binary(of) or types.is_large_binary(of) or "bytes" in stored):
            raise TypeError(f"{of} is no picture")
        copy = ParquetSplit.__new__(ParquetSplit)
        copy.__setstate__(self.__getstate__() | {"_pictures": name})
        return copy

    def cells(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The undecoded pictures of these rows."""
        found: list[Any] = [None] * len(rows)
        indices = np.asarray(rows, np.int64)
        groups = self.group(indices)
        for g in np.unique(groups):
            column, first = self._group(int(g)), self.ends[g] - self.sizes[g]
            for place in np.flatnonzero(groups == g):
                found[place] = column[int(indices[place] - first)].as_py()
        return [{"bytes": c, "path": None} if isinstance(c, bytes) else c for c in found]

    def _group(self, g: int) -> "pyarrow.ChunkedArray":
        """The pictures of a row group; those of the last `capacity` are kept."""
        with self._lock:
            if g not in self._groups:
                i, k = self.places[g]
                name = self._pictures
                column = self._read(i, lambda file: file.read_row_group(k, columns=[name])[name])
                while len(self._groups) >= self.capacity:
                    self._groups.popitem(last=False)
                self._groups[g] = column
            self._groups.move_to_end(g)
            return self._groups[g]

    def _read(self, i: int, read: Callable[["pyarrow.parquet.ParquetFile"], Any]) -> Any:
        """What `read` has of the i-th file. A file that is elsewhere may be out of reach for a
        while: that is tried again.
        """
        import fsspec
        import pyarrow
        import pyarrow.parquet

        path = self.files[i]
        pauses = iter(RETRY_SECONDS if "://" in path else ())
        while True:
            try:
                with fsspec.open(path) as file, pyarrow.parquet.ParquetFile(file) as parquet:
                    return read(parquet)
            except Exception as error:  # the network, the hub's server, the disk: many kinds
                # Damaged, without the column, not there, not for us: it stays so.
                lasting = (pyarrow.ArrowInvalid, LookupError, FileNotFoundError, PermissionError)
                pause = None if isinstance(error, lasting) else next(pauses, None)
                reason = str(error).partition("\n")[0] or type(error).__name__
                problem = f"cannot read {path} ({reason})"
                if pause is None:
                    raise UserError(problem) from error
            print(f"warning: {problem}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)

    def _at_once(self, read: Callable[["pyarrow.parquet.ParquetFile"], Any], what: str) -> list:
        """What `read` has of every file, with a progress bar when it takes long."""
        from tqdm import tqdm

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            answers = pool.map(lambda i: self._read(i, read), range(len(self.files)))
            return list(tqdm(answers, what, len(self.files), leave=False, delay=2, unit="file"))
