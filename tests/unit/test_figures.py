"""The figures of a run are made, or a line says why not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from figures_cases import (
    OF_RECORDS,
    command,  # noqa: F401
)
from PIL import Image
from tiny_models import CAPTIONS, CLASSES, DDPM, SIGMA, tiny_model

import figures
from data.batch import EncodedCaption
from data.load import open_dataset
from figures import FiguresConfig
from inference import comparisons, grids
from inference.sampler import SamplerConfig
from inference.trained_model import SamplingOverrides, TrainedModel
from methods.rectified_flow import RectifiedFlow
from runtime.errors import UserError


def test_without_weights_there_are_curves(command):
    def gone():
        raise UserError("'run' has no complete checkpoint yet")

    trained = replace(tiny_model(), load=gone)
    made, left_out = command(trained)
    assert made == set(OF_RECORDS)
    assert left_out == [
        "trajectory.gif, x0.png, cfg_sweep.png, denoising.png are left out: "
        "'run' has no complete checkpoint yet"
    ]
    assert command(trained, records_only=True) == (set(OF_RECORDS), [])


def test_a_checkpoint_that_is_named_must_exist(command, tmp_path):
    def gone():
        raise UserError("'run' has no checkpoint of step 999")

    with pytest.raises(UserError, match="no checkpoint of step 999"):
        command(replace(tiny_model(), load=gone), step=999)
    assert not (tmp_path / "run" / "figures").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError("encoder error -2")])
def test_a_figure_that_cannot_be_written_ends_the_command(command, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setitem(figures.FIGURES_OF_RECORDS, "progress.gif", fail)
    with pytest.raises(UserError, match=r"cannot write .*progress.gif: (No space|encoder)"):
        command(tiny_model(), records_only=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"labels": ("catt",)}, "unknown label 'catt'"),
        ({"prompts": ("a cat",)}, "trained without captions; choose classes by --labels"),
        ({"prompts": ("a cat",), "labels": ("3",)}, "pass one of them"),
        ({"cfg_sweep": (1.0,)}, "--cfg_sweep: name a scale besides 1"),
        ({"denoise": (0.5, 1.5)}, r"--denoise 1\.5: a time must be above 0 and at most 1"),
        ({"labels": ("3",) * 40}, "a grid of 480 images is more than 400"),
        ({"n_steps": 0}, "must be at least 1"),
    ],
)
def test_a_mistake_ends_before_anything_is_made(command, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        command(tiny_model(), **flags)
    assert not (tmp_path / "run" / "figures").exists()


def test_captions_are_those_named_or_of_the_evaluation_split(monkeypatch):
    captions = [("a cat",), ("a cat", "one cat"), ("two dogs",)]
    split = replace(open_dataset("digits").eval, captions=captions)
    monkeypatch.setattr(comparisons, "open_eval_split", lambda _: split)

    def encode(_, captions):
        n, length = len(captions), CAPTIONS.text_length
        tokens, mask = np.ones((n, length, 6), "f4"), np.ones((n, length), bool)
        return EncodedCaption(tokens, mask, np.ones((n, 4), "f4"))

    monkeypatch.setattr(TrainedModel, "encode_captions", encode)
    trained = tiny_model(CAPTIONS, conditioning="text")
    for prompts, names in (
        ((), ["a cat"] * 5 + ["two dogs"] * 5),  # they fill a row
        (tuple("abcdefg"), list("abcdefg")),
    ):
        config = FiguresConfig(run=Path("run"), prompts=prompts)
        row = figures.make_row(config, trained, figures.choose_words(config, trained))
        assert row.captions == names
    with pytest.raises(UserError, match=r"name them by --prompts"):
        trained.conditioning.check(labels=("3",))


def test_captions_that_cannot_be_encoded_leave_the_curves(command, monkeypatch):
    def encode(*_):
        raise UserError("the text encoder cannot be read")

    monkeypatch.setattr(TrainedModel, "encode_captions", encode)
    made, left_out = command(tiny_model(CAPTIONS, conditioning="text"), prompts=("a cat",))
    assert made == set(OF_RECORDS)
    assert len(left_out) == 1 and left_out[0].endswith("the text encoder cannot be read")


def test_large_images_are_shrunk_to_their_means():
    squares = np.array([[0, 100], [200, 50]], np.uint8)
    large = np.kron(squares, np.ones((130, 130), np.uint8))[None, ..., None]
    large[0, 0, 0] = 255  # a single pixel hardly changes the mean of its square
    small = grids.shrink_images(large, 128)
    assert small.shape == (1, 86, 86, 1)
    assert grids.shrink_images(small, 128) is small and grids.shrink_images(small, None) is small
    np.testing.assert_array_equal(small[0, [0, 0, -1, -1], [1, -1, 0, -1], 0], squares.ravel())


def test_a_header_has_a_progress_bar():
    frame = np.asarray(
        grids.add_header(Image.new("RGB", (108, 20)), "step 50 of 100", progress=0.5)
    )
    row = frame[-20 - 1]  # the last above the image
    blue, grey = ((row == colour).all(axis=1).sum() for colour in ((42, 111, 187), (221,) * 3))
    assert (blue, grey) == (50, 50)
    assert (frame[-20:] == 0).all() and grids.add_header(Image.new("L", (9, 9)), "").size == (9, 34)


# --- the grid of steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("config, settings", [(CLASSES, {}), (SIGMA, DDPM)], ids=["flow", "ddpm"])
def test_the_times_are_those_of_the_states(config, settings):
    """The x0 prediction of a step is x − t·v, which is x itself at the end, where t is 0."""
    trained = tiny_model(config, **settings)
    sampler = trained.plan(SamplingOverrides(n_steps=4, cfg_scale=1.0)).sampler
    times = sampler.state_times()
    assert len(times) == 5 and times[-1] == 0 and (np.diff(times[:-1]) < 0).all()
    if sampler.method == RectifiedFlow():
        np.testing.assert_allclose(times, [1, 0.75, 0.5, 0.25, 0])
        np.testing.assert_allclose(SamplerConfig(n_steps=2, shift=3.0).state_times(), [1, 0.75, 0])
    else:
        np.testing.assert_allclose(times[:-1], np.array([999, 666, 333, 0]) / 1000)


def test_a_grid_of_steps_has_the_states_and_their_x0_predictions(monkeypatch):
    trained, inputs = tiny_model(), {}
    row = trained.conditioning.request(2, labels=["3", "7"], seed=5)
    plan = trained.plan(SamplingOverrides(n_steps=5))

    def recorded_grid(x, *, rows, columns):
        inputs.update(x=x, rows=rows, columns=columns)
        return Image.new("L", (8, 8))

    monkeypatch.setattr(grids, "comparison_grid", recorded_grid)
    comparisons.compare_steps(trained, row, plan, 3)
    assert list(inputs["columns"]) == ["3", "7"]
    assert inputs["rows"][::2] == ["x at t = 1.00", "x at t = 0.60", "x at t = 0.20"]
    assert inputs["rows"][1::2] == ["x0 prediction"] * 3
    rows = row.rows(0, 2)
    samples = trained.sample(
        rows.labels,
        plan,
        seed=rows.seed,
        first_index=rows.first_index,
        trajectory=True,
        estimates=True,
    )
    assert samples.trajectory is not None and samples.estimates is not None
    images = grids.to_uint8(np.stack([samples.trajectory[0], samples.estimates[-1]]))
    np.testing.assert_array_equal(inputs["x"][[0, -1]], images)
