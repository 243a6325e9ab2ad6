"""Training by Muon is the same on any number of devices and after a resume, and can decay late."""

from dataclasses import replace

import numpy as np
import optax
import pytest
from parallel_cases import MESHES, assert_same_reports, steps
from parallel_cases import TINY as NETWORK
from train_cases import TINY, assert_same

from model import JOINT
from runtime.errors import UserError
from train import Trainer
from training import muon, optim

MUON = replace(TINY, optimizer="muon", n_steps=4, eval_save_steps=2)


def test_it_resumes_bit_for_bit_and_accumulates(tmp_path):
    whole = Trainer(replace(MUON, run_dir=tmp_path / "whole"))
    whole.fit()
    Trainer(replace(MUON, run_dir=tmp_path / "run")).fit(2)
    resumed = Trainer.from_run(tmp_path / "run")
    resumed.fit()
    assert_same(resumed.state, whole.state)
    with pytest.raises(UserError, match="optimizer"):
        Trainer(replace(MUON, optimizer="adamw", resume=True, run_dir=tmp_path / "run"))


def test_a_run_that_was_constant_decays_from_where_it_is(tmp_path):
    constant = replace(MUON, schedule="wsd", decay_from=3, warmup_steps=0)
    run = Trainer(replace(constant, run_dir=tmp_path / "run"))
    run.fit(2)
    peak = run.config.learning_rate
    np.testing.assert_allclose([run.learning_rate(s) for s in (0, 3)], peak, rtol=1e-6)
    resumed = Trainer(
        replace(constant, resume=True, run_dir=tmp_path / "run", n_steps=6, decay_from=2)
    )
    rates = [resumed.learning_rate(s) / peak for s in (2, 4, 6)]
    np.testing.assert_allclose(rates, [1, 0.5, 0], atol=1e-6)
    with pytest.raises(UserError, match="--decay_from 4: training ends at --n_steps 4"):
        Trainer(replace(constant, decay_from=4, run_dir=tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"block": JOINT}], ids=["DiT", "MMDiT"])
def test_its_steps_report_what_one_device_reports(fields):
    schedule = optax.constant_schedule(1e-3)
    optimizer = optim.clipped_adamw(
        schedule,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        clip_norm=1.0,
        blocks=muon.muon(schedule, weight_decay=0.1),
    )
    config = replace(NETWORK, **fields)
    expected = steps(config, MESHES["1 device"], n=6, optimizer=optimizer)["reports"]
    for name in ("DDP 8", "hybrid 2x4"):
        got = steps(config, MESHES[name], n=6, optimizer=optimizer)["reports"]
        assert_same_reports(got, expected)
