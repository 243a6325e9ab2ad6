"""A run with buckets trains one set of weights on images of many proportions."""

from dataclasses import replace

import numpy as np
import pytest
from export_cases import SMALL
from hub_copies import image_file
from pipeline_cases import own_cache  # noqa: F401
from train_cases import assert_same

from runtime.errors import UserError
from train import Trainer

N_STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for i, size in enumerate([(8, 8)] * 20 + [(8, 12)] * 30 + [(12, 8)] * 14):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_file(rng, size=size))
    small = {"model": "DiT-Nano/4", "image_size": 16, "eval_split": "none", "n_steps": N_STEPS}
    return replace(SMALL, dataset_name=f"folder:{folder}", **small)


def train(trainer, stop):
    for batch in trainer.batches(trainer.position, stop):
        trainer.train_step(batch)
    return trainer


def test_it_resumes_in_the_middle_of_a_pass_bit_for_bit(config, tmp_path):
    config = replace(config, buckets=("3",))
    whole = train(Trainer(replace(config, run_dir=tmp_path / "whole")), N_STEPS)
    assert len({batch.image.shape for batch in whole.data.train_batches(0, N_STEPS)}) == 3
    assert np.isfinite(whole.evaluate()["eval_loss"])
    train(Trainer(replace(config, run_dir=tmp_path / "cut")), 3).save()
    # The shapes that were chosen are recorded; the same words name them again.
    for resumed in (
        Trainer.from_run(tmp_path / "cut"),
        Trainer(replace(config, run_dir=tmp_path / "cut", resume=True)),
    ):
        assert resumed.config.buckets == ("20x12", "16x16", "12x20")
    assert_same(train(resumed, N_STEPS).state, whole.state)
    with pytest.raises(UserError, match="cannot resume: buckets was"):
        Trainer(replace(config, run_dir=tmp_path / "cut", resume=True, buckets=("2",)))


def test_one_square_bucket_changes_nothing(config, tmp_path):
    runs = (
        train(Trainer(replace(config, buckets=buckets, run_dir=tmp_path / name)), 3)
        for name, buckets in (("plain", ()), ("one", ("1",)))
    )
    plain, one = runs
    assert_same(one.state, plain.state)
    assert one.evaluate() == plain.evaluate()


def test_what_buckets_are_not_for_is_refused(config, tmp_path):
    for changes, message in (
        ({"position": "learned"}, "--buckets is not for --position learned: its table has one"),
        ({"cache_on_device": True}, "--buckets is not for --cache_on_device"),
        ({"overfit_batch": True}, "--buckets is not for --overfit_batch"),
        ({"buckets": ("wide",)}, "--buckets wide: takes one number, such as 5, or several"),
        ({"buckets": ("8x10",)}, "--buckets 8x10: both sides must be multiples of 4"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(replace(config, **{"buckets": ("3",), "run_dir": tmp_path / "no"} | changes))
