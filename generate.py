"""A trained run, or a published model → pictures.

    python generate.py --run runs/digits --labels 3 7 --n 16 --cfg_scale 2 --out grid.png
    python generate.py --run runs/coco --prompts "a cat on a sofa, from above" --n 4
    python generate.py --run runs/cifar10 --n 50000 --out samples/
    python generate.py --pretrained facebook/DiT-XL-2-256 --labels 207 360 --n 8
    python generate.py --run runs/cifar10 --labels cat ship --cfg_sweep 1 2 4 8 --out sweep.png

Stop it whenever you like: with an .npz or a folder as --out, the same command goes on.
"""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

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
from drawing import Pictures
from drawn import Draw
from errors import UserError
from generate_config import FILLED, N_OF_SHEET, GenerateConfig, N, check
from run_folder import unwritable
from subjects import Subjects


def opened(config: GenerateConfig) -> Drawable:
    """What to draw from."""
    c = config
    where = {"vae": c.vae, "text_towers": c.text_towers, "fsdp": c.fsdp}
    if c.run:
        return Drawable.of_run(c.run, ema=c.ema, step=c.step, **where)
    return Drawable.of_pretrained(str(c.pretrained), **where)


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
    named = len(config.prompts or config.labels)
    n = len(config.seeds) or config.n or N
    if config.sheet and not (config.seeds or config.n):
        n = named or min(drawable.model.n_classes, N_OF_SHEET) or N_OF_SHEET
    if n < named:
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
    drawable = opened(c)
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
    """Draw and write what is asked for. Films come last, for `out` may be refused."""
    c, n = config, len(of.which)
    size, filmed = min(c.batch_size, n), c.trajectory or c.x0
    whole = cache(partial(drawn_whole, c, drawable, of, how, size))
    draw_batch = drawn.part_of(whole, size) if filmed else drawn.drawer(drawable, of, how, size)
    said = {"labels": c.labels, "prompts": c.prompts, "negative_prompt": c.negative_prompt}
    card = drawn.describe(drawable, of, how) | said
    write(c.out, draw_batch, range(0, n, size), of, card)
    if filmed:
        write_gif(c.trajectory, whole().trajectory, of, "the way from noise")
        write_gif(c.x0, whole().estimates, of, "what they were taken for on that way")


def drawn_whole(
    config: GenerateConfig, drawable: Drawable, of: Subjects, how: How, size: int
) -> Pictures:
    """All pictures, and of the way there what is to be shown."""
    labels, told = of.rows(0, len(of.which))
    told |= {"trajectory": config.trajectory is not None, "estimates": config.x0 is not None}
    return drawable.sample(labels, how, batch_size=size, **told)


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
