"""A folder of latents: what a VAE made of a dataset's pictures, and how it was made.

    latents/digits/
      latents.json                            `LatentSet`: the VAE, its scale, statistics, counts
      data/train-00000-of-00002.parquet …     a Hugging Face dataset
      README.md                               its card

A row holds the *moments* of q(z | picture), mean and log-variance, so that each step of training
can draw its own z from them. NumPy and PyArrow; who encodes and who trains is elsewhere.
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

INFO_FILE = "latents.json"
METADATA_KEY = b"latents"  # of every file's own record
MOMENTS_COLUMN, LABEL_COLUMN, CAPTION_COLUMN = "moments", "label", "caption"
ROWS_PER_READ = 512  # rows that are read at a time
MIN_SCALED_STD, MAX_SCALED_STD = 0.4, 2.5  # of scaled latents; a VAE's own scale makes it about 1


@dataclass(frozen=True)
class MomentSums:
    """Of latents drawn from their moments, by channel: how many numbers, their sum and the sum of
    their squares, both expected.
    """

    n: int
    first: Float[np.ndarray, "c"]
    second: Float[np.ndarray, "c"]

    @classmethod
    def over(cls, moments: Float16[np.ndarray, "b h w k"], channels: int) -> "MomentSums":
        """E z = μ and E z² = μ² + σ², summed over rows and places, in float64. Mirrored views are
        left out.
        """
        mean, log_variance = (
            moments[..., i * channels : (i + 1) * channels].astype(np.float64) for i in (0, 1)
        )
        second = np.square(mean) + np.exp(log_variance)
        return cls(mean[..., 0].size, mean.sum((0, 1, 2)), second.sum((0, 1, 2)))

    def __add__(self, other: "MomentSums") -> "MomentSums":
        return MomentSums(self.n + other.n, self.first + other.first, self.second + other.second)

    @property
    def mean(self) -> Float[np.ndarray, "c"]:
        return self.first / self.n

    @property
    def std(self) -> Float[np.ndarray, "c"]:
        return np.sqrt(np.maximum(0, self.second / self.n - np.square(self.mean)))

    def record(self) -> dict[str, Any]:
        return {"n": self.n, "first": self.first.tolist(), "second": self.second.tolist()}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "MomentSums":
        return cls(record["n"], np.array(record["first"]), np.array(record["second"]))


@dataclass(frozen=True)
class LatentDataset:
    """A whole folder. `channel_mean` and `channel_std` are of the latents before scale and shift;
    `skipped` has the rows of the source whose pictures could not be read.
    """

    encoding: LatentEncoding
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    n_rows: dict[str, int]
    n_files: dict[str, int]
    skipped: dict[str, list[int]]

    @property
    def counts(self) -> str:
        """How many rows each split has."""
        return ", ".join(f"{n} {name} rows" for name, n in self.n_rows.items())

    @property
    def scaled_std(self) -> float:
        """Of what a model sees, over all channels."""
        e, mean = self.encoding, np.asarray(self.channel_mean)
        second = np.square(self.channel_std) + np.square(mean)
        return e.scaling_factor * math.sqrt(second.mean() - mean.mean() ** 2)


def read_latent_dataset(folder: Path) -> LatentDataset:
    """What `latents.json` says.

    Raises:
        UserError: the folder holds no finished latents, or the file is damaged.
    """
    try:
        record = json.loads((folder / INFO_FILE).read_text())
        encoding = LatentEncoding.of(record["encoding"])
        channels = {name: tuple(record[name]) for name in ("channel_mean", "channel_std")}
        said = LatentDataset(**record | channels | {"encoding": encoding})
        if not said.n_files["train"] or said.n_files.keys() != said.n_rows.keys():
            raise ValueError("it counts no rows to train on")
        if {len(said.channel_mean), len(said.channel_std)} != {encoding.shape[-1]}:
            raise ValueError("its statistics are not of as many channels")
        return said
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"'{folder}' holds no finished latents: it has no {INFO_FILE}; "
            "python convert_imagenet.py makes them"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / INFO_FILE} is damaged: {error}") from None


def to_json(record: Any) -> bytes:
    """A dataclass of this file as text."""
    return json.dumps(dataclasses.asdict(record), indent=2).encode() + b"\n"


# --- rows -----------------------------------------------------------------------------------------


def pack_moments(moments: Float16[np.ndarray, "b h w k"]) -> list[bytes]:
    """Rows as the cells of a column: little-endian float16, in the order h, w, channels."""
    return [row.astype("<f2", copy=False).tobytes() for row in moments]


def unpack_moments(cells: Sequence[bytes], encoding: LatentEncoding) -> Float16[np.ndarray, "b h w k"]:
    """The inverse of `pack`.

    Raises:
        UserError: a cell is not as long as a row must be.
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
    """The files of a split, as Hugging Face names them."""
    return [folder / "data" / f"{split}-{i:05d}-of-{n:05d}.parquet" for i in range(n)]


def read_file_record(file: Path) -> dict[str, Any]:
    """What a file says of itself: its `encoding`, the first and the last of the `rows` it was made
    from and those that were `skipped`, the number of the rows that it has and their `sums`.

    Raises:
        UserError: it is missing, damaged, or was not written by `convert_imagenet.py`.
    """
    import pyarrow.parquet

    try:
        end = pyarrow.parquet.read_metadata(file)
        record = json.loads((end.metadata or {})[METADATA_KEY])
        encoding, sums = LatentEncoding.of(record["encoding"]), MomentSums.of(record["sums"])
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no file of latents, or damaged: {error}") from None
    return record | {"encoding": encoding, "sums": sums, "n_rows": end.num_rows}


def iterate_moments(file: Path, encoding: LatentEncoding) -> Iterator[Float16[np.ndarray, "b h w k"]]:
    """All rows of a file, `AT_ONCE` at a time.

    Raises:
        UserError: it is damaged.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=ROWS_PER_READ, columns=[MOMENTS_COLUMN]):
                yield unpack_moments(batch[MOMENTS_COLUMN].to_pylist(), encoding)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


# --- the doctor -----------------------------------------------------------------------------------


def check_latents(folder: Path) -> LatentDataset:
    """The fast half of the doctor's visit, for which no VAE is needed: that every file is there,
    whole and of this encoding, and that the latents are as `latents.json` says.

    Raises:
        UserError: what is wrong.
    """
    said = read_latent_dataset(folder)
    records = {
        split: {file: read_file_record(file) for file in latent_files(folder, split, n)}
        for split, n in said.n_files.items()
    }
    for problem in chain(_wrong_files(said, records), _wrong_statistics(said, records["train"])):
        raise UserError(f"latents in '{folder}': {problem}")
    return said


def _wrong_files(said: LatentDataset, records: dict[str, dict[Path, dict[str, Any]]]) -> Iterator[str]:
    wanted = dataclasses.asdict(said.encoding)
    for split, of_split in records.items():
        for file, record in of_split.items():
            for name, made in dataclasses.asdict(record["encoding"]).items():
                if made != wanted[name]:
                    yield f"{name} is {wanted[name]} in {INFO_FILE}, but {file.name} has {made}"
        n_rows = sum(record["n_rows"] for record in of_split.values())
        if n_rows != said.n_rows[split]:
            yield f"split '{split}' has {n_rows} rows, and {INFO_FILE} says {said.n_rows[split]}"


def _wrong_statistics(said: LatentDataset, records: dict[Path, dict[str, Any]]) -> Iterator[str]:
    sums = add_moment_sums(record["sums"] for record in records.values())
    written, found = (said.channel_mean, said.channel_std), (sums.mean, sums.std)
    if not np.allclose(found, written, rtol=1e-6, atol=1e-12):
        yield (
            f"channels have mean {format_numbers(sums.mean)} and std {format_numbers(sums.std)}, and {INFO_FILE} "
            f"says {format_numbers(said.channel_mean)} and {format_numbers(said.channel_std)}"
        )
        return
    e = said.encoding
    # All rows of the smallest file: some rows of each could all be of one class.
    file = min(
        (file for file in records if records[file]["n_rows"]),
        key=lambda file: records[file]["n_rows"],
    )
    rows = add_moment_sums(MomentSums.over(moments, e.shape[-1]) for moments in iterate_moments(file, e))
    if not np.allclose(rows.second, records[file]["sums"].second, rtol=1e-6):
        yield f"the rows of {file.name} are not those that it was written with"
    if not MIN_SCALED_STD <= said.scaled_std <= MAX_SCALED_STD:
        yield (
            f"scaled by {e.scaling_factor} they have a standard deviation of "
            f"{said.scaled_std:.3g}, where a model expects about 1: the scaling factor is of "
            "another VAE"
        )


def add_moment_sums(several: Iterator[MomentSums]) -> MomentSums:
    """All of them together, in their order."""
    total = next(several)
    for one in several:
        total = total + one
    return total


def format_numbers(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(f"{value:.3g}" for value in values)
