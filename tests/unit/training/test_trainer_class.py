"""A run is resumed by the class that it was trained by, wherever that class lies."""

from pathlib import Path

import pytest

from runtime.errors import UserError
from train import Trainer
from training.autoencoder.trainer import VaeTrainer
from training.resolve import require_same_implementation


class Logged(Trainer):
    def end_message(self):
        return "done"


class Mine(Logged):
    def loss(self, *, label_dropout):
        return super().loss(label_dropout=label_dropout)


class MineToo(Mine):
    pass


def test_a_subclass_counts_if_it_changes_what_is_trained():
    assert Logged.trainer_path() == Trainer.trainer_path() == "train:Trainer"
    assert MineToo.trainer_path() == Mine.trainer_path() == f"{__name__}:Mine"
    assert VaeTrainer.trainer_path() == "training.autoencoder.trainer:VaeTrainer"


def test_a_run_of_another_class_is_named():
    run, saved = Path("runs/a"), {"trainer": "__main__:Mine", "method": "my_methods:Robust"}
    require_same_implementation(run, {}, "trainer", "train:Trainer")
    require_same_implementation(run, saved, "trainer", "mine:Mine")
    require_same_implementation(run, saved, "method", "notebook:Robust")
    with pytest.raises(
        UserError,
        match=r"'runs/a' was trained by the trainer __main__:Mine, not by train:Trainer: resume it "
        r"with Mine\.from_run\(…\); generate\.py --run samples from it",
    ):
        require_same_implementation(run, saved, "trainer", "train:Trainer")
    with pytest.raises(UserError, match=r"by the method my_methods:Robust, .* Robust in METHODS"):
        require_same_implementation(run, saved, "method", "methods.rectified_flow:RectifiedFlow")
