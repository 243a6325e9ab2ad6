"""Texts and grids that a training run shows: first message, grids of samples, last message.

Plain values in, texts and images out. It neither samples nor writes files.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from data import bad_rows
from data.rows import Source
from inference import grids
from inference.conditioning import Conditioning
from inference.labels import DisplayLabels, grid_texts
from inference.spaces import Space
from model import ModelConfig
from runtime import parallel
from runtime.image_size import format_shape
from training.config import TrainConfig

NO_FP8 = "this device has no units for fp8: the same numbers are computed, slowly\n"
ROWS = 4
COLUMNS = 10


def sample_grid(
    x: Float[np.ndarray, "b h w c"], labels: DisplayLabels, names: Sequence[str]
) -> Image.Image:
    """Arrange samples in −1 … 1 in four rows, with their labels below."""
    columns = len(labels) // ROWS
    return grids.image_grid(grids.to_uint8(x), columns=columns, captions=grid_texts(labels, names))


def start_message(
    config: TrainConfig,
    model: ModelConfig,
    source: Source,
    space: Space,
    conditioning: Conditioning,
    *,
    n_params: int,
    n_trained: int,
    step: int,
    last: int,
    run_dir: Path,
) -> str:
    """Describe the model, the dataset and the run from `step` to step `last`."""
    devices = f"{parallel.devices().count} × {parallel.devices().kind}"
    part = f"the first {config.batch_size} of " if config.overfit_batch else ""
    begin = f"resuming at step {step}" if step else "starting"
    precision = f"{model.dtype} with blocks in fp8" if model.fp8 else model.dtype
    trained = ""
    if model.lora:
        trained = f", of which {n_trained / 1e6:.3g} M are trained (LoRA of rank {model.lora.rank})"
    is_emulated = model.fp8 and not parallel.devices().has_fp8
    return (
        f"{config.model}, {n_params / 1e6:.3g} M parameters{trained}, {precision}, on {devices}\n"
        f"{NO_FP8 if is_emulated else ''}"
        f"{source.config.name}: {part}{len(source.train)} training "
        f"{space.title} of "
        f"{format_shape(model.image_shape)}, "
        f"{conditioning.title}\n"
        f"{bad_rows.summary(source)}"
        f"{begin}: {last} steps of {config.batch_size} images, into {run_dir}"
    )


def end_message(run_dir: Path, step: int, *, example: str = "") -> str:
    """List the files of a finished run, and commands to run next."""
    checkpoint, run = f"checkpoints/{step}/", shlex.quote(str(run_dir))
    words = f" {example}" if example else ""
    files = {
        "samples/final.png": "samples; samples/trajectory.gif shows them emerge from noise",
        "figures/curves.png": "losses",
        "figures/progress.gif": "the samples over time",
    }
    # A short run has no losses to plot, and a figure that fails does not fail the run.
    lines = [f"  {name:24} {text}\n" for name, text in files.items() if (run_dir / name).exists()]
    return f"""
Done: step {step}. Everything is in {run_dir}/
{"".join(lines)}  {"metrics.jsonl":24} the metrics; TensorBoard reads them from the same folder
  {checkpoint:24} weights, their average and the optimizer's state
Next:
  python generate.py --run {run}{words} --n 64 --out samples.png
  python figures.py --run {run}
  python train.py --resume --run_dir {run} --n_steps {2 * step}"""
