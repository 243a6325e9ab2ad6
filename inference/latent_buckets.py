"""Latents of images of many proportions: a folder for each bucket, and a record and a card of all.

`data/buckets.py` chooses the bucket of an image.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data import latents
from data.buckets import Buckets
from data.image_buckets import select_bucket
from data.latents import LatentDataset
from data.rows import Source
from datasets_config import LatentEncoding
from inference.latent_writer import UnreadableError, write_records
from runtime.errors import UserError, count
from runtime.image_size import ImageSize
from runtime.run_folder import create_run_folder


class BucketPart(NamedTuple):
    """The images of one bucket, and the folder of their latents."""

    source: Source
    folder: Path
    encoding: LatentEncoding


def with_buckets(encoding: LatentEncoding, buckets: Mapping[str, Buckets]) -> LatentEncoding:
    """Return the encoding of latents in these buckets."""
    names = tuple(shape.in_full for shape in buckets["train"].shapes)
    return dataclasses.replace(encoding, buckets=names)


def bucket_parts(
    source: Source, buckets: Mapping[str, Buckets], folder: Path, encoding: LatentEncoding
) -> Iterator[BucketPart]:
    """Divide a source into its buckets, each with a folder of its own."""
    for i, name in enumerate(encoding.buckets):
        part = encoding.at_bucket(ImageSize.parse(name))
        yield BucketPart(select_bucket(source, buckets, i), folder / name, part)


def require_same_buckets(folder: Path, encoding: LatentEncoding) -> None:
    """Raises UserError if the folder holds latents in other buckets, or in none, be they finished
    or not.
    """
    begun = {path.parent.parent.name for path in folder.glob("*/data/*.parquet")}
    if others := sorted(begun - {*encoding.buckets}):
        raise UserError(
            f"'{folder}' holds latents in {', '.join(others)}, which is none of these buckets; "
            "delete them, or name another --out"
        )
    if not (folder / latents.INFO_FILE).exists():
        return
    found = latents.read_latent_dataset(folder).encoding.buckets
    # Those of which no image can be read are begun, and not among those found.
    wanted = tuple(name for name in encoding.buckets if name in found)
    if found != wanted or {*found, *begun} != {*encoding.buckets}:
        raise UserError(
            f"'{folder}' holds latents in {', '.join(found) or 'one shape'}, not in "
            f"{', '.join(encoding.buckets) or 'one shape'}; name another --out"
        )


def convert_parts(
    folder: Path,
    encoding: LatentEncoding,
    parts: Sequence[BucketPart],
    convert: Callable[..., LatentDataset],
) -> LatentDataset:
    """Write the folder of each bucket, then the record and the card of all.

    A bucket of which no training image can be read is left out, with its images to evaluate with.

    Args:
        encoding: of all buckets.
        convert: `convert_dataset`, with all but its source, folder and encoding.

    Raises:
        UserError: no training image of any bucket can be read.
    """
    written, files, names, unreadable = [], [], [], []
    for part in parts:
        create_run_folder(part.folder / "data")
        try:
            written.append(convert(part.source, folder=part.folder, encoding=part.encoding))
        except UnreadableError as error:
            unreadable += error.rows
            warn_of_empty_bucket(part, len(error.rows))
            continue
        names.append(part.folder.name)
        files += latents.latent_files(part.folder, "train", written[-1].n_files["train"])
    if not written:
        raise UnreadableError(encoding.dataset_name, unreadable)
    sums = latents.add_moment_sums(latents.read_file_record(file)["sums"] for file in files)
    splits = sorted({split for dataset in written for split in dataset.n_rows})
    skipped = {
        split: sorted(row for d in written for row in d.skipped.get(split, [])) for split in splits
    }
    dataset = LatentDataset(
        encoding=dataclasses.replace(encoding, buckets=tuple(names)),
        channel_mean=tuple(sums.mean.tolist()),
        channel_std=tuple(sums.std.tolist()),
        n_rows={split: sum(d.n_rows.get(split, 0) for d in written) for split in splits},
        n_files={split: sum(d.n_files.get(split, 0) for d in written) for split in splits},
        skipped=skipped | {"train": sorted(skipped["train"] + unreadable)},
    )
    write_records(folder, dataset)
    return dataset


def warn_of_empty_bucket(part: BucketPart, n_rows: int) -> None:
    """Print that a bucket is left out, and what is left out with it."""
    n_eval = sum(len(split) for name, split in part.source.full_splits().items() if name != "train")
    others = f", with {count(n_eval, 'image')} to evaluate with" if n_eval else ""
    print(
        f"warning: bucket {part.folder.name} is left out{others}: none of its "
        f"{count(n_rows, 'training image')} can be read",
        file=sys.stderr,
    )
