"""Protocols of papers: their values are known here, and contradictions to them are refused."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_cases import evaluate_pixels
from tiny_models import CAPTIONS, DDPM, UNCONDITIONAL, tiny_model

import evaluate
from evaluate import EvaluateConfig
from evaluation.features import build_pixel_extractor
from evaluation.protocols import PROTOCOLS
from evaluation.reference import read_reference
from inference import grids, sample_files
from inference.sample_files import EvaluationSamplesConfig
from inference.sampler import Samples
from inference.trained_model import TrainedModel
from methods.registry import METHODS
from model import model_config
from networks.inception import PREPARATIONS
from runtime import parallel
from runtime.errors import UserError

FLAGS: dict[str, Any] = {"run": Path("run"), "reference": Path("r.npz"), "inception": "weights"}


@pytest.fixture
def adm_reference(tmp_path):
    """A reference of the ADM suite by its arrays, of 64 features."""
    arrays = {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(9), "sigma_s": np.eye(9)}
    np.savez(tmp_path / "adm.npz", **arrays)
    return tmp_path / "adm.npz"


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_its_values_are_known_here(protocol):
    assert protocol.solver in METHODS[protocol.objective].solvers
    assert protocol.rounding in grids.ROUNDINGS and protocol.preparation in PREPARATIONS
    assert protocol.n == 50_000 and protocol.source
    METHODS[protocol.objective]().check_sampler(
        solver=protocol.solver, n_steps=protocol.n_steps, shift=protocol.shift, eta=0.0
    )


def test_they_are_those_of_the_papers():
    names = ("objective", "solver", "n_steps", "guided_channels", "interval", "labels", "rounding")
    found = {
        name: tuple(asdict(protocol)[field] for field in names)
        for name, protocol in PROTOCOLS.items()
    }
    assert found == {
        "dit": ("ddpm", "ddpm", 250, 3, (0.0, 1.0), "random", "half_up"),
        "adm": ("ddpm", "ddpm", 250, None, None, "random", "down"),
        "sit": ("rectified_flow", "sde", 250, 3, (0.0, 1.0), "random", "half_up"),
        "repa": ("rectified_flow", "sde", 250, None, None, "random", "down"),
        "jit": ("rectified_flow", "heun", 50, None, (0.0, 0.9), "balanced", "nearest"),
    }
    assert PROTOCOLS["adm"].cfg_scale == 1
    assert {protocol.preparation for protocol in PROTOCOLS.values()} == {"adm"}


def test_limits_of_guidance_are_those_of_a_guided_model():
    dit, repa, jit = (PROTOCOLS[name] for name in ("dit", "repa", "jit"))
    assert dit.flags(cfg_scale=1.5, channels=4)["guided_channels"] == 3
    assert repa.flags(cfg_scale=1.5, channels=4)["guided_channels"] == 4
    assert jit.flags(cfg_scale=2.0, channels=3)["interval"] == (0.0, 0.9)
    assert "interval" not in repa.flags(cfg_scale=1.5, channels=4)
    for protocol in (dit, jit):
        flags = protocol.flags(cfg_scale=1.0, channels=4)
        assert flags.get("interval") is flags.get("guided_channels") is None


def test_a_sweep_by_a_protocol_guides_each_scale_as_it_says(adm_reference):
    """Scale 1 is without guidance, and so without limits."""
    four = model_config("DiT-Nano/4", image_size=8, channels=4, out_channels=4, n_classes=10)
    model = tiny_model(four, sample_shift=3.0, guided_channels=3)
    reference = read_reference(adm_reference)

    def samplers(protocol, **flags):
        config = EvaluateConfig(protocol=protocol, cfg_scale=(1.0, 1.5), **flags)
        configs = [
            evaluate.apply_protocol(one, model, reference) for one in evaluate.split_sweep(config)
        ]
        assert [one.n for one in configs] == [50_000] * 2
        plans = [model.plan(evaluate.sampling_config(one, 4)) for one in configs]
        assert [plan.cfg_scale for plan in plans] == [1, 1.5]
        return [plan.sampler for plan in plans]

    plain, guided = samplers("sit")
    assert (plain.guided_channels, guided.guided_channels) == (None, 3)
    assert (guided.solver, guided.n_steps, guided.shift, guided.interval) == ("sde", 250, 1, (0, 1))
    plain, guided = samplers("repa", interval=(0.0, 0.7))  # all channels, not the model's own
    assert (plain.guided_channels, guided.guided_channels) == (None, 4)
    assert (plain.interval, guided.interval) == ((0, 1), (0, 0.7))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"protocol": "dlt"}, "unknown protocol 'dlt'; did you mean 'dit'"),
        ({"protocol": "dit", "n_steps": 50}, "--n_steps 50 contradicts --protocol dit.* 250"),
        ({"protocol": "sit", "solver": "euler"}, "--solver euler contradicts --protocol sit.* sde"),
        (
            {"protocol": "jit", "interval": (0.2, 0.8)},
            "--interval 0.2 0.8 contradicts --protocol jit, which has 0 0.9",
        ),
        ({"protocol": "dit", "guided_channels": 4}, "--guided_channels 4 contradicts .*dit.* 3"),
        ({"protocol": "adm", "cfg_scale": (1.5,)}, "--cfg_scale 1.5 contradicts --protocol adm"),
        ({"protocol": "adm", "cfg_scale": (1.0, 1.5)}, "--cfg_scale 1.5 contradicts"),
        ({"protocol": "sit", "shift": 3.0}, "--shift 3 contradicts --protocol sit, which has 1"),
        (
            {"protocol": "jit", "preparation": "clean_fid"},
            "--preparation clean_fid contradicts .* adm",
        ),
        ({"protocol": "sit", "ema": False}, "--ema False contradicts --protocol sit"),
        ({"protocol": "repa", "guide": "weak"}, "--guide weak is not part of --protocol repa"),
        ({"protocol": "dit", "eta": 1.0}, "--eta 1 is not part of --protocol dit"),
        (
            {"protocol": "dit", "features": "pixels", "inception": None},
            "--features pixels contradicts --protocol dit, which has inception",
        ),
        (
            {"protocol": "dit", "reference": None, "make_reference": Path("x.npz")},
            "--protocol needs --reference",
        ),
        ({"protocol": "dit", "run": None, "npz": Path("a.npz")}, "--protocol needs --run or"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_read(flags, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(EvaluateConfig(**FLAGS | flags))


def test_flags_that_say_the_same_are_fine():
    same = {"n_steps": 250, "solver": "sde", "guided_channels": 3, "interval": (0.0, 1.0)}
    same |= {"shift": 1.0, "preparation": "adm", "cfg_scale": (1.0, 1.5), "n": 1000}
    evaluate.check_flags(EvaluateConfig(protocol="sit", **same, **FLAGS))
    evaluate.check_flags(EvaluateConfig(protocol="repa", interval=(0.0, 0.7), **FLAGS))


@pytest.mark.parametrize(
    ("protocol", "model", "flags", "message"),
    [
        ("dit", {}, {}, "--protocol dit evaluates models of DDPM, not of rectified flow"),
        ("adm", {}, {}, "--protocol adm evaluates models of DDPM, not of rectified flow"),
        ("sit", DDPM, {}, "--protocol sit evaluates models of rectified flow, not of DDPM"),
        ("repa", DDPM, {}, "--protocol repa evaluates models of rectified flow, not of DDPM"),
        ("sit", {}, {}, "--protocol sit guides 3 channels, and the model has 1"),
        ("repa", {}, {"guided_channels": 3}, "--guided_channels 3 contradicts .*repa.* all 1"),
    ],
)
def test_a_model_or_reference_that_does_not_fit_is_refused(
    protocol, model, flags, message, adm_reference, monkeypatch
):
    monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: tiny_model(**model))
    with pytest.raises(UserError, match=message):
        evaluate.main(
            EvaluateConfig(protocol=protocol, **FLAGS | {"reference": adm_reference} | flags)
        )


def test_a_reference_of_another_preparation_is_refused(adm_reference, tmp_path):
    """A file of means and covariances alone, such as JiT's, does not say which it has."""
    jit, adm = PROTOCOLS["jit"], read_reference(adm_reference)
    jit.check_reference(adm)
    np.savez(tmp_path / "bare.npz", mu=np.zeros(64), sigma=np.eye(64))
    jit.check_reference(read_reference(tmp_path / "bare.npz"))
    other = replace(adm, card={"features": {"space": "inception", "preparation": "clean_fid"}})
    with pytest.raises(UserError, match=r"prepares images as adm, and reference .* of clean_fid"):
        jit.check_reference(other)


def test_a_model_without_classes_is_refused(adm_reference, monkeypatch):
    monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: tiny_model(UNCONDITIONAL))
    config = EvaluateConfig(protocol="sit", **FLAGS | {"reference": adm_reference})
    with pytest.raises(UserError, match="evaluates models of classes, not without labels"):
        evaluate.main(config)


def test_a_model_of_captions_is_refused(adm_reference, monkeypatch):
    model = tiny_model(CAPTIONS, conditioning="text")
    monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: model)
    config = EvaluateConfig(protocol="sit", **FLAGS | {"reference": adm_reference})
    with pytest.raises(UserError, match="evaluates models of classes, not of captions"):
        evaluate.main(config)
    with pytest.raises(UserError, match="random labels need a model of classes"):
        sample_files.open_image_set(model, EvaluationSamplesConfig(n=3, labels="random"))


# --- the record -----------------------------------------------------------------------------------


def test_the_record_names_the_protocol_and_its_values(adm_reference, tmp_path, monkeypatch, capsys):
    """With pixels in the place of Inception's features, whose weights are large."""
    monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: tiny_model(**DDPM))
    extractor = build_pixel_extractor(parallel.make_mesh())
    monkeypatch.setattr(evaluate, "build_matching_extractor", lambda *_, **__: extractor)
    monkeypatch.setattr(evaluate.protocols, "check_flags", lambda *_, **__: None)
    flags = {"run": Path("run"), "reference": adm_reference, "n": 6, "protocol": "dit"}
    record = evaluate_pixels(tmp_path / "a", cfg_scale=(1.0,), **flags)
    card = record["card"]
    assert card["protocol"]["name"] == "dit" and "Peebles" in card["protocol"]["source"]
    assert card["protocol"]["deviations"] == ["n 6, not 50000"]
    sampler = card["pictures"]["sampler"]
    assert (sampler["solver"], sampler["n_steps"], sampler["guided_channels"]) == (
        "ddpm",
        250,
        None,
    )
    assert (card["pictures"]["labels"], card["pictures"]["rounding"]) == ("random", "half_up")
    assert card["config"]["preparation"] == "adm" and card["config"]["n_steps"] == 250
    assert "--protocol dit has 50000 samples, and these are 6" in capsys.readouterr().out


# --- labels and bytes -----------------------------------------------------------------------------


def test_random_labels_depend_on_seed_and_index_alone(monkeypatch):
    sampled = []

    def sample(_, labels, plan, *, batch_size, **__):
        sampled.append(np.asarray(labels))
        return Samples(np.zeros((batch_size, 8, 8, 1), np.float32), None, None)

    model = tiny_model()
    monkeypatch.setattr(TrainedModel, "sample", sample)
    found = []
    for n, size in ((20, 3), (20, 7), (20, 20), (13, 5)):
        sampled.clear()
        config = EvaluationSamplesConfig(n=n, batch_size=size, labels="random", seed=3)
        list(sample_files.open_image_set(model, config).batches(size))
        found.append(np.concatenate(sampled)[:n].tolist())
    assert found[0] == found[1] == found[2] and found[3] == found[0][:13]
    other = model.conditioning.request_random(20, seed=4)
    assert other.label_index.tolist() != found[0]


def test_random_labels_are_uniform_and_balanced_ones_as_ever():
    conditioning = tiny_model().conditioning
    counts = np.bincount(conditioning.request_random(10_000, seed=0).label_index, minlength=10)
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # χ² of 9 degrees: once in a thousand seeds
    balanced = sample_files.request_labels(tiny_model(), EvaluationSamplesConfig(n=12))
    assert balanced.label_index.tolist() == [*range(10), 0, 1]


ROUNDED = {
    # x · 127.5 + 127.5:  below 0  0  63.75  127.5  191.25  254.8725  255  above
    "nearest": [0, 0, 64, 128, 191, 255, 255, 255],
    "half_up": [0, 0, 64, 128, 191, 255, 255, 255],
    "down": [0, 0, 63, 127, 191, 254, 255, 255],
}


@pytest.mark.parametrize("rounding", grids.ROUNDINGS)
def test_roundings_are_those_computed_by_hand(rounding):
    x = np.array([-2, -1, -0.5, 0, 0.5, 0.999, 1, 2], np.float32)
    assert grids.ROUNDINGS[rounding](x).tolist() == ROUNDED[rounding]
    found = grids.to_uint8(x.reshape(2, 2, 2), rounding=rounding)
    assert found.dtype == np.uint8 and found.ravel().tolist() == ROUNDED[rounding]


def test_roundings_are_the_formulas_of_the_papers():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 100_000).astype(np.float32)
    x[:256] = np.arange(256, dtype=np.float32) / 127.5 - 1
    repa = np.clip(np.float32(255) * ((x + 1) / np.float32(2)), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(grids.round_down(x), repa)
    jit = np.round(np.clip((x + 1) / np.float32(2) * np.float32(255), 0, 255)).astype(np.uint8)
    np.testing.assert_array_equal(grids.round_to_nearest(x), jit)
    assert (grids.round_to_nearest(x) == grids.round_half_up(x)).mean() > 0.999
    np.testing.assert_array_equal(grids.to_uint8(x.reshape(1, -1, 1)), jit.reshape(1, -1, 1))


def test_samples_are_rounded_as_asked():
    model = tiny_model()
    config = EvaluationSamplesConfig(n=3, batch_size=3)
    nearest, down = (
        np.concatenate([*sample_files.open_image_set(model, each).batches(3)]).astype(int)
        for each in (config, replace(config, rounding="down"))
    )
    assert set(np.unique(nearest - down)) == {0, 1}
