"""The settings of `generate.py`: every flag, and what cannot be."""

# SECOND DOCSTRING: """A trained run, or a published model → pictures.
#
#     python generate.py --run runs/digits --labels 3 7 --n 16 --cfg_scale 2 --out grid.png
#     python generate.py --run runs/coco --prompts "a cat on a sofa, from above" --n 4
#     python generate.py --run runs/cifar10 --n 50000 --out samples/
#     python generate.py --pretrained facebook/DiT-XL-2-256 --labels 207 360 --n 8
#     python generate.py --run runs/cifar10 --labels cat ship --cfg_sweep 1 2 4 8 --out sweep.png
#
# Stop it whenever you like: with an .npz or a folder as --out, the same command goes on.
# """
#
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from inference import comparisons, grids, sample_files, sampler
from inference import labels as inference_labels
from inference.grids import MAX_GRID_IMAGES
from inference.labels import SampleRequest
from inference.sample_files import BatchSampler
from inference.sampler import Samples
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from runtime import cli, parallel
from runtime.cli import FreeText
from runtime.errors import UserError
from runtime.files import check_distinct_paths, report_unwritable

N, N_OF_SHEET = 16, 10


@dataclass(frozen=True)
class GenerateConfig:
    """Draw pictures from a trained run, or from a published model.

    Args:
        run: the run's folder.
        pretrained: instead of a run: DiT or SD3 of the hub or of a folder, as diffusers has them or
            export.py writes them; or a file of the original DiT or SiT, such as
            dit:DiT-XL-2-256x256.pt.
        labels: class names or numbers; all classes if not given. Each gets an equal share of n.
        prompts: captions, for a model that was trained on them; each in quotes.
        negative_prompt: a caption that guidance leads away from, in place of the empty one.
        text_towers: where the model's text encoders are, if elsewhere than it says.
        vae: where the VAE of a model of latents is, if elsewhere than it says.
        n: how many pictures; of a sheet, how many columns, by default one of each label, up to 10.
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
        ema: use a run's averaged weights; False uses the raw ones.
        step: of a run's checkpoint; the newest if not given.
        batch_size: pictures drawn at a time, on all devices together.
        fsdp: devices that share one copy of the weights.
    """

    run: Path | None = None
    pretrained: str | None = None
    labels: tuple[str, ...] = ()
    prompts: tuple[FreeText, ...] = ()
    negative_prompt: FreeText | None = None
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
FILLED = dict.fromkeys(OWN, "the model's own") | {"seed": 0, "eta": 0, "interval": "0 1"}
FILLED |= {"n": N}
FILLED |= {"fsdp": "the run's own, as far as there are so many"}


def check(config: GenerateConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    if (config.run is None) == (config.pretrained is None):
        raise UserError("name a run's folder by --run, or a published model by --pretrained")
    if config.pretrained and (config.step is not None or not config.ema):
        raise UserError("--step and --ema choose among a run's weights; --pretrained has one set")
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
    if n > MAX_GRID_IMAGES and (config.out.suffix == ".png" or config.trajectory or config.x0):
        raise UserError(
            f"{shown} at most {MAX_GRID_IMAGES} pictures, not {n}: name a folder or an .npz by --out, "
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
        if path.is_dir() and path.suffix in (".png", ".npz", ".gif"):
            raise UserError(f"{path} is a folder; name a file")
    check_distinct_paths(config, written=("out", "trajectory", "x0"))
    if config.out.suffix not in (".png", ".npz"):
        sample_files.check_sample_folder(config.out)


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
    n = len(config.seeds) or config.n or len(config.labels or config.prompts) or N_OF_SHEET
    if n * n_rows > MAX_GRID_IMAGES:
        raise UserError(f"a sheet of {n * n_rows} pictures is more than {MAX_GRID_IMAGES}; lower --n")


def opened(config: GenerateConfig) -> TrainedModel:
    """What to draw from."""
    c = config
    where = {"vae": c.vae, "text_towers": c.text_towers, "fsdp": c.fsdp}
    if c.run:
        return TrainedModel.from_run(c.run, ema=c.ema, step=c.step, **where)
    return TrainedModel.from_pretrained(str(c.pretrained), **where)


def how_asked(config: GenerateConfig, drawable: TrainedModel) -> SamplingPlan:
    """How to draw. Raises UserError if the model cannot be drawn from so."""
    wishes, negative = SamplingOverrides.from_flags(config), config.negative_prompt is not None
    scales = [scale for scale in config.cfg_sweep if scale != 1]
    how = drawable.plan(replace(wishes, cfg_scale=scales[0]) if scales else wishes)
    for one in map(how.at, scales) if scales else [how]:
        sampler.check_guidance(one.sampler, drawable.model, one.cfg_scale, negative=negative)
    return how


def count(config: GenerateConfig, drawable: TrainedModel) -> int:
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


def asked(config: GenerateConfig, drawable: TrainedModel) -> SampleRequest:
    """What the pictures are to be of."""
    c, n, seed = config, count(config, drawable), config.seeds or config.seed or 0
    if not c.prompts and c.negative_prompt is None:
        return inference_labels.request_labels(drawable, c.labels, n, seed=seed)
    return inference_labels.request_prompts(
        drawable, c.prompts, n, seed=seed, negative=c.negative_prompt
    )


# --- the command ----------------------------------------------------------------------------------


def main(config: GenerateConfig) -> None:
    """Load, draw, write."""
    check(config)
    parallel.enable_compilation_cache()
    c = config
    drawable = opened(c)
    how = how_asked(c, drawable)
    if c.sheet:
        what, sheet = "a sheet", (denoised if c.denoise else swept)(c, drawable, how)
        with report_unwritable(c.out):
            grids.save_png(sheet, c.out)
    else:
        of = asked(c, drawable)
        what = f"{len(of.which)} pictures"
        draw(c, drawable, of, how)
    step = "" if drawable.step is None else f" from step {drawable.step}"
    print(f"{what}{step} of {drawable.name}: {c.out}")


def swept(config: GenerateConfig, drawable: TrainedModel, how: SamplingPlan) -> Image.Image:
    """The sheet of --cfg_sweep."""
    of, scales = asked(config, drawable), config.cfg_sweep
    return comparisons.compare_scales(drawable, of, how, scales, batch_size=config.batch_size)


def denoised(config: GenerateConfig, drawable: TrainedModel, how: SamplingPlan) -> Image.Image:
    """The sheet of --denoise."""
    c, n, seed = config, count(config, drawable), config.seeds or config.seed or 0
    sampler.check_seeds(seed)
    ids = inference_labels.label_ids(c.labels, drawable.label_names, drawable.model.n_classes)
    real = comparisons.load_real_images(drawable, ids, n)
    return comparisons.compare_denoising(drawable, real, how, c.denoise, seed=seed, batch_size=c.batch_size)


def draw(
    config: GenerateConfig, drawable: TrainedModel, of: SampleRequest, how: SamplingPlan
) -> None:
    """Draw and write what is asked for. Films come last, for `out` may be refused."""
    c, n = config, len(of.which)
    size, filmed = min(c.batch_size, n), c.trajectory or c.x0
    whole = cache(partial(drawn_whole, c, drawable, of, how, size))
    draw_batch = (
        sample_files.slice_samples(whole, size)
        if filmed
        else sample_files.make_batch_sampler(drawable, of, how, size)
    )
    said = {"labels": c.labels, "prompts": c.prompts, "negative_prompt": c.negative_prompt}
    card = sample_files.describe_samples(drawable, of, how) | said
    write(c.out, draw_batch, range(0, n, size), of, card)
    if filmed:
        write_gif(c.trajectory, whole().trajectory, of, "the way from noise")
        write_gif(c.x0, whole().estimates, of, "what they were taken for on that way")


def drawn_whole(
    config: GenerateConfig, drawable: TrainedModel, of: SampleRequest, how: SamplingPlan, size: int
) -> Samples:
    """All pictures, and of the way there what is to be shown."""
    labels, told = of.rows(0, len(of.which))
    told |= {"trajectory": config.trajectory is not None, "estimates": config.x0 is not None}
    return drawable.sample(labels, how, batch_size=size, **told)


def write(out: Path, draw: BatchSampler, starts: range, of: SampleRequest, card: dict[str, Any]) -> None:
    """A grid with names, the arrays of the ADM suite, or a folder, with a progress bar."""
    with tqdm(total=len(of.which), unit=" pictures", disable=None) as bar:
        if out.suffix == ".npz":
            for batch in sample_files.write_npz(draw, starts, out, of.which, card):
                bar.update(len(batch))
        elif out.suffix == ".png":
            parts = []
            for start in starts:
                parts.append(draw(start))
                bar.update(len(parts[-1]))
            with report_unwritable(out):
                grids.save_png(grids.image_grid(np.concatenate(parts), captions=of.captions), out)
        else:
            for n_written in sample_files.write_folder(draw, starts, out, of.words, card):
                bar.update(n_written)


def write_gif(out: Path | None, states: np.ndarray | None, of: SampleRequest, what: str) -> None:
    """Pictures in −1 … 1 at each step, as grids with names, if they are asked for."""
    if out and states is not None:
        frames = [grids.image_grid(grids.to_uint8(x), captions=of.captions) for x in states]
        with report_unwritable(out):
            grids.save_gif(frames, out)
        print(f"{what}: {out}")


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(GenerateConfig, shown_defaults=FILLED)))
