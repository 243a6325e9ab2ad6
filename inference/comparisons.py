"""Comparison grids: by guidance scale, by solver step, and from real images noised more or less.

Chooses what to compare and samples it; the layout of a grid is in `grids.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from data import bad_rows
from data.batch import EncodedCaption
from data.load import open_dataset
from data.rows import Split
from inference import grids
from inference.labels import SampleRequest, changed_classes, drawable_texts, spread_evenly
from inference.sampler import StartFrom
from inference.trained_model import SamplingPlan, TrainedModel
from runtime.errors import UserError


def compare_scales(
    trained: TrainedModel,
    request: SampleRequest,
    plan: SamplingPlan,
    scales: Sequence[float],
    *,
    side: int | None = None,
    batch_size: int = 256,
) -> Image.Image:
    """A row of samples for each guidance scale. The noise of a column is the same.

    Args:
        side: shrink larger images to this many pixels a side.
    """
    samples = request.rows(0, len(request.label_index))
    rows = [
        trained.sample_rows(
            samples,
            plan.with_cfg_scale(scale),
            batch_size=batch_size,
        ).x
        for scale in scales
    ]
    return grids.comparison_grid(
        grids.shrink_images(trained.to_uint8(np.stack(rows)), side),
        rows=[f"cfg {scale:g}" for scale in scales],
        columns=request.grid_captions or (),
    )


def compare_steps(
    trained: TrainedModel,
    request: SampleRequest,
    plan: SamplingPlan,
    n_times: int,
    *,
    side: int | None = None,
) -> Image.Image:
    """Two rows for each of up to `n_times` times of the trajectory, evenly spaced among the
    solver's steps: x at that time, and the model's x0 prediction from it.

    Args:
        side: shrink larger images to this many pixels a side.
    """
    rows = request.rows(0, len(request.label_index))
    samples = trained.sample_rows(
        rows,
        plan,
        trajectory=True,
        estimates=True,
        decode=False,  # only the states that are shown are decoded, below
    )
    assert samples.trajectory is not None and samples.estimates is not None
    steps = evenly_spaced(len(samples.estimates), n_times)
    # Rows alternate: the state, its x0 prediction, the next state, …
    states = np.stack([samples.trajectory[steps], samples.estimates[steps]], axis=1)
    times = plan.sampler.state_times()[steps]
    x = trained.space.to_images(states.reshape(-1, *states.shape[2:]))
    return grids.comparison_grid(
        grids.shrink_images(trained.to_uint8(x), side),
        rows=[name for t in times for name in (f"x at t = {t:.2f}", "x0 prediction")],
        columns=request.grid_captions or (),
    )


def evenly_spaced(n: int, max_n: int) -> Int[np.ndarray, "m"]:
    """Choose up to `max_n` of the indices 0 … n − 1, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, max_n)).round().astype(int))


# --- from real images -----------------------------------------------------------------------------


class RealImages(NamedTuple):
    """Images of a dataset as a model sees them, with their labels.

    Args:
        data: pixels in −1 … 1, or scaled latents.
        names: of their classes, or their captions; empty if there are none.
    """

    data: Float[np.ndarray, "b h w c"]
    labels: Int[np.ndarray, "b"] | EncodedCaption
    names: Sequence[str]


def compare_denoising(
    trained: TrainedModel,
    real: RealImages,
    plan: SamplingPlan,
    times: Sequence[float],
    *,
    seed: int | Sequence[int] = 0,
    side: int | None = None,
    batch_size: int = 256,
) -> Image.Image:
    """Real images in the first row, and two rows for each time: noised up to that time, and sampled
    from there. DDPM starts at the step nearest to the time; the row names that step's time.

    Args:
        side: shrink larger images to this many pixels a side.
    """
    rows, names = [real.data], ["real"]
    for t in times:
        samples = trained.sample(
            real.labels,
            plan,
            seed=seed,
            start_from=StartFrom(real.data, plan.sampler.time_steps(t)),
            batch_size=batch_size,
            trajectory=True,
            decode=False,
        )
        assert samples.trajectory is not None
        rows += [samples.trajectory[0], samples.x]
        names += [f"noised, t = {plan.sampler.state_times(t)[0]:.3g}", "sampled from it"]
    images = trained.to_uint8(trained.space.to_images(np.stack(rows)))
    numbers = real.labels if isinstance(real.labels, np.ndarray) else range(len(real.names))
    columns = drawable_texts(real.names, map(int, numbers))
    return grids.comparison_grid(grids.shrink_images(images, side), rows=names, columns=columns)


def load_real_images(trained: TrainedModel, class_ids: Sequence[int], n: int) -> RealImages:
    """Load n images of the run's evaluation split. Latents are the means of the VAE's posterior.

    Args:
        class_ids: equal shares of these classes; if empty, images from all over the split.

    Raises:
        UserError: the dataset cannot be opened, or does not have so many.
    """
    split = open_eval_split(trained)
    if split.config.encoding and split.config.encoding.buckets:
        raise UserError("--denoise is not for a model of latents of several shapes")
    rows = choose_rows(split, class_ids, n)
    data = trained.space.means(split.decode(rows))
    labels, names = trained.conditioning.of_rows(split, rows)
    return RealImages(data, labels, names)


def open_eval_split(
    trained: TrainedModel, *, need: str = "--denoise needs the run's real images"
) -> Split:
    """Open the evaluation split of the dataset that a model was trained on.

    Args:
        need: what needs the split, to begin a message with.

    Raises:
        UserError: the dataset is not known, or cannot be opened.
    """
    settings = trained.settings
    if not settings.get("dataset_name"):
        raise UserError(f"{need}, and the dataset of {trained.name} is not known")
    latents = settings.get("latents")
    names = settings.get("dataset", {}).get("label_names") or ()
    try:
        source = open_dataset(
            settings["dataset_name"],
            data_dir=settings.get("data_dir"),
            image_column=settings.get("image_column"),
            label_column=settings.get("label_column"),
            conditioning=settings.get("conditioning"),
            caption_column=settings.get("caption_column"),
            templates=tuple(settings.get("caption") or ()),
            image_size=settings.get("image_size"),
            channels=settings.get("channels"),
            crop=settings.get("crop"),
            streaming=bool(settings.get("streaming")),
            latents_dir=Path(latents) if latents else None,
            train_split=settings.get("train_split"),
            eval_split=settings.get("eval_split"),
            unlabelled=settings.get("unlabelled") or "stop",
            class_order=names,
        )
        n_classes = trained.model.n_classes
        if n_classes and (change := changed_classes(source.config, names, n_classes)):
            raise UserError(f"{change}; give it the classes of the training again")
        run_dir = settings.get("run_dir")
        if run_dir and (record := bad_rows.read_record(Path(run_dir))):
            source = bad_rows.leave_out(source, bad_rows.from_json(record, source))
    except UserError as error:
        raise UserError(f"{need}: {error}") from None
    return source.eval


def choose_rows(split: Split, class_ids: Sequence[int], n: int) -> Int[np.ndarray, "n"]:
    """Choose n rows of a split: the first of each class in equal shares, or evenly from all over it
    if no class is given.

    Raises:
        UserError: the split does not have so many.
    """
    rows = np.linspace(0, len(split) - 1, min(n, len(split))).astype(int)
    if distinct_ids := list(dict.fromkeys(class_ids)):
        shares = spread_evenly(distinct_ids, n)
        rows = np.concatenate(
            [np.flatnonzero(split.labels == i)[: (shares == i).sum()] for i in distinct_ids]
        )
    if len(rows) < n:
        raise UserError(f"{n} images are needed, and split '{split.name}' has {len(rows)} such")
    return rows
