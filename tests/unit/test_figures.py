"""The figures of a run are drawn, or it is said why not."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from drawables import CLASSES, DDPM, SIGMA, drawable
from figures_cases import (
    FIGURES_OF_RECORDS,
    command,  # noqa: F401
)
from PIL import Image

import figures
from data.batch import EncodedCaption
from figures import FiguresConfig
from inference import comparisons, grids
from inference import labels as inference_labels
from inference.sampler import SamplerConfig
from inference.trained_model import SamplingOverrides, TrainedModel
from model import model_config
from runtime.errors import UserError


def test_without_weights_there_are_curves(command):
    def gone():
        raise UserError("'run' has no complete checkpoint yet")

    of = replace(drawable(), load=gone)
    drawn, left_out = command(of)
    assert drawn == set(FIGURES_OF_RECORDS)
    assert left_out == [
        "trajectory.gif, x0.png, cfg_sweep.png, denoising.png are left out: "
        "'run' has no complete checkpoint yet"
    ]
    assert command(of, records_only=True) == (set(FIGURES_OF_RECORDS), [])


def test_a_checkpoint_that_is_asked_for_must_be_there(command, tmp_path):
    def gone():
        raise UserError("'run' has no checkpoint of step 999")

    with pytest.raises(UserError, match="no checkpoint of step 999"):
        command(replace(drawable(), load=gone), step=999)
    assert not (tmp_path / "run" / "figures").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError("encoder error -2")])
def test_a_figure_that_cannot_be_written_ends_the_command(command, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setitem(figures.FIGURES_OF_RECORDS, "progress.gif", fail)
    with pytest.raises(UserError, match=r"cannot write .*progress.gif: (No space|encoder)"):
        command(drawable(), records_only=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"labels": ("catt",)}, "unknown label 'catt'"),
        ({"prompts": ("a cat",)}, "trained without captions; choose classes by --labels"),
        ({"prompts": ("a cat",), "labels": ("3",)}, "pass one of them"),
        ({"cfg_sweep": (1.0,)}, "--cfg_sweep: name a scale besides 1"),
        ({"denoise": (0.5, 1.5)}, r"--denoise 1\.5: a time must be above 0 and at most 1"),
        ({"labels": ("3",) * 40}, "a sheet of 480 pictures is more than 400"),
        ({"n_steps": 0}, "must be at least 1"),
    ],
)
def test_a_mistake_ends_before_anything_is_drawn(command, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        command(drawable(), **flags)
    assert not (tmp_path / "run" / "figures").exists()


CAPTIONS = model_config(
    "DiT-Nano/8",
    image_size=8,
    channels=1,
    out_channels=1,
    n_classes=0,
    block="cross_attention",
    text_length=4,
    text_width=6,
    pooled_width=4,
)


def test_captions_are_those_named_or_of_the_evaluation_split(monkeypatch):
    split = SimpleNamespace(captions=[("a cat",), ("a cat", "one cat"), ("two dogs",)])
    monkeypatch.setattr(comparisons, "open_eval_split", lambda _: split)

    def encode(_, captions):
        n = len(captions)
        return EncodedCaption(
            np.ones((n, 4, 6), "f4"), np.ones((n, 4), bool), np.ones((n, 4), "f4")
        )

    monkeypatch.setattr(TrainedModel, "encode_captions", encode)
    of = drawable(CAPTIONS, conditioning="text")
    for prompts, names in (
        ((), ["a cat"] * 5 + ["two dogs"] * 5),  # they fill a row
        (tuple("abcdefg"), list("abcdefg")),
    ):
        config = FiguresConfig(run=Path("run"), prompts=prompts)
        row = figures.make_row(config, of, figures.choose_labels(config, of))
        assert row.captions == names
    with pytest.raises(UserError, match=r"say what to draw by --prompts"):
        figures.choose_labels(FiguresConfig(run=Path("run"), labels=("3",)), of)


def test_captions_that_cannot_be_encoded_leave_the_curves(command, monkeypatch):
    def encode(*_):
        raise UserError("the text encoder is not to be had")

    monkeypatch.setattr(TrainedModel, "encode_captions", encode)
    drawn, left_out = command(drawable(CAPTIONS, conditioning="text"), prompts=("a cat",))
    assert drawn == set(FIGURES_OF_RECORDS)
    assert len(left_out) == 1 and left_out[0].endswith("the text encoder is not to be had")


def test_large_pictures_are_reduced_to_their_means():
    squares = np.array([[0, 100], [200, 50]], np.uint8)
    large = np.kron(squares, np.ones((130, 130), np.uint8))[None, ..., None]
    large[0, 0, 0] = 255  # a point of a square hardly changes its mean
    small = grids.shrink_images(large, 128)
    assert small.shape == (1, 86, 86, 1)
    assert grids.shrink_images(small, 128) is small and grids.shrink_images(small, None) is small
    np.testing.assert_array_equal(small[0, [0, 0, -1, -1], [1, -1, 0, -1], 0], squares.ravel())


def test_a_bar_tells_how_far_a_film_is():
    frame = np.asarray(grids.add_header(Image.new("RGB", (108, 20)), "step 50 of 100", progress=0.5))
    row = frame[-20 - 1]  # the last above the picture
    blue, grey = ((row == colour).all(axis=1).sum() for colour in ((42, 111, 187), (221,) * 3))
    assert (blue, grey) == (50, 50)
    assert (frame[-20:] == 0).all() and grids.add_header(Image.new("L", (9, 9)), "").size == (9, 34)


# --- the sheet of steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("config, settings", [(CLASSES, {}), (SIGMA, DDPM)], ids=["flow", "ddpm"])
def test_the_times_are_those_of_the_states(config, settings):
    """What a step takes the picture for is x − t·v: nothing but x at the end, where t is 0."""
    of = drawable(config, **settings)
    sampler = of.plan(SamplingOverrides(n_steps=4, cfg_scale=1.0)).sampler
    times = sampler.state_times()
    assert len(times) == 5 and times[-1] == 0 and (np.diff(times[:-1]) < 0).all()
    assert times[0] == sampler.nearest_start(1.0)
    if sampler.prediction is None:
        np.testing.assert_allclose(times, [1, 0.75, 0.5, 0.25, 0])
        np.testing.assert_allclose(SamplerConfig(n_steps=2, shift=3.0).state_times(), [1, 0.75, 0])
    else:
        np.testing.assert_allclose(times[:-1], np.array([999, 666, 333, 0]) / 1000)


def test_a_sheet_of_steps_has_the_states_and_what_they_were_taken_for(monkeypatch):
    of, shown = drawable(), {}
    row = inference_labels.request_labels(of, ["3", "7"], 2, seed=5)
    how = of.plan(SamplingOverrides(n_steps=5))

    def table(x, *, rows, columns):
        shown.update(x=x, rows=rows, columns=columns)
        return Image.new("L", (8, 8))

    monkeypatch.setattr(comparisons.grids, "table", table)
    comparisons.compare_steps(of, row, how, 3)
    assert list(shown["columns"]) == ["3", "7"]
    assert shown["rows"][::2] == ["x at t = 1.00", "x at t = 0.60", "x at t = 0.20"]
    assert shown["rows"][1::2] == ["x0 prediction"] * 3
    labels, told = row.rows(0, 2)
    found = of.sample(labels, how, trajectory=True, estimates=True, **told)
    assert found.trajectory is not None and found.estimates is not None
    pictures = comparisons.grids.to_uint8(np.stack([found.trajectory[0], found.estimates[-1]]))
    np.testing.assert_array_equal(shown["x"][[0, -1]], pictures)
