"""A split in Parquet files that are read where they lie, one row group at a time.

Nothing is downloaded or converted first. Rows can be read in any order; consecutive reads from one
row group are cheap. The order of rows is `data.shuffle`'s, decoding images is `data.rows`'.
"""

import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from data.arrow import undecoded
from runtime.errors import UserError
from runtime.files import describe_state

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

FILES_AT_ONCE = 32  # files whose metadata or columns are read in parallel
RETRY_SECONDS = (1, 4, 16, 60)  # pauses before a remote file is tried again
DEFAULT_OPEN_GROUPS = 16
COMMIT = re.compile(r"^hf://.*@[0-9a-f]{40}/")  # an address of the hub whose file cannot change


class UnreachableError(UserError):
    """A remote file stays out of reach: the fault of the network and not of the file."""


class ParquetSplit:
    """All rows of a split in Parquet files, given by path or by address (`hf://…`).

    `max_open_groups` row groups of images are cached. A pickled split holds no cached data.
    """

    def __init__(self, files: Sequence[str], features: "Features | None" = None):
        """Read the metadata of all files, which lists their row groups.

        Args:
            features: by default those of the first file.

        Raises:
            UserError: a file cannot be read or is not Parquet.
        """
        from datasets import Features

        self.files = list(files)
        self.max_open_groups = DEFAULT_OPEN_GROUPS
        metadata = self._read_all_files(lambda file: file.metadata, "looking into files")
        groups = [
            (file_index, group_index, file_metadata.row_group(group_index))
            for file_index, file_metadata in enumerate(metadata)
            for group_index in range(file_metadata.num_row_groups)
        ]
        groups = [group for group in groups if group[2].num_rows]
        self.group_locations = [(file_index, index) for file_index, index, _ in groups]
        self.group_rows = np.array([group.num_rows for _, _, group in groups], np.int64)
        self.group_bytes = np.array([group.total_byte_size for _, _, group in groups], np.int64)
        self.group_ends = np.cumsum(self.group_rows)
        self.features = features or Features.from_arrow_schema(metadata[0].schema.to_arrow_schema())
        self.image_column = ""
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._lock = threading.Lock()
        self._open_groups: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self._damaged_groups: dict[int, str] = {}  # why each cannot be read
        self._columns: dict[str, pyarrow.ChunkedArray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_caches()

    def __len__(self) -> int:
        return int(self.group_rows.sum())

    def file_states(self) -> list[tuple[str, int]]:
        """Return for each file a text that is another one once its images change, and its number of
        rows. The text is "" for an address that does not name a commit.
        """
        file_of_group = [file_index for file_index, _ in self.group_locations]
        n_rows = np.bincount(file_of_group, self.group_rows, len(self.files)).astype(int)
        states = [path if COMMIT.search(path) else describe_state(path) for path in self.files]
        return [
            (f"{state}|{self.image_column}" if state else "", n)
            for state, n in zip(states, n_rows.tolist())
        ]

    def find_groups(self, rows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Find the row group of each row."""
        return np.searchsorted(self.group_ends, rows, side="right")

    def read_column(self, name: str) -> "pyarrow.ChunkedArray":
        """Read a whole column and cache it: for labels and captions, not for images."""
        import pyarrow

        if name not in self._columns:
            columns = self._read_all_files(
                lambda file: file.read(columns=[name])[name], f"reading {name}"
            )
            chunks = [chunk for column in columns for chunk in column.chunks]
            self._columns[name] = pyarrow.chunked_array(chunks, columns[0].type)
        return self._columns[name]

    def select_images(self, column: str) -> "ParquetSplit":
        """Return the same rows, with this column of images for `read_cells`.

        Raises:
            TypeError: the column holds no images.
        """
        import pyarrow.types as types

        kind = self.features.arrow_schema.field(column).type
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        is_struct = types.is_struct(kind)
        fields = [kind.field(i).name for i in range(kind.num_fields)] if is_struct else []
        if not (types.is_binary(kind) or types.is_large_binary(kind) or "bytes" in fields):
            raise TypeError(f"{kind} is no image")
        selected = ParquetSplit.__new__(ParquetSplit)
        selected.__setstate__(self.__getstate__() | {"image_column": column})
        return selected

    def read_cells(self, rows: Sequence[int]) -> list[dict[str, Any] | None]:
        """Read the undecoded images of these rows, as {"bytes": …, "path": …}; None if empty. Of a
        list of images the first is read.
        """
        cells: list[Any] = [None] * len(rows)
        indices = np.asarray(rows, np.int64)
        groups = self.find_groups(indices)
        for group in np.unique(groups):
            column = self._read_group(int(group))
            first_row = self.group_ends[group] - self.group_rows[group]
            for position in np.flatnonzero(groups == group):
                cells[position] = column[int(indices[position] - first_row)].as_py()
        return [undecoded(cell) for cell in cells]

    def _read_group(self, group: int) -> "pyarrow.ChunkedArray":
        """Read the images of a row group, through a cache of the `max_open_groups` used last."""
        with self._lock:
            if group in self._damaged_groups:  # it would take as long again, for each of its rows
                raise UserError(self._damaged_groups[group])
            if group not in self._open_groups:
                column = self._read_images(group)
                while len(self._open_groups) >= self.max_open_groups:
                    self._open_groups.popitem(last=False)
                self._open_groups[group] = column
            self._open_groups.move_to_end(group)
            return self._open_groups[group]

    def _read_images(self, group: int) -> "pyarrow.ChunkedArray":
        file_index, group_index = self.group_locations[group]
        name = self.image_column
        try:
            return self._read_file(
                file_index, lambda file: file.read_row_group(group_index, columns=[name])[name]
            )
        except UnreachableError:
            raise
        except UserError as error:
            self._damaged_groups[group] = str(error)
            raise

    def _read_file(
        self, file_index: int, read: Callable[["pyarrow.parquet.ParquetFile"], Any]
    ) -> Any:
        """Open a file and call `read` on it. A remote file that is out of reach is tried again."""
        import fsspec
        import pyarrow
        import pyarrow.parquet

        path = self.files[file_index]
        pauses = iter(RETRY_SECONDS if "://" in path else ())
        while True:
            try:
                with fsspec.open(path) as file, pyarrow.parquet.ParquetFile(file) as parquet:
                    return read(parquet)
            except Exception as error:  # the network, the hub's server, the disk: many kinds
                # Damaged, without the column, missing or forbidden: trying again would not help.
                lasting = (pyarrow.ArrowInvalid, LookupError, FileNotFoundError, PermissionError)
                pause = None if isinstance(error, lasting) else next(pauses, None)
                reason = str(error).partition("\n")[0] or type(error).__name__
                problem = f"cannot read {path} ({reason})"
                if pause is None:
                    is_damaged = isinstance(error, lasting) or "://" not in path
                    raise (UserError if is_damaged else UnreachableError)(problem) from error
            print(f"warning: {problem}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)

    def _read_all_files(
        self, read: Callable[["pyarrow.parquet.ParquetFile"], Any], description: str
    ) -> list[Any]:
        """Call `read` on every file, with a progress bar when that takes long."""
        from tqdm import tqdm

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            results = pool.map(lambda i: self._read_file(i, read), range(len(self.files)))
            bar = tqdm(results, description, len(self.files), leave=False, delay=2, unit="file")
            return list(bar)
