"""Write a dataset's images as latents: Parquet files, `latents.json` and a dataset card.

Files that are complete are kept when a conversion is resumed, and the result is the same, byte for
byte. The format and its reader are in `data/latents.py`; the VAE is in `codec.py`.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float16, Int64
from tqdm import tqdm

from data import latents
from data.latents import LatentDataset, MomentSums
from data.rows import BadRow, DecodedRows, Source, Split
from datasets_config import LatentEncoding
from inference.codec import Codec
from runtime import parallel, workers
from runtime.errors import RunError, UserError
from runtime.files import atomic_file
from runtime.image_size import format_shape

ROWS_PER_GROUP = 512  # of a Parquet row group, which streaming reads at a time
IN_FLIGHT = 2  # batches on the devices whose results are not read yet


class UnreadableError(UserError):
    """None of the training images can be read.

    Args:
        dataset_name: in the message.
        rows: their numbers in the source.
    """

    def __init__(self, dataset_name: str, rows: list[int]):
        super().__init__(f"no image of {dataset_name} can be read")
        self.rows = rows


# --- one file -------------------------------------------------------------------------------------


class LatentFile(NamedTuple):
    """A file to write, and the rows `start` … `stop` − 1 of the split that go into it."""

    path: Path
    start: int
    stop: int

    def batches(self, batch_size: int) -> list[Int64[np.ndarray, "b"]]:
        """The rows in batches. No batch spans two files, so that each file can be made alone."""
        starts = range(self.start, self.stop, batch_size)
        return [np.arange(start, min(start + batch_size, self.stop)) for start in starts]


class EncodedBatch(NamedTuple):
    """Moments of the rows of a batch that could be decoded, and the others."""

    rows: Int64[np.ndarray, "b"]
    moments: Float16[np.ndarray, "b h w k"]
    bad: list[BadRow]


def plan_files(folder: Path, split: str, n_rows: int, rows_per_file: int) -> list[LatentFile]:
    """Divide a split into files of equally many rows, but for the last."""
    starts = range(0, n_rows, rows_per_file)
    paths = latents.latent_files(folder, split, len(starts))
    return [
        LatentFile(path, start, min(start + rows_per_file, n_rows))
        for path, start in zip(paths, starts)
    ]


def is_written(file: LatentFile, encoding: LatentEncoding) -> bool:
    """Return whether the file exists.

    Raises:
        UserError: it holds other rows or another encoding.
    """
    if not file.path.exists():
        return False
    record = latents.read_file_record(file.path)
    wanted = dataclasses.asdict(encoding) | {"rows": [file.start, file.stop]}
    found = dataclasses.asdict(record["encoding"]) | {"rows": record["rows"]}
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"'{file.path.parents[1]}' was begun with {name} {found[name]}, not {value}; "
                "resume with the same flags, or name another --out"
            )
    return True


def write_latent_file(
    file: LatentFile,
    batches: Sequence[EncodedBatch],
    split: Split,
    encoding: LatentEncoding,
    *,
    with_size: bool = False,
) -> None:
    """Write a file of latents. Its bytes do not depend on when it is made.

    Args:
        with_size: add columns of the height and the width of a latent.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features, List, Value

    rows = np.concatenate([batch.rows for batch in batches])
    moments = np.concatenate([batch.moments for batch in batches])
    channels = encoding.shape[-1]
    features: dict[str, Any] = {latents.MOMENTS_COLUMN: Value("binary")}
    columns: dict[str, Any] = {latents.MOMENTS_COLUMN: latents.pack_moments(moments)}
    if split.config.n_classes:
        features[latents.LABEL_COLUMN] = ClassLabel(names=list(split.config.label_names))
        columns[latents.LABEL_COLUMN] = split.labels[rows].astype(np.int64)
    if encoding.captions:
        features[latents.CAPTION_COLUMN] = List(Value("string"))
        columns[latents.CAPTION_COLUMN] = [list(split.captions[row]) for row in rows]
    if with_size:
        for name, side in zip(latents.SIZE_COLUMNS, encoding.shape):
            features[name] = Value("int32")
            columns[name] = np.full(len(rows), side, np.int32)
    record = {
        "encoding": dataclasses.asdict(encoding),
        "rows": [file.start, file.stop],
        "skipped": sorted(bad.row for batch in batches for bad in batch.bad),
        "sums": latents.add_moment_sums(
            MomentSums.of_moments(batch.moments, channels) for batch in batches
        ).to_record(),
    }
    schema = Features(features).arrow_schema
    schema = schema.with_metadata(
        (schema.metadata or {}) | {latents.METADATA_KEY: json.dumps(record)}
    )
    with atomic_file(file.path) as output:
        table = pyarrow.table(columns, schema=schema)
        pyarrow.parquet.write_table(table, output, row_group_size=ROWS_PER_GROUP)


# --- all files ------------------------------------------------------------------------------------


def encode_split(
    split: Split,
    batches: Sequence[Int64[np.ndarray, "b"]],
    codec: Codec,
    *,
    mirrored: bool,
    batch_size: int,
    n_workers: int,
) -> Generator[EncodedBatch]:
    """Encode batches of rows, in their order.

    Images are decoded ahead of the devices, whose results are read while they work on later ones.

    Args:
        batches: rows of the split, at most `batch_size` of them each.
        mirrored: encode the mirrored images too, in further channels.
        n_workers: processes that decode; 0 for threads.

    Raises:
        RunError: a worker process dies over the same images again and again.
    """
    decode = split.images_only().decode_readable
    callers = [workers.Worker(decode) for _ in range(n_workers)] or [decode] * (os.cpu_count() or 1)
    steps = (np.array_split(rows, len(callers)) for rows in batches)

    def dispatch(parts: list[DecodedRows]) -> tuple[DecodedRows, list[jax.Array]]:
        batch = join_parts(parts)
        padded = np.zeros((batch_size, *batch.images.shape[1:]), np.uint8)
        padded[: len(batch.images)] = batch.images
        views = [padded, padded[:, :, ::-1]] if mirrored else [padded]
        return batch, [codec.encode(view) for view in views]

    def read(dispatched: tuple[DecodedRows, list[jax.Array]]) -> EncodedBatch:
        (rows, _, bad), views = dispatched
        moments = np.concatenate(
            [parallel.fetch_to_host(view)[: len(rows)] for view in views], axis=-1
        )
        not_finite = ~np.isfinite(moments).all(axis=(1, 2, 3))
        if not_finite.any():
            raise UserError(
                f"the VAE {codec.id} encodes row {split.rows[rows[not_finite][0]]} of split "
                f"'{split.name}' to numbers that are not finite; {codec.dtype} may be too narrow "
                "for it (--nohalf_precision), or its weights are damaged"
            )
        return EncodedBatch(rows, moments, bad)

    with closing(workers.run_ahead(callers, steps)) as answers:
        dispatched = map(dispatch, name_undecodable_rows(answers))
        yield from parallel.keep_in_flight(dispatched, n=IN_FLIGHT, read=read)


def name_undecodable_rows(answers: Generator[list[DecodedRows]]) -> Generator[list[DecodedRows]]:
    """Pass results on. Images that kill the workers end the run with a message that names them."""
    try:
        yield from answers
    except workers.WorkerDied as died:
        raise RunError(f"{died}, decoding rows {died.call.tolist()} of a split") from died


def join_parts(parts: Sequence[DecodedRows]) -> DecodedRows:
    """Join the parts of a batch that several workers decoded."""
    rows, images, bad = zip(*parts)
    return DecodedRows(np.concatenate(rows), np.concatenate(images), list(chain(*bad)))


def convert_dataset(
    source: Source,
    codec: Codec,
    folder: Path,
    encoding: LatentEncoding,
    *,
    rows_per_file: int,
    batch_size: int | None = None,
    n_workers: int | None = None,
    with_size: bool = False,
) -> LatentDataset:
    """Write the files that a folder lacks, and when all are there, its `latents.json` and card.

    Args:
        batch_size: images at a time, on all devices together; by default 64 a device, 16 on a CPU.
        n_workers: processes that decode; 0 for threads; by default half of the CPUs.
        with_size: each row tells its height and width too.

    Raises:
        UserError: the folder was begun with other settings.
        UnreadableError: no training image can be read; the other splits are not begun.
        RunError: a worker process dies over the same images again and again.
    """
    splits = source.full_splits()
    if n_workers is None:
        n_workers = max(1, (os.cpu_count() or 1) // 2)
    size = (
        batch_size
        or (16 if parallel.devices().platform == "cpu" else 64) * parallel.devices().count
    )
    files = {
        name: plan_files(folder, name, len(split), rows_per_file) for name, split in splits.items()
    }
    check_same_files(folder, files)
    missing = {
        name: [file for file in files[name] if not is_written(file, encoding)] for name in files
    }
    n_missing = sum(file.stop - file.start for name in missing for file in missing[name])
    n_rows = sum(map(len, splits.values()))
    with tqdm(total=n_rows, initial=n_rows - n_missing, unit=" images", smoothing=0.05) as bar:
        for name, split in splits.items():
            encoded_batches = encode_split(
                split,
                [rows for file in missing[name] for rows in file.batches(size)],
                codec,
                mirrored=encoding.mirrored,
                batch_size=size,
                n_workers=n_workers,
            )
            with closing(encoded_batches):
                for file in missing[name]:
                    batches = []
                    for rows in file.batches(size):
                        batches.append(next(encoded_batches))
                        bar.update(len(rows))
                        for bad in batches[-1].bad:
                            warning = f"warning: {split.describe(bad)}; it is left out"
                            bar.write(warning, file=sys.stderr)
                    write_latent_file(file, batches, split, encoding, with_size=with_size)
            if name == "train":
                require_readable(encoding, files[name])
    return write_manifest(folder, encoding, files)


def source_revision(source: Source, data_dir: Path | None) -> str:
    """Name the source of the images: a path, or a hub id with its commit."""
    if data_dir or source.config.name.startswith("folder:"):
        return str(data_dir or source.config.path)
    data: Any = source.train.data
    files = getattr(data, "files", None) or getattr(data.data.info, "download_checksums", None)
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(files or ()))
    return source.config.path + (f"@{commit[1]}" if commit else "")


def make_encoding(
    source: Source, codec: Codec, *, data_dir: Path | None = None, mirror: bool | None = None
) -> LatentEncoding:
    """Describe how a folder of latents is made.

    Args:
        mirror: encode the mirrored images too; by default where the dataset allows flips.

    Raises:
        UserError: the VAE cannot encode images of this size.
    """
    c = source.config
    latent_size = c.size.divided(codec.config.downsampling)
    if not latent_size:
        raise UserError(
            f"--image_size {c.image_size}: must be a multiple of {codec.config.downsampling}, "
            "which the VAE divides it by"
        )
    return LatentEncoding(
        dataset_name=c.name,
        source=source_revision(source, data_dir),
        image_size=c.image_size,
        shape=(*latent_size.sides, codec.config.latent_channels),
        vae=codec.id,
        vae_hash=codec.hash,
        scaling_factor=codec.scaling_factor,
        shift_factor=codec.shift_factor,
        precision=codec.dtype,
        mirrored=c.flip if mirror is None else mirror,
        captions=bool(c.caption_column),
        crop="center" if c.crop == "random" else c.crop,  # what is random is training's
    )


def check_same_files(folder: Path, files: dict[str, list[LatentFile]]) -> None:
    """Raises UserError if the folder has Parquet files that are not of this plan."""
    planned = {file.path for name in files for file in files[name]}
    others = sorted(set((folder / "data").glob("*.parquet")) - planned)
    if others:
        raise UserError(
            f"'{folder}' has {others[0].name}, which is not of this conversion; resume it as it "
            "was begun (with the same --rows_per_file), or name another --out"
        )


def require_readable(encoding: LatentEncoding, files: Sequence[LatentFile]) -> None:
    """Raises UnreadableError if written files of the training split have no row."""
    records = [latents.read_file_record(file.path) for file in files]
    if not sum(record["n_rows"] for record in records):
        rows = [row for record in records for row in record["skipped"]]
        raise UnreadableError(encoding.dataset_name, rows)


def write_manifest(
    folder: Path, encoding: LatentEncoding, files: dict[str, list[LatentFile]]
) -> LatentDataset:
    """Write what holds for all files together: `latents.json` and the dataset card."""
    records = {
        name: [latents.read_file_record(file.path) for file in files[name]] for name in files
    }
    sums = latents.add_moment_sums(record["sums"] for record in records["train"])
    dataset = LatentDataset(
        encoding=encoding,
        channel_mean=tuple(sums.mean.tolist()),
        channel_std=tuple(sums.std.tolist()),
        n_rows={name: sum(r["n_rows"] for r in records[name]) for name in records},
        n_files={name: len(records[name]) for name in records},
        skipped={name: [row for r in records[name] for row in r["skipped"]] for name in records},
    )
    write_records(folder, dataset)
    return dataset


def write_records(folder: Path, dataset: LatentDataset) -> None:
    """Write the dataset card and, last, `latents.json`."""
    with atomic_file(folder / "README.md") as output:
        output.write(dataset_card(dataset).encode())
    with atomic_file(folder / latents.INFO_FILE) as output:
        output.write(latents.to_json(dataset))


def dataset_card(dataset: LatentDataset) -> str:
    """Write the text of the folder's page on the hub."""
    encoding = dataset.encoding
    # `load_dataset` refuses a split of empty files.
    patterns = {name: f"data/{name}-*.parquet" for name, n in dataset.n_rows.items() if n}
    if encoding.buckets:
        patterns = {name: f'"*/{pattern}"' for name, pattern in patterns.items()}
    files = "\n".join(
        f"  - split: {name}\n    path: {pattern}" for name, pattern in patterns.items()
    )
    height, width, n = encoding.moments_shape
    sides, title = f"{height}, {width}", format_shape(encoding.size.sides)
    if encoding.buckets:
        sides, title = "row['height'], row['width']", ", ".join(encoding.buckets)
    if encoding.crop == "letterbox":
        title += ", whole between black bars"
    views = ", then both of the mirrored image" if encoding.mirrored else ""
    # `load_dataset` takes two folders of one name for the same unless their cards differ, hence the
    # digest. By default it reads as many rows at a time as a file's first group has: maybe none.
    digest = hashlib.sha256(latents.to_json(dataset)).hexdigest()
    return f"""---
configs:
- config_name: default
  description: {digest}
  batch_size: {ROWS_PER_GROUP}
  data_files:
{files}
---

# Latents of {encoding.dataset_name} at {title}

{dataset.row_summary}, made by `convert_imagenet.py` from `{encoding.source}`
with the VAE `{encoding.vae}` (SHA-256 of its weights: {encoding.vae_hash}).

    np.frombuffer(row["{latents.MOMENTS_COLUMN}"], "<f2").reshape({sides}, {n})

are the means and log-variances of {encoding.shape[-1]} channels each{views}. A diffusion model is
given (z − {encoding.shift_factor}) · {encoding.scaling_factor}, where z is sampled from them.

The licence is that of the images.
"""
