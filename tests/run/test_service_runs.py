"""Sampling jobs of the page: the images requested, within limits, by few compiled programs; and the
command that opens it.
"""

from dataclasses import replace

import numpy as np
import pytest
from service_cases import (
    JOB,
    digits,  # noqa: F401
    sample,
)
from tiny_models import DDPM, SHAPE, SIGMA, UNCONDITIONAL, tiny_model

from data.batch import EncodedCaption
from inference import grids, sampler
from inference.app import service
from inference.app.service import SampleJob
from inference.trained_model import SamplingOverrides, TrainedModel
from model import model_config
from runtime.errors import UserError


def test_visitors_get_the_samples_of_generate(digits):
    x, names = sample(digits, replace(JOB, n_images=20))
    assert names == ["3"] * 10 + ["7"] * 10 and x.shape == (20, 256, 256)
    plan = digits.plan(SamplingOverrides.from_flags(JOB))
    direct = digits.sample([3] * 10 + [7] * 10, plan, seed=5).x
    small = grids.to_uint8(direct)[..., 0].astype(int)
    assert np.abs(x[:, ::32, ::32] - small).max() <= 1
    assert (sample(digits, replace(JOB, n_images=20, seed=6))[0] != x).any()


def test_images_of_another_size_are_drawn_up_to_a_limit(digits):
    assert service.sizes_of(digits) == ["8x8"] and not digits.size_warning
    job = replace(JOB, n_images=1, n_steps=1, size="8x16")
    assert sample(digits, job)[0].shape == (1, 256, 512)
    assert "trained on images of 8, and" in service.at_size(digits, job).size_warning
    assert service.at_size(digits, replace(job, size="8 × 16")).image_size.in_full == "8x16"
    for size, message in (
        ("64", "size 64: at most 4 times the area of 8 can be sampled"),
        ("9999x9999", "at most 4 times the area of 8 can be sampled"),
        ("9x8", "size 9x8: both sides must be multiples of 4"),
        ("wide", "^size 'wide': must be a number of pixels"),
        ("8x0", "^size 8x0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            list(service.run_job(digits, replace(job, size=size)))
    bucketed = replace(digits, settings=digits.settings | {"buckets": ["8x8", "8x16"]})
    assert service.sizes_of(bucketed) == ["8x8", "8x16"]
    assert not service.at_size(bucketed, job).size_warning


def test_programs_are_dropped_before_there_are_many(digits, monkeypatch):
    monkeypatch.setattr(service, "MAX_COMPILED_PROGRAMS", 1)
    for low in (0.1, 0.2):
        list(service.run_job(digits, replace(JOB, n_images=1, n_steps=1, interval=(low, 1.0))))
        assert sampler.sample_batch._cache_size() == 1  # type: ignore


def test_a_trajectory_starts_with_noise_and_ends_with_the_images(digits):
    frames = service.sample_trajectory_frames(digits, JOB)
    assert len(frames) == 4  # three steps
    x, names = sample(digits, JOB)
    last = grids.image_grid(x[:, ::32, ::32, None], captions=names)
    assert np.abs(np.asarray(frames[-1]).astype(int) - np.asarray(last)).max() <= 1
    assert (np.asarray(frames[0]) != np.asarray(last)).any()
    long = replace(JOB, n_steps=60, n_images=64)
    assert len(service.sample_trajectory_frames(digits, long)) == service.MAX_FRAMES


def test_a_comparison_grid_fills_cell_by_cell_with_the_images_sampled_alone(digits):
    steps = service.sample_comparison_grid(digits, JOB, [1.0, 4.0], [2, 3])
    partial = [np.asarray(grid) for grid in steps]
    assert len(partial) == 4 and len({grid.tobytes() for grid in partial}) == 4
    alone = {
        (scale, k): sample(digits, replace(JOB, n_images=1, cfg_scale=float(scale), n_steps=k))[0][
            0
        ]
        for scale in (1, 4)
        for k in (2, 3)
    }
    cells = [[alone[scale, k][::32, ::32, None] for k in (2, 3)] for scale in (1, 4)]
    whole = grids.comparison_grid(
        np.array(cells), rows=["cfg 1", "cfg 4"], columns=["2 steps", "3 steps"]
    )
    assert np.abs(partial[-1].astype(int) - np.asarray(whole)).max() <= 1


def test_without_guidance_the_interval_is_ignored_and_other_models_have_other_limits(digits):
    unlimited = replace(JOB, cfg_scale=1.0, interval=(0.2, 0.8))
    assert service.plan_sampling(digits, unlimited).sampler.interval == (0, 1)
    assert service.max_steps(tiny_model(SIGMA, **DDPM)) == 1000
    unconditional = tiny_model(UNCONDITIONAL, cfg_scale=1.0)
    assert len(sample(unconditional, SampleJob(n_images=3))[0]) == 3
    with pytest.raises(UserError, match="unconditional"):
        list(service.run_job(unconditional, SampleJob(n_images=3, cfg_scale=2.0)))


def test_prompts_are_for_models_of_captions(monkeypatch):
    widths = {"text_length": 5, "text_width": 6, "pooled_width": 4}
    config = model_config("MMDiT-Nano/4", **SHAPE, out_channels=1, n_classes=0, **widths)
    encoded = []

    def encode(_, captions):
        encoded.append(captions)
        n, rng = len(captions), np.random.default_rng(0)
        tokens = rng.normal(size=(n, 5, 6)).astype("f4")
        return EncodedCaption(tokens, np.ones((n, 5), bool), rng.normal(size=(n, 4)).astype("f4"))

    monkeypatch.setattr(TrainedModel, "encode_captions", encode)
    model = tiny_model(config, conditioning="text")
    x, names = sample(model, SampleJob(prompt=" a seven ", n_images=2))
    assert names == ["a seven"] * 2 and encoded == [["a seven"]]
    job = SampleJob(prompt="a seven", negative_prompt="a one", n_images=2)
    with_negative, _ = sample(model, job)
    assert encoded[1:] == [["a seven", "a one"]] and (with_negative != x).any()
    grid = service.sample_comparison_grid(model, job, [1.0, 2.0], [2])
    assert len(list(grid)) == 2  # also without guidance, where a negative prompt has no effect
    with pytest.raises(UserError, match="write a prompt"):
        list(service.run_job(model, SampleJob(prompt=" ")))
    with pytest.raises(UserError, match="has no effect without guidance"):
        list(service.run_job(model, SampleJob(prompt="a", negative_prompt="b", cfg_scale=1.0)))
    # The null label of the published SD3 is an empty caption, encoded also without guidance.
    published = tiny_model(config, conditioning="text", full_width=6)
    job = SampleJob(prompt="a seven", cfg_scale=1.0, n_images=2)
    assert sample(published, job)[1] == ["a seven"] * 2
    assert encoded[-1] == ["a seven", ""]
