"""The figures of a run are made, or a line says why not."""

from pathlib import Path

import pytest
from figures_cases import (
    OF_RECORDS,
    command,  # noqa: F401
)
from PIL import Image, ImageSequence
from tiny_models import MEAN, SPAN, UNCONDITIONAL, tiny_model

OF_WEIGHTS = ["trajectory.gif", "x0.png", "cfg_sweep.png", "denoising.png"]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.slow
def test_all_of_a_run_with_classes(command, tmp_path):
    out = tmp_path / "there"
    made, left_out = command(tiny_model(), out=out)
    assert (made, left_out) == ({*OF_RECORDS, *OF_WEIGHTS}, [])
    with Image.open(out / "trajectory.gif") as gif:
        assert len(list(ImageSequence.Iterator(gif))) == 4  # the states of three steps
    # As wide as a page shows them: ten classes of 64 pixels.
    assert all(640 < size(out / name)[0] < 860 for name in OF_WEIGHTS)


@pytest.mark.slow
def test_a_figure_that_cannot_be_made_is_left_out_with_a_line(command):
    made, left_out = command(tiny_model(UNCONDITIONAL, conditioning="none", cfg_scale=1.0))
    assert made == {*OF_RECORDS, *OF_WEIGHTS} - {"cfg_sweep.png"}
    assert left_out == ["cfg_sweep.png is left out: an unconditional model cannot be guided"]
    made, (left_out,) = command(tiny_model(SPAN, **MEAN))
    assert made == {*OF_RECORDS, *OF_WEIGHTS} - {"cfg_sweep.png"}
    assert "guidance of MeanFlow is in its weights" in left_out
