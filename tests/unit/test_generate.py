"""The command: files hold what they promise, also after an interruption; sheets compare what they
say; what cannot be is refused.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawables import CLASSES, DDPM, DIGITS, NOTHING, SIGMA, drawable
from generate_cases import (
    arrays,
    command,  # noqa: F401
    digits,  # noqa: F401
)
from PIL import Image, ImageSequence

import generate
from generate import GenerateConfig
from inference import comparisons, grids, sample_files
from inference import labels as inference_labels
from inference.sampler import StartFrom
from inference.trained_model import SamplingOverrides, TrainedModel
from pretrained import transformer
from runtime import run_folder
from runtime.errors import UserError


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)[..., None]


# --- where pictures go ----------------------------------------------------------------------------


def test_every_form_and_size_of_batch_holds_the_same_pictures(command, tmp_path, capsys):
    flags = {"labels": ("3", "7"), "n": 11, "seed": 5}
    command(out=tmp_path / "a.npz", **flags)
    pictures, labels = arrays(tmp_path / "a.npz")
    assert pictures.shape == (11, 8, 8, 1) and pictures.dtype == np.uint8
    assert labels == [3] * 6 + [7] * 5
    command(out=tmp_path / "b.npz", batch_size=8, **flags)
    command(out=tmp_path / "folder", batch_size=8, **flags)
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [file.name for file in files[5:7]] == ["000005_3.png", "000006_7.png"]
    for again in (arrays(tmp_path / "b.npz")[0], np.stack([grey(file) for file in files])):
        assert np.abs(again.astype(int) - pictures).max() <= 1
    command(out=tmp_path / "grid.png", **flags)
    grid = grids.image_grid(pictures, captions=[DIGITS[label] for label in labels])
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == np.asarray(grid)).all()
    card = json.loads((tmp_path / "folder/card.json").read_text())
    assert (card["count"], card["seed"], card["step"], card["cfg_scale"]) == (11, 5, 7, 2)
    assert card["labels"] == ["3", "7"] and card["sampler"]["n_steps"] == 3
    assert (
        f"11 pictures from step 7 of digits: {tmp_path / 'grid.png'}\n" in capsys.readouterr().out
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "b.npz", "folder", "grid.png"}


def test_the_way_there_is_shown_with_every_form(command, tmp_path, capsys):
    ways = {"trajectory": tmp_path / "way.gif", "x0": tmp_path / "seen.gif"}
    command(out=tmp_path / "folder", n=3, batch_size=8, **ways)
    for name, n_frames in (("way.gif", 4), ("seen.gif", 3)):
        with Image.open(tmp_path / name) as frames:
            assert len(list(ImageSequence.Iterator(frames))) == n_frames
    assert len(list((tmp_path / "folder").glob("*.png"))) == 3
    with pytest.raises(UserError, match="was begun with other settings: seed was 0, not 1"):
        command(out=tmp_path / "folder", n=3, seed=1, batch_size=8, trajectory=tmp_path / "1.gif")
    assert not (tmp_path / "1.gif").exists()


def test_seeds_are_pictures(command, tmp_path, capsys):
    command(out=tmp_path / "several.npz", seeds=(3, 17, 42), labels=("7",))
    several, labels = arrays(tmp_path / "several.npz")
    assert labels == [7, 7, 7]
    command(out=tmp_path / "one.npz", seed=17, n=1, labels=("7",))
    one, _ = arrays(tmp_path / "one.npz")
    assert np.abs(one[0].astype(int) - several[1]).max() <= 1
    assert (several[0] != several[1]).any()


def test_the_card_of_a_published_model_tells_which_it_is_and_how_it_is_told(monkeypatch):
    towers = {"text_towers": ["clip", "giant", "t5"], "text_revisions": [None] * 3, "full_width": 6}
    found = transformer.PretrainedTransformer(
        CLASSES, {}, drawable(**towers).settings, "someone/sd3", "a1b2"
    )
    monkeypatch.setattr(transformer, "load_transformer", lambda *_, **__: found)
    card = TrainedModel.from_pretrained("someone/sd3").card
    assert (card["run"], card["revision"], card["dtype"]) == ("someone/sd3", "a1b2", "float32")
    assert card["text_towers"] == ["clip", "giant", "t5"]
    without_t5 = TrainedModel.from_pretrained(
        "someone/sd3", text_encoders=("here/clip", "here/giant")
    )
    assert without_t5.card["text_towers"] == ["here/clip", "here/giant"]


def test_files_are_named_by_place_and_label():
    assert sample_files.sample_file_name(7, 50_000, "cat") == "000007_cat.png"
    assert sample_files.sample_file_name(7, 10_000_000, "") == "0000007.png"
    long = sample_files.sample_file_name(
        0, 1, "a cat: on/a sofa, from above, and another one beside it"
    )
    assert long == "000000_a-cat-on-a-sofa-from-above-and-another-o.png"


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["x.npz", "x"])
def test_what_was_drawn_is_not_drawn_again(out, tmp_path):
    rng = np.random.default_rng(0)
    pictures, calls = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8), []

    def draw(start):
        calls.append(start)
        if len(calls) == 3:
            raise MemoryError
        return pictures[start : start + 16]

    def to(folder, draw, card):
        path, labels = folder / out, np.arange(40)
        if path.suffix:
            return list(sample_files.write_npz(draw, range(0, 40, 16), path, labels, card))
        return list(
            sample_files.write_folder(draw, range(0, 40, 16), path, [*map(str, labels)], card)
        )

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
    with pytest.raises(MemoryError):
        to(twice, draw, {"seed": 1, "sampler": {"n_steps": 3}})
    (left,) = twice.iterdir()
    (left / f".000016_16.png.{2**22}.tmp").touch()  # of a process that was killed
    with pytest.raises(UserError, match=r"seed was 1, not 2; n_steps was 3, not 4; go on with"):
        to(twice, draw, {"seed": 2, "sampler": {"n_steps": 4}})
    with run_folder.exclusive_writer(left), pytest.raises(UserError, match="another process is writing"):
        to(twice, draw, {"seed": 1, "sampler": {"n_steps": 3}})
    to(twice, draw, {"seed": 1, "sampler": {"n_steps": 3}})
    assert calls == [0, 16, 32, 32]
    calls.append(0)
    to(once, draw, {"seed": 1, "sampler": {"n_steps": 3}})
    assert content(once) == content(twice) and len(content(once)) == (1 if "." in out else 41)


def test_a_folder_of_something_else_is_left_alone(command, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files, such as diary\.txt"):
        command(out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        command(out=tmp_path / "file")
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(UserError, match=r"x\.npz is a folder; name a file"):
        command(out=tmp_path / "x.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"diary.txt", "file", "x.npz"}


# --- sheets ---------------------------------------------------------------------------------------


@pytest.fixture
def tables(monkeypatch):
    """What sheets are made of, as it is drawn."""
    seen = []

    def table(pictures, **names):
        seen.append((pictures, names))
        return honest(pictures, **names)

    honest = grids.comparison_grid
    monkeypatch.setattr(grids, "comparison_grid", table)
    return seen


def test_a_row_of_a_sweep_is_what_its_scale_draws(command, tables, tmp_path, capsys):
    flags = {"labels": ("3", "7"), "n": 4, "seed": 5}
    how = {"interval": (0.4, 1.0), "guided_channels": 1}
    command(out=tmp_path / "sweep.png", cfg_sweep=(1.0, 2.0, 8.0), **flags, **how)
    ((rows, names),) = tables
    assert names == {"rows": ["cfg 1", "cfg 2", "cfg 8"], "columns": ["3", "3", "7", "7"]}
    for scale, row in zip((1.0, 2.0, 8.0), rows):
        out = tmp_path / f"{scale}.npz"
        command(out=out, cfg_scale=scale, **flags, **(how if scale > 1 else {}))
        assert np.abs(arrays(out)[0].astype(int) - row).max() <= 1
    assert (rows[0] != rows[2]).any()


@pytest.mark.parametrize("ddpm", [False, True])
def test_real_pictures_are_noised_and_drawn_from_there(command, digits, tables, tmp_path, ddpm):
    of = drawable(SIGMA, **DDPM) if ddpm else digits
    command(of, out=tmp_path / "a.png", denoise=(0.05, 1.0), labels=("3", "7"), n=4, seed=5)
    ((rows, names),) = tables
    t = ["0", "0.999"] if ddpm else ["0.05", "1"]
    drawn_from = [w for time in t for w in (f"noised, t = {time}", "drawn from it")]
    assert names == {"rows": ["real", *drawn_from], "columns": ["3", "3", "7", "7"]}
    split = comparisons.open_eval_split(of)
    real = split.decode(np.concatenate([np.flatnonzero(split.labels == i)[:2] for i in (3, 7)]))
    np.testing.assert_array_equal(rows[0], real)
    near, far = (np.abs(row.astype(int) - rows[0]).mean() for row in rows[[1, 3]])
    assert near < 10 < 50 < far
    how, asked = (
        of.plan(SamplingOverrides()),
        inference_labels.request_labels(of, ["3", "7"], 4, seed=5),
    )
    labels, told = asked.rows(0, 4)
    begin = StartFrom(real / np.float32(127.5) - 1, how.sampler.time_steps(1.0))
    plain = grids.to_uint8(of.sample(labels, how, **told | ({"begin": begin} if ddpm else {})).x)
    assert np.abs(rows[4].astype(int) - plain).max() <= 1


def test_pictures_of_a_sheet_come_from_all_over_the_data_or_are_refused(digits):
    real = comparisons.load_real_images(digits, [], 5)
    assert len(real.data) == len(real.labels) == 5 and -1 <= real.data.min() < real.data.max() <= 1
    untold = comparisons.load_real_images(drawable(NOTHING, conditioning="none"), [], 5)
    assert not np.asarray(untold.labels).any() and untold.names == ()
    with pytest.raises(UserError, match=r"300 pictures are wanted, and split 'test' has \d+ such"):
        comparisons.load_real_images(digits, [3], 300)
    with pytest.raises(UserError, match=r"needs the run's real pictures: .* there is no folder"):
        comparisons.load_real_images(drawable(data_dir="gone"), [], 5)
    with pytest.raises(UserError, match="no dataset of digits is known"):
        comparisons.load_real_images(drawable(dataset_name=None), [], 5)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"out": "grid.jpg"}, r"must end in \.png \(a grid\) or \.npz \(arrays\), or be a folder"),
        ({"trajectory": "way.mp4"}, r"must end in \.gif"),
        ({"x0": "seen.png"}, r"--x0 seen\.png: the name must end in \.gif"),
        ({"trajectory": "a.gif", "x0": "a.gif"}, "--trajectory and --x0 name the same file: a.gif"),
        ({"n": 0}, "--n 0: must be at least 1"),
        ({"out": "/nowhere/grid.png"}, "folder /nowhere does not exist"),
        ({"n": 401}, r"a grid shows at most 400 pictures, not 401: name a folder or an \.npz"),
        ({"n": 401, "out": "a.npz", "x0": "a.gif"}, "--trajectory and --x0 show at most 400"),
        ({"seeds": (1, 2), "seed": 3}, "--seeds has one for each picture; drop --seed"),
        ({"seeds": (1, 2), "n": 3}, "--seeds has one for each picture; drop --n"),
        ({"cfg_sweep": (1.0, 2.0), "cfg_scale": 2.0}, "--cfg_sweep makes a sheet .*; drop --cfg_s"),
        ({"cfg_sweep": (2.0,), "denoise": (0.5,)}, "--cfg_sweep makes a sheet .*; drop --denoise"),
        ({"cfg_sweep": (2.0,), "out": "a.npz"}, "--cfg_sweep makes a sheet, a .png"),
        ({"cfg_sweep": (1.0,)}, "--cfg_sweep 1: name a scale besides 1"),
        ({"denoise": (0.5, 1.5)}, "--denoise 1.5: a time must be above 0 and at most 1"),
        ({"denoise": (0.5,), "prompts": ("a",)}, "--denoise makes a sheet .*; drop --prompts"),
        ({"denoise": (0.5,), "n": 200}, "a sheet of 600 pictures is more than 400; lower --n"),
        ({"labels": ("3",), "prompts": ("three",)}, "--labels are of classes, and prompts"),
        ({}, "is not a run"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(tmp_path, fields, message):
    flags: dict[str, Any] = {n: Path(v) if isinstance(v, str) else v for n, v in fields.items()}
    with pytest.raises(UserError, match=message):
        generate.main(GenerateConfig(run=tmp_path, **flags))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"labels": ("eleven",)}, "unknown label 'eleven'"),
        ({"labels": ("3", "7", "1"), "n": 2}, "--n 2 is fewer than the labels or prompts"),
        ({"labels": ("3", "7"), "seeds": (1,)}, "--seeds has 1, which is fewer than the labels"),
        ({"seeds": (1, -1)}, "seed -1: must be in 0 …"),
        ({"prompts": ("a seven",)}, "trained without captions; choose classes by --labels"),
        ({"negative_prompt": ""}, "trained without captions; choose classes by --labels"),
        ({"negative_prompt": "", "cfg_scale": 1.0}, "--negative_prompt: without guidance"),
        ({"interval": (0.5,)}, "--interval takes two times"),
        ({"interval": (0.5, 0.7), "cfg_scale": 1.0}, "--interval: without guidance"),
        ({"solver": "ddim"}, "--solver ddim is not for a model trained by rectified flow"),
        ({"cfg_sweep": (1.0, 4.0), "of": NOTHING}, "cfg_scale 4.0: an unconditional model"),
        ({"shift": 3.0, "of": SIGMA}, "--shift 3 is for rectified flow"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_weights_are_loaded(command, fields, message):
    def load():
        raise AssertionError("weights are loaded")

    config = fields.pop("of", CLASSES)
    of = drawable(config, **(DDPM if config is SIGMA else {}))
    with pytest.raises(UserError, match=message):
        command(replace(of, load=load), **fields)
