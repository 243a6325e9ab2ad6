"""Headers of images that were read before, in a file of the user's cache.

An image has a key of 64 bits, which is another one once the image changes. A damaged file is as
good as none, and one that cannot be written only costs time. How a header is read is
`data.headers`'.
"""

import contextlib
import hashlib
import os
import time
import zipfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt64

from runtime.files import atomic_file, user_cache

UNREADABLE, GREY, COLOUR = range(3)  # kinds of images
HEADER = np.dtype([("key", np.uint64), ("kind", np.uint8), ("sides", np.int32, 2)])
NO_KEY = 0  # of an image that may change without a sign
VERSION = 2  # of what is taken from an image: another one begins another file
SECONDS_BETWEEN_SAVES = 60  # a killed process loses what it read since


def make_key(state: str) -> int:
    """Return the key of a file by its state: a hash; `NO_KEY` if that is "", not known."""
    digest = hashlib.blake2b(state.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") if state else NO_KEY


def make_row_keys(files: Sequence[tuple[str, int]]) -> UInt64[np.ndarray, "n"]:
    """Return the keys of the rows of a table: the numbers that follow its file's.

    Args:
        files: state and number of rows of each file, in the order of the rows.
    """
    keys = []
    for state, n_rows in files:
        numbers = np.arange(n_rows, dtype=np.uint64)  # the sum wraps around
        keys.append(numbers + np.uint64(make_key(state)) if state else np.zeros(n_rows, np.uint64))
    return np.concatenate(keys)


class HeaderCache:
    """The headers of one dataset's images that were read before."""

    def __init__(self, dataset_name: str):
        """Load the file, if there is one."""
        name = hashlib.blake2b(f"{VERSION}|{dataset_name}".encode(), digest_size=12).hexdigest()
        self.path = user_cache() / "headers" / f"{name}.npy"
        self._known = self._load()
        self._added: list[np.ndarray] = []
        self._saved_at = time.monotonic()

    def _load(self) -> np.ndarray:
        """Load the headers, sorted by key. The first has no key: it is never empty."""
        try:
            known = np.load(self.path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none yet, or damaged
            known = None
        if not isinstance(known, np.ndarray) or known.dtype != HEADER or known.ndim != 1:
            known = np.zeros(0, HEADER)
        return np.concatenate([np.zeros(1, HEADER), known])

    def can_save(self) -> bool:
        """Return whether the file's folder can be made and written to."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.access(self.path.parent, os.W_OK)

    def find(self, keys: UInt64[np.ndarray, "n"]) -> np.ndarray:
        """Find the headers of images; they are unreadable where none is known."""
        places = np.minimum(np.searchsorted(self._known["key"], keys), len(self._known) - 1)
        headers = self._known[places]
        headers[headers["key"] != keys] = 0
        headers["key"] = keys
        return headers

    def add(self, headers: np.ndarray) -> None:
        """Add headers, except those of images without a key or that could not be read."""
        has_key = headers["key"] != NO_KEY
        self._added.append(headers[has_key & (headers["kind"] != UNREADABLE)])
        if time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write the file, if headers were added, with those that were known before."""
        added = np.concatenate([np.zeros(0, HEADER), *self._added])
        self._added = []
        if len(added):
            both = np.concatenate([self._known, added])
            self._known = both[np.unique(both["key"], return_index=True)[1]]
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(self.path, sync=False) as file:
                    np.save(file, self._known[1:])
        self._saved_at = time.monotonic()
