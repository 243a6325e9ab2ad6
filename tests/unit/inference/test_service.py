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

import pytest
from service_cases import (
    JOB,
    digits,  # noqa: F401
    sample,
)
from tiny_models import CLASSES

import demo
import inference.app
from demo import DemoConfig
from inference import sampler
from inference.app import service
from inference.app.service import ModelLibrary
from inference.trained_model import TrainedModel
from runtime.errors import UserError


def test_another_number_of_images_or_guidance_scale_compiles_no_new_program(digits):
    list(service.run_job(digits, replace(JOB, n_images=16)))
    before = sampler.sample_batch._cache_size()  # type: ignore
    for n in (5, 9, 17):
        images, _ = sample(digits, replace(JOB, n_images=n, cfg_scale=3.0, seed=n))
        assert len(images) == n
    assert sampler.sample_batch._cache_size() == before  # type: ignore


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
        ({"port": 0}, r"--port 0: must be between"),
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
