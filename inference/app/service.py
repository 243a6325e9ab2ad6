"""Models that visitors of a page may draw from: what they may ask for, and how it is made.

    models = Models(runs=Path("runs"))
    of = models.keep("digits-DiT-Ti-2-20261121-093000")
    for pictures in draw(of, Order(labels=("3", "7"), n=20)):
        ...

Knows nothing of pages. All that is drawn here goes to whoever asked; nothing is kept but a model's
weights. Calls must come one after the other: see `page.DEVICE`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from inference import grids, sample_files, sampler
from inference import labels as inference_labels
from inference.labels import SampleRequest
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from methods import ddpm
from runtime.errors import UserError, unknown_name
from runtime.run_folder import CONFIG_FILE, RUNS, read_config

MAX_IMAGES, MAX_FLOW_STEPS, MAX_PROMPT_CHARACTERS, MAX_GRID_CELLS = 64, 250, 300, 36
MAX_TRAJECTORY_IMAGES, MAX_FRAMES = 16, 48  # of an animation: every state of every picture is in memory
BATCH_SIZES = (4, 16)  # of batches, so that another number of pictures is not another program
MAX_COMPILED_PROGRAMS = 32  # of ten MB or more, one for each number of steps, interval, solver


@dataclass(frozen=True)
class SampleJob(SamplingOverrides):
    """What a visitor asks for; what is None is as in the model's settings.

    Args:
        labels: names or numbers of classes; by default all.
        prompt: a caption instead, for a model that was trained on them.
        negative_prompt: a caption that guidance leads away from; an empty one is none.
        n: how many pictures.
    """

    labels: tuple[str, ...] = ()
    prompt: str = ""
    negative_prompt: str = ""
    n: int = 16
    seed: int = 0


# --- models ---------------------------------------------------------------------------------------


@dataclass
class ModelLibrary:
    """A run, a folder of runs, or a pretrained model, by name.

    Args:
        vae: where the VAE of latents is now, if it has moved.
        text_towers: where the towers that encode captions are now, if they have moved.

    Raises:
        UserError: there is none.
    """

    run: Path | None = None
    runs: Path = RUNS
    pretrained: str | None = None
    vae: str | None = None
    text_towers: tuple[str, ...] = ()
    kept: dict[tuple[str, int], TrainedModel] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.pretrained:
            self.keep(self.pretrained)  # whose weights come with it
        elif self.run:
            self.open(self.names()[0])  # which says what it cannot be drawn from
            if not newest_checkpoint_step(self.run):
                raise UserError(f"run '{self.run}' has no checkpoint yet")
        elif not self.names():
            raise UserError(
                f"{self.runs}/ holds no run with a checkpoint: train one by python train.py, or "
                "name one by --run"
            )

    def names(self) -> list[str]:
        """Of what can be drawn from now: of runs with a checkpoint the last begun first."""
        if self.pretrained:
            return [self.pretrained]
        if self.run:
            return [self.run.resolve().name]
        found = sorted(self.runs.glob(f"*/{CONFIG_FILE}"), key=lambda path: -path.stat().st_mtime)
        return [path.parent.name for path in found if newest_checkpoint_step(path.parent) and is_training_run(path.parent)]

    def folder(self, name: str) -> Path | None:
        """The run's; None for a pretrained model.

        Raises:
            UserError: there is no such name.
        """
        if name not in (names := self.names()):
            raise unknown_name("model", name, names)
        return None if self.pretrained else self.run or self.runs / name

    def open(self, name: str) -> TrainedModel:
        """What is known of a model. The weights of a run are read when they are first asked for."""
        return self._opened(self._key(name))

    def keep(self, name: str) -> TrainedModel:
        """The same to draw from. Its weights, the newest, take the place of another model's."""
        key = self._key(name)  # once: a run may save another checkpoint meanwhile
        found = self._opened(key)
        self.kept = {key: found}
        return found

    def _key(self, name: str) -> tuple[str, int]:
        return name, newest_checkpoint_step(self.folder(name))

    def _opened(self, key: tuple[str, int]) -> TrainedModel:
        if found := self.kept.get(key):
            return found
        folder = self.folder(key[0])
        if folder is None:
            return TrainedModel.from_pretrained(
                key[0], vae=self.vae, text_encoders=self.text_towers
            )
        return TrainedModel.from_run(folder, vae=self.vae, text_encoders=self.text_towers)


def newest_checkpoint_step(run: Path | None) -> int:
    """The last step with a checkpoint; 0 if there is none."""
    steps = (path.name for path in run.glob("checkpoints/*")) if run else ()
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def is_training_run(run: Path) -> bool:
    """Whether a folder is a run of `train.py`: other commands and damage are passed over."""
    try:
        return bool(read_config(run))
    except UserError:
        return False


# --- what may be asked for ------------------------------------------------------------------------


def max_steps(drawable: TrainedModel) -> int:
    """As many as DDPM's chain has, or a bound for flows."""
    return ddpm.N_STEPS if drawable.settings.get("prediction") else MAX_FLOW_STEPS


def check_job(drawable: TrainedModel, order: SampleJob) -> None:
    """Raises UserError for more than a page gives to one visitor."""
    if not 1 <= order.n <= MAX_IMAGES:
        raise UserError(f"{order.n} pictures: ask for 1 … {MAX_IMAGES} at a time")
    most = max_steps(drawable)
    if order.n_steps is not None and not 1 <= order.n_steps <= most:
        raise UserError(f"{order.n_steps} steps: ask for 1 … {most}")
    for name in ("prompt", "negative_prompt"):
        if (n := len(getattr(order, name))) > MAX_PROMPT_CHARACTERS:
            said = name.replace("_", " ")
            raise UserError(f"the {said} has {n} letters: at most {MAX_PROMPT_CHARACTERS} are read")


def plan_sampling(drawable: TrainedModel, order: SampleJob) -> SamplingPlan:
    """How to draw it. Without guidance there is no interval to limit.

    Raises:
        UserError: it does not fit the model, or is too much.
    """
    check_job(drawable, order)
    if order.cfg_scale == 1:
        order = replace(order, interval=None, guided_channels=None)
    how, negative = (
        drawable.plan(SamplingOverrides.from_flags(order)),
        bool(order.negative_prompt.strip()),
    )
    sampler.check_guidance(how.sampler, drawable.model, how.cfg_scale, negative=negative)
    return how


def request_samples(drawable: TrainedModel, order: SampleJob) -> SampleRequest:
    """What the pictures are to be of.

    Raises:
        UserError: nothing that the model knows.
    """
    if not drawable.model.text_width:
        return inference_labels.request_labels(drawable, order.labels, order.n, seed=order.seed)
    if not order.prompt.strip():
        raise UserError("this model was trained on captions: write a prompt")
    more = {"seed": order.seed, "negative": order.negative_prompt.strip() or None}
    return inference_labels.request_prompts(drawable, [order.prompt.strip()], order.n, **more)


# --- drawing --------------------------------------------------------------------------------------


def choose_batch_size(n: int) -> int:
    """Of the batches of n pictures."""
    return next((size for size in BATCH_SIZES if n <= size), BATCH_SIZES[-1])


def bound_jit_cache() -> None:
    """Drop compiled programs before there are many of them."""
    if sampler.sample_batch._cache_size() >= MAX_COMPILED_PROGRAMS:  # type: ignore
        sampler.sample_batch.clear_cache()  # type: ignore


def run_job(drawable: TrainedModel, order: SampleJob) -> Iterator[list[tuple[Image.Image, str]]]:
    """The pictures and what they are of, batch by batch.

    Raises:
        UserError: they cannot be drawn.
    """
    bound_jit_cache()
    how, of = plan_sampling(drawable, order), request_samples(drawable, order)
    size, names = choose_batch_size(order.n), of.captions or [""] * order.n
    draw_batch = sample_files.make_batch_sampler(drawable, of, how, size)
    for start in range(0, order.n, size):
        pictures = draw_batch(start)
        yield [(upscale(p), name) for p, name in zip(pictures, names[start : start + size])]


def sample_trajectory_frames(drawable: TrainedModel, order: SampleJob) -> list[Image.Image]:
    """Frames of the first pictures' way from noise, with names, evenly chosen among the steps.

    Raises:
        UserError: they cannot be drawn.
    """
    bound_jit_cache()
    order = replace(order, n=min(order.n, MAX_TRAJECTORY_IMAGES))
    how, of = plan_sampling(drawable, order), request_samples(drawable, order)
    size = choose_batch_size(order.n)
    rows = of.rows(0, size)
    # Of latents only the frames are decoded, not every state.
    states = drawable.sample(
        rows.labels,
        how,
        seed=rows.seed,
        first_index=rows.first_index,
        negative=rows.negative,
        batch_size=size,
        trajectory=True,
        decode=False,
    ).trajectory
    assert states is not None
    n_frames = min(len(states), MAX_FRAMES)
    shown = states[np.linspace(0, len(states) - 1, n_frames).round().astype(int), : order.n]
    x = drawable.codec.decode(shown) if drawable.codec else shown
    return [grids.image_grid(grids.to_uint8(frame), captions=of.captions) for frame in x]


def sample_comparison_grid(
    drawable: TrainedModel, order: SampleJob, scales: Sequence[float], steps: Sequence[int]
) -> Iterator[Image.Image]:
    """One picture, from the same noise at each scale of guidance (rows) and number of steps
    (columns): the table as it fills.

    Raises:
        UserError: some of them cannot be drawn, or they are too many.
    """
    if not 1 <= (n := len(scales) * len(steps)) <= MAX_GRID_CELLS:
        raise UserError(f"a table of {n} pictures: name 1 … {MAX_GRID_CELLS}")
    bound_jit_cache()
    order = replace(order, n=1, labels=order.labels[:1])
    cells = list(product(enumerate(steps), enumerate(scales)))
    # A negative prompt leads away from nothing where there is no guidance.
    orders = [
        replace(
            order, cfg_scale=scale, n_steps=k, **({"negative_prompt": ""} if scale == 1 else {})
        )
        for (_, k), (_, scale) in cells
    ]
    hows, of = [plan_sampling(drawable, one) for one in orders], request_samples(drawable, order)
    request = of.rows(0, 1)
    shown: UInt8[np.ndarray, "rows columns h w c"] | None = None
    for how, ((column, _), (row, _)) in zip(hows, cells):
        sample = drawable.sample(
            request.labels,
            how,
            seed=request.seed,
            first_index=request.first_index,
            negative=request.negative,
        )
        picture = grids.to_uint8(sample.x[0])
        if shown is None:
            shown = np.full((len(scales), len(steps), *picture.shape), 255, np.uint8)
        shown[row, column] = picture
        rows, columns = [f"cfg {s:g}" for s in scales], [f"{k} step{'s' * (k > 1)}" for k in steps]
        yield grids.comparison_grid(shown, rows=rows, columns=columns)


def upscale(picture: UInt8[np.ndarray, "h w c"], side: int = 256) -> Image.Image:
    """Enlarged by a whole factor, so that small ones are seen as they are."""
    found = grids.to_pillow(picture)
    scale = math.ceil(side / min(found.size))
    return found.resize((found.width * scale, found.height * scale), Image.Resampling.NEAREST)
