"""`--overfit_batch` trains on the first batch only, and evaluates on it."""

import nano  # noqa: F401  (its preset)
import numpy as np
import pytest
from commands import NANO, run
from conftest import OLDER_EMITTERS
from PIL import Image
from train_cases import metrics


def grey(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), int)


@pytest.mark.slow
def test_the_model_learns_the_batch_and_samples_it(tmp_path, cache):
    """The loss falls far below the third or so that runs on all digits reach, and the samples are
    the images of the batch.
    """
    flags = ["--model", "DiT-Nano/4", "--batch_size", 8, "--learning_rate", 1e-2, "--cfg_scale", 1]
    flags += ["--ema_decay", 0.95, "--n_sample_steps", 20, "--n_steps", 1000, "--log_every", 100]
    flags += ["--sample_every_n", 1000, "--eval_save_steps", 1000, "--run_dir", tmp_path / "run"]
    done = run(NANO, "--overfit_batch", *flags, cache=cache, xla_flags=OLDER_EMITTERS)
    assert done.returncode == 0, done.stderr
    assert "digits: the first 8 of 1437 training images" in done.stdout
    *_, trained, evaluated = metrics(tmp_path / "run")
    assert trained["loss"] < 0.15 and evaluated["eval_loss"] < 0.1
    batch, samples = (
        grey(tmp_path / "run" / "samples" / f"{name}.png") for name in ("batch", "final")
    )
    assert batch.shape == samples.shape and batch.std() > 50
    assert np.abs(batch - samples).mean() < 14  # of 255; other digits are more than 30 apart
