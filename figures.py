"""Figures of a trained run: curves, GIFs and comparison grids.

    python figures.py --run runs/digits-…
    python figures.py --run runs/coco-… --prompts "a cat on a sofa" "two zebras" --out figures/

Training makes those of its records (curves.png and progress.gif) at its end; here the weights are
loaded too. A figure that cannot be made is left out, with a line that says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inference import comparisons, curves, grids, progress
from inference.grids import MAX_GRID_IMAGES
from inference.labels import SampleRequest
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from runtime import cli, parallel, processes
from runtime.errors import UserError
from runtime.files import report_unwritable
from runtime.flags import Derived, again, flag
from training.flag_groups import (
    CheckpointFlags,
    DeviceFlags,
    MovedFlags,
    RequestFlags,
    RunSourceFlags,
    SamplingFlags,
)
from training.session import FIGURES

# Images of a row: as many as a page shows at a size at which their names can be read.
COLUMNS, COLUMNS_OF_LARGE, MAX_SMALL_SIDE = 10, 6, 64
MAX_SIDE = 128  # larger images are shrunk
GIF_ROWS = 2  # of the trajectory, where there are classes to fill them
X0_TIMES = 6
MAX_FRAMES = 51


# --- flags ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FigureFlags:
    """Figures."""

    out: Path | None = flag(Derived("figures/ of the run"), "a folder for them")
    records_only: bool = flag(False, "only those that need no weights: curves.png and progress.gif")
    cfg_scale: float | None = again(SamplingFlags, "cfg_scale")
    n_steps: int | None = again(SamplingFlags, "n_steps")
    fsdp: int | None = again(DeviceFlags, "fsdp")


@dataclass(frozen=True, kw_only=True)
class FiguresConfig(RunSourceFlags, CheckpointFlags, MovedFlags, RequestFlags, FigureFlags):
    """Make the figures of a trained run: curves.png, progress.gif, trajectory.gif, x0.png,
    cfg_sweep.png and denoising.png.
    """

    cfg_sweep: tuple[float, ...] = again(RequestFlags, "cfg_sweep", default=(1.0, 2.0, 4.0, 8.0))
    denoise: tuple[float, ...] = again(RequestFlags, "denoise", default=(0.25, 0.5, 0.75))
    seed: int = again(RequestFlags, "seed", default=0)


def check_flags(config: FiguresConfig) -> None:
    """Raises UserError for flags that cannot work, before anything is loaded."""
    if config.labels and config.prompts:
        raise UserError("--labels are of classes, and prompts are captions; pass one of them")
    if not config.cfg_sweep or set(config.cfg_sweep) == {1}:
        raise UserError("--cfg_sweep: name a scale besides 1, which is no guidance")
    if invalid := [t for t in config.denoise if not 0 < t <= 1]:
        raise UserError(f"--denoise {invalid[0]:g}: a time must be above 0 and at most 1")
    n_columns = max(len(config.labels or config.prompts), COLUMNS)
    n_rows = max(len(config.cfg_sweep), 1 + 2 * len(config.denoise), 2 * X0_TIMES)
    if n_columns * n_rows > MAX_GRID_IMAGES:
        raise UserError(f"a grid of {n_columns * n_rows} images is more than {MAX_GRID_IMAGES}")


# --- the command ----------------------------------------------------------------------------------


class FigureInputs(NamedTuple):
    """Inputs of the figures that need weights.

    Args:
        words: labels or prompts of a row.
        row: the samples of one row of a grid.
    """

    trained: TrainedModel
    words: list[str]
    row: SampleRequest
    plan: SamplingPlan
    config: FiguresConfig


def main(config: FiguresConfig) -> None:
    """Make all figures that can be made."""
    check_flags(config)
    processes.start_backend()
    parallel.enable_compilation_cache()
    trained = TrainedModel.from_run(
        config.run,
        ema=config.ema,
        ema_std=config.ema_std,
        step=config.step,
        base=config.base,
        vae=config.vae,
        text_encoders=config.text_towers,
        fsdp=config.fsdp,
    )
    plan = trained.plan(SamplingOverrides(cfg_scale=config.cfg_scale, n_steps=config.n_steps))
    trained.conditioning.check(labels=config.labels, prompts=config.prompts)
    if config.step is not None and not config.records_only:
        trained.load_weights()  # a checkpoint that is named must exist; without one, see below
    out = config.out or config.run / FIGURES
    with report_unwritable(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, save in FIGURES_OF_RECORDS.items():
        save_or_explain(out / name, lambda path, save=save: save(config.run, path))
    if config.records_only:
        return
    try:
        words = choose_words(config, trained)
        row = make_row(config, trained, words)
        inputs = FigureInputs(trained, words, row, plan, config)
        trained.load_weights()
    except UserError as error:
        print(f"{', '.join(FIGURES_OF_WEIGHTS)} are left out: {error}", flush=True)
        return
    for name, save in FIGURES_OF_WEIGHTS.items():
        save_or_explain(out / name, lambda path, save=save: save(inputs, path))


def save_or_explain(path: Path, save: Callable[[Path], None]) -> None:
    """Save one figure and print its path, or why it is left out.

    Raises:
        UserError: the file cannot be written, as then the others cannot be either.
    """
    message = str(path)
    with report_unwritable(path):
        try:
            save(path)
        except UserError as error:
            message = f"{path.name} is left out: {error}"
    print(message, flush=True)


# --- labels ---------------------------------------------------------------------------------------


def count_columns(trained: TrainedModel) -> int:
    """Return the number of images in a row if no more are named."""
    side = max(trained.space.image_size(trained.model).sides)
    return COLUMNS if side <= MAX_SMALL_SIDE else COLUMNS_OF_LARGE


def choose_words(config: FiguresConfig, trained: TrainedModel) -> list[str]:
    """Return the labels or prompts of a row; none for an unconditional model."""
    given = list(config.labels or config.prompts)
    open_split = partial(comparisons.open_eval_split, trained)
    return given or trained.conditioning.examples(count_columns(trained), open_split)


def make_row(config: FiguresConfig, trained: TrainedModel, words: list[str]) -> SampleRequest:
    """Request one sample of each label or prompt, or as many as fill a row.

    Raises:
        UserError: captions cannot be encoded.
    """
    n, conditioning = count_columns(trained), trained.conditioning
    if words:
        n = max(1, n // len(words)) * len(words)
    labels, prompts = ((), words) if conditioning.takes_prompts else (words, ())
    return conditioning.request(n, labels=labels, prompts=prompts, seed=config.seed)


# --- figures of records ---------------------------------------------------------------------------


def save_progress(run: Path, path: Path) -> None:
    """Make a GIF of the grids that training saved."""
    record = curves.read_metrics(run / "metrics.jsonl")
    last_step = max((line["step"] for line in record), default=None)
    progress.save_progress_gif(run / "samples", path, last_step=last_step)


# --- figures of weights ---------------------------------------------------------------------------


def save_trajectory(inputs: FigureInputs, path: Path) -> None:
    """Make a GIF of the trajectory from noise, a frame per step."""
    trained, row, plan = inputs.trained, inputs.row, inputs.plan
    request = row._replace(label_index=np.tile(row.label_index, GIF_ROWS))
    rows = request.rows(0, len(request.label_index))
    states = trained.sample_rows(
        rows,
        plan,
        trajectory=True,
        decode=False,  # only the frames are decoded, below
    ).trajectory
    assert states is not None
    times = plan.sampler.state_times()
    frames = []
    for i in comparisons.evenly_spaced(len(states), MAX_FRAMES):
        images = trained.to_uint8(trained.space.to_images(states[i]))
        grid = grids.image_grid(
            grids.shrink_images(images, MAX_SIDE),
            columns=len(row.label_index),
            captions=request.grid_captions,
        )
        t = float(times[i])
        frames.append(grids.add_header(grid, f"t = {t:.2f}", progress=1 - t))
    grids.save_gif(frames, path)


def save_x0(inputs: FigureInputs, path: Path) -> None:
    """Make a grid of the model's x0 predictions along the trajectory."""
    grid = comparisons.compare_steps(
        inputs.trained, inputs.row, inputs.plan, X0_TIMES, side=MAX_SIDE
    )
    grids.save_png(grid, path)


def save_cfg_sweep(inputs: FigureInputs, path: Path) -> None:
    """Make a grid of the same noise at several guidance scales."""
    trained, row, plan, config = inputs.trained, inputs.row, inputs.plan, inputs.config
    if not trained.model.is_conditional:
        raise UserError("an unconditional model cannot be guided")
    for scale in config.cfg_sweep:
        trained.check_scale(scale)
    grid = comparisons.compare_scales(trained, row, plan, config.cfg_sweep, side=MAX_SIDE)
    grids.save_png(grid, path)


def save_denoising(inputs: FigureInputs, path: Path) -> None:
    """Make a grid of real images, noised more or less and sampled from there."""
    trained, row, plan, config = inputs.trained, inputs.row, inputs.plan, inputs.config
    class_ids = trained.conditioning.class_ids(inputs.words)
    real = comparisons.load_real_images(trained, class_ids, len(row.label_index))
    grid = comparisons.compare_denoising(
        trained, real, plan, config.denoise, seed=config.seed, side=MAX_SIDE
    )
    grids.save_png(grid, path)


FIGURES_OF_RECORDS = {
    curves.CURVES_FILE: curves.save_curves,
    progress.PROGRESS_FILE: save_progress,
}
FIGURES_OF_WEIGHTS = {
    "trajectory.gif": save_trajectory,
    "x0.png": save_x0,
    "cfg_sweep.png": save_cfg_sweep,
    "denoising.png": save_denoising,
}

if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(FiguresConfig)))
