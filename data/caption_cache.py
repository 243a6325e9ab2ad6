"""The embeddings of a dataset's captions, computed once and kept in a folder.

    FOLDER/openai--clip-vit-large-patch14@0123456789ab/     and more towers after a +
        towers.json          their names, revisions and channels
        89ab….parquet        a shard: captions, float16 tokens and pooled, whether it was cut
        arrow/89ab….arrow    its copy that is mapped into memory; made again if it is deleted

Only `text` knows of towers, and they are loaded only if a caption is missing. What a caption
belongs to is the caller's.
"""

import copy
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Int64
from tqdm import tqdm

from data import batch, text_encoders
from runtime.errors import UserError
from runtime.files import atomic_file

if TYPE_CHECKING:  # at run time it is imported where it is used
    import pyarrow

CAPTIONS_PER_SHARD = 1024  # captions of a file: the most that a killed process loses
INFO_FILE = "towers.json"
HALF = np.dtype("<f2")
LENGTH_STEP = 8


def default_cache_folder(dataset_name: str, data_dir: Path | None) -> Path:
    """Beside data on this machine, never inside, where it would be taken for data; for a set of the
    hub, or one in this repository, in the person's cache.
    """
    kind, _, path = dataset_name.partition(":")
    if data_dir or kind == "folder":
        folder = Path(data_dir or path).expanduser().resolve()
        return folder.with_name(f"{folder.name}-captions")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "dit-jax" / "captions" / dataset_name.replace("/", "--").replace(":", "--")


class CaptionStore:
    """Embeddings of captions in a folder of Parquet files, one per shard of `SHARD` captions.

    What is missing is encoded, the rest never again. A store holds the captions that it was opened
    with, whatever else lies in its folder. A pickled one holds no embeddings: it opens the files.
    """

    revisions: tuple[str, ...]
    width: int  # channels of a token
    pooled: int  # channels of the pooled vector
    length: int  # tokens of the longest caption, rounded up to a multiple of 8, but at most `most`
    n_cut: int  # captions, not counting repetitions, that were longer than that or a tower takes

    @classmethod
    def open(
        cls,
        folder: Path,
        captions: Sequence[str],
        towers: Sequence[str],
        *,
        revisions: Sequence[str | None] | None = None,
        most: int | None = None,
        encoder: Callable[[], text_encoders.TextEncoders] | None = None,
    ) -> "CaptionStore":
        """Encodes what the folder lacks, shard by shard.

        Args:
            towers: names as `text.Towers` takes them.
            revisions: of the towers, None for the newest; see `text.revision`.
            most: tokens that are shown of a caption; None for all that the towers take.
            encoder: makes the towers where they are needed.

        Raises:
            UserError: a tower cannot be loaded or its revision be told, a file is damaged, or the
                folder cannot be written to.
        """
        folder = Path(folder).expanduser().absolute()
        names, known = _names_and_revisions(folder, towers, revisions)
        subfolder = folder / "+".join(f"{name}@{digits}" for name, digits in zip(names, known))
        held = _rows([_mapped(path) for path in subfolder.glob("*.parquet")])
        wanted = sorted(set(captions))
        missing = [caption for caption in wanted if caption not in held]
        if missing or not (subfolder / INFO_FILE).exists():
            text_encoders.check_revisions(towers, known)
            _check_writable(subfolder)
            made = encoder() if encoder else text_encoders.TextEncoders(towers, known)
            _write_info(subfolder, names, known, made)
            _encode(subfolder, missing, made)
            del made
            text_encoders.release_gpu_memory()
        return cls(subfolder, wanted, most)

    def __init__(self, subfolder: Path, captions: Sequence[str], most: int | None):
        """Of distinct captions that all have their embeddings."""
        import pyarrow.compute

        info = _read_info(subfolder)
        self.width, self.pooled = info["width"], info["pooled"]
        self.revisions = tuple(info["revisions"])
        self._paths = sorted(subfolder.glob("*.parquet"))
        rows = _rows([_mapped(path) for path in self._paths])
        self._ids = {caption: i for i, caption in enumerate(captions)}
        self._row = np.array([rows[caption] for caption in captions], np.int64)
        self._end = np.cumsum([len(cut) for *_, cut in self._shards])
        sizes, cut = [np.zeros(0, int)], [np.zeros(0, bool)]
        for tokens, _, was_cut in self._shards:
            sizes.append(pyarrow.compute.call_function("binary_length", [tokens]).to_numpy())
            cut.append(was_cut.to_numpy(zero_copy_only=False))
        n_tokens = np.concatenate(sizes)[self._row] // (HALF.itemsize * self.width)
        longest = -(-int(n_tokens.max(initial=1)) // LENGTH_STEP) * LENGTH_STEP
        self.length = min(longest, most or longest)
        self.n_cut = int((np.concatenate(cut)[self._row] | (n_tokens > self.length)).sum())

    @cached_property
    def _shards(self) -> "list[list[pyarrow.Array]]":
        """Tokens, pooled vectors and cuts of each file."""
        tables = [_mapped(path) for path in self._paths]
        return [[t[name].chunk(0) for name in ("tokens", "pooled", "cut")] for t in tables]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def nameless(self) -> "CaptionStore":
        """A copy that can only be called, for processes that are told ids: it pickles no texts."""
        copied = copy.copy(self)
        copied._ids = {}
        return copied

    def __contains__(self, caption: str) -> bool:
        return caption in self._ids

    def ids(self, captions: Sequence[str]) -> Int64[np.ndarray, "n"]:
        """What to call it with. Raises UserError for a caption that is not held."""
        for caption in captions:
            if caption not in self._ids:
                raise UserError(f"there is no embedding of the caption {caption!r}")
        return np.array([self._ids[caption] for caption in captions], np.int64)

    def blank(self, n: int) -> batch.EncodedCaption:
        """n null captions."""
        nothing = text_encoders.CaptionEmbedding(
            np.zeros((0, self.width), HALF), np.zeros(self.pooled, HALF), False
        )
        return text_encoders.pad_embeddings([nothing] * n, self.length)

    def __call__(self, ids: Int[np.ndarray, "b"]) -> batch.EncodedCaption:
        """The embeddings, each padded to `length`."""
        rows = self._row[ids]
        shards = np.searchsorted(self._end, rows, side="right")
        pairs = zip(shards.tolist(), (rows - self._end[shards]).tolist())  # rows from the end
        return text_encoders.pad_embeddings([self._embedding(*pair) for pair in pairs], self.length)

    def _embedding(self, shard: int, row: int) -> text_encoders.CaptionEmbedding:
        tokens, pooled, cut = (column[row] for column in self._shards[shard])
        tokens, pooled = (np.frombuffer(x.as_buffer(), HALF) for x in (tokens, pooled))
        return text_encoders.CaptionEmbedding(tokens.reshape(-1, self.width), pooled, cut.as_py())


def _names_and_revisions(
    folder: Path, towers: Sequence[str], revisions: Sequence[str | None] | None
) -> tuple[list[str], list[str]]:
    """Of the towers: what tells them from others here. Names are fit for a file."""
    names = [_plain(tower) for tower in towers]
    asked = zip(towers, revisions or [None] * len(towers), strict=True)
    known = [revision or text_encoders.find_revision(tower) for tower, revision in asked]
    told = [revision for revision in known if revision]
    if len(told) == len(known):
        return names, told
    pattern = "+".join(
        f"{glob.escape(n)}@{glob.escape(r) if r else '*'}" for n, r in zip(names, known)
    )
    infos = [_read_info(path.parent) for path in sorted(folder.glob(f"{pattern}/{INFO_FILE}"))]
    fitting = [info for info in infos if info["names"] == names]
    if len(fitting) == 1:
        return names, fitting[0]["revisions"]
    raise UserError(
        f"cannot tell the version of the text encoder '{towers[known.index(None)]}': it is no folder,"
        f" the Hugging Face hub does not answer or know it, and '{folder}' holds embeddings of"
        f" {len(fitting)} versions; go online, or name a tower's folder"
    )


def _plain(tower: str) -> str:
    path = Path(tower).expanduser()
    is_folder = path.is_dir() or path.is_absolute()  # also one that is gone
    return path.resolve().name if is_folder else tower.replace("/", "--")


def _read_info(subfolder: Path) -> dict[str, Any]:
    with _readable(subfolder / INFO_FILE):
        info = json.loads((subfolder / INFO_FILE).read_text())
        return {name: info[name] for name in ("names", "revisions", "width", "pooled")}


def _check_writable(subfolder: Path) -> None:
    """Before towers of gigabytes are loaded in vain."""
    with _writing(subfolder):
        subfolder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=subfolder):
            pass


def _write_info(
    subfolder: Path,
    names: Sequence[str],
    revisions: Sequence[str],
    towers: text_encoders.TextEncoders,
) -> None:
    channels = {"width": towers.width, "pooled": towers.pooled}
    info = {"names": names, "revisions": revisions, **channels}
    with _writing(subfolder), atomic_file(subfolder / INFO_FILE) as file:
        file.write(json.dumps(info, indent=2).encode() + b"\n")


def _encode(subfolder: Path, captions: Sequence[str], towers: text_encoders.TextEncoders) -> None:
    with tqdm(total=len(captions), desc="captions", unit=" captions", disable=None) as bar:
        for start in range(0, len(captions), CAPTIONS_PER_SHARD):
            shard = captions[start : start + CAPTIONS_PER_SHARD]
            digest = hashlib.sha256(json.dumps(shard).encode()).hexdigest()
            path = subfolder / f"{digest[:16]}.parquet"
            if not path.exists():  # as it does where another process is at the same work
                _write(path, shard, towers.encode(shard))
            bar.update(len(shard))


def _write(
    path: Path, captions: Sequence[str], embeddings: Sequence[text_encoders.CaptionEmbedding]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def raw(x: np.ndarray) -> bytes:
        return x.astype(HALF).tobytes()

    columns = {
        "caption": pa.array(captions, pa.string()),
        # Long captions of wide towers: 2 GiB would be too little for a column, or a page of a file.
        "tokens": pa.array([raw(e.tokens) for e in embeddings], pa.large_binary()),
        "pooled": pa.array([raw(e.pooled) for e in embeddings], pa.large_binary()),
        "cut": pa.array([e.cut for e in embeddings], pa.bool_()),
    }
    with _writing(path.parent), atomic_file(path) as file:
        table = pa.table(columns)
        pq.write_table(table, file, row_group_size=64, compression="none", use_dictionary=False)


def _mapped(path: Path) -> "pyarrow.Table":
    """A shard, each column in one piece, of which only what is looked at is in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    copy = path.parent / "arrow" / f"{path.stem}.arrow"
    if not copy.exists() or copy.stat().st_mtime_ns < path.stat().st_mtime_ns:
        with _readable(path):
            table = pq.ParquetFile(path).read().combine_chunks()
        with _writing(path.parent):
            copy.parent.mkdir(exist_ok=True)
            with atomic_file(copy) as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    with _readable(copy), pa.memory_map(str(copy)) as file:  # closed, the map lives on
        return pa.ipc.open_file(file).read_all()


def _rows(tables: "Sequence[pyarrow.Table]") -> dict[str, int]:
    """Each caption's row, counted through all tables."""
    captions = [caption for table in tables for caption in table["caption"].to_pylist()]
    return {caption: row for row, caption in enumerate(captions)}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # Arrow's are OSErrors and ValueErrors
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"'{path}' cannot be read ({reason}); delete it to have it made again"
        ) from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write embeddings to '{folder}': {reason}; pass --caption_cache FOLDER"
        ) from error
