"""Training by Muon is the same on any number of devices and after a resume, and can decay late."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest
from parallel_cases import MESHES, assert_same_reports, steps
from parallel_cases import TINY as NETWORK
from train_cases import TINY, assert_same

from model import JOINT
from runtime import parallel
from runtime.errors import UserError
from train import Trainer
from training import muon, optim

MUON = replace(TINY, optimizer="muon", mup=16, n_steps=4, eval_save_steps=2)


def test_it_accumulates():
    """Microbatches round otherwise, so single steps are compared, not runs."""
    moved = []
    for n_parts in (1, 2):
        trainer = Trainer(replace(MUON, batch_size=16, accumulate_steps=n_parts))
        before = parallel.fetch_to_host(trainer.state.params)
        trainer.train_step(next(iter(trainer.batches(0, 1))))
        moved.append(
            jax.tree.map(np.subtract, parallel.fetch_to_host(trainer.state.params), before)
        )
    for a, b in zip(*map(jax.tree.leaves, moved), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def test_it_resumes_bit_for_bit_and_keeps_its_base_width(tmp_path):
    whole = Trainer(replace(MUON, run_dir=tmp_path / "whole"))
    whole.fit()
    Trainer(replace(MUON, run_dir=tmp_path / "run")).fit(2)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.config.mup == 16
    resumed.fit()
    assert_same(resumed.state, whole.state)
    for name, value, was in (("optimizer", "adamw", "muon"), ("mup", 0, "16")):
        with pytest.raises(UserError, match=f"{name} was {was}, not {value}"):
            Trainer(replace(MUON, **{name: value}, resume=True, run_dir=tmp_path / "run"))
    started = Trainer(replace(TINY, mup=16, init_from=str(tmp_path / "run")))
    assert_same(started.state.params, resumed.state.ema)


def test_a_run_of_before_there_was_a_choice_keeps_what_it_was(tmp_path):
    old = replace(TINY, n_steps=4, run_dir=tmp_path / "run")
    Trainer(old).fit(2)
    config = tmp_path / "run/config.json"
    settings = json.loads(config.read_text())
    for name in ("optimizer", "mup", "ema_std", "route", "route_share"):
        del settings[name]
    config.write_text(json.dumps(settings))
    resumed = Trainer(replace(old, resume=True, optimizer="adamw", mup=0))
    assert (resumed.step, resumed.config.mup, resumed.config.ema_std) == (2, 0, ())
    changed = {"optimizer": "muon", "mup": 16, "ema_std": (0.05, 0.1), "route": (1, -1)}
    for name, value in changed.items():
        with pytest.raises(UserError, match=f"{name} was .*, not "):
            Trainer(replace(old, resume=True, **{name: value}))


def test_a_run_that_was_constant_decays_from_where_it_is(tmp_path):
    constant = replace(TINY, n_steps=4, schedule="constant", warmup_steps=1)
    run = Trainer(replace(constant, run_dir=tmp_path / "run"))
    run.fit(2)
    peak = run.config.learning_rate
    assert peak
    again = replace(
        constant, resume=True, run_dir=tmp_path / "run", schedule="wsd", n_steps=6, decay_from=2
    )
    resumed = Trainer(again)
    rates = [resumed.learning_rate(s) / peak for s in (1, 2, 4, 6)]
    np.testing.assert_allclose(rates, [1, 1, 0.5, 0], atol=1e-6)
    resumed.fit(3)
    longer = Trainer(replace(again, n_steps=20, decay_from=None))
    np.testing.assert_allclose(longer.learning_rate(15) / peak, 1, rtol=1e-6)
    for changes, message in (
        ({"decay_from": 4, "n_steps": 4}, "--decay_from 4: must be after the 1 steps of warm-up"),
        ({"decay_from": 0}, "--decay_from 0: must be after"),
        ({"decay_from": 3, "schedule": "constant"}, "cannot resume: schedule was wsd"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(replace(again, **changes))
    with pytest.raises(UserError, match="--decay_from is for --schedule wsd"):
        Trainer(replace(constant, decay_from=2, run_dir=tmp_path / "other"))


@pytest.mark.slow
def test_steps_of_an_mmdit_report_what_one_device_reports():
    """Those of a DiT are in test_mup_runs.py."""
    config = replace(NETWORK, block=JOINT)
    schedule = optax.constant_schedule(1e-3)
    reports = {}
    for name in ("1 device", "hybrid 2x4"):
        mesh = MESHES[name]
        optimizer = optim.clipped_adamw(
            schedule,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.1,
            clip_norm=1.0,
            blocks=muon.muon(
                schedule, weight_decay=0.1, distribute=partial(parallel.spread_rows, mesh=mesh)
            ),
        )
        reports[name] = steps(config, mesh, n=6, optimizer=optimizer)["reports"]
    assert_same_reports(reports["hybrid 2x4"], reports["1 device"])
