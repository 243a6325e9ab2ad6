"""A run with an inner head, LayerSync and clean images resumes, starts others and can be guided."""

import json
from dataclasses import replace
from functools import partial

import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from parallel_cases import MESHES, assert_same_reports, steps
from parallel_cases import TINY as NETWORK
from train_cases import TINY, assert_same, metrics, whole  # noqa: F401

import export
from export import ExportConfig
from inference.autoguidance import plan_with_guide
from inference.sample_files import describe_sampler, describe_samples
from inference.sampler import SamplerConfig
from inference.trained_model import SamplingOverrides, TrainedModel
from methods.rectified_flow import RectifiedFlow
from pretrained import transformer
from runtime.errors import UserError
from train import Trainer
from training.auxiliary import with_auxiliary

DEEP = replace(
    TINY,
    inner_head=1,
    layer_sync=(1, 2),
    prediction="x0",
    noise_scale=1.5,
    bottleneck=8,
    n_steps=6,
    log_every=2,
    eval_save_steps=3,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    trainer = Trainer(replace(DEEP, run_dir=tmp_path_factory.mktemp("runs") / "deep"))
    trainer.fit()
    return trainer


def test_it_resumes_bit_for_bit_and_logs_each_loss(deep, tmp_path):
    Trainer(replace(DEEP, run_dir=tmp_path / "run")).fit(3)
    resumed = Trainer.from_run(tmp_path / "run")
    assert (resumed.config.prediction, resumed.config.layer_sync) == ("x0", (1, 2))
    resumed.fit()
    assert_same(resumed.state, deep.state)
    lines = [line for line in metrics(deep.run_dir) if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["inner_loss"] > 0 and abs(line["layer_similarity"]) <= 1
        # The loss is the method's own: that of its bins.
        assert (
            min(filter(None, line["loss_by_t"]))
            <= line["loss"]
            <= max(filter(None, line["loss_by_t"]))
        )


def test_samples_can_be_guided_by_the_inner_head(deep):
    trained = TrainedModel.from_run(deep.run_dir)

    def sample(**flags):
        plan = plan_with_guide(trained, SamplingOverrides(cfg_scale=1.0, **flags))
        request = trained.conditioning.request(4, labels=["3"])
        return trained.sample([3, 7], plan).x, describe_samples(trained, request, plan)

    plain, card = sample()
    assert "inner_guidance" not in card
    led, card = sample(inner_guidance=2.0, inner_interval=(0.3, 1.0))
    assert np.isfinite(led).all() and np.abs(led - plain).max() > 1e-3
    assert card["inner_guidance"] == 2 and card["sampler"]["inner_interval"] == (0.3, 1.0)
    assert card["sampler"]["method"]["noise_scale"] == 1.5
    np.testing.assert_array_equal(
        deep.sample([3, 7], cfg_scale=1.0, inner_guidance=2.0), sample(inner_guidance=2.0)[0]
    )
    with pytest.raises(UserError, match="--inner_interval takes two times"):
        sample(inner_guidance=2.0, inner_interval=(0.3,))


def test_an_export_keeps_the_head_and_what_the_output_means(deep, tmp_path):
    export.main(ExportConfig(run=deep.run_dir, out=tmp_path / "own"))
    exported = TrainedModel.from_pretrained(str(tmp_path / "own"))
    assert exported.model.inner_head == 1
    assert (exported.method.prediction, exported.method.noise_scale) == ("x0", 1.5)  # pyright: ignore[reportAttributeAccessIssue]
    text = (tmp_path / "own" / "README.md").read_text()
    assert "It predicts the clean image" in text and "t·1.5·noise" in text
    plan = exported.plan(SamplingOverrides(cfg_scale=1.0, inner_guidance=2.0))
    run = TrainedModel.from_run(deep.run_dir)
    np.testing.assert_array_equal(exported.sample([3], plan).x, run.sample([3], plan).x)


def test_diffusers_layout_leaves_the_head_out_and_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    trainer = Trainer(replace(TINY, inner_head=1, n_steps=1, run_dir=run))
    trainer.save()
    export.main(ExportConfig(run=run, out=tmp_path / "theirs", layout="diffusers"))
    assert "the inner head is left out: DiTTransformer2DModel has none" in capsys.readouterr().out
    assert transformer.load_transformer(str(tmp_path / "theirs")).config.inner_head == 0


def test_a_run_started_from_it_keeps_the_head_or_drops_it(deep, tmp_path, capsys):
    start = replace(TINY, init_from=str(deep.run_dir), run_dir=tmp_path / "kept", model=None)
    kept = Trainer(start)
    assert (kept.config.inner_head, kept.config.prediction) == (1, "x0")
    assert_same(kept.state.params, deep.state.ema)
    capsys.readouterr()
    dropped = Trainer(replace(start, inner_head=0, run_dir=tmp_path / "dropped"))
    assert "--init_from: its inner head is left out" in capsys.readouterr().out
    assert "inner" not in dropped.state.params


@pytest.mark.slow
def test_its_steps_report_what_one_device_reports():
    """An MMDiT's with the head are in test_routing_runs.py, its taps in test_parallel_runs.py."""
    loss = with_auxiliary(
        partial(RectifiedFlow(prediction="x0").loss, label_dropout=0.3),
        inner_weight=0.5,
        layer_sync=(1, 2),
        sync_weight=0.2,
    )
    config = replace(NETWORK, inner_head=1)
    expected, found = (
        steps(config, MESHES[name], n=4, loss=loss)["reports"]
        for name in ("1 device", "hybrid 2x4")
    )
    assert_same_reports(found, expected)
    for metric in ("inner_loss", "layer_similarity"):
        np.testing.assert_allclose(found[metric], expected[metric], rtol=1e-5)


def test_the_record_of_a_run_names_every_choice(deep):
    config = json.loads((deep.run_dir / "config.json").read_text())
    for name in ("inner_head", "inner_weight", "sync_weight", "prediction", "t_min", "noise_scale"):
        assert config[name] is not None
    assert config["model_config"]["bottleneck"] == 8


def test_samples_that_an_older_version_began_are_resumed():
    """Their card has none of the newer fields, which are left out at their neutral values."""
    sampler = SamplerConfig(method=RectifiedFlow("logit_normal", 0.0, 1.0, 1.29, 1.0))
    assert describe_sampler(sampler) == {
        "solver": "euler",
        "n_steps": 50,
        "method": {
            "time_density": "logit_normal",
            "logit_mean": 0.0,
            "logit_std": 1.0,
            "mode_scale": 1.29,
            "time_shift": 1.0,
        },
        "shift": 1.0,
        "interval": (0.0, 1.0),
        "eta": 0.0,
        "guided_channels": None,
        "clip": False,
    }


def test_the_page_forgets_inner_guidance_with_the_model(deep, whole):
    page = pytest.importorskip("inference.app.page", reason="the page needs gradio")
    for trainer, is_visible in ((deep, True), (whole, False)):
        updates = page.fields_for_model(TrainedModel.from_run(trainer.run_dir))
        fields = [u for u in updates if u.get("value") in (0, 1) and "visible" in u]
        values = [(u["value"], u["visible"]) for u in fields]
        assert values == [(1, is_visible), (0, is_visible), (1, is_visible)]
