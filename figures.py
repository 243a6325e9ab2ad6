"""A trained run → the figures that people look at: curves, films and sheets.

    python figures.py --run runs/digits-…
    python figures.py --run runs/coco-… --prompts "a cat on a sofa" "two zebras" --out figures/

Training draws at its end what needs its records alone (curves.png and progress.gif); here the
weights are loaded too. What cannot be had of a run is left out, with a line that says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inference import comparisons, curves, grids
from inference import labels as inference_labels
from inference import progress as inference_progress
from inference.grids import MAX_GRID_IMAGES
from inference.labels import SampleRequest
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from runtime import cli, parallel
from runtime.cli import FreeText
from runtime.errors import UserError
from runtime.files import report_unwritable
from training.session import FIGURES

# Of a row: as many pictures as a page shows at a size at which their names can be read.
COLUMNS, COLUMNS_OF_LARGE, SMALL_SIDE, SIDE = 10, 6, 64, 128
ROWS_OF_FILM = 2  # where there are classes to fill them
ROWS_OF_STEPS = 6
MOST_FRAMES = 51


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the figures of a trained run: curves.png, progress.gif, trajectory.gif, x0.png,
    cfg_sweep.png and denoising.png.

    Args:
        run: the run's folder.
        out: a folder for them; by default figures/ in the run's.
        records_only: only what needs no weights: curves.png and progress.gif.
        labels: class names or numbers; by default up to ten, spread over all.
        prompts: captions, for a run that was trained on them, each in quotes; by default the first
            ones of its evaluation split.
        cfg_sweep: scales of guidance, the rows of cfg_sweep.png.
        denoise: times in 0 … 1, up to which real pictures are noised for denoising.png.
        cfg_scale: guidance of all others; 1 is none.
        n_steps: solver steps.
        seed: of the noise.
        ema: use the averaged weights; False uses the raw ones.
        step: of the checkpoint; the newest if not given.
        vae: where the VAE of a run on latents is now, if it has moved.
        text_towers: where the run's text encoders are now, if they have moved.
        fsdp: devices that share one copy of the weights.
    """

    run: Path
    out: Path | None = None
    records_only: bool = False
    labels: tuple[str, ...] = ()
    prompts: tuple[FreeText, ...] = ()
    cfg_sweep: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    denoise: tuple[float, ...] = (0.25, 0.5, 0.75)
    cfg_scale: float | None = None
    n_steps: int | None = None
    seed: int = 0
    ema: bool = True
    step: int | None = None
    vae: str | None = None
    text_towers: tuple[str, ...] = ()
    fsdp: int | None = None


FILLED = {"out": "figures/ of the run", "cfg_scale": "the run's own", "n_steps": "the run's own"}
FILLED |= {"fsdp": "the run's own, as far as there are so many"}


class Scene(NamedTuple):
    """What a run's pictures are drawn from, of what and how: as many subjects as stand in a row."""

    drawable: TrainedModel
    row: SampleRequest
    how: SamplingPlan
    config: FiguresConfig


def main(config: FiguresConfig) -> None:
    """Draw all that can be had."""
    c = config
    check(c)
    parallel.enable_compilation_cache()
    where = {"vae": c.vae, "text_towers": c.text_towers, "fsdp": c.fsdp}
    drawable = TrainedModel.from_run(c.run, ema=c.ema, step=c.step, **where)
    how = drawable.plan(SamplingOverrides(cfg_scale=c.cfg_scale, n_steps=c.n_steps))
    words = subject_words(c, drawable)
    if c.step is not None and not c.records_only:
        _ = drawable.params  # or that checkpoint is not to be had
    out = c.out or c.run / FIGURES
    with report_unwritable(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, draw in OF_RECORDS.items():
        attempt(out / name, lambda path, draw=draw: draw(c.run, path))
    if c.records_only:
        return
    try:
        scene = Scene(drawable, row_of(c, drawable, words), how, c)
        _ = drawable.params
    except UserError as error:
        print(f"{', '.join(OF_WEIGHTS)} are left out: {error}", flush=True)
        return
    for name, draw in OF_WEIGHTS.items():
        attempt(out / name, lambda path, draw=draw: draw(scene, path))


def attempt(path: Path, draw: Callable[[Path], None]) -> None:
    """One figure, and a line that tells where it is, or why it is not."""
    told: object = path
    with report_unwritable(path):  # which ends the command: there will be no room for the others
        try:
            draw(path)
        except UserError as error:
            told = f"{path.name} is left out: {error}"
    print(told, flush=True)


def check(config: FiguresConfig) -> None:
    """Refuse what cannot be before anything is loaded."""
    if config.labels and config.prompts:
        raise UserError("--labels are of classes, and prompts are captions; pass one of them")
    if not config.cfg_sweep or set(config.cfg_sweep) == {1}:
        raise UserError("--cfg_sweep: name a scale besides 1, which is no guidance")
    if wrong := [t for t in config.denoise if not 0 < t <= 1]:
        raise UserError(f"--denoise {wrong[0]:g}: a time must be above 0 and at most 1")
    n = max(len(config.labels or config.prompts), COLUMNS)
    n_rows = max(len(config.cfg_sweep), 1 + 2 * len(config.denoise), 2 * ROWS_OF_STEPS)
    if n * n_rows > MAX_GRID_IMAGES:
        raise UserError(f"a sheet of {n * n_rows} pictures is more than {MAX_GRID_IMAGES}")


# --- what the pictures are of ---------------------------------------------------------------------


def subject_words(config: FiguresConfig, drawable: TrainedModel) -> list[str]:
    """Labels or prompts; none where the model is told nothing, or captions that are not named.

    Raises:
        UserError: the model is not told such, or there is no such class.
    """
    c, names, n_classes = config, drawable.label_names, drawable.model.n_classes
    if drawable.model.text_width:
        if c.labels:
            raise UserError('this run was trained on captions; say what to draw by --prompts "…"')
        return list(c.prompts)
    if c.prompts:
        raise UserError("this run was trained without captions; choose classes by --labels")
    inference_labels.label_ids(c.labels, names, n_classes)
    spread = comparisons.evenly_spaced(n_classes, columns(drawable)).tolist() if n_classes else []
    return list(c.labels) or [names[i] if names else str(i) for i in spread]


def columns(drawable: TrainedModel) -> int:
    """Pictures of a row, if no more are named."""
    encoding = drawable.encoding
    side = encoding.image_size if encoding else drawable.model.image_size
    return COLUMNS if side <= SMALL_SIDE else COLUMNS_OF_LARGE


def row_of(config: FiguresConfig, drawable: TrainedModel, words: list[str]) -> SampleRequest:
    """A picture of each, or as many as fill a row.

    Raises:
        UserError: captions are not to be had, or not to be encoded.
    """
    n, seed, text = columns(drawable), config.seed, drawable.model.text_width
    if text and not words:
        captions = comparisons.open_eval_split(drawable).captions
        words = list(dict.fromkeys(several[0] for several in captions))[:n]
    if words:
        n = max(1, n // len(words)) * len(words)
    return (inference_labels.request_prompts if text else inference_labels.request_labels)(
        drawable, words, n, seed=seed
    )


# --- figures of records ---------------------------------------------------------------------------


def progress(run: Path, path: Path) -> None:
    """The samples over time."""
    record = curves.read_metrics(run / "metrics.jsonl")
    inference_progress.save_progress_gif(
        run / "samples", path, last=max((line["step"] for line in record), default=None)
    )


# --- figures of weights ---------------------------------------------------------------------------


def trajectory(scene: Scene, path: Path) -> None:
    """The way from noise, a frame for a step."""
    drawable, row, how, _ = scene
    of = row._replace(which=np.tile(row.which, ROWS_OF_FILM))
    labels, told = of.rows(0, len(of.which))
    told |= {"trajectory": True, "codec": None}  # only what is shown is decoded
    states = drawable.sample(labels, how, **told).trajectory
    assert states is not None
    times, frames = how.sampler.state_times(), []
    for i in comparisons.evenly_spaced(len(states), MOST_FRAMES):
        x = grids.shrink_images(grids.to_uint8(comparisons.decode_images(drawable, states[i])), SIDE)
        sheet = grids.image_grid(x, columns=len(row.which), captions=of.captions)
        t = float(times[i])
        frames.append(grids.add_header(sheet, f"t = {t:.2f}", share=1 - t))
    grids.save_gif(frames, path)


def x0(scene: Scene, path: Path) -> None:
    """What the model takes x for on that way."""
    sheet = comparisons.compare_steps(scene.drawable, scene.row, scene.how, ROWS_OF_STEPS, side=SIDE)
    grids.save_png(sheet, path)


def cfg_sweep(scene: Scene, path: Path) -> None:
    """The same noise at several scales of guidance."""
    drawable, row, how, c = scene
    if not (drawable.model.n_classes or drawable.model.text_width):
        raise UserError("an unconditional model has no label to be guided by")
    grids.save_png(comparisons.compare_scales(drawable, row, how, c.cfg_sweep, side=SIDE), path)


def denoising(scene: Scene, path: Path) -> None:
    """Real pictures, noised more or less and drawn from there."""
    drawable, row, how, c = scene
    ids = np.asarray(row.told)[row.which].tolist() if drawable.model.n_classes else []
    real = comparisons.load_real_images(drawable, ids, len(row.which))
    told = {"seed": c.seed, "side": SIDE}
    grids.save_png(comparisons.compare_denoising(drawable, real, how, c.denoise, **told), path)


OF_RECORDS = {curves.CURVES_FILE: curves.save_curves, inference_progress.PROGRESS_FILE: progress}
OF_WEIGHTS = {
    "trajectory.gif": trajectory,
    "x0.png": x0,
    "cfg_sweep.png": cfg_sweep,
    "denoising.png": denoising,
}

if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(FiguresConfig, shown_defaults=FILLED)))
