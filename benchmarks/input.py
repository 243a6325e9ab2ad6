"""Does the input keep up? Images/s of the pipeline alone, beside those that the step consumes.

    python benchmarks/input.py

Each row is a way to feed a trainer: "alone" runs the pipeline with nothing else, "step" trains on
one batch that is there already, "fed" trains on what the pipeline delivers. Where fed / step is 1,
the input costs nothing. Pictures are made up: smooth colours with grain, of a photograph's size.
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
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
from PIL import Image as Picture

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime import cli, parallel
from train import Trainer
from training.config import TrainConfig


@dataclass(frozen=True)
class InputConfig:
    """Measure how fast batches are made, and how fast they are used.

    Args:
        seconds: that each of a row's measurements takes, about.
        rounds: of each, of which the median counts.
    """

    seconds: float = 2.0
    rounds: int = 3


SMALL = {"model": "DiT-Ti/8", "batch_size": 64, "image_size": 32}
PHOTOS = {"model": "DiT-Ti/8", "batch_size": 32, "image_size": 64}
ROWS = {  # which data, and how they are fed
    "digits, held": ("digits", {"model": "DiT-Ti/2", "batch_size": 64}),
    "32 px PNG, held": ("small", SMALL),
    "32 px PNG, in device memory": ("small", SMALL | {"cache_on_device": True}),
    "32 px PNG, streamed, 1 worker": ("small", SMALL | {"streaming": True, "n_workers": 1}),
    "256 px JPEG, threads": ("photos", PHOTOS | {"in_memory": False, "n_workers": 0}),
    "256 px JPEG, 1 worker": ("photos", PHOTOS | {"in_memory": False, "n_workers": 1}),
    "256 px JPEG, 2 workers": ("photos", PHOTOS | {"in_memory": False, "n_workers": 2}),
    "256 px JPEG, streamed, 2 workers": ("photos", PHOTOS | {"streaming": True, "n_workers": 2}),
}


def write(folder: Path, *, n: int, size: int, form: str) -> str:
    """n made-up pictures of ten classes as Parquet; returns the dataset's name."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = Picture.fromarray(coarse).resize((size, size), Picture.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (size, size, 3))
        file = io.BytesIO()
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Picture.fromarray(pixels).save(file, form)
        return file.getvalue()

    features = Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    cells = [{"bytes": picture(), "path": None} for _ in range(n)]
    data = Dataset.from_dict({"image": cells, "label": [i % 10 for i in range(n)]}, features)
    (folder / "data").mkdir(parents=True)
    data.to_parquet(folder / "data/train.parquet", batch_size=100)
    return f"folder:{folder}"


def per_second(batches: Iterator, seconds: float, batch_size: int) -> float:
    """Images/s of an endless iterator, after its first batch."""
    next(batches)
    n, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        next(batches)
        n += 1
    return n * batch_size / (now - start)


def measure(trainer: Trainer, config: InputConfig) -> dict[str, float]:
    """Images/s alone, of the step, and of both together."""
    endless = 10**9

    def trained(batches: Iterator) -> Iterator:
        """One step behind, as `Trainer.fit` is: the device always has the next one."""
        unread = None
        for batch in batches:
            report = trainer.train_step(batch)
            jax.block_until_ready(unread)
            unread = report
            yield

    def same() -> Iterator:
        batch = parallel.shard_batch(next(trainer.batches(0, 1)), trainer.mesh)
        while True:
            yield batch

    def fed() -> Iterator:
        return parallel.prefetch_to_device(trainer.batches(0, endless), trainer.mesh)

    found: dict[str, list[float]] = {"alone": [], "step": [], "fed": []}
    for _ in range(config.rounds):
        for name, batches in (
            ("alone", trainer.batches(0, endless)),
            ("step", trained(same())),
            ("fed", trained(fed())),
        ):
            rate = per_second(batches, config.seconds, trainer.config.batch_size)
            found[name].append(rate)
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    rates = {name: median(several) for name, several in found.items()}
    ratios = [f / s for f, s in zip(found["fed"], found["step"], strict=True)]
    return rates | {"fed_per_step": median(ratios)}


def main() -> None:
    config = cli.parse_flags(InputConfig)
    results = {}
    disable_progress_bars()
    print(f"{'images/s':34}{'alone':>12}{'step':>10}{'fed':>10}{'fed / step':>12}")
    with tempfile.TemporaryDirectory() as folder:
        names = {
            "digits": "digits",
            "small": write(Path(folder) / "small", n=5000, size=32, form="PNG"),
            "photos": write(Path(folder) / "photos", n=1500, size=256, form="JPEG"),
        }
        for row, (data, settings) in ROWS.items():
            trainer = Trainer(
                TrainConfig(dataset_name=names[data], run_dir=Path(folder) / "run", **settings)
            )
            r = results[row] = measure(trainer, config)
            print(
                f"{row:34}{r['alone']:12,.0f}{r['step']:10,.0f}{r['fed']:10,.0f}"
                f"{r['fed_per_step']:12.2f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "input", "device": jax.devices()[0].device_kind} | results))


if __name__ == "__main__":
    cli.run_command(main)
