"""What visitors get: as many pictures as they ask for, within limits, by few programs."""

import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from drawables import CLASSES, DDPM, NOTHING, SHAPE, SIGMA, drawable

import demo
from data.batch import EncodedCaption
from demo import DemoConfig
from inference import grids, sampler
from inference.app import service
from inference.app.service import ModelLibrary, SampleJob
from inference.trained_model import TrainedModel
from model import model_config
from runtime.errors import UserError

ORDER = SampleJob(labels=("3", "7"), n=5, seed=5)


@pytest.fixture(scope="module")
def digits():
    return drawable()


def drawn(of, order):
    """All pictures as arrays, and what they are of."""
    found = [pair for pictures in service.run_job(of, order) for pair in pictures]
    return np.stack([np.asarray(picture) for picture, _ in found]), [name for _, name in found]


def test_visitors_get_what_generate_draws(digits):
    x, names = drawn(digits, replace(ORDER, n=20))
    assert names == ["3"] * 10 + ["7"] * 10 and x.shape == (20, 256, 256)
    how = digits.plan(ORDER.of(ORDER))
    straight = digits.sample([3] * 10 + [7] * 10, how, seed=5).x
    small = grids.to_uint8(straight)[..., 0].astype(int)
    assert np.abs(x[:, ::32, ::32] - small).max() <= 1
    assert (drawn(digits, replace(ORDER, n=20, seed=6))[0] != x).any()


def test_another_number_of_pictures_or_scale_is_no_new_program(digits):
    list(service.run_job(digits, replace(ORDER, n=16)))
    before = sampler.sample_batch._cache_size()  # type: ignore
    for n in (5, 9, 17):
        pictures, _ = drawn(digits, replace(ORDER, n=n, cfg_scale=3.0, seed=n))
        assert len(pictures) == n
    assert sampler.sample_batch._cache_size() == before  # type: ignore


def test_programs_are_dropped_before_there_are_many(digits, monkeypatch):
    monkeypatch.setattr(service, "MAX_COMPILED_PROGRAMS", 1)
    for low in (0.1, 0.2):
        list(service.run_job(digits, replace(ORDER, n=1, n_steps=1, interval=(low, 1.0))))
        assert sampler.sample_batch._cache_size() == 1  # type: ignore


def test_the_way_begins_with_noise_and_ends_with_the_pictures(digits):
    frames = service.sample_trajectory_frames(digits, ORDER)
    assert len(frames) == 4  # of three steps
    x, names = drawn(digits, ORDER)
    last = grids.image_grid(x[:, ::32, ::32, None], captions=names)
    assert np.abs(np.asarray(frames[-1]).astype(int) - np.asarray(last)).max() <= 1
    assert (np.asarray(frames[0]) != np.asarray(last)).any()
    assert (
        len(service.sample_trajectory_frames(digits, replace(ORDER, n_steps=60, n=64)))
        == service.MAX_FRAMES
    )


def test_a_table_fills_cell_by_cell_with_what_is_drawn_alone(digits):
    sheets = [np.asarray(s) for s in service.sample_comparison_grid(digits, ORDER, [1.0, 4.0], [2, 3])]
    assert len(sheets) == 4 and len({sheet.tobytes() for sheet in sheets}) == 4
    alone = {
        (scale, k): drawn(digits, replace(ORDER, n=1, cfg_scale=float(scale), n_steps=k))[0][0]
        for scale in (1, 4)
        for k in (2, 3)
    }
    cells = [[alone[scale, k][::32, ::32, None] for k in (2, 3)] for scale in (1, 4)]
    whole = grids.comparison_grid(
        np.array(cells), rows=["cfg 1", "cfg 4"], columns=["2 steps", "3 steps"]
    )
    assert np.abs(sheets[-1].astype(int) - np.asarray(whole)).max() <= 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"n": 0}, r"0 pictures: ask for 1 … 64"),
        ({"n": 65}, r"65 pictures: ask for 1 … 64"),
        ({"n_steps": 0}, r"0 steps: ask for 1 … 250"),
        ({"n_steps": 251}, r"251 steps: ask for 1 … 250"),
        ({"prompt": "a" * 301}, r"the prompt has 301 letters: at most 300"),
        ({"negative_prompt": "a" * 301}, r"the negative prompt has 301 letters"),
        ({"seed": -1}, r"seed -1: must be in"),
        ({"labels": ("ten",)}, r"unknown label 'ten'"),
        ({"interval": (0.8, 0.2)}, r"two times in 0 … 1"),
        ({"solver": "ddpm"}, r"not for a model trained by rectified flow"),
        ({"cfg_scale": float("inf")}, r"must be finite"),
    ],
)
def test_too_much_and_what_cannot_be_is_said(asked, said, digits):
    with pytest.raises(UserError, match=said):
        list(service.run_job(digits, replace(ORDER, **asked)))


def test_a_table_has_a_bound(digits):
    for scales, steps in (([1.0] * 7, [2] * 6), ([], [2])):
        with pytest.raises(UserError, match="a table of"):
            list(service.sample_comparison_grid(digits, ORDER, scales, steps))
    with pytest.raises(UserError, match="251 steps"):  # before anything is drawn
        next(service.sample_comparison_grid(digits, ORDER, [1.0], [2, 251]))


def test_no_guidance_has_no_interval_and_other_models_have_other_limits(digits):
    unlimited = replace(ORDER, cfg_scale=1.0, interval=(0.2, 0.8))
    assert service.plan_sampling(digits, unlimited).sampler.interval == (0, 1)
    assert service.max_steps(drawable(SIGMA, **DDPM)) == 1000
    nothing = drawable(NOTHING, cfg_scale=1.0)
    assert len(drawn(nothing, SampleJob(n=3))[0]) == 3
    with pytest.raises(UserError, match="unconditional"):
        list(service.run_job(nothing, SampleJob(n=3, cfg_scale=2.0)))


def test_prompts_are_for_models_of_captions(monkeypatch):
    told = {"text_length": 5, "text_width": 6, "pooled_width": 4}
    config = model_config("MMDiT-Nano/4", **SHAPE, out_channels=1, n_classes=0, **told)
    words = []

    def encode(_, captions):
        words.append(captions)
        n, rng = len(captions), np.random.default_rng(0)
        tokens = rng.normal(size=(n, 5, 6)).astype("f4")
        return EncodedCaption(tokens, np.ones((n, 5), bool), rng.normal(size=(n, 4)).astype("f4"))

    monkeypatch.setattr(TrainedModel, "encode_captions", encode)
    of = drawable(config, conditioning="text")
    x, names = drawn(of, SampleJob(prompt=" a seven ", n=2))
    assert names == ["a seven"] * 2 and words == [["a seven"]]
    away, _ = drawn(of, SampleJob(prompt="a seven", negative_prompt="a one", n=2))
    assert words[1:] == [["a seven", "a one"]] and (away != x).any()
    table = service.sample_comparison_grid(of, SampleJob(prompt="a seven", negative_prompt="a one"), [1.0, 2.0], [2])
    assert len(list(table)) == 2  # also where there is nothing to lead away
    with pytest.raises(UserError, match="write a prompt"):
        list(service.run_job(of, SampleJob(prompt=" ")))
    with pytest.raises(UserError, match="nothing leads away"):
        list(service.run_job(of, SampleJob(prompt="a", negative_prompt="b", cfg_scale=1.0)))
    # The published SD3 is told of no caption by an empty one, also where there is no guidance.
    published = drawable(config, conditioning="text", full_width=6)
    assert drawn(published, SampleJob(prompt="a seven", cfg_scale=1.0, n=2))[1] == ["a seven"] * 2
    assert words[-1] == ["a seven", ""]


# --- models ---------------------------------------------------------------------------------------


def save(folder: Path, *steps: int, time: int = 0, **more) -> Path:
    """A run as far as it is read before it is drawn from."""
    for step in steps:
        (folder / f"checkpoints/{step}").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    config = {"dataset_name": "digits", "model": "DiT-Nano/4", "model_config": asdict(CLASSES)}
    config |= {"dataset": {"encoding": None, "label_names": []}, "fsdp": 1} | more
    (folder / "config.json").write_text(json.dumps(config))
    os.utime(folder / "config.json", (time, time))
    return folder


def test_runs_with_a_checkpoint_are_found_the_last_begun_first(tmp_path):
    save(tmp_path / "old", 5, time=1)
    save(tmp_path / "new", 5, 10, time=2)
    save(tmp_path / "begun")
    save(tmp_path / "vae", 5, command="train_vae.py")
    (tmp_path / "other").mkdir()
    models = ModelLibrary(runs=tmp_path)
    assert models.names() == ["new", "old"]
    assert models.open("old").name == str(tmp_path / "old")
    assert models.keep("new") is models.open("new") is models.keep("new")
    assert models.open("old") is not models.open("old") and list(models.kept) == [("new", 10)]
    (tmp_path / "new/checkpoints/15").mkdir()
    assert models.open("new") is not models.kept["new", 10]  # there are newer weights
    with pytest.raises(UserError, match=r"unknown model '\.\./x'"):
        models.open("../x")


def test_weights_are_kept_under_the_step_that_was_looked_up(tmp_path, monkeypatch):
    save(tmp_path / "run", 10)
    models = ModelLibrary(runs=tmp_path)
    kept, steps = models.keep("run"), iter([10])
    monkeypatch.setattr(service, "newest_checkpoint_step", lambda _: next(steps, 15))  # one is saved meanwhile
    monkeypatch.setattr(ModelLibrary, "names", lambda _: ["run"])
    assert models.keep("run") is kept and list(models.kept) == [("run", 10)]
    assert models.keep("run") is not kept


def test_a_run_is_called_as_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(save(tmp_path / "run", 10))
    assert ModelLibrary(run=Path(".")).names() == ["run"]


def test_a_pretrained_model_is_opened_once(digits, monkeypatch):
    opened = []

    def from_pretrained(name, **where):
        opened.append((name, where))
        return digits

    monkeypatch.setattr(TrainedModel, "from_pretrained", from_pretrained)
    models = ModelLibrary(pretrained="someone/dit", vae="here")
    assert models.names() == ["someone/dit"] and models.folder("someone/dit") is None
    assert models.keep("someone/dit") is models.open("someone/dit") is digits
    assert opened == [("someone/dit", {"vae": "here", "text_encoders": ()})]


def test_no_model_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no run with a checkpoint: train one"):
        ModelLibrary(runs=tmp_path)
    with pytest.raises(UserError, match="is not a run"):
        ModelLibrary(run=tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        ModelLibrary(run=save(tmp_path / "begun"))
    with pytest.raises(UserError, match="--vae there: the model is of pictures"):
        ModelLibrary(run=save(tmp_path / "done", 5), vae="there")


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"run": Path("a"), "runs": Path("b")}, "--run and --runs both say"),
        ({"port": 0}, r"--port 0: must be in"),
        ({"vae": "somewhere"}, "name it by --run"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        demo.main(DemoConfig(**flags))


def test_where_gradio_is_missing_its_installation_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "page", raising=False)
    with pytest.raises(UserError, match=r"pip install --group demo"):
        demo.import_page(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_loads_leaves_nothing_behind(number, monkeypatch, tmp_path):
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
