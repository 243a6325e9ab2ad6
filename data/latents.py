"""A folder of latents: the VAE-encoded images of a dataset, with a record of how they were made.

    latents/digits/
      latents.json                          `LatentDataset`: the VAE, its scale, statistics, counts
      data/train-00000-of-00002.parquet …   a Hugging Face dataset
      README.md                             its card

Images of several shapes are one such folder for each, in `latents/photos/304x208` and its like,
under a record and a card of all.

A row holds the *moments* of q(z | image), mean and log-variance, so that each training step can
sample its own z from them. NumPy and PyArrow only; encoding and training are elsewhere.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16

from datasets_config import LatentEncoding
from runtime.errors import UserError
from runtime.image_size import ImageSize

INFO_FILE = "latents.json"
METADATA_KEY = b"latents"  # of the record in each Parquet file's metadata
MOMENTS_COLUMN = "moments"
LABEL_COLUMN = "label"
CAPTION_COLUMN = "caption"
SIZE_COLUMNS = ("height", "width")  # of latents of several shapes
ROWS_PER_READ = 512
# Bounds on the standard deviation of scaled latents. The VAE's own scale makes it about 1.
MIN_SCALED_STD = 0.4
MAX_SCALED_STD = 2.5


# --- the folder's record --------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentDataset:
    """The record of a finished folder, `latents.json`.

    Args:
        encoding: how the images became latents.
        channel_mean: of the latents before scale and shift.
        channel_std: of the latents before scale and shift.
        n_rows: by split.
        n_files: by split.
        skipped: by split, the rows of the source whose images could not be read.
    """

    encoding: LatentEncoding
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    n_rows: dict[str, int]
    n_files: dict[str, int]
    skipped: dict[str, list[int]]

    @property
    def row_summary(self) -> str:
        """Number of rows of each split, as text."""
        return ", ".join(f"{n} {name} rows" for name, n in self.n_rows.items())

    @property
    def scaled_std(self) -> float:
        """Standard deviation over all channels of the latents that a model sees."""
        mean = np.asarray(self.channel_mean)
        second_moment = np.square(self.channel_std) + np.square(mean)
        return self.encoding.scaling_factor * math.sqrt(second_moment.mean() - mean.mean() ** 2)


def read_latent_dataset(folder: Path) -> LatentDataset:
    """Read the record of a folder of latents.

    Raises:
        UserError: the folder holds no finished latents, or the record is damaged.
    """
    try:
        record = json.loads((folder / INFO_FILE).read_text())
        encoding = LatentEncoding.from_record(record["encoding"])
        channel_mean = tuple(record["channel_mean"])
        channel_std = tuple(record["channel_std"])
        fields = record | {
            "encoding": encoding,
            "channel_mean": channel_mean,
            "channel_std": channel_std,
        }
        dataset = LatentDataset(**fields)
        if not dataset.n_files["train"] or dataset.n_files.keys() != dataset.n_rows.keys():
            raise ValueError("it counts no rows to train on")
        if {len(channel_mean), len(channel_std)} != {encoding.shape[-1]}:
            raise ValueError("its statistics are not of as many channels")
        return dataset
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"'{folder}' holds no finished latents: it has no {INFO_FILE}",
            how="python convert_imagenet.py makes them",
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / INFO_FILE} is damaged: {error}") from None


def to_json(dataset: LatentDataset) -> bytes:
    """Serialise the record of a folder."""
    return json.dumps(dataclasses.asdict(dataset), indent=2).encode() + b"\n"


# --- statistics -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MomentSums:
    """Expected sums over latents sampled from their moments, by channel.

    Args:
        n: numbers per channel.
        first: sum of E z.
        second: sum of E z².
    """

    n: int
    first: Float[np.ndarray, "c"]
    second: Float[np.ndarray, "c"]

    @classmethod
    def of_moments(cls, moments: Float16[np.ndarray, "b h w k"], channels: int) -> "MomentSums":
        """Sum E z = μ and E z² = μ² + σ² over rows and positions, in float64.

        The moments of mirrored images are left out.
        """
        mean = moments[..., :channels].astype(np.float64)
        log_variance = moments[..., channels : 2 * channels].astype(np.float64)
        second = np.square(mean) + np.exp(log_variance)
        return cls(mean[..., 0].size, mean.sum((0, 1, 2)), second.sum((0, 1, 2)))

    def __add__(self, other: "MomentSums") -> "MomentSums":
        return MomentSums(self.n + other.n, self.first + other.first, self.second + other.second)

    @property
    def mean(self) -> Float[np.ndarray, "c"]:
        """Mean of the latents."""
        return self.first / self.n

    @property
    def std(self) -> Float[np.ndarray, "c"]:
        """Standard deviation of the latents."""
        return np.sqrt(np.maximum(0, self.second / self.n - np.square(self.mean)))

    def to_record(self) -> dict[str, Any]:
        """Convert to what JSON can hold."""
        return {"n": self.n, "first": self.first.tolist(), "second": self.second.tolist()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "MomentSums":
        """Invert `to_record`."""
        return cls(record["n"], np.array(record["first"]), np.array(record["second"]))


def add_moment_sums(sums: Iterator[MomentSums]) -> MomentSums:
    """Add at least one, in their order."""
    total = next(sums)
    for part in sums:
        total = total + part
    return total


# --- rows -----------------------------------------------------------------------------------------


def pack_moments(moments: Float16[np.ndarray, "b h w k"]) -> list[bytes]:
    """Pack rows into the cells of a column: little-endian float16, in the order h, w, channels."""
    return [row.astype("<f2", copy=False).tobytes() for row in moments]


def unpack_moments(
    cells: Sequence[bytes], encoding: LatentEncoding
) -> Float16[np.ndarray, "b h w k"]:
    """Invert `pack_moments`.

    Raises:
        UserError: a cell does not have the length of a row.
    """
    shape = encoding.moments_shape
    size = 2 * math.prod(shape)
    wrong = next((i for i, cell in enumerate(cells) if len(cell) != size), None)
    if wrong is not None:
        raise UserError(
            f"a row of the latents has {len(cells[wrong])} bytes where "
            f"{'×'.join(map(str, shape))} float16 numbers take {size}"
        )
    return np.frombuffer(b"".join(cells), "<f2").reshape(len(cells), *shape)


# --- files ----------------------------------------------------------------------------------------


def latent_files(folder: Path, split: str, n: int) -> list[Path]:
    """List the files of a split, as Hugging Face names them."""
    return [folder / "data" / f"{split}-{i:05d}-of-{n:05d}.parquet" for i in range(n)]


def read_file_record(file: Path) -> dict[str, Any]:
    """Read the record in a file's metadata.

    Returns:
        `encoding`; `rows`, the first and last row of the source that it was made from; `skipped`,
        those of them that could not be read; `n_rows` in the file; and their `sums`.

    Raises:
        UserError: the file is missing, damaged, or was not written by `convert_imagenet.py`.
    """
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file)
        record = json.loads((metadata.metadata or {})[METADATA_KEY])
        encoding = LatentEncoding.from_record(record["encoding"])
        sums = MomentSums.from_record(record["sums"])
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no file of latents, or damaged: {error}") from None
    return record | {"encoding": encoding, "sums": sums, "n_rows": metadata.num_rows}


def iterate_moments(
    file: Path, encoding: LatentEncoding
) -> Iterator[Float16[np.ndarray, "b h w k"]]:
    """Yield all rows of a file, `ROWS_PER_READ` at a time.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=ROWS_PER_READ, columns=[MOMENTS_COLUMN]):
                yield unpack_moments(batch[MOMENTS_COLUMN].to_pylist(), encoding)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


# --- checks ---------------------------------------------------------------------------------------


def check_latents(folder: Path) -> LatentDataset:
    """Check that every file is there, whole and of one encoding, and that the latents have the
    statistics of the record. This is the fast half of `inference.latent_check`: it needs no VAE.

    Raises:
        UserError: the first problem.
    """
    dataset = read_latent_dataset(folder)
    if dataset.encoding.buckets:
        _check_buckets(folder, dataset)
        return dataset
    records = {
        split: {file: read_file_record(file) for file in latent_files(folder, split, n)}
        for split, n in dataset.n_files.items()
    }
    problems = chain(
        _find_wrong_files(dataset, records), _find_wrong_statistics(dataset, records["train"])
    )
    for problem in problems:
        raise UserError(f"latents in '{folder}': {problem}")
    return dataset


def _check_buckets(folder: Path, dataset: LatentDataset) -> None:
    """Raises UserError unless the folder of each bucket is sound, and their rows add up."""
    parts = []
    for bucket in dataset.encoding.buckets:
        part = check_latents(folder / bucket)
        if part.encoding != dataset.encoding.at_bucket(ImageSize.parse(bucket)):
            raise UserError(f"latents in '{folder / bucket}': of another conversion")
        parts.append(part)
    for split, n_rows in dataset.n_rows.items():
        found = sum(part.n_rows.get(split, 0) for part in parts)
        if found != n_rows:
            raise UserError(
                f"latents in '{folder}': split '{split}' has {found} rows, and {INFO_FILE} says "
                f"{n_rows}"
            )


def _find_wrong_files(
    dataset: LatentDataset, records: dict[str, dict[Path, dict[str, Any]]]
) -> Iterator[str]:
    expected = dataclasses.asdict(dataset.encoding)
    for split, split_records in records.items():
        for file, record in split_records.items():
            for name, value in dataclasses.asdict(record["encoding"]).items():
                if value != expected[name]:
                    yield f"{name} is {expected[name]} in {INFO_FILE}, but {file.name} has {value}"
        n_rows = sum(record["n_rows"] for record in split_records.values())
        if n_rows != dataset.n_rows[split]:
            yield f"split '{split}' has {n_rows} rows, and {INFO_FILE} says {dataset.n_rows[split]}"


def _find_wrong_statistics(
    dataset: LatentDataset, records: dict[Path, dict[str, Any]]
) -> Iterator[str]:
    for file, record in records.items():
        if not np.isfinite((record["sums"].first, record["sums"].second)).all():
            yield f"{file.name} holds latents that are not finite; make them again"
            return
    sums = add_moment_sums(record["sums"] for record in records.values())
    recorded = (dataset.channel_mean, dataset.channel_std)
    if not np.allclose((sums.mean, sums.std), recorded, rtol=1e-6, atol=1e-12):
        yield (
            f"channels have mean {format_numbers(sums.mean)} and std {format_numbers(sums.std)}, "
            f"and {INFO_FILE} says {format_numbers(dataset.channel_mean)} and "
            f"{format_numbers(dataset.channel_std)}"
        )
        return
    encoding = dataset.encoding
    # All rows of the smallest file: some rows of each could all be of one class.
    file = min(
        (file for file in records if records[file]["n_rows"]),
        key=lambda file: records[file]["n_rows"],
    )
    measured = add_moment_sums(
        MomentSums.of_moments(moments, encoding.shape[-1])
        for moments in iterate_moments(file, encoding)
    )
    if not np.allclose(measured.second, records[file]["sums"].second, rtol=1e-6):
        yield f"the rows of {file.name} are not those that it was written with"
    if not MIN_SCALED_STD <= dataset.scaled_std <= MAX_SCALED_STD:
        yield (
            f"scaled by {encoding.scaling_factor} they have a standard deviation of "
            f"{dataset.scaled_std:.3g}, where a model expects about 1: the scaling factor is of "
            "another VAE"
        )


def format_numbers(values: Sequence[float] | np.ndarray) -> str:
    """Write numbers with three digits."""
    return " ".join(f"{value:.3g}" for value in values)
