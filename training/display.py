"""Texts and grids that a training run shows: first message, grids of samples, last message.

Plain values in, texts and images out. It neither samples nor writes files.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Num
from PIL import Image

from data.caption_cache import CaptionStore
from data.rows import Source
from datasets_config import LatentEncoding
from inference import grids
from inference.codec import Codec
from inference.labels import DisplayLabels, label_texts
from model import ModelConfig
from networks import autoencoder
from runtime import parallel
from training.config import TrainConfig

ROWS = 4
COLUMNS = 10


def grid_labels(
    n_classes: int, captions: Sequence[Sequence[str]] | None = None
) -> list[int] | list[str]:
    """The labels of a grid of samples, row by row: up to ten classes spread over all of them, or
    ten captions, four times. Without either, null labels.

    Args:
        captions: several per row of the evaluation split, where the model is trained on captions.
    """
    if captions is not None:
        distinct = dict.fromkeys(texts[0] for texts in captions)
        return list(distinct)[:COLUMNS] * ROWS
    classes = np.linspace(0, max(0, n_classes - 1), min(n_classes, COLUMNS) or ROWS)
    return classes.astype(int).tolist() * ROWS


def sample_grid(
    x: Float[np.ndarray, "b h w c"], labels: DisplayLabels, names: Sequence[str]
) -> Image.Image:
    """Arrange samples in −1 … 1 in four rows, with their labels below."""
    columns = len(labels) // ROWS
    return grids.image_grid(grids.to_uint8(x), columns=columns, captions=label_texts(labels, names))


def decode_rows(
    stored: Num[np.ndarray, "b h w k"], encoding: LatentEncoding | None, codec: Codec | None
) -> Float[np.ndarray, "b H W c"]:
    """Rows of a dataset as images in −1 … 1: uint8 images, or the means of latents decoded."""
    x = stored.astype(np.float32)
    if encoding is None or codec is None:
        return x / 127.5 - 1
    means = x[..., : encoding.shape[-1]]
    return codec.decode(
        autoencoder.scale_latents(
            means, scaling_factor=encoding.scaling_factor, shift_factor=encoding.shift_factor
        )
    )


def start_message(
    config: TrainConfig,
    model: ModelConfig,
    source: Source,
    captions: CaptionStore | None,
    *,
    n_params: int,
    step: int,
    last: int,
    run_dir: Path,
) -> str:
    """Describe the model, the dataset and the run from `step` to step `last`."""
    devices = f"{parallel.devices().count} × {parallel.devices().kind}"
    part = f"the first {config.batch_size} of " if config.overfit_batch else ""
    begin = f"resuming at step {step}" if step else "starting"
    return (
        f"{config.model}, {n_params / 1e6:.3g} M parameters, {model.dtype}, on {devices}\n"
        f"{source.config.name}: {part}{len(source.train)} training "
        f"{_describe_rows(source.config.encoding)} of "
        f"{model.image_size}×{model.image_size}×{model.channels}, "
        f"{_describe_conditioning(model, captions)}\n"
        f"{begin}: {last} steps of {config.batch_size} images, into {run_dir}"
    )


def _describe_rows(encoding: LatentEncoding | None) -> str:
    if encoding is None:
        return "images"
    return f"latents ({encoding.image_size}×{encoding.image_size} images through {encoding.vae})"


def _describe_conditioning(model: ModelConfig, captions: CaptionStore | None) -> str:
    if captions is None:
        return f"{model.n_classes or 'no'} classes"
    cut = f"; {captions.n_truncated} are longer and were cut" if captions.n_truncated else ""
    return f"captions, padded to {captions.length} tokens{cut}"


def end_message(run_dir: Path, step: int, *, has_captions: bool) -> str:
    """List the files of a finished run, and commands to run next."""
    checkpoint = f"checkpoints/{step}/"
    prompts = ' --prompts "…"' if has_captions else ""
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
  python generate.py --run {run_dir}{prompts} --n 64 --out samples.png
  python figures.py --run {run_dir}
  python train.py --resume --run_dir {run_dir} --n_steps {2 * step}"""
