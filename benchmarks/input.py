"""Compare the speed of the input pipeline with the speed at which a step consumes images.

    python benchmarks/input.py

Each row is a way to feed a trainer: "alone" runs the pipeline with nothing else, "step" trains on
one batch that is on the device already, "fed" trains on the pipeline's batches. Where fed / step is
1, the input costs nothing. Images are synthetic: smooth colours with grain, of a photograph's size.
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime import cli, parallel
from runtime.flags import flag
from train import Trainer
from training.config import TrainConfig


@dataclass(frozen=True)
class InputConfig:
    """Measure how fast batches are made, and how fast they are used."""

    seconds: float = flag(2.0, "about how long each of a row's measurements takes")
    rounds: int = flag(3, "of each measurement; their median is reported")


SMALL = {"model": "DiT-Ti/8", "batch_size": 64, "image_size": 32}
PHOTOS = {"model": "DiT-Ti/8", "batch_size": 32, "image_size": 64}
# Each row's dataset and flags. The names are keys of the result.
ROWS = {
    "digits, held": ("digits", {"model": "DiT-Ti/2", "batch_size": 64}),
    "32 px PNG, held": ("small", SMALL),
    "32 px PNG, in device memory": ("small", SMALL | {"cache_on_device": True}),
    "32 px PNG, streamed, 1 worker": ("small", SMALL | {"streaming": True, "n_workers": 1}),
    "256 px JPEG, threads": ("photos", PHOTOS | {"in_memory": False, "n_workers": 0}),
    "256 px JPEG, 1 worker": ("photos", PHOTOS | {"in_memory": False, "n_workers": 1}),
    "256 px JPEG, 2 workers": ("photos", PHOTOS | {"in_memory": False, "n_workers": 2}),
    "256 px JPEG, streamed, 2 workers": ("photos", PHOTOS | {"streaming": True, "n_workers": 2}),
}


def write_synthetic_dataset(folder: Path, *, n: int, size: int, file_format: str) -> str:
    """Write n synthetic images of ten classes as Parquet; returns the dataset's name."""
    rng = np.random.default_rng(0)

    def encode_image() -> bytes:
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (size, size, 3))
        file = io.BytesIO()
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(file, file_format)
        return file.getvalue()

    features = Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    images = [{"bytes": encode_image(), "path": None} for _ in range(n)]
    data = Dataset.from_dict({"image": images, "label": [i % 10 for i in range(n)]}, features)
    (folder / "data").mkdir(parents=True)
    data.to_parquet(folder / "data/train.parquet", batch_size=100)
    return f"folder:{folder}"


def measure_rate(batches: Iterator, seconds: float, batch_size: int) -> float:
    """Measure the images per second of an endless iterator, after its first batch."""
    next(batches)
    n, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        next(batches)
        n += 1
    return n * batch_size / (now - start)


def measure_feeding(trainer: Trainer, config: InputConfig) -> dict[str, float]:
    """Measure the images per second of the pipeline, of the step, and of both together."""
    endless = 10**9

    def train_on(batches: Iterator) -> Iterator:
        """Wait one step behind, as `Trainer.fit` does: the device always has the next one."""
        pending_report = None
        for batch in batches:
            report = trainer.train_step(batch)
            jax.block_until_ready(pending_report)
            pending_report = report
            yield

    def repeat_one_batch() -> Iterator:
        batch = parallel.shard_batch(next(trainer.batches(0, 1)), trainer.mesh)
        while True:
            yield batch

    def prefetch() -> Iterator:
        return parallel.prefetch_to_device(trainer.batches(0, endless), trainer.mesh)

    rates_by_name: dict[str, list[float]] = {"alone": [], "step": [], "fed": []}
    for _ in range(config.rounds):
        for name, batches in (
            ("alone", trainer.batches(0, endless)),
            ("step", train_on(repeat_one_batch())),
            ("fed", train_on(prefetch())),
        ):
            rate = measure_rate(batches, config.seconds, trainer.config.batch_size)
            rates_by_name[name].append(rate)
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    medians = {name: median(rates) for name, rates in rates_by_name.items()}
    ratios = [f / s for f, s in zip(rates_by_name["fed"], rates_by_name["step"], strict=True)]
    return medians | {"fed_per_step": median(ratios)}


def main() -> None:
    config = cli.parse_flags(InputConfig)
    results = {}
    disable_progress_bars()
    print(f"{'images/s':34}{'alone':>12}{'step':>10}{'fed':>10}{'fed / step':>12}")
    with tempfile.TemporaryDirectory() as folder:
        names = {
            "digits": "digits",
            "small": write_synthetic_dataset(
                Path(folder) / "small", n=5000, size=32, file_format="PNG"
            ),
            "photos": write_synthetic_dataset(
                Path(folder) / "photos", n=1500, size=256, file_format="JPEG"
            ),
        }
        for row, (data, settings) in ROWS.items():
            trainer = Trainer(
                TrainConfig(dataset_name=names[data], run_dir=Path(folder) / "run", **settings)
            )
            r = measure_feeding(trainer, config)
            results[row] = r
            print(
                f"{row:34}{r['alone']:12,.0f}{r['step']:10,.0f}{r['fed']:10,.0f}"
                f"{r['fed_per_step']:12.2f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "input", "device": jax.devices()[0].device_kind} | results))


if __name__ == "__main__":
    cli.run_command(main)
