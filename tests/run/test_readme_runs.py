"""What README.md says can be done can be done: its recipes, its commands, its map of files."""

import optax
import pytest
from readme_cases import cook

import train
from methods import rectified_flow
from training import config as training_config


@pytest.mark.slow
def test_a_trainer_asks_itself_for_its_objective(tmp_path):
    """Of the untrained model, which says 0, Huber's loss is below half of the squares'."""
    robust = cook("An objective", rectified_flow, Trainer=train.Trainer, optax=optax)["Robust"]
    config = training_config.TrainConfig(model="DiT-Ti/4", batch_size=64, n_eval_batches=1)
    small, large = (kind(config).evaluate()["eval_loss"] for kind in (robust, train.Trainer))
    assert 0.2 * large < small < 0.5 * large
