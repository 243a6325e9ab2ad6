"""A run that is aligned with an encoder resumes, ends its alignment exactly, and starts others."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dinov2_cases import write_dinov2
from train_cases import TINY, assert_same, metrics

import export
from export import ExportConfig
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime.errors import UserError
from train import Trainer
from training.step import ProjectorState

SEEN = replace(TINY, model="DiT-Nano/4", patch_size=2, n_steps=4, eval_save_steps=2)
ALIGNED = replace(
    SEEN,
    patch_size=None,
    batch_size=16,
    accumulate_steps=2,
    log_every=1,
    learning_rate=1e-2,
    weight_decay=0.1,
    align_at=1,
    align_until=0.5,
)


def saved(config):
    """A run that has a checkpoint."""
    trainer = Trainer(config)
    trainer.save()
    return trainer


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The run of the encoder, whose grid is finer."""
    return saved(replace(SEEN, run_dir=tmp_path_factory.mktemp("seen") / "run"))


@pytest.fixture(scope="module")
def aligned(seen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned") / "run"
    trainer = Trainer(replace(ALIGNED, align=str(seen.run_dir), run_dir=folder))
    trainer.fit()
    return trainer


def parts(tree):
    return jax.tree.map(np.asarray, tree)


def test_it_resumes_bit_for_bit_before_its_end_and_after(seen, aligned, tmp_path):
    Trainer(replace(ALIGNED, align=str(seen.run_dir), run_dir=tmp_path / "run")).fit(1)
    for stop in (3, 4):
        resumed = Trainer.from_run(tmp_path / "run")
        assert resumed.alignment and resumed.step in (1, 3)
        resumed.fit(stop)
    assert_same(resumed.state, aligned.state)


def test_from_its_end_on_steps_are_those_of_a_run_without(seen, aligned, tmp_path):
    run = Trainer(replace(ALIGNED, align=str(seen.run_dir), run_dir=tmp_path / "run"))
    plain = Trainer(replace(ALIGNED, align_at=None, align_until=None, run_dir=tmp_path / "plain"))
    assert_same(run.state.params, plain.state.params)
    batches = list(run.batches(0, 4))
    for batch in batches[:2]:
        run.train_step(batch)
    window = {name: run.state.window[name] for name in plain.state.window}
    plain.state = jax.tree.map(jnp.copy, replace(run.state, projector=(), window=window))
    plain.step, projector = 2, parts(run.state.projector)
    for batch in batches[2:]:
        run.train_step(batch)
        plain.train_step(batch)
    for name in ("params", "ema", "opt_state", "step"):
        assert_same(getattr(run.state, name), getattr(plain.state, name))
    assert_same(run.state.projector, projector)  # pyright: ignore[reportArgumentType]
    assert_same(run.state.params, aligned.state.params)
    lines = [line for line in metrics(aligned.run_dir) if "loss" in line]
    assert [-1 <= line.get("align_loss", 9) <= 1 for line in lines] == [True, True, False, False]


def test_samples_exports_and_runs_that_start_from_it_have_no_projector(aligned, tmp_path):
    trained = TrainedModel.from_run(aligned.run_dir)
    assert "projector" not in trained.params
    export.main(ExportConfig(run=aligned.run_dir, out=tmp_path / "own", layout="own"))
    assert "--align" in (tmp_path / "own" / "README.md").read_text()
    exported = TrainedModel.from_pretrained(str(tmp_path / "own"))
    plan = trained.plan(SamplingOverrides(cfg_scale=1.0))
    np.testing.assert_array_equal(exported.sample([3], plan).x, trained.sample([3], plan).x)
    start = replace(TINY, init_from=str(aligned.run_dir), model=None)
    plain = Trainer(replace(start, run_dir=tmp_path / "plain"))
    again = Trainer(replace(start, align=str(aligned.run_dir), run_dir=tmp_path / "again"))
    for trainer in (plain, again):
        assert_same(trainer.state.params, aligned.state.ema)
    assert not plain.state.projector and again.state.projector


def test_the_encoder_may_move_but_not_change(seen, aligned, tmp_path):
    shutil.copytree(seen.run_dir, tmp_path / "moved")
    shutil.copytree(aligned.run_dir, tmp_path / "run")
    resume = replace(ALIGNED, resume=True, run_dir=tmp_path / "run")
    moved = Trainer(replace(resume, align=str(tmp_path / "moved")))
    assert moved.config.align == f"{tmp_path / 'moved'}@0"
    other = saved(replace(SEEN, seed=1, run_dir=tmp_path / "other"))
    for message, flags in (
        ("is not the encoder that the run began with", {"align": str(other.run_dir)}),
        ("--align /nothing: there is no such run or file; if it has moved", {"align": "/nothing"}),
        (r"align_weight was 0\.5, not 0\.3", {"align_weight": 0.3}),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(replace(resume, **flags))
    assert json.loads((aligned.run_dir / "config.json").read_text())["align"].endswith("run@0")


def test_an_encoder_of_other_data_is_refused(seen, tmp_path):
    for message, changes in (
        (r"its images are 8×8×1, this run's are 16×16×1", {"image_size": 16}),
        ("cannot be read|not found|is no folder|hub", {"align": "nothing/nowhere"}),
    ):
        wrong = replace(ALIGNED, align=str(seen.run_dir), run_dir=tmp_path / "run")
        with pytest.raises(UserError, match=f"--align .*({message})"):
            Trainer(replace(wrong, **changes))
    saved(replace(SEEN, label_dropout=0.0, cfg_scale=1.0, run_dir=tmp_path / "deaf"))
    with pytest.raises(UserError, match=r"--align .* was trained without label dropout"):
        Trainer(replace(ALIGNED, align=str(tmp_path / "deaf")))


def test_a_dinov2_is_sharded_as_the_network_is(tmp_path):
    write_dinov2(tmp_path / "dinov2", "registers")
    weights = {}
    for fsdp in (1, 4):
        trainer = Trainer(
            replace(
                ALIGNED,
                align=str(tmp_path / "dinov2"),
                image_size="8x12",
                objective="meanflow",
                n_sample_steps=None,
                run_dir=tmp_path / str(fsdp),
                fsdp=fsdp,
            )
        )
        for batch in trainer.batches(0, 2):
            report = trainer.train_step(batch)
        assert -1 <= float(report.window["align_loss"]) <= 1
        assert isinstance(trainer.state.projector, ProjectorState)
        weights[fsdp] = parts((trainer.state.params, trainer.state.projector.weights))
    assert trainer.frozen[0]["frozen"]["positions"].sharding.is_fully_replicated is False
    for a, b in zip(*map(jax.tree.leaves, weights.values()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
