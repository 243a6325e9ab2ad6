"""A trained run → pictures.

    python generate.py --run runs/digits --labels 3 7 --n 16 --cfg_scale 2 --out grid.png
    python generate.py --run runs/coco --prompts "a cat on a sofa, from above" --n 4
    python generate.py --run runs/cifar10 --n 50000 --out samples/
    python generate.py --run runs/cifar10 --labels cat ship --cfg_sweep 1 2 4 8 --out sweep.png

Stop it whenever you like: with an .npz or a folder as --out, the same command goes on.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

import cli
import drawing
import drawn
import images
import parallel
import sheets
import subjects
from drawable import Drawable, How, Wishes
from drawn import Draw
from errors import UserError
from metrics.pictures import Batch
from run_folder import unwritable
from subjects import Subjects

MOST_SHOWN = 400  # pictures of a grid or a sheet
N, N_OF_SHEET = 16, 10


@dataclass(frozen=True)
class GenerateConfig:
    """Draw pictures from a trained run.

    Args:
        run: the run's folder.
        labels: class names or numbers; all classes if not given. Each gets an equal share of n.
        prompts: captions, for a run that was trained on them; each in quotes.
        negative_prompt: a caption that guidance leads away from, in place of the empty one.
        text_towers: where the run's text towers are now, if they have moved.
        vae: where the VAE of a run on latents is now, if it has moved.
        n: how many pictures; of a sheet, how many columns.
        seed: of the noise. The same seed gives the same pictures.
        seeds: one for each picture, in place of n and seed: a picture is then the same whatever
            else is drawn, and that of --seed with n 1.
        out: where they go: .png is a grid with class names or prompts; .npz holds arr_0 (uint8
            images, n h w c) and arr_1 (labels, or the prompts' places); a folder gets a file for
            each, and card.json with all that they depend on. An interrupted .npz or folder goes on.
        trajectory: a .gif of the way from noise to pictures.
        x0: a .gif of what each step on that way takes the pictures for.
        cfg_sweep: scales of guidance: a sheet with a row for each, from the same noise.
        denoise: times in 0 … 1: a sheet of real pictures of the evaluation split, noised up to
            each time, and what the model makes of them from there. --labels chooses classes.
        cfg_scale: guidance scale; 1 is none.
        interval: guide between two times only, such as 0.2 0.8; 1 is noise.
        guided_channels: guide the first so many; by default all. Published DiTs are for 3.
        solver: euler or heun, or ddpm or ddim after training by DDPM.
        n_steps: solver steps.
        shift: of rectified flow's time grid; above 1 spends more steps near the noise.
        eta: fresh noise of ddim, from 0 (none) to 1 (as much as ddpm).
        ema: use the averaged weights; False uses the raw ones.
        step: of the checkpoint; the newest if not given.
        batch_size: pictures drawn at a time, on all devices together.
        fsdp: devices that share one copy of the weights.
    """

    run: Path
    labels: tuple[str, ...] = ()
    prompts: tuple[cli.Text, ...] = ()
    negative_prompt: cli.Text | None = None
    text_towers: tuple[str, ...] = ()
    vae: str | None = None
    n: int | None = None
    seed: int | None = None
    seeds: tuple[int, ...] = ()
    out: Path = Path("samples.png")
    trajectory: Path | None = None
    x0: Path | None = None
    cfg_sweep: tuple[float, ...] = ()
    denoise: tuple[float, ...] = ()
    cfg_scale: float | None = None
    interval: tuple[float, ...] | None = None
    guided_channels: int | None = None
    solver: str | None = None
    n_steps: int | None = None
    shift: float | None = None
    eta: float | None = None
    ema: bool = True
    step: int | None = None
    batch_size: int = 256
    fsdp: int | None = None

    @property
    def sheet(self) -> str | None:
        """The flag of the sheet that is asked for."""
        return next((name for name in ("cfg_sweep", "denoise") if getattr(self, name)), None)


# What the help page says of values that are not given.
OWN = ("cfg_scale", "solver", "n_steps", "shift")
FILLED = dict.fromkeys(OWN, "the run's own") | {"seed": 0, "eta": 0, "interval": "0 1"}
FILLED |= {"n": f"{N}; of a sheet, one of each label, or {N_OF_SHEET}"}
FILLED |= {"fsdp": "the run's own, as far as there are so many"}


# --- what cannot be -------------------------------------------------------------------------------


def check(config: GenerateConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name in ("n", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if config.fsdp is not None and (config.fsdp < 1 or jax.device_count() % config.fsdp):
        raise UserError(f"--fsdp {config.fsdp} does not divide the {jax.device_count()} devices")
    for other in ("n", "seed"):
        if config.seeds and getattr(config, other) is not None:
            raise UserError(f"--seeds has one for each picture; drop --{other}")
    if config.labels and (config.prompts or config.negative_prompt is not None):
        raise UserError("--labels are of classes, and prompts are captions; pass one of them")
    _check_files(config)
    _check_sheet(config)
    shown = "a grid shows" if config.out.suffix == ".png" else "--trajectory and --x0 show"
    n = len(config.seeds) or config.n or N
    if n > MOST_SHOWN and (config.out.suffix == ".png" or config.trajectory or config.x0):
        raise UserError(
            f"{shown} at most {MOST_SHOWN} pictures, not {n}: name a folder or an .npz by --out, "
            "and no --trajectory or --x0"
        )


def _check_files(config: GenerateConfig) -> None:
    if config.out.suffix not in (".png", ".npz", "") and not config.out.is_dir():
        raise UserError(
            f"--out {config.out}: the name must end in .png (a grid) or .npz (arrays), or be a "
            "folder's"
        )
    for name in ("trajectory", "x0"):
        path = getattr(config, name)
        if path and path.suffix != ".gif":
            raise UserError(f"--{name} {path}: the name must end in .gif")
    for path in filter(None, (config.out, config.trajectory, config.x0)):
        if not path.parent.is_dir():
            raise UserError(f"folder {path.parent} does not exist")
    if config.out.suffix not in (".png", ".npz"):
        drawn.require_ours(config.out)


def _check_sheet(config: GenerateConfig) -> None:
    if not config.sheet:
        return
    others = {"cfg_sweep": ("denoise", "cfg_scale", "trajectory", "x0")}
    others["denoise"] = ("trajectory", "x0", "prompts", "negative_prompt")
    for other in others[config.sheet]:
        if getattr(config, other) not in (None, ()):
            raise UserError(f"--{config.sheet} makes a sheet of its own; drop --{other}")
    if config.out.suffix != ".png":
        raise UserError(f"--out {config.out}: --{config.sheet} makes a sheet, a .png")
    if config.cfg_sweep and set(config.cfg_sweep) == {1}:
        raise UserError("--cfg_sweep 1: name a scale besides 1, which is no guidance")
    if wrong := [t for t in config.denoise if not 0 < t <= 1]:
        raise UserError(f"--denoise {wrong[0]:g}: a time must be above 0 and at most 1")
    n_rows = len(config.cfg_sweep) or 1 + 2 * len(config.denoise)
    if (n := (len(config.seeds) or config.n or N_OF_SHEET) * n_rows) > MOST_SHOWN:
        raise UserError(f"a sheet of {n} pictures is more than {MOST_SHOWN}; lower --n")


# --- what is drawn --------------------------------------------------------------------------------


def how_asked(config: GenerateConfig, drawable: Drawable) -> How:
    """How to draw. Raises UserError if the model cannot be drawn from so."""
    wishes, negative = Wishes.of(config), config.negative_prompt is not None
    scales = [scale for scale in config.cfg_sweep if scale != 1]
    how = drawable.how(replace(wishes, cfg_scale=scales[0]) if scales else wishes)
    for one in map(how.at, scales) if scales else [how]:
        drawing.require_guidable(one.sampler, drawable.model, one.cfg_scale, negative=negative)
    return how


def count(config: GenerateConfig, drawable: Drawable) -> int:
    """How many pictures, or columns.

    Raises:
        UserError: fewer than what they are to show.
    """
    asked = len(config.prompts or config.labels)
    n = len(config.seeds) or config.n or N
    if config.sheet and not (config.seeds or config.n):
        n = asked or min(drawable.model.n_classes, N_OF_SHEET) or N_OF_SHEET
    if n < asked:
        said = f"--seeds has {n}, which" if config.seeds else f"--n {n}"
        raise UserError(f"{said} is fewer than the labels or prompts that it is to show")
    return n


def asked(config: GenerateConfig, drawable: Drawable) -> Subjects:
    """What the pictures are to be of."""
    c, n, seed = config, count(config, drawable), config.seeds or config.seed or 0
    if not c.prompts and c.negative_prompt is None:
        return subjects.of_labels(drawable, c.labels, n, seed=seed)
    return subjects.of_prompts(drawable, c.prompts, n, seed=seed, negative=c.negative_prompt)


# --- the command ----------------------------------------------------------------------------------


def main(config: GenerateConfig) -> None:
    """Load, draw, write."""
    check(config)
    parallel.keep_compiled()
    c = config
    where = {"vae": c.vae, "text_towers": c.text_towers, "fsdp": c.fsdp}
    drawable = Drawable.of_run(c.run, ema=c.ema, step=c.step, **where)
    how = how_asked(c, drawable)
    if c.sheet:
        what, sheet = "a sheet", (denoised if c.denoise else swept)(c, drawable, how)
        with unwritable(c.out):
            images.save_png(sheet, c.out)
    else:
        of = asked(c, drawable)
        what = f"{len(of.which)} pictures"
        draw(c, drawable, of, how)
    step = "" if drawable.step is None else f" from step {drawable.step}"
    print(f"{what}{step} of {drawable.name}: {c.out}")


def swept(config: GenerateConfig, drawable: Drawable, how: How) -> Image.Image:
    """The sheet of --cfg_sweep."""
    of, scales = asked(config, drawable), config.cfg_sweep
    return sheets.of_scales(drawable, of, how, scales, batch_size=config.batch_size)


def denoised(config: GenerateConfig, drawable: Drawable, how: How) -> Image.Image:
    """The sheet of --denoise."""
    c, n, seed = config, count(config, drawable), config.seeds or config.seed or 0
    drawing.origins(seed, n)
    ids = drawing.label_ids(c.labels, drawable.label_names, drawable.model.n_classes)
    real = sheets.real_pictures(drawable, ids, n)
    return sheets.of_times(drawable, real, how, c.denoise, seed=seed, batch_size=c.batch_size)


def draw(config: GenerateConfig, drawable: Drawable, of: Subjects, how: How) -> None:
    """Draw and write what is asked for."""
    c, n = config, len(of.which)
    size = min(c.batch_size, n)
    draw_batch = drawn.drawer(drawable, of, how, size)
    if c.trajectory or c.x0:
        labels, told = of.rows(0, n)
        told |= {"trajectory": c.trajectory is not None, "estimates": c.x0 is not None}
        found = drawable.sample(labels, how, batch_size=size, **told)
        write_gif(c.trajectory, found.trajectory, of, "the way from noise")
        write_gif(c.x0, found.estimates, of, "what they were taken for on that way")
        draw_batch = partial(batch_of, images.to_uint8(found.x), size)
    said = {"labels": c.labels, "prompts": c.prompts, "negative_prompt": c.negative_prompt}
    card = drawn.describe(drawable, of, how) | said
    write(c.out, draw_batch, range(0, n, size), of, card)


def batch_of(pictures: Batch, size: int, start: int) -> Batch:
    """So many of them."""
    return pictures[start : start + size]


def write(out: Path, draw: Draw, starts: range, of: Subjects, card: dict[str, Any]) -> None:
    """A grid with names, the arrays of the ADM suite, or a folder, with a progress bar."""
    with tqdm(total=len(of.which), unit=" pictures", disable=None) as bar:
        if out.suffix == ".npz":
            for batch in drawn.kept(draw, starts, out, of.which, card):
                bar.update(len(batch))
        elif out.suffix == ".png":
            parts = []
            for start in starts:
                parts.append(draw(start))
                bar.update(len(parts[-1]))
            with unwritable(out):
                images.save_png(images.grid(np.concatenate(parts), captions=of.captions), out)
        else:
            for n_written in drawn.in_folder(draw, starts, out, of.words, card):
                bar.update(n_written)


def write_gif(out: Path | None, states: np.ndarray | None, of: Subjects, what: str) -> None:
    """Pictures in −1 … 1 at each step, as grids with names, if they are asked for."""
    if out and states is not None:
        frames = [images.grid(images.to_uint8(x), captions=of.captions) for x in states]
        with unwritable(out):
            images.save_gif(frames, out)
        print(f"{what}: {out}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(GenerateConfig, filled=FILLED)))
