"""data.arrow."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time they are imported where they are used: together they take a second
    import pyarrow
    from datasets import Dataset


class ArrowSplit:
    """All rows of a split as `datasets` keeps them on this machine. `Streamed` is the other way."""

    def __init__(self, data: "Dataset"):
        self.data, self.features = data, data.features

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> "pyarrow.ChunkedArray":
        """A whole column: of labels or captions."""
        return self.data.select_columns([name]).with_format("arrow")[:][name]

    def pictures(self, name: str) -> "ArrowSplit":
        """The same rows, of which `cells` are those of this column, of pictures or plain bytes.

        Raises:
            TypeError, ValueError, NotImplementedError: the column holds neither.
        """
        from datasets import Image, Value

        only = self.data.select_columns([name])
        if self.features[name] == Value("binary"):
            return ArrowSplit(only)
        return ArrowSplit(only.cast_column(name, Image(decode=False)))

    def cells(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The undecoded pictures of these rows."""
        (column,) = self.data[rows].values()
        return [{"bytes": c, "path": None} if isinstance(c, bytes) else c for c in column]
