"""The path that everybody takes: train, resume, sample, evaluate, export, load the export."""

import json

import numpy as np
import pytest
from commands import NANO, SMALL, run
from PIL import Image


@pytest.fixture(scope="module")
def path(tmp_path_factory, cache):
    """The folder that all steps of the path write to, and a function that runs one of them."""
    folder = tmp_path_factory.mktemp("golden_path")

    def step(*words) -> str:
        done = run(*words, cache=cache)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return folder, step


def test_train_resume_sample_evaluate_export_and_load(path):
    folder, step = path
    trained, reference, export = folder / "run", folder / "digits.npz", folder / "export"

    step(NANO, *SMALL, "--n_steps", 4, "--log_every", 2, "--run_dir", trained)
    step(NANO, "--run_dir", trained, "--resume", "--n_steps", 8)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8 and all(np.isfinite(line.get("loss", 0)) for line in lines)
    assert (trained / "samples" / "final.png").exists()
    assert (trained / "figures" / "curves.png").stat().st_size > 0

    grid, arrays = folder / "grid.png", folder / "samples.npz"
    step("generate.py", "--run", trained, "--labels", 3, 7, "--n", 4, "--out", grid)
    with Image.open(grid) as image:
        assert image.size[0] > 100
    step("generate.py", "--run", trained, "--n", 10, "--out", arrays)

    pixels = ["--features", "pixels"]
    step("evaluate.py", "--make_reference", reference, "--dataset_name", "digits", *pixels)
    scores = folder / "scores.jsonl"
    step("evaluate.py", "--npz", arrays, "--reference", reference, *pixels, "--out", scores)
    assert json.loads(scores.read_text())["pixel_frechet"] > 0

    step("export.py", "--run", trained, "--out", export)
    again = folder / "again.npz"
    step("generate.py", "--pretrained", export, "--n", 10, "--out", again)
    with np.load(arrays) as ours, np.load(again) as theirs:
        np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])
