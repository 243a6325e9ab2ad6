"""What a run shows a person: its first words, its sample sheets and its last words.

It neither samples nor writes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from inference import grids
from networks import autoencoder

if TYPE_CHECKING:
    from train import Trainer
from inference.labels import ShownLabels, label_texts

ROWS = 4
COLUMNS = 10


def labels(trainer: "Trainer") -> list[int] | list[str]:
    """The labels of a sheet: up to ten classes, spread over all, or captions of the evaluation
    split; four rows of them. Without either, the null label. Of a run on one batch, its own.
    """
    if trainer.config.overfit_batch:
        return trainer.data.labels(0)[: ROWS * COLUMNS]
    if trainer.encoded:
        captions = dict.fromkeys(several[0] for several in trainer.source.eval.captions)
        return list(captions)[:COLUMNS] * ROWS
    n_classes = trainer.model_config.n_classes
    classes = np.linspace(0, max(0, n_classes - 1), min(n_classes, COLUMNS) or ROWS)
    return classes.astype(int).tolist() * ROWS


def sheet(
    x: Float[np.ndarray, "b h w c"], labels: ShownLabels, names: Sequence[str]
) -> Image.Image:
    """Samples in −1 … 1 as a grid, with what they are of."""
    columns = len(labels) // ROWS
    return grids.grid(grids.to_uint8(x), columns=columns, captions=label_texts(labels, names))


def batch_sheet(trainer: "Trainer") -> Image.Image:
    """The pictures of the one batch that is trained on, where samples of them will stand."""
    shown = labels(trainer)
    x = trainer.data.first_rows(0, len(shown)).image.astype(np.float32)
    if (e := trainer.dataset.encoding) and trainer.codec:
        how = {"scaling_factor": e.scaling_factor, "shift_factor": e.shift_factor}
        x = trainer.codec.decode(autoencoder.scale(x[..., : e.shape[-1]], **how))
    else:
        x = x / 127.5 - 1
    return sheet(x, shown, trainer.dataset.label_names)


def greeting(trainer: "Trainer", last: int) -> str:
    """What is trained, on what, from where to where."""
    c, m, source = trainer.config, trainer.model_config, trainer.source
    n_params = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    begin = f"going on at step {trainer.step}" if trainer.step else "starting"
    n_rows = f"the first {c.batch_size} of " * c.overfit_batch + str(len(source.train))
    return (
        f"{c.model}, {n_params / 1e6:.3g} M parameters, {m.dtype}, on {devices}\n"
        f"{source.config.name}: {n_rows} training {subject(trainer)} of "
        f"{m.image_size}×{m.image_size}×{m.channels}, {told(trainer)}\n"
        f"{begin}: {last} steps of {c.batch_size} pictures, into {trainer.run_dir}"
    )


def subject(trainer: "Trainer") -> str:
    """What there is to learn."""
    if not (e := trainer.dataset.encoding):
        return "pictures"
    return f"latents ({e.image_size}×{e.image_size} pictures through {e.vae})"


def told(trainer: "Trainer") -> str:
    """What the model is told of a picture."""
    if not trainer.encoded:
        return f"{trainer.model_config.n_classes or 'no'} classes"
    n_cut = trainer.encoded.n_cut
    cut = f"; {n_cut} are longer and were cut" if n_cut else ""
    return f"captions, padded to {trainer.encoded.length} tokens{cut}"


def farewell(trainer: "Trainer") -> str:
    """Where everything is, and what to do next."""
    run_dir, step = trainer.run_dir, trainer.step
    checkpoint = f"checkpoints/{step}/"
    prompts = ' --prompts "…"' if trainer.encoded else ""
    shown = {
        "samples/final.png": "what the model draws; samples/trajectory.gif is its way from noise",
        "figures/curves.png": "losses",
        "figures/progress.gif": "the samples over time",
    }
    # A short run has no losses to draw, and what cannot be drawn fails no run.
    there = [f"  {n:24} {what}\n" for n, what in shown.items() if (run_dir / n).exists()]
    return f"""
Done: step {step}. Everything is in {run_dir}/
{"".join(there)}  {"metrics.jsonl":24} what was recorded; TensorBoard shows it from the same folder
  {checkpoint:24} weights, their average and the optimizer
Next:
  python generate.py --run {run_dir}{prompts} --n 64 --out samples.png
  python figures.py --run {run_dir}
  python train.py --resume --run_dir {run_dir} --n_steps {2 * step}"""
