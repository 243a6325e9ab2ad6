"""A run that keeps averages trains as one without, resumes bit for bit with its snapshots, and
gives averages of any width.
"""

import json
import shutil
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from parallel_cases import LOSS, MESHES, batch_of, distance, quickly_compiled
from parallel_cases import TINY as NETWORK
from train_cases import TINY, assert_same

import evaluate
import export
from inference.trained_model import TrainedModel
from model import init_model_params, model_graphdef
from networks.power_ema import gamma_of_std
from runtime import parallel
from runtime.checkpoint import PROFILES_ITEM, SNAPSHOTS_FOLDER, Checkpoints
from runtime.errors import UserError
from train import Trainer
from training import step as training_step
from training.config import TrainConfig

STDS = (0.05, 0.1)
AVERAGES = replace(TINY, ema_std=STDS, snapshot_every=1, n_steps=8, eval_save_steps=4)


def snapshots_of(run_dir):
    """What each snapshot records of itself, by step: its profiles and the sums of its bits."""
    records = {}
    with Checkpoints(run_dir, folder=SNAPSHOTS_FOLDER, read_only=True) as snapshots:
        for step in snapshots.manager.all_steps():
            sums = json.loads((snapshots.folder / f"{step}/sums/metadata").read_text())
            records[step] = (snapshots.read_metadata(step, PROFILES_ITEM), sums)
    return records


def relative(a, b):
    """The norm of the difference of two trees, relative to that of the second."""
    difference = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, a, jax.device_get(b))
    return float(optax.tree.norm(difference) / optax.tree.norm(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = Trainer(replace(AVERAGES, run_dir=tmp_path_factory.mktemp("runs") / "whole"))
    trainer.fit()
    return trainer


def test_a_run_trains_as_one_without_averages(whole, tmp_path):
    plain = Trainer(replace(TINY, n_steps=8, eval_save_steps=4, run_dir=tmp_path / "plain"))
    plain.fit()
    # Another program, which may round the last bits in another way.
    assert relative(whole.state.params, plain.state.params) < 1e-5
    assert relative(whole.state.ema, plain.state.ema) < 1e-5
    assert not (tmp_path / "plain" / SNAPSHOTS_FOLDER).exists()
    items = {path.name for path in (tmp_path / "plain/checkpoints/8").iterdir() if path.is_dir()}
    of_whole = {path.name for path in (whole.run_dir / "checkpoints/8").iterdir() if path.is_dir()}
    assert of_whole - items == {"power_ema"} and items < of_whole
    with pytest.raises(UserError, match=r"ema_std 0\.1: .* kept no averages to make it of"):
        TrainedModel.from_run(tmp_path / "plain", ema_std=0.1)
    with pytest.raises(UserError, match=r"cannot resume: ema_std was \(\), not \(0\.05, 0\.1\)"):
        Trainer(TrainConfig(run_dir=tmp_path / "plain", resume=True, ema_std=STDS))


@pytest.mark.parametrize("lost, step", [((8,), 4), ((4, 8), 0)])
def test_it_resumes_bit_for_bit_and_writes_later_snapshots_anew(whole, tmp_path, lost, step):
    run = tmp_path / "run"
    shutil.copytree(whole.run_dir, run)
    for each in lost:
        shutil.rmtree(run / f"checkpoints/{each}")
    for folder in (run / SNAPSHOTS_FOLDER).iterdir():
        (folder / "of_before").touch()
    resumed = Trainer(TrainConfig(run_dir=run, resume=True))
    assert resumed.step == step
    resumed.fit()
    assert_same(resumed.state, whole.state)
    assert snapshots_of(run) == snapshots_of(whole.run_dir)
    left = {int(path.parent.name) for path in run.glob(f"{SNAPSHOTS_FOLDER}/*/of_before")}
    assert left == {*range(1, step + 1)}


def test_a_run_from_other_weights_averages_those(whole):
    trainer = Trainer(replace(AVERAGES, init_from=str(whole.run_dir)))
    assert relative(trainer.state.power_ema[0], whole.state.ema) < 1e-6
    trainer.train_step(next(trainer.data.train_batches(0, 1)))
    for average in trainer.state.power_ema:
        assert relative(average, trainer.state.params) < 1e-6


def test_a_skipped_step_does_not_count_and_a_rollback_removes_newer_snapshots(tmp_path, capsys):
    trainer = Trainer(replace(AVERAGES, nan_patience=2, run_dir=tmp_path / "run"))
    honest_step = trainer.update

    def step(state, batch, key):
        if trainer.position not in (1, 5, 6):
            return honest_step(state, batch, key)
        saved = jax.tree.map(np.asarray, state)
        nan = jax.tree.map(lambda x: x * np.nan, state.params)
        new, report = honest_step(replace(state, params=nan), batch, key)
        for before, after in zip(saved.power_ema, new.power_ema, strict=True):
            assert_same(before, after)
        weights = {name: getattr(saved, name) for name in ("params", "ema", "opt_state")}
        return parallel.replicate(replace(new, **weights), trainer.mesh), report

    trainer.update = step
    trainer.fit()
    assert "rolling back to step 4" in capsys.readouterr().out
    assert (trainer.step, trainer.position, int(trainer.state.n_updates)) == (8, 11, 7)
    counts = {
        step: record[0]["n_updates"] for step, record in snapshots_of(trainer.run_dir).items()
    }
    assert counts == {1: 1, 2: 1} | {step: step - 1 for step in range(3, 9)}
    made = TrainedModel.from_run(trainer.run_dir, ema_std=0.1)
    assert relative(made.params, trainer.state.power_ema[1]) < 1e-5


def test_an_average_is_made_of_the_snapshots(whole, tmp_path):
    """A tracked one is itself; one of another width is what a run that tracks it has."""
    for std, tracked in zip(STDS, whole.state.power_ema, strict=True):
        made = TrainedModel.from_run(whole.run_dir, ema_std=std)
        assert relative(made.params, tracked) < 1e-5
        assert (made.step, made.card["ema_std"]) == (8, std)
    assert "ema_std" not in TrainedModel.from_run(whole.run_dir).card
    other = Trainer(replace(AVERAGES, ema_std=(0.07, 0.15), run_dir=tmp_path / "other"))
    other.fit()
    change = relative(other.state.power_ema[0], other.state.power_ema[1])
    for std, tracked in zip((0.07, 0.15), other.state.power_ema, strict=True):
        made = TrainedModel.from_run(whole.run_dir, ema_std=std)
        assert relative(made.params, tracked) < 0.02 * change
    with Checkpoints(whole.run_dir, folder=SNAPSHOTS_FOLDER, read_only=True) as snapshots:
        like = training_step.as_items(parallel.abstract_state(whole.initial_state, whole.mesh))[
            "power_ema"
        ]
        earlier = snapshots.restore(6, {"power_ema": like})["power_ema"]
    made = TrainedModel.from_run(whole.run_dir, ema_std=0.05, step=6, fsdp=4)
    assert made.step == 6 and relative(made.params, earlier[0]) < 1e-5


def test_what_cannot_be_averaged_is_one_line(whole):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ema_std": 0.0}, "--ema_std 0: must be at least 0.001, and below 0.2887"),
        ({"ema_std": 0.3}, "--ema_std 0.3: must be at least 0.001, and below 0.2887"),
        ({"ema_std": 0.1, "ema": False}, "--ema_std 0.1 names an average, and --noema wants none"),
        ({"ema_std": 0.1, "step": 99}, "no snapshot of step 99 in .*snapshots"),
        (
            {"ema_std": 0.2, "step": 1},
            r"--ema_std 0.2: snapshots of widths 0.05 0.1 \(1 by step 1\) .* with an error of",
        ),
    ]
    for flags, message in cases:
        with pytest.raises(UserError, match=message):
            TrainedModel.from_run(whole.run_dir, **flags).load_weights()


def test_averages_are_evaluated_in_turn_and_exported(whole, tmp_path, capsys, monkeypatch):
    evaluate.main(
        evaluate.EvaluateConfig(
            dataset_name="digits",
            make_reference=tmp_path / "d.npz",
            features="pixels",
            n_features=0,
        )
    )
    config = evaluate.EvaluateConfig(
        run=whole.run_dir,
        reference=tmp_path / "d.npz",
        features="pixels",
        n_features=0,
        n=20,
        batch_size=16,
        out=tmp_path / "a.jsonl",
        ema_std=(0.05, 0.1, 0.15),
    )
    opened = []  # the run may train on meanwhile: every average is of the step found first
    monkeypatch.setattr(
        evaluate,
        "open_model",
        lambda one, open_=evaluate.open_model: opened.append(one) or open_(one),
    )
    evaluate.main(config)
    assert {one.step for one in opened[1:]} == {whole.step}
    out = capsys.readouterr().out
    assert [row.split()[0] for row in out.splitlines()[-5:-1]] == ["ema_std", "0.05", "0.1", "0.15"]
    assert (tmp_path / "a-averages.png").stat().st_size > 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["card"]["pictures"]["ema_std"] for line in lines] == [0.05, 0.1, 0.15]
    assert len({line["pixel_frechet"] for line in lines}) == 3
    evaluate.main(replace(config, ema_std=(0.15,), out=tmp_path / "b.jsonl"))
    single = json.loads((tmp_path / "b.jsonl").read_text())
    assert single["pixel_frechet"] == lines[2]["pixel_frechet"]
    evaluate.main(config)
    assert capsys.readouterr().out.count("not evaluated again") == 3
    export.main(export.ExportConfig(run=whole.run_dir, ema_std=0.15, out=tmp_path / "out"))
    assert (
        "averaged (EMA of relative width 0.15) weights" in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.slow
def test_averages_are_the_same_on_all_meshes_and_sharded_as_weights():
    gammas = [gamma_of_std(std) for std in STDS]
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))

    def train(mesh, n=3):
        def initial():
            params = init_model_params(NETWORK, jax.random.key(0))
            loss_metrics = {"binned_loss": jax.ShapeDtypeStruct((8,), "float32")}
            return training_step.initial_state(params, optimizer, loss_metrics, n_averages=2)

        def loss(model, batch, key):
            return LOSS(model, batch, key)[0], {"binned_loss": jax.numpy.zeros(8)}

        value_and_grad = parallel.value_and_grad(loss, model_graphdef(NETWORK), mesh)

        @quickly_compiled
        def update(state, batch):
            return training_step.update(
                state,
                batch,
                jax.random.key(1),
                read_batch=lambda batch, _: batch,
                value_and_grad=value_and_grad,
                optimizer=optimizer,
                ema_decay=0.99,
                log_every=1,
                power_gammas=gammas,
            )[0]

        state = parallel.create_sharded(initial, mesh)
        for i in range(n):
            state = update(state, parallel.shard_rows(batch_of(16, NETWORK, seed=i), mesh))
        return state

    expected, state = train(MESHES["1 device"]), train(MESHES["hybrid 2x4"])
    assert distance(state.power_ema, expected.power_ema) < 1e-5
    for average in state.power_ema:
        for a, p in zip(*map(jax.tree.leaves, (average, state.params)), strict=True):
            assert a.sharding.is_equivalent_to(p.sharding, a.ndim)
