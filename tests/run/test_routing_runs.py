"""A run with a route resumes, starts others, and can be guided by it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from parallel_cases import MESHES, assert_same_reports, steps
from parallel_cases import TINY as NETWORK
from train_cases import TINY, assert_same

import export
import model
from export import ExportConfig
from inference.sample_files import describe_samples
from inference.trained_model import SamplingOverrides, TrainedModel
from methods.rectified_flow import RectifiedFlow
from runtime import parallel
from runtime.errors import UserError
from train import Trainer
from training.auxiliary import with_auxiliary
from training.routing import with_routing

ROUTED = replace(
    TINY, model="DiT-Three/2", route=(1, -1), n_steps=4, eval_save_steps=2, learning_rate=1e-2
)


@pytest.fixture(scope="module", autouse=True)
def preset():
    """Add a preset of three blocks, the fewest that a route fits into."""
    model.MODELS["DiT-Three/2"] = {"width": 32, "depth": 3, "n_heads": 2, "patch_size": 2}
    yield
    del model.MODELS["DiT-Three/2"]


@pytest.fixture(scope="module")
def routed(preset, tmp_path_factory):
    trainer = Trainer(replace(ROUTED, run_dir=tmp_path_factory.mktemp("runs") / "routed"))
    trainer.fit()
    return trainer


def test_it_resumes_bit_for_bit(routed, tmp_path):
    Trainer(replace(ROUTED, run_dir=tmp_path / "run")).fit(2)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.model_config.route == (1, 2)
    resumed.fit()
    assert_same(resumed.state, routed.state)
    with pytest.raises(UserError, match=r"route_share was 0\.5, not 0\.25"):
        Trainer(replace(ROUTED, resume=True, run_dir=tmp_path / "run", route_share=0.25))


def test_a_route_that_nothing_leaves_is_the_same_run_without():
    plain, none = Trainer(replace(ROUTED, route=None)), Trainer(replace(ROUTED, route_share=0.0))
    assert none.model_config == plain.model_config
    assert none.train_passes == plain.train_passes == 3
    for trainer in (plain, none):
        trainer.train_step(next(iter(trainer.batches(0, 1))))
    assert_same(none.state, plain.state)


def test_its_steps_count_fewer_flops_and_its_evaluation_computes_all(routed):
    assert 2 < routed.train_passes < 3 and routed.eval_passes == 1
    assert routed.state.params["blocks"]["modulation"]["kernel"].any()


def test_samples_can_be_guided_by_the_route(routed, tmp_path):
    export.main(ExportConfig(run=routed.run_dir, out=tmp_path / "own"))
    for trained in (
        TrainedModel.from_run(routed.run_dir),
        TrainedModel.from_pretrained(str(tmp_path / "own")),
    ):

        def sample(trained=trained, cfg_scale=1.0, **flags):
            plan = trained.plan(SamplingOverrides(cfg_scale=cfg_scale, **flags))
            request = trained.conditioning.request(4, labels=["3"])
            return trained.sample([3, 7], plan).x, describe_samples(trained, request, plan)

        plain, card = sample()
        assert "route_guidance" not in card and "route_rates" not in card["sampler"]
        guided, card = sample(route_guidance=2.0, route_rates=(0.25, 0.75), cfg_scale=1.5)
        assert np.isfinite(guided).all() and np.abs(guided - plain).max() > 1e-3
        assert card["route_guidance"] == 2 and card["sampler"]["route_rates"] == (0.25, 0.75)
        # A sample is of its seed and index alone.
        alone = trained.sample(
            [7], trained.plan(SamplingOverrides(cfg_scale=1.0, route_guidance=2.0)), first_index=1
        ).x
        np.testing.assert_allclose(sample(route_guidance=2.0)[0][1:], alone, atol=1e-5)
        nearly = sample(route_guidance=1.0 + 1e-6)[0]
        np.testing.assert_allclose(nearly, plain, atol=1e-4)
        with pytest.raises(UserError, match="--route_rates: has no effect without"):
            sample(route_rates=(0.0, 0.25))
        with pytest.raises(UserError, match=r"--route_rates 0\.3: of each 2×2"):
            sample(route_guidance=2.0, route_rates=(0.0, 0.3))
        with pytest.raises(UserError, match=r"--route_rates 0\.5 0: takes two shares"):
            sample(route_guidance=2.0, route_rates=(0.5, 0.0))


def test_a_run_started_from_it_computes_all_tokens_again(routed, tmp_path):
    start = replace(TINY, init_from=str(routed.run_dir), model=None)
    again = Trainer(replace(start, run_dir=tmp_path / "again"))
    assert again.model_config.route == ()
    assert_same(again.state.params, routed.state.ema)
    plan = TrainedModel.from_run(routed.run_dir).plan
    assert plan(SamplingOverrides(route_guidance=1.5)).route_guidance == 1.5
    with pytest.raises(UserError, match=r"--route_guidance nan: must be finite"):
        plan(SamplingOverrides(route_guidance=float("nan")))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"route": (1, 3)}, "--route 1 3: takes two numbers of blocks, of 3"),
        ({"route_share": 0.6}, r"--route_share 0\.6: of each 2×2 tokens 0 to 3 may go around"),
        ({"route": None, "route_share": 0.5}, "--route_share"),
        ({"objective": "meanflow"}, "--route 1 -1: --objective meanflow calls its network"),
        ({"patch_size": 8}, "the 1×1 tokens of an image do not fall into groups of 2×2"),
    ],
)
def test_a_route_that_does_not_fit_is_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Trainer(replace(ROUTED, run_dir=tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_blocks_inside_the_route_cannot_be_looked_into(tmp_path):
    deep = replace(ROUTED, model="DiT-Ti/2", route=(1, -1), run_dir=tmp_path / "run")
    for flags in ({"inner_head": 2}, {"layer_sync": (1, 3)}):
        with pytest.raises(UserError, match="on --route 1 -1 tokens are missing"):
            Trainer(replace(deep, **flags))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"block": model.JOINT}], ids=["DiT", "MMDiT"])
def test_its_steps_report_what_one_device_and_microbatches_report(fields, monkeypatch):
    flow = partial(RectifiedFlow().loss, label_dropout=0.3)
    inner = with_auxiliary(flow, inner_weight=0.5, layer_sync=(), sync_weight=0.2)
    config = replace(NETWORK, depth=3, route=(1, 2), inner_head=1, rope=True, **fields)
    expected = steps(config, MESHES["1 device"], n=3, loss=with_routing(inner, 0.5))["reports"]
    plain = steps(config, MESHES["1 device"], n=1, loss=inner)["reports"]
    assert abs(plain["loss"][0] - expected["loss"][0]) > 1e-4
    reports = steps(config, MESHES["hybrid 2x4"], n=3, loss=with_routing(inner, 0.5))["reports"]
    assert_same_reports(reports, expected)
    halves = partial(parallel.value_and_grad, accumulate_steps=2)
    monkeypatch.setattr(parallel, "value_and_grad", halves)
    reports = steps(config, MESHES["DDP 8"], n=1, loss=with_routing(inner, 0.5))["reports"]
    np.testing.assert_allclose(reports["loss"], expected["loss"][:1], rtol=1e-5)
