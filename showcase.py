"""What a run shows a person: its first words, its sample sheets and its last words.

It neither samples nor writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float, Int
from PIL import Image

import images

if TYPE_CHECKING:
    from train import Trainer

Labels = Sequence[int] | Int[np.ndarray, "n"]
ROWS = 4
COLUMNS = 10


def labels(n_classes: int) -> list[int]:
    """The labels of a sheet: up to ten classes, spread over all, four rows of them.

    Without classes, the null label.
    """
    classes = np.linspace(0, max(0, n_classes - 1), min(n_classes, COLUMNS) or ROWS)
    return classes.astype(int).tolist() * ROWS


def captions(labels: Labels, names: Sequence[str]) -> list[str] | None:
    """The class name of every picture; None where classes have no names."""
    return [names[label] for label in labels] if names else None


def sheet(
    x: Float[np.ndarray, "b h w c"], labels: Sequence[int], names: Sequence[str]
) -> Image.Image:
    """Samples in −1 … 1 as a grid, with the names of their classes."""
    columns = len(labels) // ROWS
    return images.grid(images.to_uint8(x), columns=columns, captions=captions(labels, names))


def greeting(trainer: "Trainer", last: int) -> str:
    """What is trained, on what, from where to where."""
    c, m, source = trainer.config, trainer.model_config, trainer.source
    n_params = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    begin = f"going on at step {trainer.step}" if trainer.step else "starting"
    return (
        f"{c.model}, {n_params / 1e6:.3g} M parameters, {m.dtype}, on {devices}\n"
        f"{source.config.name}: {len(source.train)} training pictures of "
        f"{m.image_size}×{m.image_size}×{m.channels}, {m.n_classes} classes\n"
        f"{begin}: {last} steps of {c.batch_size} pictures, into {trainer.run_dir}"
    )


def farewell(run_dir: Path, step: int) -> str:
    """Where everything is, and what to do next."""
    checkpoint = f"checkpoints/{step}/"
    return f"""
Done: step {step}. Everything is in {run_dir}/
  {"samples/final.png":24} what the model draws; samples/trajectory.gif is its way from noise
  {"metrics.jsonl":24} losses, norms, speed; TensorBoard shows them from the same folder
  {checkpoint:24} weights, their average and the optimizer
Next:
  python generate.py --run {run_dir} --n 64 --out samples.png
  python train.py --resume --run_dir {run_dir} --n_steps {2 * step}"""
