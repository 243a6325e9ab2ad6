"""A mean flow learns from scratch or from a flow, resumes, and samples in one step."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses_cases import batch_of
from parallel_cases import MESHES, assert_same_reports, steps, weights
from parallel_cases import TINY as NETWORK
from train_cases import TINY, assert_same

from inference.trained_model import SamplingOverrides, TrainedModel
from methods.mean_flow import MeanFlow
from model import JOINT, model_graphdef
from runtime.errors import UserError
from train import Trainer
from training.teacher import open_teacher, taught_by

FLOW = replace(TINY, n_steps=4, eval_save_steps=2, time_scale=1.0, learning_rate=1e-2)
MEAN = replace(FLOW, objective="meanflow", time_scale=None, n_sample_steps=None)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A flow whose time embedding turns slowly."""
    trainer = Trainer(replace(FLOW, run_dir=tmp_path_factory.mktemp("flow") / "run"))
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def distilled(flow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mean") / "run"
    trainer = Trainer(
        replace(
            MEAN,
            run_dir=folder,
            model=None,
            teacher=str(flow.run_dir),
            teacher_scale=1.25,
            init_from=str(flow.run_dir),
        )
    )
    trainer.fit()
    return trainer


def test_at_its_start_it_predicts_what_the_flow_does(flow, tmp_path):
    start = replace(MEAN, init_from=str(flow.run_dir), model=None, run_dir=tmp_path / "run")
    trainer = Trainer(start)
    assert trainer.config.n_sample_steps == 1 and trainer.config.cfg_scale == 1
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    t, label = jnp.asarray([0.2, 0.6, 1.0]), jnp.asarray([1, 2, 10])
    span = jnp.asarray([0.1, 0.6, 0.5])
    ours = trainer.model()(x, t, label, span=span)
    np.testing.assert_array_equal(ours, flow.model()(x, t, label))


def test_a_flow_of_fast_features_is_refused(tmp_path):
    fast = Trainer(replace(FLOW, time_scale=None, run_dir=tmp_path / "fast"))
    fast.save()
    start = replace(MEAN, init_from=str(fast.run_dir), model=None, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="--time_scale 1000: the features of t turn too fast"):
        Trainer(start)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["scratch", "distilled"])
def test_it_resumes_bit_for_bit(kind, flow, tmp_path):
    config = MEAN
    if kind == "distilled":
        config = replace(MEAN, teacher=str(flow.run_dir), batch_size=16, accumulate_steps=2)
    whole = Trainer(replace(config, run_dir=tmp_path / "whole"))
    whole.fit()
    Trainer(replace(config, run_dir=tmp_path / "run")).fit(2)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.step == 2
    resumed.fit()
    assert_same(resumed.state, whole.state)


def test_it_samples_in_any_number_of_steps_and_only_unguided(distilled):
    trained = TrainedModel.from_run(distilled.run_dir)
    one = trained.sample([3, 7], trained.plan(SamplingOverrides())).x
    two = trained.sample([3, 7], trained.plan(SamplingOverrides(n_steps=2))).x
    assert np.isfinite(one).all() and np.abs(one - two).max() > 1e-4
    with pytest.raises(UserError, match="guidance of MeanFlow is in its weights"):
        trained.plan(SamplingOverrides(cfg_scale=2.0))
    samples = trained.sample(
        [3], trained.plan(SamplingOverrides(n_steps=2)), trajectory=True, estimates=True
    )
    assert samples.trajectory is not None and samples.estimates is not None
    assert len(samples.trajectory) == 3 and len(samples.estimates) == 2


def test_a_teacher_of_other_data_is_refused(flow, distilled, tmp_path):
    wrong = replace(MEAN, run_dir=tmp_path / "run", teacher=str(flow.run_dir))
    for message, changes in (
        ("--teacher .* its number of classes is 10, this run's is 0", {"conditioning": "none"}),
        ("a teacher is a flow, not MeanFlow", {"teacher": str(distilled.run_dir)}),
        ("--teacher is not for rectified flow", {"objective": "rectified_flow"}),
        ("--teacher /nothing: there is no such run", {"teacher": "/nothing"}),
        ("there is no such run or file; if it has moved", {"teacher": f"{tmp_path}/flow@2"}),
        ("no checkpoint of step 3", {"teacher": f"{flow.run_dir}@3"}),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(replace(wrong, **changes))
    assert not (tmp_path / "run").exists()


def test_the_target_follows_the_teachers_guided_velocity(flow):
    """v_null + scale·(v − v_null), of its averaged weights; a student that is the teacher itself
    has no error where r = t.
    """
    teacher = open_teacher(
        f"{flow.run_dir}@2",
        1.5,
        network=flow.model_config,
        conditioning=flow.conditioning,
        space=flow.space,
        fsdp=1,
    )
    assert teacher.reference == f"{flow.run_dir}@2" and teacher.passes == 2
    network = teacher.merge()
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    t, label = jnp.asarray([0.2, 0.6, 1.0]), jnp.asarray([1, 2, 3])
    null = network(x, t, jnp.full(3, 10))
    guided = null + 1.5 * (network(x, t, label) - null)
    np.testing.assert_allclose(teacher.velocity(network)(x, t, label), guided, atol=1e-5)

    class Student:
        config = flow.model_config

        def __call__(self, x, t, label, span=None):
            return teacher.velocity(network)(x, t, label)

        def frozen(self):
            return self

    image = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    loss = taught_by(teacher, MeanFlow(equal_share=1.0).loss)
    value, _ = loss(Student(), batch_of(8, image=image), jax.random.key(1), network)
    np.testing.assert_allclose(value, 0, atol=1e-10)


def test_a_run_keeps_to_the_checkpoint_and_the_scale_of_its_teacher(distilled, tmp_path):
    saved = json.loads((distilled.run_dir / "config.json").read_text())
    assert saved["teacher"].endswith("@4") and saved["teacher_scale"] == 1.25
    again = Trainer(
        replace(
            MEAN,
            model=None,
            resume=True,
            run_dir=distilled.run_dir,
            teacher=saved["teacher"].removesuffix("@4"),
        )
    )
    assert again.config.teacher == saved["teacher"]
    assert again.evaluate()["eval_loss"] == distilled.evaluate()["eval_loss"]


def test_a_flow_of_fast_features_becomes_one_of_slow_features(flow, tmp_path, capsys):
    fast = Trainer(replace(FLOW, time_scale=None, run_dir=tmp_path / "fast"))
    fast.save()
    slow = Trainer(replace(FLOW, init_from=str(fast.run_dir), model=None, run_dir=tmp_path / "run"))
    assert slow.model_config.time_scale == 1
    assert "time_scale is 1, not 1000: the embedding of t starts fresh" in capsys.readouterr().out


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_the_frozen_copy_computes_in_float32_and_has_no_gradient(half):
    config = replace(NETWORK, takes_span=True, time_scale=1.0)
    params = jax.tree.map(jnp.asarray, weights(config))
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    inputs = x, jnp.asarray([0.2, 0.6, 1.0]), jnp.asarray([1, 2, 3])
    exact = nnx.merge(model_graphdef(config), params)
    coarse = nnx.merge(model_graphdef(replace(config, dtype=half)), params)
    span = jnp.asarray([0.1, 0.2, 0.9])
    expected = exact(*inputs, span=span)
    np.testing.assert_array_equal(coarse.frozen()(*inputs, span=span), expected)
    assert np.abs(coarse(*inputs, span=span) - expected).max() > 1e-4

    def total(params):
        return nnx.merge(model_graphdef(config), params).frozen()(*inputs, span=span).sum()

    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(total)(params)))


@pytest.mark.slow
def test_a_teacher_is_sharded_as_its_student_is(flow, tmp_path):
    weights = {}
    for fsdp in (1, 4):
        taught = replace(MEAN, teacher=str(flow.run_dir), run_dir=tmp_path / str(fsdp), fsdp=fsdp)
        trainer = Trainer(taught)
        trainer.fit(2)
        weights[fsdp] = jax.tree.map(np.asarray, trainer.state.params)
    for a, b in zip(*map(jax.tree.leaves, weights.values()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.slow
def test_steps_of_an_mmdit_report_what_one_device_reports():
    loss = partial(MeanFlow(target_scale=1.5).loss, label_dropout=0.3)
    config = replace(NETWORK, takes_span=True, time_scale=1.0, block=JOINT)
    expected, found = (
        steps(config, MESHES[name], n=4, loss=loss)["reports"]
        for name in ("1 device", "hybrid 2x4")
    )
    assert_same_reports(found, expected)
