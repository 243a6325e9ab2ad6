"""A recipe of docs/extending.md that needs a trainer."""

import optax
import pytest
from pages import run_recipe

import train
from methods import rectified_flow
from training import config as training_config


@pytest.mark.slow
def test_a_trainer_asks_itself_for_its_objective(tmp_path):
    """Of the untrained model, which says 0, Huber's loss is below half of the squares'."""
    robust = run_recipe("An objective", rectified_flow, Trainer=train.Trainer, optax=optax)[
        "Robust"
    ]
    config = training_config.TrainConfig(model="DiT-Ti/4", batch_size=64, n_eval_batches=1)
    small, large = (kind(config).evaluate()["eval_loss"] for kind in (robust, train.Trainer))
    assert 0.2 * large < small < 0.5 * large
