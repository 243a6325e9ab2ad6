"""inference.latent_writer."""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float16, Int64
from tqdm import tqdm

from data import latents
from data.latents import LatentDataset, MomentSums
from data.rows import DecodedRows, Source, Split
from datasets_config import LatentEncoding
from inference.codec import Codec
from runtime import files as runtime_files
from runtime import parallel, workers
from runtime.errors import RunError, UserError

ROWS_PER_GROUP = 512  # rows of a row group, which a streamed training reads at a time
IN_FLIGHT = 2  # batches on the devices whose results are not read yet


# --- a file ---------------------------------------------------------------------------------------


class LatentFile(NamedTuple):
    """A file, and the rows of the split that it is made from: first … last − 1."""

    file: Path
    first: int
    last: int

    def chunks(self, batch_size: int) -> list[Int64[np.ndarray, "b"]]:
        """The rows in batches. No batch lies in two files, so that each file can be made alone."""
        starts = range(self.first, self.last, batch_size)
        return [np.arange(start, min(start + batch_size, self.last)) for start in starts]


class EncodedBatch(NamedTuple):
    """What became of a batch."""

    rows: Int64[np.ndarray, "b"]
    moments: Float16[np.ndarray, "b h w k"]
    problems: dict[int, str]


def plan_files(folder: Path, split: str, n_rows: int, rows_per_file: int) -> list[LatentFile]:
    """The files of a split, each from as many rows, in their order."""
    starts = range(0, n_rows, rows_per_file)
    files = latents.latent_files(folder, split, len(starts))
    return [LatentFile(file, i, min(i + rows_per_file, n_rows)) for file, i in zip(files, starts)]


def is_written(part: LatentFile, encoding: LatentEncoding) -> bool:
    """Whether the file is there, whole and of this encoding.

    Raises:
        UserError: it is something else.
    """
    if not part.file.exists():
        return False
    record = latents.read_file_record(part.file)
    wanted = dataclasses.asdict(encoding) | {"rows": [part.first, part.last]}
    found = dataclasses.asdict(record["encoding"]) | {"rows": record["rows"]}
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"'{part.file.parents[1]}' was begun with {name} {found[name]}, not {value}; go on "
                "as it was begun, or name another --out"
            )
    return True


def write_latent_file(part: LatentFile, pieces: Sequence[EncodedBatch], split: Split, encoding: LatentEncoding) -> None:
    """The file, which takes its name when it is whole. Nothing in it depends on when it is made."""
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features, List, Value

    rows = np.concatenate([piece.rows for piece in pieces])
    moments = np.concatenate([piece.moments for piece in pieces])
    channels = encoding.shape[-1]
    kinds: dict[str, Any] = {latents.MOMENTS_COLUMN: Value("binary")}
    columns: dict[str, Any] = {latents.MOMENTS_COLUMN: latents.pack_moments(moments)}
    if split.config.n_classes:
        kinds[latents.LABEL_COLUMN] = ClassLabel(names=list(split.config.label_names))
        columns[latents.LABEL_COLUMN] = split.labels[rows].astype(np.int64)
    if encoding.captions:
        kinds[latents.CAPTION_COLUMN] = List(Value("string"))
        columns[latents.CAPTION_COLUMN] = [list(split.captions[row]) for row in rows]
    record = {
        "encoding": dataclasses.asdict(encoding),
        "rows": [part.first, part.last],
        "skipped": sorted(row for piece in pieces for row in piece.problems),
        "sums": latents.add_moment_sums(MomentSums.over(piece.moments, channels) for piece in pieces).record(),
    }
    schema = Features(kinds).arrow_schema
    schema = schema.with_metadata((schema.metadata or {}) | {latents.METADATA_KEY: json.dumps(record)})
    with runtime_files.atomic_file(part.file) as file:
        content = pyarrow.table(columns, schema=schema)
        pyarrow.parquet.write_table(content, file, row_group_size=ROWS_PER_GROUP)


# --- all of them ----------------------------------------------------------------------------------


def encode_split(
    split: Split,
    chunks: Sequence[Int64[np.ndarray, "b"]],
    codec: Codec,
    *,
    mirrored: bool,
    batch_size: int,
    n_workers: int,
) -> Generator[EncodedBatch]:
    """The chunks in their order. Pictures are decoded ahead of the devices, and what these make is
    waited for as late as can be.
    """
    decode = dataclasses.replace(split, labels=split.labels[:0], captions=[]).readable
    callers = [workers.Worker(decode) for _ in range(n_workers)] or [decode] * (os.cpu_count() or 1)
    steps = (np.array_split(rows, len(callers)) for rows in chunks)
    flying: deque[tuple[DecodedRows, list[jax.Array]]] = deque()

    def land() -> EncodedBatch:
        (rows, _, problems), views = flying.popleft()
        moments = [parallel.fetch_to_host(view)[: len(rows)] for view in views]
        return EncodedBatch(rows, np.concatenate(moments, axis=-1), problems)

    with closing(workers.run_ahead(callers, steps)) as answers:
        for answer in name_undecodable_rows(answers):
            batch = join_parts(answer)
            padded = np.zeros((batch_size, *batch.images.shape[1:]), np.uint8)
            padded[: len(batch.images)] = batch.images
            views = [padded, padded[:, :, ::-1]] if mirrored else [padded]
            flying.append((batch, [codec.encode(view) for view in views]))
            if len(flying) > IN_FLIGHT:
                yield land()
    while flying:
        yield land()


def name_undecodable_rows(answers: Generator[list[DecodedRows]]) -> Generator[list[DecodedRows]]:
    """The same, where pictures that kill their readers end it in one line."""
    try:
        yield from answers
    except workers.WorkerDied as died:
        raise RunError(f"{died}, decoding rows {died.call.tolist()} of a split") from died


def join_parts(parts: Sequence[DecodedRows]) -> DecodedRows:
    """What several readers made of a batch."""
    rows, pictures, problems = zip(*parts)
    every = {row: why for several in problems for row, why in several.items()}
    return DecodedRows(np.concatenate(rows), np.concatenate(pictures), every)


def convert_dataset(
    source: Source,
    codec: Codec,
    folder: Path,
    encoding: LatentEncoding,
    *,
    rows_per_file: int,
    batch_size: int | None = None,
    n_workers: int | None = None,
) -> LatentDataset:
    """Make what is missing of the folder, and then say that it is whole.

    Raises:
        UserError: the folder was begun otherwise, or no picture can be read.
        RunError: a worker process dies over the same pictures again and again.
    """
    splits = source.whole()
    if n_workers is None:
        n_workers = max(1, (os.cpu_count() or 1) // 2)
    size = batch_size or (16 if jax.default_backend() == "cpu" else 64) * jax.device_count()
    how = {"mirrored": encoding.mirrored, "batch_size": size, "n_workers": n_workers}
    parts = {name: plan_files(folder, name, len(s), rows_per_file) for name, s in splits.items()}
    check_same_files(folder, parts)
    missing = {name: [p for p in parts[name] if not is_written(p, encoding)] for name in parts}
    n_left = sum(p.last - p.first for several in missing.values() for p in several)
    n_rows = sum(map(len, splits.values()))
    with tqdm(total=n_rows, initial=n_rows - n_left, unit=" images", smoothing=0.05) as bar:
        for name, split in splits.items():
            chunks = [rows for part in missing[name] for rows in part.chunks(size)]
            with closing(encode_split(split, chunks, codec, **how)) as stream:
                for part in missing[name]:
                    pieces = []
                    for rows in part.chunks(size):
                        pieces.append(next(stream))
                        bar.update(len(rows))
                        for problem in pieces[-1].problems.values():
                            bar.write(f"warning: {problem}; it is left out", file=sys.stderr)
                    write_latent_file(part, pieces, split, encoding)
    return write_manifest(folder, encoding, parts)


def source_revision(source: Source, data_dir: Path | None) -> str:
    """Where the pictures are from: of the hub, with the commit."""
    if data_dir or source.config.name.startswith("folder:"):
        return str(data_dir or source.config.path)
    data: Any = source.train.data
    files = getattr(data, "files", None) or getattr(data.data.info, "download_checksums", None)
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(files or ()))
    return source.config.path + (f"@{commit[1]}" if commit else "")


def make_encoding(
    source: Source, codec: Codec, *, data_dir: Path | None = None, mirror: bool | None = None
) -> LatentEncoding:
    """How the folder is made."""
    c, side = source.config, source.config.image_size
    if side % codec.config.downsampling:
        raise UserError(
            f"--image_size {side}: must be a multiple of {codec.config.downsampling}, which the "
            "VAE divides it by"
        )
    small = side // codec.config.downsampling
    return LatentEncoding(
        dataset_name=c.name,
        source=source_revision(source, data_dir),
        image_size=side,
        shape=(small, small, codec.config.latent_channels),
        vae=codec.id,
        vae_hash=codec.hash,
        scaling_factor=codec.scaling_factor,
        shift_factor=codec.shift_factor,
        precision=codec.dtype,
        mirrored=c.flip if mirror is None else mirror,
        captions=bool(c.caption_column),
    )


def check_same_files(folder: Path, parts: dict[str, list[LatentFile]]) -> None:
    """Raises UserError if the folder has files that are not of this plan."""
    planned = {part.file for several in parts.values() for part in several}
    others = sorted(set((folder / "data").glob("*.parquet")) - planned)
    if others:
        raise UserError(
            f"'{folder}' has {others[0].name}, which is not of this conversion; go on as it was "
            "begun (with the same --rows_per_file), or name another --out"
        )


def write_manifest(folder: Path, encoding: LatentEncoding, parts: dict[str, list[LatentFile]]) -> LatentDataset:
    """Write what is true of all files together: `latents.json` and the card."""
    records = {
        name: [latents.read_file_record(p.file) for p in several] for name, several in parts.items()
    }
    sums = latents.add_moment_sums(record["sums"] for record in records["train"])
    if not sums.n:
        raise UserError(f"no picture of {encoding.dataset_name} can be read")
    done = LatentDataset(
        encoding=encoding,
        channel_mean=tuple(sums.mean.tolist()),
        channel_std=tuple(sums.std.tolist()),
        n_rows={name: sum(r["n_rows"] for r in several) for name, several in records.items()},
        n_files={name: len(several) for name, several in records.items()},
        skipped={
            name: [row for r in several for row in r["skipped"]]
            for name, several in records.items()
        },
    )
    with runtime_files.atomic_file(folder / "README.md") as file:
        file.write(dataset_card(done).encode())
    with runtime_files.atomic_file(folder / latents.INFO_FILE) as file:
        file.write(latents.to_json(done))
    return done


def dataset_card(done: LatentDataset) -> str:
    """What the folder's page on the hub says."""
    e = done.encoding
    files = "\n".join(f"  - split: {name}\n    path: data/{name}-*.parquet" for name in done.n_rows)
    height, width, n = e.moments_shape
    views = ", then both of the mirrored picture" if e.mirrored else ""
    # `load_dataset` takes two folders of one name for the same, unless their cards differ; and as
    # many rows at a time as are in a file's first group, which may be none.
    digest = hashlib.sha256(latents.to_json(done)).hexdigest()
    return f"""---
configs:
- config_name: default
  description: {digest}
  batch_size: {ROWS_PER_GROUP}
  data_files:
{files}
---

# Latents of {e.dataset_name} at {e.image_size}×{e.image_size}

{done.counts}, made by `convert_imagenet.py` from `{e.source}` with the VAE `{e.vae}`
(SHA-256 of its weights: {e.vae_hash}).

    np.frombuffer(row["{latents.MOMENTS_COLUMN}"], "<f2").reshape({height}, {width}, {n})

are the means and log-variances of {e.shape[-1]} channels each{views}. A diffusion model is
given (z − {e.shift_factor}) · {e.scaling_factor}, where z is drawn from them.

The licence is that of the pictures.
"""
