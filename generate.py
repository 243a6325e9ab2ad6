"""Sample images from a trained run or a published model.

    python generate.py --run runs/digits --labels 3 7 --n 16 --cfg_scale 2 --out grid.png
    python generate.py --run runs/coco --prompts "a cat on a sofa, from above" --n 4
    python generate.py --run runs/cifar10 --n 50000 --out samples/
    python generate.py --pretrained facebook/DiT-XL-2-256 --labels 207 360 --n 8
    python generate.py --run runs/cifar10 --labels cat ship --cfg_sweep 1 2 4 8 --out sweep.png

Stop it whenever you like: with an .npz or a folder as --out, the same command resumes.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from inference import comparisons, grids, sample_files
from inference.autoguidance import plan_with_guide
from inference.grids import MAX_GRID_IMAGES
from inference.labels import SampleRequest
from inference.sample_files import BatchSampler
from inference.sampler import Samples, check_guidance, check_seeds
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from runtime import cli, parallel, processes
from runtime.cli import FreeText
from runtime.errors import UserError
from runtime.files import check_distinct_paths, report_unwritable
from runtime.flags import Derived, again, check_values, flag
from runtime.image_size import WrittenSize
from training.flag_groups import (
    CheckpointFlags,
    DeviceFlags,
    MovedFlags,
    RequestFlags,
    SamplingFlags,
    SourceFlags,
)

DEFAULT_N = 16
MAX_DEFAULT_COLUMNS = 10  # of a comparison grid


# --- flags ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleFlags(RequestFlags):
    """Samples."""

    negative_prompt: FreeText | None = flag(
        None, "a caption to guide away from, in place of the empty one"
    )
    size: WrittenSize | None = flag(
        Derived("that of the training"),
        "size of the images, such as 256 or 320x192 (height x width); not with learned positions",
        above=0,
    )
    n: int | None = flag(
        Derived(DEFAULT_N),
        "number of images; of a comparison grid, of columns: by default one for each label, up to "
        "10",
        at_least=1,
    )
    seeds: tuple[int, ...] = flag(
        (),
        "one for each image, in place of n and seed: an image is then independent of the others, "
        "and the same as with --seed and n 1",
    )


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Output."""

    out: Path = flag(
        Path("samples.png"),
        "output: .png is a grid with class names or prompts; .npz holds arr_0 (uint8 images, "
        "n h w c) and arr_1 (class numbers, or the prompts' places); a folder gets a file for "
        "each, and card.json with all that they depend on. An interrupted .npz or folder is "
        "resumed",
    )
    trajectory: Path | None = flag(None, "a .gif of the trajectory from noise to images")
    x0: Path | None = flag(None, "a .gif of the x0 prediction at each step of the trajectory")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(
    SourceFlags, CheckpointFlags, MovedFlags, SampleFlags, OutputFlags, SamplingFlags, DeviceFlags
):
    """Sample images from a trained run, or from a published model."""

    batch_size: int = again(DeviceFlags, "batch_size", default=256)

    @property
    def grid_flag(self) -> str | None:
        """The flag that asks for a comparison grid, if one does."""
        return next((name for name in ("cfg_sweep", "denoise") if getattr(self, name)), None)


# Flags that do not go with a comparison grid.
UNUSED_BY_GRID = {
    "cfg_sweep": ("denoise", "cfg_scale", "trajectory", "x0"),
    "denoise": ("trajectory", "x0", "prompts", "negative_prompt", "size"),
}


def check_flags(config: GenerateConfig) -> None:
    """Raises UserError for flags that cannot work, before anything is loaded."""
    if (config.run is None) == (config.pretrained is None):
        raise UserError("name a run's folder by --run, or a published model by --pretrained")
    chosen = (config.step, config.ema_std, config.base, None if config.ema else False)
    if config.pretrained and any(value is not None for value in chosen):
        raise UserError(
            "--step, --ema, --ema_std and --base choose among a run's weights; --pretrained has "
            "only one version"
        )
    if config.lora and not config.pretrained:
        raise UserError(
            f"--lora {config.lora}: is added to a published model: name it by --pretrained"
        )
    check_values(config, vars(config))
    if config.fsdp is not None and (config.fsdp < 1 or parallel.devices().count % config.fsdp):
        raise UserError(
            f"--fsdp {config.fsdp} does not divide the {parallel.devices().count} devices"
        )
    for other in ("n", "seed"):
        if config.seeds and getattr(config, other) is not None:
            raise UserError(f"--seeds has one for each image; drop --{other}")
    if config.labels and (config.prompts or config.negative_prompt is not None):
        raise UserError("--labels are of classes, and prompts are captions; pass one of them")
    _check_files(config)
    _check_comparison_grid(config)
    n = len(config.seeds) or config.n or DEFAULT_N
    is_grid = config.out.suffix == ".png"
    if n > MAX_GRID_IMAGES and (is_grid or config.trajectory or config.x0):
        subject = "a grid shows" if is_grid else "--trajectory and --x0 show"
        raise UserError(
            f"{subject} at most {MAX_GRID_IMAGES} images, not {n}: name a folder or an .npz by "
            "--out, and no --trajectory or --x0"
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


def _check_comparison_grid(config: GenerateConfig) -> None:
    if not config.grid_flag:
        return
    for other in UNUSED_BY_GRID[config.grid_flag]:
        if getattr(config, other) not in (None, ()):
            raise UserError(
                f"--{config.grid_flag} makes a comparison grid, which has no use for --{other}; "
                f"drop --{other}"
            )
    if config.out.suffix != ".png":
        raise UserError(f"--out {config.out}: --{config.grid_flag} makes a comparison grid, a .png")
    if config.cfg_sweep and set(config.cfg_sweep) == {1}:
        raise UserError("--cfg_sweep 1: name a scale besides 1, which is no guidance")
    if invalid := [t for t in config.denoise if not 0 < t <= 1]:
        raise UserError(f"--denoise {invalid[0]:g}: a time must be above 0 and at most 1")
    n_rows = len(config.cfg_sweep) or 1 + 2 * len(config.denoise)
    n_named = len(config.labels or config.prompts)
    n_columns = len(config.seeds) or config.n or n_named or MAX_DEFAULT_COLUMNS
    if n_columns * n_rows > MAX_GRID_IMAGES:
        raise UserError(
            f"a grid of {n_columns * n_rows} images is more than {MAX_GRID_IMAGES}; lower --n"
        )


# --- the command ----------------------------------------------------------------------------------


def main(config: GenerateConfig) -> None:
    """Open the model, sample, write."""
    processes.start_backend()
    check_flags(config)
    parallel.enable_compilation_cache()
    trained = at_size(config, open_model(config))
    plan = make_plan(config, trained)
    if config.grid_flag:
        make_grid = grid_of_real_images if config.denoise else grid_of_scales
        grid = make_grid(config, trained, plan)
        with report_unwritable(config.out):
            grids.save_png(grid, config.out)
        output = "a comparison grid"
    else:
        request = make_request(config, trained)
        write_samples(config, trained, request, plan)
        output = f"{len(request.label_index)} images"
    step = "" if trained.step is None else f" from step {trained.step}"
    print(f"{output}{step} of {trained.name}: {config.out}")


def open_model(config: GenerateConfig) -> TrainedModel:
    """Open the run or the published model."""
    if config.run:
        return TrainedModel.from_run(
            config.run,
            ema=config.ema,
            ema_std=config.ema_std,
            step=config.step,
            base=config.base,
            vae=config.vae,
            text_encoders=config.text_towers,
            fsdp=config.fsdp,
        )
    return TrainedModel.from_pretrained(
        str(config.pretrained),
        lora=config.lora,
        vae=config.vae,
        text_encoders=config.text_towers,
        fsdp=config.fsdp,
    )


def at_size(config: GenerateConfig, trained: TrainedModel) -> TrainedModel:
    """Let the model sample images of --size, if it is given, and warn of one that is larger than it
    was trained on.

    Raises:
        UserError: the model cannot sample images of that size.
    """
    if config.size is None:
        return trained
    trained = trained.at_size(config.size)
    if trained.size_warning:
        print(f"warning: {trained.size_warning}", file=sys.stderr)
    return trained


def make_plan(config: GenerateConfig, trained: TrainedModel) -> SamplingPlan:
    """Complete the sampling flags with the model's own settings.

    Raises:
        UserError: they do not fit the model.
    """
    overrides = SamplingOverrides.from_flags(config)
    negative = config.negative_prompt is not None
    guided_scales = [scale for scale in config.cfg_sweep if scale != 1]
    if guided_scales:
        overrides = replace(overrides, cfg_scale=guided_scales[0])
    plan = plan_with_guide(trained, overrides, negative=negative)
    for scale in guided_scales or [plan.cfg_scale]:
        check_guidance(
            plan.sampler, trained.model, scale, negative=negative, has_guide=bool(plan.guide)
        )
    return plan


def count_images(config: GenerateConfig, trained: TrainedModel) -> int:
    """Return the number of images, or of a comparison grid's columns.

    Raises:
        UserError: fewer than the labels or prompts.
    """
    n_named = len(config.prompts or config.labels)
    n = len(config.seeds) or config.n or DEFAULT_N
    if config.grid_flag and not (config.seeds or config.n):
        n_choices = len(trained.conditioning.choices)
        n = n_named or min(n_choices, MAX_DEFAULT_COLUMNS) or MAX_DEFAULT_COLUMNS
    if n < n_named:
        given = f"--seeds has {n}, which" if config.seeds else f"--n {n}"
        raise UserError(f"{given} is fewer than the {n_named} labels or prompts")
    return n


def make_request(config: GenerateConfig, trained: TrainedModel) -> SampleRequest:
    """Look up the labels, or encode the prompts.

    Raises:
        UserError: there is no such class, or the prompts cannot be encoded.
    """
    n = count_images(config, trained)
    seed = config.seeds or config.seed or 0
    return trained.conditioning.request(
        n,
        labels=config.labels,
        prompts=config.prompts,
        negative=config.negative_prompt,
        seed=seed,
    )


# --- comparison grids -----------------------------------------------------------------------------


def grid_of_scales(
    config: GenerateConfig, trained: TrainedModel, plan: SamplingPlan
) -> Image.Image:
    """Make the grid of --cfg_sweep."""
    request = make_request(config, trained)
    return comparisons.compare_scales(
        trained, request, plan, config.cfg_sweep, batch_size=config.batch_size
    )


def grid_of_real_images(
    config: GenerateConfig, trained: TrainedModel, plan: SamplingPlan
) -> Image.Image:
    """Make the grid of --denoise."""
    n = count_images(config, trained)
    seed = config.seeds or config.seed or 0
    check_seeds(seed)
    trained.conditioning.check(labels=config.labels)
    class_ids = trained.conditioning.class_ids(config.labels)
    real = comparisons.load_real_images(trained, class_ids, n)
    return comparisons.compare_denoising(
        trained, real, plan, config.denoise, seed=seed, batch_size=config.batch_size
    )


# --- samples --------------------------------------------------------------------------------------


def write_samples(
    config: GenerateConfig, trained: TrainedModel, request: SampleRequest, plan: SamplingPlan
) -> None:
    """Sample and write --out, --trajectory and --x0."""
    n = len(request.label_index)
    size = min(config.batch_size, n)

    @cache
    def sample_all() -> Samples:
        rows = request.rows(0, n)
        return trained.sample_rows(
            rows,
            plan,
            batch_size=size,
            trajectory=config.trajectory is not None,
            estimates=config.x0 is not None,
        )

    if config.trajectory or config.x0:
        sample_at = sample_files.slice_samples(trained, sample_all, size)
    else:
        sample_at = sample_files.make_batch_sampler(trained, request, plan, size)
    card = sample_files.describe_samples(trained, request, plan) | {
        "labels": config.labels,
        "prompts": config.prompts,
        "negative_prompt": config.negative_prompt,
    }
    write_images(config.out, sample_at, range(0, n, size), request, card)
    # GIFs come last, as a folder of other samples is refused by the line above.
    if config.trajectory:
        states = sample_all().trajectory
        write_gif(config.trajectory, trained, states, request, "the trajectory")
    if config.x0:
        write_gif(config.x0, trained, sample_all().estimates, request, "the x0 predictions")


def write_images(
    out: Path,
    sample_at: BatchSampler,
    starts: range,
    request: SampleRequest,
    card: dict[str, Any],
) -> None:
    """Write a grid, an .npz or a folder, batch by batch, with a progress bar."""
    with tqdm(total=len(request.label_index), unit=" images", disable=None) as bar:
        if out.suffix == ".npz":
            for batch in sample_files.write_npz(sample_at, starts, out, request.label_index, card):
                bar.update(len(batch))
        elif out.suffix == ".png":
            batches = []
            for start in starts:
                batches.append(sample_at(start))
                bar.update(len(batches[-1]))
            with report_unwritable(out):
                grid = grids.image_grid(np.concatenate(batches), captions=request.grid_captions)
                grids.save_png(grid, out)
        else:
            for n_written in sample_files.write_folder(
                sample_at, starts, out, request.file_labels, card
            ):
                bar.update(n_written)


def write_gif(
    out: Path,
    trained: TrainedModel,
    states: np.ndarray | None,
    request: SampleRequest,
    description: str,
) -> None:
    """Write images in −1 … 1 of each step as a .gif of grids."""
    assert states is not None
    frames = [grids.image_grid(trained.to_uint8(x), captions=request.grid_captions) for x in states]
    with report_unwritable(out):
        grids.save_gif(frames, out)
    print(f"{description}: {out}")


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(GenerateConfig)))
