"""A model whose null label was never trained is sampled without guidance, and never with it."""

import json
from dataclasses import asdict, replace

import pytest
from service_cases import JOB
from tiny_models import CLASSES, DIGITS, SHAPE, UNCONDITIONAL, tiny_model

import export
from inference import guidance, sample_files
from inference.app import service
from inference.sample_files import EvaluationSamplesConfig
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from model import model_config
from runtime.errors import UserError

CAPTIONS = model_config(
    "MMDiT-Nano/4",
    **SHAPE,
    out_channels=1,
    n_classes=0,
    text_length=5,
    text_width=6,
    pooled_width=4,
)
REFUSED = r"cfg_scale 4: '.*' was trained without label dropout, so it has no null label"


@pytest.fixture(scope="module")
def undropped():
    """A run with `--label_dropout 0`, whose dataset recommends guidance."""
    return tiny_model(label_dropout=0.0)


@pytest.mark.parametrize(
    ("settings", "is_trained"),
    [
        ({}, True),  # of a version that did not record it, or published
        ({"label_dropout": 0.1}, True),
        ({"label_dropout": 0.0}, False),
        ({"label_dropout": 0}, False),
        ({"label_dropout": 0.0, "null_is_trained": True}, True),  # of the weights to start from
        ({"label_dropout": 0.0, "null_is_trained": False}, False),
    ],
)
def test_the_settings_tell_if_the_null_label_was_trained(settings, is_trained):
    assert guidance.null_is_trained(settings) is is_trained
    assert guidance.default_scale(settings | {"cfg_scale": 1.5}) == (1.5 if is_trained else 1.0)


def test_guidance_is_off_by_default_and_refused(undropped):
    plan = undropped.plan(SamplingOverrides())
    assert plan.cfg_scale == 1
    assert undropped.sample([3], plan).x.shape == (1, 8, 8, 1)
    assert undropped.plan(SamplingOverrides(cfg_scale=1.0)) == plan
    for scale in (4.0, 0.0, 1.01):
        with pytest.raises(UserError, match="has no null label to guide by; leave it at 1"):
            undropped.plan(SamplingOverrides(cfg_scale=scale))
    with pytest.raises(UserError, match=REFUSED):
        undropped.sample([3], SamplingPlan(plan.sampler, 4.0))


def test_a_run_on_disk_is_read_in_the_same_way(tmp_path):
    settings = tiny_model(label_dropout=0.0).settings | {"model": "DiT-Nano/4", "fsdp": 1}
    config = settings | {"model_config": asdict(CLASSES)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TrainedModel.from_run(tmp_path).plan(SamplingOverrides()).cfg_scale == 1


def test_evaluation_and_the_page_sample_without_guidance(undropped):
    images = sample_files.open_image_set(undropped, EvaluationSamplesConfig(n=20))
    assert images.card["cfg_scale"] == 1
    with pytest.raises(UserError, match=REFUSED):
        sample_files.open_image_set(undropped, EvaluationSamplesConfig(n=20, cfg_scale=4.0))
    assert service.plan_sampling(undropped, JOB).cfg_scale == 1
    with pytest.raises(UserError, match=REFUSED):
        service.plan_sampling(undropped, replace(JOB, cfg_scale=4.0))
    with pytest.raises(UserError, match=REFUSED):
        next(service.sample_comparison_grid(undropped, JOB, [1.0, 4.0], [1]))


def test_the_card_of_an_export_warns(undropped):
    assert "without guidance (scale 1)" in export.untrained_null_note(undropped)
    for guided in (tiny_model(), tiny_model(UNCONDITIONAL, label_dropout=0.0, cfg_scale=1.0)):
        assert export.untrained_null_note(guided) == ""


def test_a_negative_prompt_stands_in_for_the_null_label():
    dataset = {"encoding": None, "label_names": DIGITS}
    model = tiny_model(CAPTIONS, label_dropout=0.0, dataset=dataset)
    assert model.plan(SamplingOverrides()).cfg_scale == 1
    assert model.plan(SamplingOverrides(cfg_scale=4.0), negative=True).cfg_scale == 4
    with pytest.raises(UserError, match=REFUSED):
        model.plan(SamplingOverrides(cfg_scale=4.0))


def test_an_unconditional_model_needs_no_label_dropout():
    model = tiny_model(UNCONDITIONAL, label_dropout=0.0, cfg_scale=1.0)
    assert model.plan(SamplingOverrides()).cfg_scale == 1
