"""Sampling jobs of the page: the images requested, within limits, by few compiled programs; and the
command that opens it.
"""

import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CLASSES, DDPM, SHAPE, SIGMA, UNCONDITIONAL, tiny_model

import demo
import inference.app
from data.batch import EncodedCaption
from demo import DemoConfig
from inference import grids, sampler
from inference.app import service
from inference.app.service import ModelLibrary, SampleJob
from inference.trained_model import SamplingOverrides, TrainedModel
from model import model_config
from runtime.errors import UserError

JOB = SampleJob(labels=("3", "7"), n_images=5, seed=5)


@pytest.fixture(scope="module")
def digits():
    return tiny_model()


def sample(model, job):
    """All images of a job as an array, and their captions."""
    pairs = [pair for batch in service.run_job(model, job) for pair in batch]
    return np.stack([np.asarray(image) for image, _ in pairs]), [caption for _, caption in pairs]


def test_visitors_get_the_samples_of_generate(digits):
    x, names = sample(digits, replace(JOB, n_images=20))
    assert names == ["3"] * 10 + ["7"] * 10 and x.shape == (20, 256, 256)
    plan = digits.plan(SamplingOverrides.from_flags(JOB))
    direct = digits.sample([3] * 10 + [7] * 10, plan, seed=5).x
    small = grids.to_uint8(direct)[..., 0].astype(int)
    assert np.abs(x[:, ::32, ::32] - small).max() <= 1
    assert (sample(digits, replace(JOB, n_images=20, seed=6))[0] != x).any()


def test_another_number_of_images_or_guidance_scale_compiles_no_new_program(digits):
    list(service.run_job(digits, replace(JOB, n_images=16)))
    before = sampler.sample_batch._cache_size()  # type: ignore
    for n in (5, 9, 17):
        images, _ = sample(digits, replace(JOB, n_images=n, cfg_scale=3.0, seed=n))
        assert len(images) == n
    assert sampler.sample_batch._cache_size() == before  # type: ignore


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_images": 0}, r"number of images 0: must be in 1 … 64"),
        ({"n_images": 65}, r"number of images 65: must be in 1 … 64"),
        ({"n_steps": 0}, r"steps 0: must be in 1 … 250"),
        ({"n_steps": 251}, r"steps 251: must be in 1 … 250"),
        ({"prompt": "a" * 301}, r"the prompt has 301 characters; at most 300"),
        ({"negative_prompt": "a" * 301}, r"the negative prompt has 301 characters"),
        ({"seed": -1}, r"seed -1: must be in"),
        ({"labels": ("ten",)}, r"unknown label 'ten'"),
        ({"interval": (0.8, 0.2)}, r"two times in 0 … 1"),
        ({"solver": "ddpm"}, r"not for a model trained by rectified flow"),
        ({"cfg_scale": float("inf")}, r"must be finite"),
    ],
)
def test_jobs_beyond_the_limits_or_the_model_are_refused(changes, message, digits):
    with pytest.raises(UserError, match=message):
        list(service.run_job(digits, replace(JOB, **changes)))


def test_a_comparison_grid_has_a_limit(digits):
    for scales, steps in (([1.0] * 7, [2] * 6), ([], [2])):
        with pytest.raises(UserError, match="a grid of"):
            list(service.sample_comparison_grid(digits, JOB, scales, steps))
    with pytest.raises(UserError, match="steps 251"):  # before the first cell is sampled
        next(service.sample_comparison_grid(digits, JOB, [1.0], [2, 251]))


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


# --- models ---------------------------------------------------------------------------------------


def make_run(folder: Path, *steps: int, time: int = 0, **more) -> Path:
    """A run as far as it is read before its weights are."""
    for step in steps:
        (folder / f"checkpoints/{step}").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    config = {"dataset_name": "digits", "model": "DiT-Nano/4", "model_config": asdict(CLASSES)}
    config |= {"dataset": {"encoding": None, "label_names": []}, "fsdp": 1} | more
    (folder / "config.json").write_text(json.dumps(config))
    os.utime(folder / "config.json", (time, time))
    return folder


def test_runs_with_a_checkpoint_are_listed_the_last_started_first(tmp_path):
    make_run(tmp_path / "old", 5, time=1)
    make_run(tmp_path / "new", 5, 10, time=2)
    make_run(tmp_path / "begun")
    make_run(tmp_path / "vae", 5, command="train_vae.py")
    (tmp_path / "other").mkdir()
    models = ModelLibrary(runs=tmp_path)
    assert models.names() == ["new", "old"]
    assert models.open("old").name == str(tmp_path / "old")
    assert models.load("new") is models.open("new") is models.load("new")
    assert models.open("old") is not models.open("old") and list(models.cached) == [("new", 10)]
    (tmp_path / "new/checkpoints/15").mkdir()
    assert models.open("new") is not models.cached["new", 10]  # there are newer weights
    with pytest.raises(UserError, match=r"unknown model '\.\./x'"):
        models.open("../x")


def test_weights_are_cached_under_the_step_that_was_looked_up(tmp_path, monkeypatch):
    make_run(tmp_path / "run", 10)
    models = ModelLibrary(runs=tmp_path)
    cached, steps = models.load("run"), iter([10])
    # The run saves another checkpoint meanwhile.
    monkeypatch.setattr(service, "newest_checkpoint_step", lambda _: next(steps, 15))
    monkeypatch.setattr(ModelLibrary, "names", lambda _: ["run"])
    assert models.load("run") is cached and list(models.cached) == [("run", 10)]
    assert models.load("run") is not cached


def test_a_run_is_named_after_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path / "run", 10))
    assert ModelLibrary(run=Path(".")).names() == ["run"]


def test_a_pretrained_model_is_opened_once(digits, monkeypatch):
    opened = []

    def from_pretrained(name, **paths):
        opened.append((name, paths))
        return digits

    monkeypatch.setattr(TrainedModel, "from_pretrained", from_pretrained)
    models = ModelLibrary(pretrained="someone/dit", vae="here")
    assert models.names() == ["someone/dit"] and models.folder("someone/dit") is None
    assert models.load("someone/dit") is models.open("someone/dit") is digits
    assert opened == [("someone/dit", {"vae": "here", "text_encoders": ()})]


def test_missing_models_are_reported(tmp_path):
    with pytest.raises(UserError, match="holds no run with a checkpoint: train one"):
        ModelLibrary(runs=tmp_path)
    with pytest.raises(UserError, match="is not a run"):
        ModelLibrary(run=tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        ModelLibrary(run=make_run(tmp_path / "begun"))
    with pytest.raises(UserError, match="--vae there: the model is of pixels"):
        ModelLibrary(run=make_run(tmp_path / "done", 5), vae="there")


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"run": Path("a"), "runs": Path("b")}, "--run and --runs are mutually exclusive"),
        ({"port": 0}, r"--port 0: must be in"),
        ({"vae": "somewhere"}, "name it by --run"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        demo.main(DemoConfig(**flags))


def test_without_gradio_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "inference.app.page", raising=False)
    monkeypatch.delattr(inference.app, "page", raising=False)
    with pytest.raises(UserError, match=r"pip install --group demo"):
        demo.import_page(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_loading_leaves_nothing_behind(number, monkeypatch, tmp_path):
    def load(_):
        tempfile.mkdtemp()
        signal.raise_signal(number)

    def end(code):
        assert not list(tmp_path.iterdir())
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "import_page", load)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(number, lambda *_: None)
    try:
        with pytest.raises(SystemExit, match=str(128 + number)):
            demo.main(DemoConfig())
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
