"""Sheets that compare what a model draws: by the scale of guidance, step by step, and from real
pictures that were noised more or less.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from data.batch import EncodedCaption
from data.load import open_dataset
from data.rows import Split
from inference import grids
from inference import labels as inference_labels
from inference.labels import SampleRequest, spread_evenly
from inference.sampler import StartFrom
from inference.trained_model import SamplingPlan, TrainedModel
from networks import autoencoder
from runtime.errors import UserError

# Of a run's settings, what `open_source` takes by the same name.
DATASET_FLAGS = (
    *("data_dir", "image_column", "label_column", "conditioning", "caption_column"),
    *("image_size", "channels"),
)


def compare_scales(
    drawable: TrainedModel,
    subjects: SampleRequest,
    how: SamplingPlan,
    scales: Sequence[float],
    *,
    side: int | None = None,
    **more: Any,
) -> Image.Image:
    """A row of pictures for every scale of guidance, the noise of each column being the same.

    Args:
        side: pixels to a side that pictures are reduced to, if they have more.
        more: of `drawing.sample`.
    """
    labels, told = subjects.rows(0, len(subjects.which))
    rows = [drawable.sample(labels, how.at(scale), **told | more).x for scale in scales]
    return grids.comparison_grid(
        grids.shrink_images(grids.to_uint8(np.stack(rows)), side),
        rows=[f"cfg {scale:g}" for scale in scales],
        columns=subjects.captions or (),
    )


def compare_steps(
    drawable: TrainedModel,
    subjects: SampleRequest,
    how: SamplingPlan,
    n_rows: int,
    *,
    side: int | None = None,
    **more: Any,
) -> Image.Image:
    """The way from noise at up to `n_rows` times, evenly among the solver's steps: a row of what x
    is there, and below it a row of what the model takes the picture for. See `of_scales`.
    """
    labels, told = subjects.rows(0, len(subjects.which))
    more |= {"trajectory": True, "estimates": True, "codec": None}  # few of them will be decoded
    found = drawable.sample(labels, how, **told | more)
    assert found.trajectory is not None and found.estimates is not None
    steps = evenly_spaced(len(found.estimates), n_rows)
    both = np.stack([found.trajectory[steps], found.estimates[steps]], axis=1)
    times = how.sampler.state_times()[steps]
    x = decode_images(drawable, both.reshape(-1, *both.shape[2:]))
    return grids.comparison_grid(
        grids.shrink_images(grids.to_uint8(x), side),
        rows=[name for t in times for name in (f"x at t = {t:.2f}", "x0 prediction")],
        columns=subjects.captions or (),
    )


def decode_images(
    drawable: TrainedModel, x: Float[np.ndarray, "*n h w c"]
) -> Float[np.ndarray, "*n H W C"]:
    """What a model draws as pictures in −1 … 1."""
    return drawable.codec.decode(x) if drawable.codec else x


def evenly_spaced(n: int, most: int) -> Int[np.ndarray, "m"]:
    """Up to `most` of the places 0 … n − 1, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


# --- from real pictures ---------------------------------------------------------------------------


class RealImages(NamedTuple):
    """Pictures of a dataset as a model sees them, and what it is told of each."""

    data: Float[np.ndarray, "b h w c"]
    labels: Int[np.ndarray, "b"] | EncodedCaption
    names: Sequence[str]


def load_real_images(drawable: TrainedModel, ids: Sequence[int], n: int) -> RealImages:
    """Pictures of the evaluation split: of these classes, or from all over it. Latents are the
    means of what the VAE makes of a picture.

    Raises:
        UserError: the dataset is not at hand, or does not have so many.
    """
    split, model = open_eval_split(drawable), drawable.model
    rows = choose_rows(split, ids, n)
    x = np.asarray(split.images(rows), np.float32)
    if encoding := drawable.encoding:
        factors = (encoding.scaling_factor, encoding.shift_factor)
        x = autoencoder.scale(
            x[..., : encoding.shape[-1]], scaling_factor=factors[0], shift_factor=factors[1]
        )
    else:
        x = x / 127.5 - 1
    if model.text_width:
        captions = [split.captions[row][0] for row in rows]
        return RealImages(x, drawable.encode(captions), captions)
    if not model.n_classes:
        return RealImages(x, np.zeros(n, np.int32), ())
    labels = split.labels[rows]
    return RealImages(x, labels, inference_labels.label_texts(labels, drawable.label_names) or ())


def open_eval_split(drawable: TrainedModel) -> Split:
    """The run's own."""
    s = drawable.settings
    if not s.get("dataset_name"):
        raise UserError(
            f"--denoise needs real pictures, and no dataset of {drawable.name} is known"
        )
    latents = s.get("latents")
    try:
        return open_dataset(
            s["dataset_name"],
            templates=tuple(s.get("caption") or ()),
            streaming=bool(s.get("streaming")),
            latents_dir=Path(latents) if latents else None,
            **{name: s.get(name) for name in DATASET_FLAGS},
        ).eval
    except UserError as error:
        raise UserError(f"--denoise needs the run's real pictures: {error}") from None


def choose_rows(split: Split, ids: Sequence[int], n: int) -> Int[np.ndarray, "n"]:
    """Rows of a split: the first of each class, as many of each, or evenly from all over it."""
    rows = np.linspace(0, len(split) - 1, min(n, len(split))).astype(int)
    if ids := list(dict.fromkeys(ids)):
        share = spread_evenly(ids, n)
        found = [np.flatnonzero(split.labels == i)[: (share == i).sum()] for i in ids]
        rows = np.concatenate(found)
    if len(rows) < n:
        raise UserError(f"{n} pictures are wanted, and split '{split.name}' has {len(rows)} such")
    return rows


def compare_denoising(
    drawable: TrainedModel,
    real: RealImages,
    how: SamplingPlan,
    times: Sequence[float],
    *,
    side: int | None = None,
    **more: Any,
) -> Image.Image:
    """Real pictures in the first row; for each time two more: noised up to there, and what the
    model draws from that. DDPM begins at the step nearest to the time, which is the one that is
    named. See `of_scales`.
    """
    rows, names = [real.data], ["real"]
    for t in times:
        start_from = StartFrom(real.data, how.sampler.time_steps(t))
        more |= {"begin": start_from, "trajectory": True, "codec": None}
        found = drawable.sample(real.labels, how, **more)
        assert found.trajectory is not None
        rows += [found.trajectory[0], found.x]
        names += [f"noised, t = {how.sampler.nearest_start(t):.3g}", "drawn from it"]
    x = grids.shrink_images(grids.to_uint8(decode_images(drawable, np.stack(rows))), side)
    return grids.comparison_grid(x, rows=names, columns=real.names)
