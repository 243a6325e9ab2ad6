"""Sampling jobs of the web page's visitors: the models, the limits, images and comparison grids.

    models = ModelLibrary(runs=Path("runs"))
    model = models.load("digits-DiT-Ti-2-20261121-093000")
    for images in run_job(model, SampleJob(labels=("3", "7"), n_images=20)):
        ...

Knows nothing of Gradio and stores no samples. Jobs must run one after the other; the queue of
`page.py` sees to that.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from inference import grids, sample_files, sampler
from inference.autoguidance import plan_with_guide
from inference.labels import SampleRequest
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from runtime.errors import UserError, unknown_name
from runtime.image_size import ImageSize
from runtime.run_folder import CONFIG_FILE, RUNS, read_config

# Limits of one job, so that no visitor keeps the device from the others for long.
MAX_IMAGES = 64
MAX_STEPS = 250
MAX_PROMPT_CHARACTERS = 300
MAX_GRID_CELLS = 36
MAX_AREA = 4  # of an image, in areas of those of the training
# Limits of a trajectory: every state of every image is in memory.
MAX_TRAJECTORY_IMAGES = 16
MAX_FRAMES = 48
# A job is padded to one of these, so that another number of images compiles no other program.
BATCH_SIZES = (4, 16)
# Each takes ten MB or more; one per number of steps, guidance interval and solver.
MAX_COMPILED_PROGRAMS = 32


@dataclass(frozen=True)
class SampleJob(SamplingOverrides):
    """One visitor's request. None leaves a setting to the model.

    Args:
        labels: class names or numbers; all classes if empty.
        prompt: the caption, for a model trained on captions.
        negative_prompt: a caption in place of the null label of guidance; empty for none.
        n_images: number of images.
        size: of the images, such as 320x192; empty for that of the training.
        seed: of the noise.
    """

    labels: tuple[str, ...] = ()
    prompt: str = ""
    negative_prompt: str = ""
    n_images: int = 16
    size: str = ""
    seed: int = 0


# --- models ---------------------------------------------------------------------------------------


@dataclass
class ModelLibrary:
    """The models of the page by name: one run, a folder of runs, or one pretrained model.

    Args:
        run: a run's folder.
        runs: a folder of runs, used if neither `run` nor `pretrained` is given.
        pretrained: a published model.
        vae: where the VAE of a latent model is now, if it has moved.
        text_encoders: where its text encoders are now, if they have moved.
        cached: the model whose weights are in memory, by name and checkpoint step.

    Raises:
        UserError: there is no model, or the one given cannot be sampled from.
    """

    run: Path | None = None
    runs: Path = RUNS
    pretrained: str | None = None
    vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    cached: dict[tuple[str, int], TrainedModel] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.pretrained:
            self.load(self.pretrained)  # its weights are read with its config anyway
        elif self.run:
            self.open(self.names()[0])
            if not newest_checkpoint_step(self.run):
                raise UserError(f"run '{self.run}' has no checkpoint yet")
        elif not self.names():
            raise UserError(
                f"{self.runs}/ holds no run with a checkpoint: train one with python train.py, or "
                "name one by --run"
            )

    def names(self) -> list[str]:
        """List the models that can be sampled from now; of runs the last started comes first."""
        if self.pretrained:
            return [self.pretrained]
        if self.run:
            return [self.run.resolve().name]
        configs = sorted(self.runs.glob(f"*/{CONFIG_FILE}"), key=lambda path: -path.stat().st_mtime)
        folders = [path.parent for path in configs]
        return [f.name for f in folders if newest_checkpoint_step(f) and is_training_run(f)]

    def folder(self, name: str) -> Path | None:
        """Return a run's folder; None for a pretrained model.

        Raises:
            UserError: unknown name.
        """
        if name not in (names := self.names()):
            raise unknown_name("model", name, names)
        return None if self.pretrained else self.run or self.runs / name

    def open(self, name: str) -> TrainedModel:
        """Open a model to read its config. The weights of a run are read at their first use."""
        return self._open_checkpoint(name, newest_checkpoint_step(self.folder(name)))

    def load(self, name: str) -> TrainedModel:
        """Open a model to sample from, with its newest weights, and cache it in place of the last
        one.
        """
        step = newest_checkpoint_step(self.folder(name))  # once: a run may save another meanwhile
        model = self._open_checkpoint(name, step)
        self.cached = {(name, step): model}
        return model

    def _open_checkpoint(self, name: str, step: int) -> TrainedModel:
        if cached := self.cached.get((name, step)):
            return cached
        folder = self.folder(name)
        if folder is None:
            return TrainedModel.from_pretrained(
                name, vae=self.vae, text_encoders=self.text_encoders
            )
        return TrainedModel.from_run(folder, vae=self.vae, text_encoders=self.text_encoders)


def newest_checkpoint_step(run: Path | None) -> int:
    """Return the last step with a checkpoint; 0 if there is none."""
    steps = (path.name for path in run.glob("checkpoints/*")) if run else ()
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def is_training_run(folder: Path) -> bool:
    """Test if a folder is a readable run of `train.py`, not of another command."""
    try:
        return bool(read_config(folder))
    except UserError:
        return False


# --- requests -------------------------------------------------------------------------------------


def max_steps(model: TrainedModel) -> int:
    """Return the most sampling steps a job may take: that of the method's chain, or a limit."""
    return model.method.max_steps or MAX_STEPS


def guides_of(model: TrainedModel) -> dict[str, str]:
    """Return what a model can be guided by, the earlier checkpoints of its run, by what to call
    each.
    """
    run = model.settings.get("run_dir") if model.method.is_guidable else None
    folders = Path(run).glob("checkpoints/*") if run else ()
    steps = sorted(int(path.name) for path in folders if path.name.isdecimal())
    return {f"step {step}": f"{run}@{step}" for step in steps[:-1]}


def sizes_of(model: TrainedModel) -> list[str]:
    """Return the sizes that a model was trained on, that of its samples first. None if its
    positions are learned: they are of one size.
    """
    if model.model.position == "learned":
        return []
    sizes = [model.image_size, *model.trained_sizes]
    return list(dict.fromkeys(size.in_full for size in sizes))


def at_size(model: TrainedModel, job: SampleJob) -> TrainedModel:
    """Let a model sample images of the job's size.

    Raises:
        UserError: it cannot, or they are too large.
    """
    if not job.size.strip():
        return model
    # The page writes sizes as 32 × 32 too.
    written = re.sub(r"\s*[xX×]\s*", "x", job.size.strip())
    size, own = ImageSize.parse(written, "size"), model.image_size
    if math.prod(size.sides) > MAX_AREA * math.prod(own.sides):
        raise UserError(f"size {size}: at most {MAX_AREA} times the area of {own} can be sampled")
    return model.at_size(size.written)


def check_job(model: TrainedModel, job: SampleJob) -> None:
    """Raise UserError if a job exceeds the limits."""
    if not 1 <= job.n_images <= MAX_IMAGES:
        raise UserError(f"number of images {job.n_images}: must be in 1 … {MAX_IMAGES}")
    limit = max_steps(model)
    if job.n_steps is not None and not 1 <= job.n_steps <= limit:
        raise UserError(f"steps {job.n_steps}: must be in 1 … {limit}")
    if job.guide and job.guide not in (guides := guides_of(model).values()):
        raise unknown_name("guide", job.guide, list(guides))
    for name, text in (("prompt", job.prompt), ("negative prompt", job.negative_prompt)):
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UserError(
                f"the {name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are "
                "accepted"
            )


def plan_sampling(model: TrainedModel, job: SampleJob) -> SamplingPlan:
    """Complete a job's settings with the model's. Without guidance its interval is ignored.

    Raises:
        UserError: the job does not fit the model, or exceeds the limits.
    """
    check_job(model, job)
    if job.cfg_scale == 1 and not job.guide:
        job = replace(job, interval=None, guided_channels=None)
    if job.inner_guidance == 1:
        job = replace(job, inner_interval=None)
    has_negative = bool(job.negative_prompt.strip())
    plan = plan_with_guide(model, SamplingOverrides.from_flags(job), negative=has_negative)
    sampler.check_guidance(
        plan.sampler,
        model.model,
        plan.cfg_scale,
        negative=has_negative,
        has_guide=bool(job.guide),
    )
    return plan


def request_samples(model: TrainedModel, job: SampleJob) -> SampleRequest:
    """Turn a job's classes or prompt into labels.

    Raises:
        UserError: unknown class, or no prompt for a model of captions.
    """
    takes_prompts = model.conditioning.takes_prompts
    if takes_prompts and not job.prompt.strip():
        raise UserError("this model was trained on captions: write a prompt")
    return model.conditioning.request(
        job.n_images,
        labels=job.labels,
        prompts=[job.prompt.strip()] if takes_prompts else (),
        negative=job.negative_prompt.strip() or None if takes_prompts else None,
        seed=job.seed,
    )


# --- sampling -------------------------------------------------------------------------------------


def choose_batch_size(n_images: int) -> int:
    """Choose the smallest of `BATCH_SIZES` that holds the images, or the largest."""
    return next((size for size in BATCH_SIZES if n_images <= size), BATCH_SIZES[-1])


def bound_jit_cache() -> None:
    """Drop all compiled sampling programs when there are `MAX_COMPILED_PROGRAMS` of them."""
    if sampler.sample_batch._cache_size() >= MAX_COMPILED_PROGRAMS:  # type: ignore
        sampler.sample_batch.clear_cache()  # type: ignore


def run_job(model: TrainedModel, job: SampleJob) -> Iterator[list[tuple[Image.Image, str]]]:
    """Sample the images of a job, with their captions, batch by batch.

    Raises:
        UserError: the job does not fit the model, or exceeds the limits.
    """
    bound_jit_cache()
    model = at_size(model, job)
    plan = plan_sampling(model, job)
    request = request_samples(model, job)
    size = choose_batch_size(job.n_images)
    captions = request.captions or [""] * job.n_images
    sample_batch = sample_files.make_batch_sampler(model, request, plan, size)
    for start in range(0, job.n_images, size):
        images = sample_batch(start)
        yield [
            (upscale(image), caption)
            for image, caption in zip(images, captions[start : start + size])
        ]


def sample_trajectory_frames(model: TrainedModel, job: SampleJob) -> list[Image.Image]:
    """Sample the first images of a job and return their states from noise to data as a sequence of
    grids, at most `MAX_FRAMES`, evenly spaced.

    Raises:
        UserError: the job does not fit the model, or exceeds the limits.
    """
    bound_jit_cache()
    model = at_size(model, job)
    job = replace(job, n_images=min(job.n_images, MAX_TRAJECTORY_IMAGES))
    plan = plan_sampling(model, job)
    request = request_samples(model, job)
    size = choose_batch_size(job.n_images)
    rows = request.rows(0, size)
    states = model.sample_rows(
        rows,
        plan,
        batch_size=size,
        trajectory=True,
        decode=False,  # decoding every state would be costly: only the frames are decoded, below
    ).trajectory
    assert states is not None
    n_frames = min(len(states), MAX_FRAMES)
    steps = np.linspace(0, len(states) - 1, n_frames).round().astype(int)
    frames = model.space.to_images(states[steps, : job.n_images])
    return [
        grids.image_grid(model.to_uint8(frame), captions=request.grid_captions) for frame in frames
    ]


def sample_comparison_grid(
    model: TrainedModel, job: SampleJob, cfg_scales: Sequence[float], n_steps: Sequence[int]
) -> Iterator[Image.Image]:
    """Sample one image from the same noise at each guidance scale (rows) and number of steps
    (columns). Yields the grid after each cell.

    Raises:
        UserError: a cell does not fit the model, or there are more than `MAX_GRID_CELLS`.
    """
    n_cells = len(cfg_scales) * len(n_steps)
    if not 1 <= n_cells <= MAX_GRID_CELLS:
        raise UserError(f"a grid of {n_cells} images: must be in 1 … {MAX_GRID_CELLS}")
    bound_jit_cache()
    model = at_size(model, job)
    job = replace(job, n_images=1, labels=job.labels[:1])
    cells = [(row, column) for column in range(len(n_steps)) for row in range(len(cfg_scales))]
    # All are checked before the first is sampled.
    plans = [plan_cell(model, job, cfg_scales[row], n_steps[column]) for row, column in cells]
    request = request_samples(model, job).rows(0, 1)
    images: UInt8[np.ndarray, "rows columns h w c"] | None = None
    for (row, column), plan in zip(cells, plans):
        sample = model.sample_rows(
            request,
            plan,
        )
        image = model.to_uint8(sample.x)[0]
        if images is None:
            images = np.full((len(cfg_scales), len(n_steps), *image.shape), 255, np.uint8)
        images[row, column] = image
        yield grids.comparison_grid(
            images,
            rows=[f"cfg {scale:g}" for scale in cfg_scales],
            columns=["1 step" if n == 1 else f"{n} steps" for n in n_steps],
        )


def plan_cell(model: TrainedModel, job: SampleJob, cfg_scale: float, n_steps: int) -> SamplingPlan:
    """Plan a cell of the comparison grid; without guidance the negative prompt is ignored."""
    negative_prompt = "" if cfg_scale == 1 else job.negative_prompt
    cell = replace(job, cfg_scale=cfg_scale, n_steps=n_steps, negative_prompt=negative_prompt)
    return plan_sampling(model, cell)


def upscale(image: UInt8[np.ndarray, "h w c"], min_side: int = 256) -> Image.Image:
    """Enlarge an image by a whole factor without smoothing, so that its pixels can be seen."""
    small = grids.to_pillow(image)
    factor = math.ceil(min_side / min(small.size))
    size = (small.width * factor, small.height * factor)
    return small.resize(size, Image.Resampling.NEAREST)
