"""The embeddings of a dataset's captions, computed once and kept in a folder.

    FOLDER/openai--clip-vit-large-patch14@0123456789ab/     and more text encoders after a +
        towers.json          their names, revisions and channels
        89ab….parquet        a shard: captions, float16 tokens and pooled, whether it was cut
        arrow/89ab….arrow    its copy that is mapped into memory; made again if it is deleted

Encoding is `data.text_encoders`', whose models are loaded only if a caption is missing. Which row a
caption belongs to is the caller's.
"""

import copy
import glob
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int64
from tqdm import tqdm

from data import text_encoders
from data.batch import EncodedCaption
from data.text_encoders import CaptionEmbedding, TextEncoders
from runtime.errors import UserError
from runtime.files import atomic_file, user_cache

if TYPE_CHECKING:  # at run time it is imported where it is used
    import pyarrow

CAPTIONS_PER_SHARD = 1024  # of a file: the most that a killed process loses
INFO_FILE = "towers.json"
FLOAT16 = np.dtype("<f2")
LENGTH_STEP = 8  # tokens: a padded length is a multiple of it
FULL_CAPTIONS_PER_SHARD = 64  # of SD3, whose captions take 2.7 MB each


def default_cache_folder(dataset_name: str, data_dir: Path | None) -> Path:
    """Choose a folder for a dataset's embeddings.

    It lies beside data on this machine, never inside, where it would be taken for data. For a
    dataset of the hub, or one in this repository, it is in the user's cache.
    """
    kind, _, path = dataset_name.partition(":")
    if data_dir or kind == "folder":
        folder = Path(data_dir or path).expanduser().resolve()
        return folder.with_name(f"{folder.name}-captions")
    return user_cache() / "captions" / dataset_name.replace("/", "--").replace(":", "--")


@runtime_checkable
class CaptionEncoder(Protocol):
    """A function from captions to embeddings, such as `TextEncoders`."""

    width: int  # channels of a token
    pooled: int  # channels of the pooled vector

    def encode(self, captions: Sequence[str]) -> Sequence[CaptionEmbedding]:
        """Encode captions in their order."""
        ...


class CaptionStore:
    """Embeddings of captions in a folder of Parquet files, a shard of captions each.

    Captions that are missing from the folder are encoded once. A store offers the captions that it
    was opened with, whatever else lies in its folder. A pickled store holds no embeddings: it maps
    the files again.
    """

    revisions: tuple[str, ...]
    width: int  # channels of a token
    pooled: int  # channels of the pooled vector
    full_width: int | None  # channels of a token of SD3, see `TextEncoders`
    length: int  # tokens that every caption is padded or cut to
    n_truncated: int  # distinct captions that are longer than that, or than an encoder takes

    @classmethod
    def open(
        cls,
        folder: Path,
        captions: Sequence[str],
        encoders: Sequence[str],
        *,
        revisions: Sequence[str | None] | None = None,
        max_length: int | None = None,
        full_width: int | None = None,
        load_encoders: Callable[[], CaptionEncoder] | None = None,
    ) -> "CaptionStore":
        """Open a store and encode the captions that its folder lacks, shard by shard.

        Args:
            folder: of the embeddings of all encoders; need not exist.
            captions: to be offered; repetitions are allowed.
            encoders: names as `TextEncoders` takes them.
            revisions: of the encoders, None for the newest; see `text_encoders.find_revision`.
            max_length: tokens to cut captions to; None for all that the encoders take.
            full_width: encode as SD3 takes them, see `TextEncoders`; "" is encoded too.
            load_encoders: called if a caption is missing; by default loads `TextEncoders`.

        Raises:
            UserError: an encoder cannot be loaded or its revision be found, a file is damaged, or
                the folder cannot be written to.
        """
        folder = Path(folder).expanduser().absolute()
        prefix = f"sd3-{full_width}+" if full_width else ""
        names, known_revisions = _find_names_and_revisions(folder, encoders, revisions, prefix)
        subfolder = folder / (prefix + _versions(names, known_revisions))
        cached = _index_captions([_map_shard(path) for path in subfolder.glob("*.parquet")])
        distinct = sorted({*captions, ""} if full_width else set(captions))
        missing = [caption for caption in distinct if caption not in cached]
        if missing or not (subfolder / INFO_FILE).exists():
            text_encoders.check_revisions(encoders, known_revisions)
            _check_writable(subfolder)
            load = load_encoders or partial(
                TextEncoders, encoders, known_revisions, full_width=full_width
            )
            loaded = load()
            if full_width:
                _check_room(subfolder, len(missing), loaded.encode([""])[0])
            _write_info(subfolder, names, known_revisions, loaded)
            n_per_shard = FULL_CAPTIONS_PER_SHARD if full_width else CAPTIONS_PER_SHARD
            _encode_shards(subfolder, missing, loaded, n_per_shard)
            del loaded
            text_encoders.release_gpu_memory()
        return cls(subfolder, distinct, max_length, full_width)

    def __init__(
        self,
        subfolder: Path,
        captions: Sequence[str],
        max_length: int | None,
        full_width: int | None,
    ):
        """Map the shards of distinct captions, all of which have their embeddings."""
        import pyarrow.compute

        info = _read_info(subfolder)
        self.width = info["width"]
        self.pooled = info["pooled"]
        self.revisions = tuple(info["revisions"])
        self.full_width = full_width
        self._paths = sorted(subfolder.glob("*.parquet"))
        row_of_caption = _index_captions([_map_shard(path) for path in self._paths])
        self._ids = {caption: i for i, caption in enumerate(captions)}
        self._rows = np.array([row_of_caption[caption] for caption in captions], np.int64)
        self._shard_ends = np.cumsum([len(truncated) for *_, truncated in self._shards])
        sizes = [np.zeros(0, int)]
        truncated = [np.zeros(0, bool)]
        for shard_tokens, _, shard_truncated in self._shards:
            size = pyarrow.compute.call_function("binary_length", [shard_tokens])
            sizes.append(size.to_numpy())
            truncated.append(shard_truncated.to_numpy(zero_copy_only=False))
        n_tokens = np.concatenate(sizes)[self._rows] // (FLOAT16.itemsize * self.width)
        step = 1 if full_width else LENGTH_STEP
        longest = -(-int(n_tokens.max(initial=1)) // step) * step
        self.length = min(longest, max_length or longest)
        is_truncated = np.concatenate(truncated)[self._rows] | (n_tokens > self.length)
        self.n_truncated = int(is_truncated.sum())

    @cached_property
    def _shards(self) -> "list[list[pyarrow.Array]]":
        """Columns of tokens, pooled vectors and truncation of each file."""
        tables = [_map_shard(path) for path in self._paths]
        return [[t[name].chunk(0) for name in ("tokens", "pooled", "cut")] for t in tables]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def without_texts(self) -> "CaptionStore":
        """Return a copy that knows captions by their ids only, to be pickled for workers."""
        copied = copy.copy(self)
        copied._ids = {}
        return copied

    def __contains__(self, caption: str) -> bool:
        return caption in self._ids

    def caption_ids(self, captions: Sequence[str]) -> Int64[np.ndarray, "n"]:
        """Return the ids of captions, to call the store with.

        Raises:
            UserError: the store was not opened with one of them.
        """
        for caption in captions:
            if caption not in self._ids:
                raise UserError(f"there is no embedding of the caption {caption!r}")
        return np.array([self._ids[caption] for caption in captions], np.int64)

    def __call__(self, ids: Int[np.ndarray, "b"]) -> EncodedCaption:
        """Return the embeddings of these ids, each padded to `length`."""
        rows = self._rows[ids]
        shards = np.searchsorted(self._shard_ends, rows, side="right")
        from_end = rows - self._shard_ends[shards]  # negative: rows counted from a shard's end
        embeddings = [
            self._read_embedding(shard, row)
            for shard, row in zip(shards.tolist(), from_end.tolist())
        ]
        return text_encoders.pad_embeddings(embeddings, self.length)

    def null_captions(self, n: int) -> EncodedCaption:
        """Return n null captions."""
        null = CaptionEmbedding(
            np.zeros((0, self.width), FLOAT16), np.zeros(self.pooled, FLOAT16), False
        )
        return text_encoders.pad_embeddings([null] * n, self.length)

    def _read_embedding(self, shard: int, row: int) -> CaptionEmbedding:
        tokens, pooled, truncated = (column[row] for column in self._shards[shard])
        return CaptionEmbedding(
            np.frombuffer(tokens.as_buffer(), FLOAT16).reshape(-1, self.width),
            np.frombuffer(pooled.as_buffer(), FLOAT16),
            truncated.as_py(),
        )


# --- names and revisions --------------------------------------------------------------------------


def _versions(names: Sequence[str], revisions: Sequence[str]) -> str:
    """Return the encoders' names and revisions as part of a file name."""
    return "+".join(f"{name}@{revision}" for name, revision in zip(names, revisions))


def _find_names_and_revisions(
    folder: Path,
    encoders: Sequence[str],
    revisions: Sequence[str | None] | None,
    prefix: str,
) -> tuple[list[str], list[str]]:
    """Return a file name and the revision of each encoder, which together, after the prefix, name
    a subfolder.

    A revision that is not known is that of the only subfolder that fits, if there is just one.
    """
    names = [_file_name(encoder) for encoder in encoders]
    given = revisions or [None] * len(encoders)
    resolved = [
        revision or text_encoders.find_revision(encoder)
        for encoder, revision in zip(encoders, given, strict=True)
    ]
    known = [revision for revision in resolved if revision]
    if len(known) == len(resolved):
        return names, known
    escaped = [glob.escape(revision) if revision else "*" for revision in resolved]
    pattern = prefix + _versions(list(map(glob.escape, names)), escaped)
    infos = [_read_info(path.parent) for path in sorted(folder.glob(f"{pattern}/{INFO_FILE}"))]
    fitting = [info for info in infos if info["names"] == names]
    if len(fitting) == 1:
        return names, fitting[0]["revisions"]
    raise UserError(
        f"cannot find the version of the text encoder '{encoders[resolved.index(None)]}': it is no"
        f" folder, the Hugging Face hub does not answer or know it, and '{folder}' holds embeddings"
        f" of {len(fitting)} versions; go online, or name an encoder's folder"
    )


def _file_name(encoder: str) -> str:
    path = Path(encoder).expanduser()
    is_folder = path.is_dir() or path.is_absolute()  # also one that is gone
    return path.resolve().name if is_folder else encoder.replace("/", "--")


def _read_info(subfolder: Path) -> dict[str, Any]:
    with _read_errors(subfolder / INFO_FILE):
        info = json.loads((subfolder / INFO_FILE).read_text())
        return {name: info[name] for name in ("names", "revisions", "width", "pooled")}


def _write_info(
    subfolder: Path, names: Sequence[str], revisions: Sequence[str], encoders: CaptionEncoder
) -> None:
    info = {
        "names": names,
        "revisions": revisions,
        "width": encoders.width,
        "pooled": encoders.pooled,
    }
    with _write_errors(subfolder), atomic_file(subfolder / INFO_FILE) as file:
        file.write(json.dumps(info, indent=2).encode() + b"\n")


# --- shards ---------------------------------------------------------------------------------------


def _encode_shards(
    subfolder: Path, captions: Sequence[str], encoders: CaptionEncoder, n_per_shard: int
) -> None:
    with tqdm(total=len(captions), desc="captions", unit=" captions", disable=None) as bar:
        for start in range(0, len(captions), n_per_shard):
            shard = captions[start : start + n_per_shard]
            digest = hashlib.sha256(json.dumps(shard).encode()).hexdigest()
            path = subfolder / f"{digest[:16]}.parquet"
            if not path.exists():  # another process may be at the same work
                _write_shard(path, shard, encoders.encode(shard))
            bar.update(len(shard))


def _write_shard(
    path: Path, captions: Sequence[str], embeddings: Sequence[CaptionEmbedding]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def to_bytes(x: np.ndarray) -> bytes:
        return x.astype(FLOAT16).tobytes()

    columns = {
        "caption": pa.array(captions, pa.string()),
        # Large, because 2 GiB are too few for long captions of wide encoders.
        "tokens": pa.array([to_bytes(e.tokens) for e in embeddings], pa.large_binary()),
        "pooled": pa.array([to_bytes(e.pooled) for e in embeddings], pa.large_binary()),
        "cut": pa.array([e.truncated for e in embeddings], pa.bool_()),
    }
    table = pa.table(columns)
    with _write_errors(path.parent), atomic_file(path) as file:
        # Small row groups, for the same reason: a page of a file holds at most 2 GiB.
        pq.write_table(table, file, row_group_size=64, compression="none", use_dictionary=False)


def _map_shard(path: Path) -> "pyarrow.Table":
    """Map a shard, each column in one piece: only what is read of it takes memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow_copy = path.parent / "arrow" / f"{path.stem}.arrow"
    if not arrow_copy.exists() or arrow_copy.stat().st_mtime_ns < path.stat().st_mtime_ns:
        with _read_errors(path):
            table = pq.ParquetFile(path).read().combine_chunks()
        with _write_errors(path.parent):
            arrow_copy.parent.mkdir(exist_ok=True)
            with (
                atomic_file(arrow_copy) as file,
                pa.ipc.new_file(file, table.schema) as writer,
            ):
                writer.write_table(table)
    with _read_errors(arrow_copy), pa.memory_map(str(arrow_copy)) as file:
        return pa.ipc.open_file(file).read_all()  # the map outlives the file's closing


def _index_captions(tables: "Sequence[pyarrow.Table]") -> dict[str, int]:
    """Return each caption's row, counted through all tables."""
    captions = [caption for table in tables for caption in table["caption"].to_pylist()]
    return {caption: row for row, caption in enumerate(captions)}


# --- errors ---------------------------------------------------------------------------------------


def _check_writable(subfolder: Path) -> None:
    """Create the folder and a file in it, before encoders of gigabytes are loaded in vain."""
    with _write_errors(subfolder):
        subfolder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=subfolder):
            pass


def _check_room(subfolder: Path, n: int, embedding: CaptionEmbedding) -> None:
    """Check for room for n embeddings as large as this one, before days are spent on them.

    Raises:
        UserError: there is too little.
    """
    needed = 2 * n * (embedding.tokens.nbytes + embedding.pooled.nbytes)  # file and mapped copy
    free = shutil.disk_usage(subfolder).free
    if free < needed:
        raise UserError(
            f"{n} captions as SD3 takes them need {needed / 1e9:.1f} GB, and '{subfolder}' has "
            f"{free / 1e9:.1f} GB left; pass --caption_cache FOLDER, or train on fewer captions"
        )


@contextmanager
def _read_errors(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # Arrow's are OSErrors and ValueErrors
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"'{path}' cannot be read ({reason}); delete it to have it made again"
        ) from error


@contextmanager
def _write_errors(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write embeddings to '{folder}': {reason}; pass --caption_cache FOLDER"
        ) from error
