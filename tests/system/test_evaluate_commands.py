"""The command, from a run to a line of JSON."""

import json
from dataclasses import replace
from functools import partial

import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from commands import run
from dinov2_cases import write_dinov2
from evaluate_cases import (
    PIXELS,
    digits,  # noqa: F401
    evaluate_pixels,
    scores,
)

import evaluate
from evaluate import EvaluateConfig
from train import Trainer
from training.config import TrainConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = TrainConfig(
        model="DiT-Nano/8", batch_size=8, n_steps=2, eval_save_steps=2, half_precision=False
    )
    Trainer(replace(config, n_eval_batches=1, n_sample_steps=2, run_dir=folder)).fit()
    return folder


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_evaluates_a_run(trained, tmp_path, cache):
    real, samples = tmp_path / "real.npz", tmp_path / "samples.npz"
    words = ["--make_reference", real, "--dataset_name", "digits", "--features", "pixels"]
    made = run("evaluate.py", *words, cache=cache)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        "1437 images of 8 × 8 pixels, grey (split 'train' of digits, cropped and resized to that)",
        f"statistics of 1437 images: {real}",
    ]

    words = ["--run", trained, "--reference", real, "--features", "pixels", "--n", 30]
    words += ["--samples", samples, "--batch_size", 7, "--cfg_scale", 2, "--seed", 3]
    words += ["--interval", "0.2", "1"]
    done = run("evaluate.py", *words, cache=cache)
    assert done.returncode == 0, done.stderr
    record = json.loads((trained / evaluate.RECORD_FILE).read_text())
    assert scores(record).keys() == PIXELS  # nothing here is called FID
    assert f"pixel_frechet        {record['pixel_frechet']:.6g}\n" in done.stdout

    card = record["card"]
    assert card["pictures"]["count"] == 30 and card["pictures"]["step"] == 2
    sampler = {"solver": "euler", "n_steps": 2, "shift": 1.0, "interval": [0.2, 1.0]}
    assert sampler.items() <= card["pictures"]["sampler"].items()
    assert (card["pictures"]["cfg_scale"], card["pictures"]["seed"]) == (2, 3)
    assert card["config"]["batch_size"] == 7 and "--cfg_scale 2" in card["command"]
    assert len(card["reference"]["sha256"]) == 64
    assert card["reference"]["pictures"]["pictures"]["dataset_name"] == "digits"

    with np.load(samples) as arrays:
        assert arrays["arr_0"].shape == (30, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == list(range(10)) * 3
    assert not samples.with_name("samples.npz.parts").exists()
    again = evaluate_pixels(tmp_path / "x", npz=samples, reference=real, batch_size=16, seed=3)
    assert scores(again) == pytest.approx(scores(record), rel=1e-6, abs=1e-6)

    # This process has eight devices, which may round the last bit of an image differently.
    flags = {"n": 30, "cfg_scale": (2.0,), "seed": 3, "batch_size": 16, "interval": (0.2, 1.0)}
    on_eight = evaluate_pixels(tmp_path / "y", run=trained, reference=real, **flags)
    assert on_eight["pixel_frechet"] == pytest.approx(record["pixel_frechet"], rel=1e-3)

    # The run's samples in DINOv2's features, beside themselves.
    write_dinov2(tmp_path / "dinov2")
    of_dinov2 = {"features": "dinov2", "encoder": str(tmp_path / "dinov2"), "batch_size": 8}
    evaluate.main(EvaluateConfig(npz=samples, make_reference=tmp_path / "own.npz", **of_dinov2))
    words = ["--run", trained, "--reference", tmp_path / "own.npz", "--features", "dinov2"]
    words += ["--encoder", tmp_path / "dinov2", "--n", 30, "--batch_size", 7, "--seed", 3]
    words += ["--cfg_scale", 2, "--interval", "0.2", "1", "--out", tmp_path / "z"]
    done = run("evaluate.py", *words, cache=cache)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "z").read_text())
    assert found["fd_dinov2"] == pytest.approx(0, abs=1e-6)
    assert found["dinov2_precision"] == found["dinov2_recall"] == 1


@pytest.mark.slow
def test_several_guidance_scales_are_evaluated_in_turn(trained, digits, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    evaluate_scales = partial(evaluate_pixels, out, run=trained, reference=digits, n=20)
    for is_repeated in (False, True):
        evaluate_scales(cfg_scale=(1.0, 2.0))
        assert capsys.readouterr().out.count("not evaluated again") == 2 * is_repeated
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["card"]["config"]["cfg_scale"] for line in lines] == [1, 2]
        assert (tmp_path / "scores-guidance.png").stat().st_size > 0
    assert scores(evaluate_scales(cfg_scale=(2.0,))) == scores(lines[1])


@pytest.mark.slow
def test_errors_of_the_command_are_one_line(trained, tmp_path, cache):
    np.savez(tmp_path / "wrong.npz", x=np.zeros(3))
    wrong = ["--run", trained, "--reference", tmp_path / "wrong.npz", "--features", "pixels"]
    no_weights = ["--run", trained, "--reference", tmp_path / "wrong.npz"]
    for words, message in ((wrong, "holds x, but no mu"), (no_weights, "--features pixels")):
        done = run("evaluate.py", *words, cache=cache)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and message in done.stderr
        assert done.stderr.count("\n") == 1
