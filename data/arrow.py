"""A split that the `datasets` library keeps on this machine as Arrow tables.

It reads columns and undecoded cells. Parquet files that are read where they lie are
`data.parquet`'s; decoding images is `data.rows`'.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.files import describe_state

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    from datasets import Dataset


class ArrowSplit:
    """All rows of a split. `ParquetSplit` offers the same methods for files read as needed."""

    def __init__(self, data: "Dataset"):
        self.data = data
        self.features = data.features

    def __len__(self) -> int:
        return len(self.data)

    def file_states(self) -> list[tuple[str, int]]:
        """Return a text that is another one once the table changes, and its number of rows; "" for
        a table in memory alone. The files of a table are taken together.
        """
        states = [describe_state(file["filename"]) for file in self.data.cache_files]
        # A hash of what `datasets` has done with the rows of these files.
        done = self.data._fingerprint  # pyright: ignore[reportPrivateUsage]
        state = "|".join([done, *states]) if states and all(states) else ""
        return [(state, len(self.data))]

    def read_column(self, name: str) -> "pyarrow.ChunkedArray":
        """Read a whole column of labels or captions."""
        return self.data.select_columns([name]).with_format("arrow")[:][name]

    def select_images(self, column: str) -> "ArrowSplit":
        """Return the same rows with only this column, of images or plain bytes, for `read_cells`.

        Raises:
            TypeError, ValueError, NotImplementedError: the column holds neither.
        """
        from datasets import Image, List, Value

        selected = self.data.select_columns([column])
        feature = self.features[column]
        is_list = isinstance(feature, List)
        item = feature.feature if is_list else feature
        if item == Value("binary") or (is_list and isinstance(item, dict) and "bytes" in item):
            return ArrowSplit(selected)
        undecoded = List(Image(decode=False)) if is_list else Image(decode=False)
        return ArrowSplit(selected.cast_column(column, undecoded))

    def read_cells(self, rows: Sequence[int]) -> list[dict[str, Any] | None]:
        """Read the undecoded images of these rows, as {"bytes": …, "path": …}; None if empty. Of a
        list of images the first is read.
        """
        (cells,) = self.data[rows].values()
        return [undecoded(cell) for cell in cells]


def undecoded(cell: Any) -> dict[str, Any] | None:
    """Return a cell as {"bytes": …, "path": …}, of a list the first; None if it is empty."""
    if isinstance(cell, list):
        return undecoded(cell[0] if cell else None)
    return {"bytes": cell, "path": None} if isinstance(cell, bytes) else cell
