"""A run of a subclass with its own loss is opened by that class, and named to any other."""

import json
from dataclasses import replace

import pytest
from train_cases import TINY

from inference.trained_model import TrainedModel
from runtime.checkpoint import OtherContentsError
from runtime.errors import UserError
from train import Trainer


class Doubled(Trainer):
    """Its loss and its metrics are its own."""

    def loss(self, *, label_dropout):
        base = super().loss(label_dropout=label_dropout)

        def loss(model, batch, key):
            value, _ = base(model, batch, key)
            return 2 * value, {"half": value}

        return loss


def test_a_run_of_a_subclass_is_named_to_the_plain_trainer(tmp_path, capsys):
    trainer = Doubled(replace(TINY, run_dir=tmp_path / "run"))
    trainer.state, trainer.step = replace(trainer.state, step=trainer.state.step + 1), 1
    trainer.save()
    assert Doubled.from_run(tmp_path / "run").step == 1
    capsys.readouterr()
    with pytest.raises(UserError, match=r"trained by the trainer .*:Doubled, not by train:Trainer"):
        Trainer.from_run(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del record["trainer"]  # as in a run of a version that did not record it
    path.write_text(json.dumps(record))
    with pytest.raises(OtherContentsError, match=r"1 is sound, .* optimizer lacks window\.bin_sh"):
        Trainer.from_run(tmp_path / "run")
    assert capsys.readouterr().err == ""
    assert TrainedModel.from_run(tmp_path / "run").step == 1
