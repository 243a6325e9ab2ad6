"""Files of many samples: an .npz in the layout of the ADM suite, or a folder with a file for each.

    images = open_image_set(TrainedModel.from_run(run), EvaluationSamplesConfig(n=1000))

Samples are made batch by batch as they are read, never all in memory. What is written is resumed by
the same request after an interruption. Grids and GIFs are written in `grids.py`.
"""

import json
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from data.image_sets import ImageBatch, ImageSet, copy_to_npz
from inference import grids
from inference.autoguidance import plan_with_guide
from inference.comparisons import open_eval_split
from inference.labels import SampleRequest
from inference.sampler import ROUTE_RATES, SamplerConfig, Samples
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from runtime.errors import UserError
from runtime.files import atomic_file, remove_leftovers, report_unwritable
from runtime.run_folder import exclusive_writer
from sampling import ALWAYS

CARD = "card.json"
MAX_LABEL_LETTERS = 40  # in a file's name
BatchSampler = Callable[[int], ImageBatch]  # the batch that begins at this index


@dataclass(frozen=True)
class EvaluationSamplesConfig(SamplingOverrides):
    """Samples for an evaluation. Overrides that are None are left to the model.

    Args:
        n: number of samples.
        batch_size: samples at a time.
        labels: balanced has equal shares of each class, random a random class for each sample.
        rounding: a key of `grids.ROUNDINGS`.
    """

    n: int = 50_000
    seed: int = 0
    batch_size: int = 64
    labels: Literal["balanced", "random"] = "balanced"
    rounding: str = "nearest"


def open_image_set(
    trained: TrainedModel, config: EvaluationSamplesConfig, *, samples: Path | None = None
) -> ImageSet:
    """Open the samples that an evaluation looks at. They are made as they are read.

    Args:
        samples: an .npz to write them to. Until it is complete, batches are in a folder beside it.

    Raises:
        UserError: the config does not fit the model, or it was trained on captions and its dataset
            cannot be opened.
    """
    return open_image_sets(trained, [config], samples=[samples])[0]


def open_image_sets(
    trained: TrainedModel,
    configs: Sequence[EvaluationSamplesConfig],
    *,
    samples: Sequence[Path | None],
) -> list[ImageSet]:
    """Open the samples of several guidance scales. They share their labels and the weak model.

    Args:
        configs: alike but for guidance and `batch_size`.
        samples: for each, as for `open_image_set`.

    Raises:
        UserError: as `open_image_set`.
    """
    request = request_labels(trained, configs[0])
    plan = plan_with_guide(trained, configs[0])
    plans = [plan, *(trained.plan(config, guide=plan.guide) for config in configs[1:])]
    return [
        _image_set(trained, request, each, config, file)
        for each, config, file in zip(plans, configs, samples, strict=True)
    ]


def request_labels(trained: TrainedModel, config: EvaluationSamplesConfig) -> SampleRequest:
    """Request the samples of an evaluation: balanced, or of random classes.

    Raises:
        UserError: as `open_image_set`.
    """
    if config.labels == "random":
        return trained.conditioning.request_random(config.n, seed=config.seed)
    need = "evaluating a model of captions needs those of its dataset"
    open_split = partial(open_eval_split, trained, need=need)
    return trained.conditioning.request_balanced(config.n, open_split, seed=config.seed)


def _image_set(
    trained: TrainedModel,
    request: SampleRequest,
    plan: SamplingPlan,
    config: EvaluationSamplesConfig,
    samples: Path | None,
) -> ImageSet:
    n, size = config.n, min(config.batch_size, config.n)
    sample_at = make_batch_sampler(trained, request, plan, size, rounding=config.rounding)
    starts = range(0, n, size)
    card = describe_samples(trained, request, plan)
    # Files and records of the default conventions do not name them.
    if config.labels != EvaluationSamplesConfig.labels:
        card["labels"] = config.labels
    if config.rounding != EvaluationSamplesConfig.rounding:
        card["rounding"] = config.rounding

    def batches(_: int) -> Iterator[ImageBatch]:
        if samples is None:
            return map(sample_at, starts)
        return write_npz(sample_at, starts, samples, request.label_index, card)

    shape = trained.space.image_shape(trained.model)
    return ImageSet(n, batches, card, shape, f", sampled from {trained.name}")


def make_batch_sampler(
    trained: TrainedModel,
    request: SampleRequest,
    plan: SamplingPlan,
    size: int,
    *,
    rounding: str = "nearest",
) -> BatchSampler:
    """Make the function that samples batches of `size` images of a request.

    Args:
        rounding: a key of `grids.ROUNDINGS`.
    """
    n = len(request.label_index)

    def sample_at(start: int) -> ImageBatch:
        # The last batch is filled up, so that all are one compiled program.
        rows = request.rows(start, start + size)
        samples = trained.sample_rows(
            rows,
            plan,
            batch_size=size,
        )
        return trained.to_uint8(samples.x[: n - start], first=start, rounding=rounding)

    return sample_at


def slice_samples(
    trained: TrainedModel, sample_all: Callable[[], Samples], size: int
) -> BatchSampler:
    """Make the function that cuts batches of `size` images out of samples made all at once. They
    are made when the first batch is needed; `sample_all` should cache its result.
    """
    return lambda start: trained.to_uint8(sample_all().x[start : start + size], first=start)


def describe_samples(
    trained: TrainedModel, request: SampleRequest, plan: SamplingPlan
) -> dict[str, Any]:
    """All that the samples depend on, for the card beside them."""
    sampler = describe_sampler(plan.sampler)
    plan_card = {"sampler": sampler, "cfg_scale": plan.cfg_scale, "seed": request.seed}
    if plan.inner_guidance != 1:
        plan_card["inner_guidance"] = plan.inner_guidance
    if plan.route_guidance != 1:
        plan_card["route_guidance"] = plan.route_guidance
    if plan.guide:
        guide, scale = plan.guide
        plan_card |= {"guide": guide.name, "guide_step": guide.step, "guide_scale": scale}
    return plan_card | trained.card | {"count": len(request.label_index)}


def describe_sampler(sampler: SamplerConfig) -> dict[str, Any]:
    """All that samples depend on in a sampler. What older versions did not have is left out at its
    neutral value, so that samples that they have begun are resumed.
    """
    facts = asdict(sampler)
    method = facts["method"]
    for name in ("t_min", "area"):  # of the loss alone
        method.pop(name, None)
    neutral = (
        (facts, "inner_interval", ALWAYS),
        (facts, "route_rates", ROUTE_RATES),
        (method, "prediction", "velocity"),
        (method, "noise_scale", 1.0),
        (method, "time_grid", "even"),
        (method, "fixed_variance", "posterior"),
    )
    for part, name, value in neutral:
        if part.get(name) == value:
            del part[name]
    return facts


# --- .npz and folders -----------------------------------------------------------------------------


def write_npz(
    sample_at: BatchSampler,
    starts: range,
    samples: Path,
    labels: Int[np.ndarray, "n"],
    card: dict[str, Any],
) -> Generator[ImageBatch]:
    """Write samples to an .npz and yield them, batch by batch.

    Until all are made, batches are files in a folder beside it, and those that an earlier process
    made are read from there.

    Args:
        starts: the index of the first sample of each batch.

    Raises:
        UserError: see `claim_folder`.
    """
    folder = parts_folder(samples)

    def batch_file(start: int) -> Path:
        return folder / f"{start:09}.npy"

    def save_batch(start: int, batch: ImageBatch) -> None:
        with atomic_file(batch_file(start)) as file:
            np.save(file, batch)

    with claim_folder(folder, card | {"batch_size": starts.step}):
        saved_starts = sample_missing_batches(
            sample_at, starts, is_saved=lambda start: batch_file(start).exists(), save=save_batch
        )
        batches = (np.load(batch_file(start)) for start in saved_starts)
        yield from copy_to_npz(batches, folder / samples.name, labels)
        (folder / samples.name).replace(samples)
        # The card goes last: without it, the other files would not be recognised as ours.
        for path in folder.glob("*.npy"):
            path.unlink()
        shutil.rmtree(folder)


def parts_folder(samples: Path) -> Path:
    """The folder beside an .npz that holds its batches until all are made."""
    return samples.with_name(f"{samples.name}.parts")


def unfinished_batch_size(samples: Path) -> int | None:
    """The batch size that an unfinished .npz was begun with; None if there is none.

    Raises:
        UserError: its card is damaged.
    """
    return (read_card(parts_folder(samples)) or {}).get("batch_size")


def write_folder(
    sample_at: BatchSampler,
    starts: range,
    folder: Path,
    labels: Sequence[str],
    card: dict[str, Any],
) -> Generator[int]:
    """Write samples as PNG files to a folder, each named by its index and label, beside a card.
    Yields the number of images of each batch.

    Raises:
        UserError: see `claim_folder`.
    """
    n = len(labels)

    def image_files(start: int) -> list[Path]:
        indices = range(start, min(start + starts.step, n))
        return [folder / sample_file_name(i, n, labels[i]) for i in indices]

    def save_batch(start: int, batch: ImageBatch) -> None:
        for image, file in zip(batch, image_files(start), strict=True):
            grids.save_png(grids.to_pillow(image), file)

    def is_saved(start: int) -> bool:
        return all(file.exists() for file in image_files(start))

    with claim_folder(folder, card | {"batch_size": starts.step}):
        for start in sample_missing_batches(sample_at, starts, is_saved=is_saved, save=save_batch):
            yield len(image_files(start))


def sample_file_name(index: int, n: int, label: str) -> str:
    """Name a sample's file, such as 000007_cat.png. Names sort as indices do."""
    number = f"{index:0{max(6, len(str(n - 1)))}}"
    word = re.sub(r"\W+", "-", label)[:MAX_LABEL_LETTERS].strip("-")
    return f"{number}_{word}.png" if word else f"{number}.png"


def sample_missing_batches(
    sample_at: BatchSampler,
    starts: range,
    *,
    is_saved: Callable[[int], bool],
    save: Callable[[int, ImageBatch], object],
) -> Generator[int]:
    """Yield the start of each batch once it is saved. Only batches that an earlier process has not
    saved are sampled.
    """
    for start in starts:
        if not is_saved(start):
            save(start, sample_at(start))
        yield start


# --- claiming a folder ----------------------------------------------------------------------------


@contextmanager
def claim_folder(folder: Path, card: dict[str, Any]) -> Generator[None]:
    """Open a folder of samples for this process alone: a new one, or one begun with the same card.

    Raises:
        UserError: it was begun with other settings, holds other files, cannot be written to, or
            another process is writing there.
    """
    check_sample_folder(folder)
    with report_unwritable(folder):
        folder.mkdir(exist_ok=True)
        with exclusive_writer(folder):
            remove_leftovers(folder)
            write_or_compare_card(folder, card)
            yield


def check_sample_folder(folder: Path) -> None:
    """Raises UserError if a folder holds files but no card, so that they are not our samples."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; name a new folder")
    if not folder.is_dir() or (folder / CARD).exists():
        return
    if others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
        raise UserError(f"'{folder}' holds other files, such as {others[0]}; name a new folder")


def write_or_compare_card(folder: Path, card: dict[str, Any]) -> None:
    """Write the card of a new folder, or compare it with that of one that was begun.

    Raises:
        UserError: the folder was begun with other settings, which are named.
    """
    card = json.loads(json.dumps(card, default=str))
    old_card = read_card(folder)
    if old_card is None:
        with atomic_file(folder / CARD) as file:
            file.write(json.dumps(card, indent=2).encode() + b"\n")
        return
    if changes := list(describe_differences(old_card, card)):
        raise UserError(
            f"'{folder}' was begun with other settings: {'; '.join(changes)}; resume with those, "
            "remove the folder, or name another one"
        )


def read_card(folder: Path) -> dict[str, Any] | None:
    """Read the card of a folder; None if there is none.

    Raises:
        UserError: the card is damaged.
    """
    file = folder / CARD
    try:
        return dict(json.loads(file.read_text())) if file.exists() else None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def describe_differences(old: dict[str, Any], new: dict[str, Any]) -> Generator[str]:
    """Describe each value that differs between two cards."""
    for name in old | new:
        old_value, new_value = old.get(name), new.get(name)
        if isinstance(old_value, dict) and isinstance(new_value, dict):
            yield from describe_differences(old_value, new_value)
        elif old_value != new_value:
            yield f"{name} was {shorten(old_value)}, not {shorten(new_value)}"


def shorten(value: Any) -> str:
    """Cut the text of a value to 60 letters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
