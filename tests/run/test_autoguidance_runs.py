"""A weaker model guides a stronger one, if both predict the same of the same data."""

from dataclasses import replace

import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest

from inference.app import service
from inference.app.service import SampleJob
from inference.autoguidance import plan_with_guide
from inference.sample_files import describe_samples
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime.errors import UserError
from train import Trainer
from training.config import TrainConfig

TINY = TrainConfig(
    model="DiT-Nano/8",
    batch_size=8,
    n_steps=4,
    eval_save_steps=2,
    n_eval_batches=1,
    n_sample_steps=2,
    half_precision=False,
    learning_rate=1e-2,
    keep_checkpoints=1,
    keep_every=2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, which keeps the checkpoint of the second."""
    folder = tmp_path_factory.mktemp("guide") / "run"
    Trainer(replace(TINY, run_dir=folder)).fit()
    return folder


def test_an_earlier_checkpoint_guides(run):
    trained = TrainedModel.from_run(run)

    def sample(**flags):
        plan = plan_with_guide(trained, SamplingOverrides(**flags))
        request = trained.conditioning.request(4, labels=["3"])
        card = describe_samples(trained, request, plan)
        return trained.sample([3, 7], plan).x, card

    plain, card = sample(cfg_scale=1.0)
    assert "guide" not in card
    itself, _ = sample(guide=str(run), guide_scale=3.0)
    np.testing.assert_allclose(itself, plain, atol=1e-5)
    unread, _ = sample(guide=f"{run}@2", guide_scale=1.0)
    np.testing.assert_array_equal(unread, plain)
    led, card = sample(guide=f"{run}@2")
    assert np.abs(led - plain).max() > 1e-3
    assert (card["guide"], card["guide_step"], card["guide_scale"]) == (str(run), 2, 2.0)
    # Classifier-free guidance is off unless it is asked for, and then acts first.
    assert card["cfg_scale"] == 1
    both, card = sample(guide=f"{run}@2", cfg_scale=2.0)
    assert card["cfg_scale"] == 2 and np.abs(both - led).max() > 1e-3
    inside, _ = sample(guide=f"{run}@2", interval=(0.4, 0.6))
    assert np.abs(inside - led).max() > 1e-3


def test_the_page_offers_the_earlier_checkpoints(run):
    trained = TrainedModel.from_run(run)
    assert service.guides_of(trained) == {"step 2": f"{run}@2"}
    job = SampleJob(n_images=2, labels=("3",), guide=f"{run}@2", cfg_scale=1.0, interval=(0.0, 0.9))
    plan = service.plan_sampling(trained, job)
    assert plan.guide is not None and plan.guide.model.step == 2
    with pytest.raises(UserError, match="unknown guide"):
        service.plan_sampling(trained, replace(job, guide=str(run)))


def test_what_does_not_fit_is_refused_by_name(run, tmp_path):
    trained = TrainedModel.from_run(run)
    for flags, message in (
        ({"objective": "ddpm"}, "its objective is DDPM, and of .* rectified flow: they must be"),
        ({"time_shift": 3.0}, r"its time_shift is 3\.0, and of .* 1\.0"),
        ({"label_column": ""}, "its number of classes is 0, and of .* 10"),
    ):
        other = tmp_path / next(iter(flags))
        Trainer(replace(TINY, run_dir=other, **flags)).save()
        with pytest.raises(UserError, match=f"--guide {other}: {message}"):
            plan_with_guide(trained, SamplingOverrides(guide=str(other)))
    with pytest.raises(UserError, match=r"--guide_scale 2 needs a weak model: --guide RUN"):
        plan_with_guide(trained, SamplingOverrides(guide_scale=2.0))
    plan = plan_with_guide(trained, SamplingOverrides(guide=f"{run}@3"))
    with pytest.raises(UserError, match=r"no checkpoint .*3|step 3"):
        trained.sample([3], plan)
