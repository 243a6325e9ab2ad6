"""The command: files hold the samples, also after an interruption; comparison grids compare what
their names say; flags that cannot work are refused.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generate_cases import (
    arrays,
    command,  # noqa: F401
    digits,  # noqa: F401
)
from latents_cases import ENCODING
from PIL import Image, ImageSequence
from tiny_models import CLASSES, DDPM, DIGITS, SIGMA, UNCONDITIONAL, tiny_model

import generate
from data import bad_rows
from data.load import open_dataset
from data.rows import BadRow
from generate import GenerateConfig
from inference import comparisons, grids, sample_files
from inference.sampler import StartFrom
from inference.trained_model import SamplingOverrides, TrainedModel
from pretrained import transformer
from runtime import run_folder
from runtime.errors import UserError


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)[..., None]


# --- files of samples -----------------------------------------------------------------------------


def test_every_format_and_batch_size_holds_the_same_images(command, tmp_path, capsys):
    flags = {"labels": ("3", "7"), "n": 11, "seed": 5}
    command(out=tmp_path / "a.npz", **flags)
    images, labels = arrays(tmp_path / "a.npz")
    assert images.shape == (11, 8, 8, 1) and images.dtype == np.uint8
    assert labels == [3] * 6 + [7] * 5
    command(out=tmp_path / "b.npz", batch_size=8, **flags)
    command(out=tmp_path / "folder", batch_size=8, **flags)
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [file.name for file in files[5:7]] == ["000005_3.png", "000006_7.png"]
    for again in (arrays(tmp_path / "b.npz")[0], np.stack([grey(file) for file in files])):
        assert np.abs(again.astype(int) - images).max() <= 1
    command(out=tmp_path / "grid.png", **flags)
    grid = grids.image_grid(images, captions=[DIGITS[label] for label in labels])
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == np.asarray(grid)).all()
    card = json.loads((tmp_path / "folder/card.json").read_text())
    assert (card["count"], card["seed"], card["step"], card["cfg_scale"]) == (11, 5, 7, 2)
    assert card["labels"] == ["3", "7"] and card["sampler"]["n_steps"] == 3
    assert f"11 images from step 7 of digits: {tmp_path / 'grid.png'}\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "b.npz", "folder", "grid.png"}


def test_gifs_are_written_beside_a_folder(command, tmp_path, capsys):
    gifs = {"trajectory": tmp_path / "trajectory.gif", "x0": tmp_path / "x0.gif"}
    command(out=tmp_path / "folder", n=3, batch_size=8, **gifs)
    for name, n_frames in (("trajectory.gif", 4), ("x0.gif", 3)):
        with Image.open(tmp_path / name) as frames:
            assert len(list(ImageSequence.Iterator(frames))) == n_frames
    assert len(list((tmp_path / "folder").glob("*.png"))) == 3
    with pytest.raises(UserError, match="was begun with other settings: seed was 0, not 1"):
        command(out=tmp_path / "folder", n=3, seed=1, batch_size=8, trajectory=tmp_path / "1.gif")
    assert not (tmp_path / "1.gif").exists()


def test_each_seed_gives_one_image(command, tmp_path, capsys):
    command(out=tmp_path / "three.npz", seeds=(3, 17, 42), labels=("7",))
    all_images, labels = arrays(tmp_path / "three.npz")
    assert labels == [7, 7, 7]
    command(out=tmp_path / "one.npz", seed=17, n=1, labels=("7",))
    one, _ = arrays(tmp_path / "one.npz")
    assert np.abs(one[0].astype(int) - all_images[1]).max() <= 1
    assert (all_images[0] != all_images[1]).any()


def test_images_of_another_size_than_the_training_s(command, digits, tmp_path, capsys):
    command(out=tmp_path / "small.npz", n=2, size="4x8")
    assert not capsys.readouterr().err.count("warning")
    command(out=tmp_path / "wide.npz", n=2, size="4x12")
    warning = "warning: size 4x12: the model was trained on images of 8, and has seen no place"
    assert warning in capsys.readouterr().err
    shapes = [arrays(tmp_path / f"{name}.npz")[0].shape for name in ("small", "wide")]
    assert shapes == [(2, 4, 8, 1), (2, 4, 12, 1)]
    wide = digits.at_size("4x12")
    assert wide.card["image_size"] == "4x12" and "image_size" not in digits.at_size("8x8").card
    assert wide.at_size(8).model == digits.model
    with pytest.raises(UserError, match=r"--size 5x12: .* multiples of 4, as 4x12 or 8x12$"):
        command(n=2, size="5x12", out=tmp_path / "a.png")
    learned = tiny_model(replace(CLASSES, position="learned"))
    with pytest.raises(UserError, match="--size 4x12: the model's positions are learned, for"):
        command(learned, n=2, size="4x12", out=tmp_path / "a.png")


def test_the_latents_of_another_size_have_its_shape():
    encoding = asdict(replace(ENCODING, image_size="16x24", shape=(8, 12, 2)))
    config = replace(CLASSES, image_size="8x12", channels=2, out_channels=2)
    model = tiny_model(config, dataset={"encoding": encoding, "label_names": []})
    wide = model.at_size("16x32")
    assert (wide.model.image_shape, wide.image_size.written) == ((8, 16, 2), "16x32")
    assert wide.settings["dataset"]["encoding"]["shape"] == [8, 16, 2]
    with pytest.raises(UserError, match=r"--size 17x32: .* multiples of 8, as 16x32 or 24x32$"):
        model.at_size("17x32")


def test_the_card_of_a_published_model_names_it_and_its_text_encoders(monkeypatch):
    encoders = {
        "text_towers": ["clip", "giant", "t5"],
        "text_revisions": [None] * 3,
        "full_width": 6,
    }
    published = transformer.PretrainedTransformer(
        CLASSES, {}, tiny_model(**encoders).settings, "someone/sd3", "a1b2"
    )
    monkeypatch.setattr(transformer, "load_transformer", lambda *_, **__: published)
    card = TrainedModel.from_pretrained("someone/sd3").card
    assert (card["run"], card["revision"], card["dtype"]) == ("someone/sd3", "a1b2", "float32")
    assert card["text_towers"] == ["clip", "giant", "t5"]
    without_t5 = TrainedModel.from_pretrained(
        "someone/sd3", text_encoders=("here/clip", "here/giant")
    )
    assert without_t5.card["text_towers"] == ["here/clip", "here/giant"]


def test_files_are_named_by_index_and_label():
    assert sample_files.sample_file_name(7, 50_000, "cat") == "000007_cat.png"
    assert sample_files.sample_file_name(7, 10_000_000, "") == "0000007.png"
    long = sample_files.sample_file_name(
        0, 1, "a cat: on/a sofa, from above, and another one beside it"
    )
    assert long == "000000_a-cat-on-a-sofa-from-above-and-another-o.png"


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["x.npz", "x"])
def test_saved_batches_are_not_sampled_again(out, tmp_path):
    rng = np.random.default_rng(0)
    images, calls = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8), []

    def sample_at(start):
        calls.append(start)
        if len(calls) == 3:
            raise MemoryError
        return images[start : start + 16]

    def write(folder, sample_at, card):
        path, labels = folder / out, np.arange(40)
        if path.suffix:
            return list(sample_files.write_npz(sample_at, range(0, 40, 16), path, labels, card))
        return list(
            sample_files.write_folder(sample_at, range(0, 40, 16), path, [*map(str, labels)], card)
        )

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
    with pytest.raises(MemoryError):
        write(twice, sample_at, {"seed": 1, "sampler": {"n_steps": 3}})
    (left,) = twice.iterdir()
    (left / f".000016_16.png.{2**22}.tmp").touch()  # of a process that was killed
    with pytest.raises(UserError, match=r"seed was 1, not 2; n_steps was 3, not 4; resume with"):
        write(twice, sample_at, {"seed": 2, "sampler": {"n_steps": 4}})
    with (
        run_folder.exclusive_writer(left),
        pytest.raises(UserError, match="another process is writing"),
    ):
        write(twice, sample_at, {"seed": 1, "sampler": {"n_steps": 3}})
    write(twice, sample_at, {"seed": 1, "sampler": {"n_steps": 3}})
    assert calls == [0, 16, 32, 32]
    calls.append(0)
    write(once, sample_at, {"seed": 1, "sampler": {"n_steps": 3}})
    assert content(once) == content(twice) and len(content(once)) == (1 if "." in out else 41)


def test_a_folder_of_other_files_is_left_alone(command, tmp_path):
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


# --- comparison grids -----------------------------------------------------------------------------


@pytest.fixture
def grid_inputs(monkeypatch):
    """Record the inputs of each comparison grid."""
    inputs = []

    def recorded_grid(images, **names):
        inputs.append((images, names))
        return original(images, **names)

    original = grids.comparison_grid
    monkeypatch.setattr(grids, "comparison_grid", recorded_grid)
    return inputs


def test_a_row_of_a_sweep_is_sampled_at_its_scale(command, grid_inputs, tmp_path, capsys):
    flags = {"labels": ("3", "7"), "n": 4, "seed": 5}
    guidance = {"interval": (0.4, 1.0), "guided_channels": 1}
    command(out=tmp_path / "sweep.png", cfg_sweep=(1.0, 2.0, 8.0), **flags, **guidance)
    ((rows, names),) = grid_inputs
    assert names == {"rows": ["cfg 1", "cfg 2", "cfg 8"], "columns": ["3", "3", "7", "7"]}
    for scale, row in zip((1.0, 2.0, 8.0), rows):
        out = tmp_path / f"{scale}.npz"
        command(out=out, cfg_scale=scale, **flags, **(guidance if scale > 1 else {}))
        assert np.abs(arrays(out)[0].astype(int) - row).max() <= 1
    assert (rows[0] != rows[2]).any()


@pytest.mark.parametrize("ddpm", [False, True])
def test_real_images_are_noised_and_sampled_from_there(
    command, digits, grid_inputs, tmp_path, ddpm
):
    trained = tiny_model(SIGMA, **DDPM) if ddpm else digits
    command(trained, out=tmp_path / "a.png", denoise=(0.05, 1.0), labels=("3", "7"), n=4, seed=5)
    ((rows, names),) = grid_inputs
    t = ["0", "0.999"] if ddpm else ["0.05", "1"]
    sampled = [name for time in t for name in (f"noised, t = {time}", "sampled from it")]
    assert names == {"rows": ["real", *sampled], "columns": ["3", "3", "7", "7"]}
    split = comparisons.open_eval_split(trained)
    real = split.decode(np.concatenate([np.flatnonzero(split.labels == i)[:2] for i in (3, 7)]))
    np.testing.assert_array_equal(rows[0], real)
    near, far = (np.abs(row.astype(int) - rows[0]).mean() for row in rows[[1, 3]])
    assert near < 10 < 50 < far
    plan = trained.plan(SamplingOverrides())
    request = trained.conditioning.request(4, labels=["3", "7"], seed=5).rows(0, 4)
    start_from = StartFrom(real / np.float32(127.5) - 1, plan.sampler.time_steps(1.0))
    plain = trained.sample(
        request.labels,
        plan,
        seed=request.seed,
        first_index=request.first_index,
        start_from=start_from if ddpm else None,
    ).x
    assert np.abs(rows[4].astype(int) - grids.to_uint8(plain)).max() <= 1


def test_real_images_come_from_all_over_the_data_or_are_refused(digits):
    real = comparisons.load_real_images(digits, [], 5)
    assert len(real.data) == len(real.labels) == 5 and -1 <= real.data.min() < real.data.max() <= 1
    unlabeled = comparisons.load_real_images(tiny_model(UNCONDITIONAL, conditioning="none"), [], 5)
    assert not np.asarray(unlabeled.labels).any() and unlabeled.names == ()
    with pytest.raises(UserError, match=r"300 images are needed, and split 'test' has \d+ such"):
        comparisons.load_real_images(digits, [3], 300)
    with pytest.raises(UserError, match=r"needs the run's real images: .* there is no folder"):
        comparisons.load_real_images(tiny_model(data_dir="gone"), [], 5)
    with pytest.raises(UserError, match="the dataset of digits is not known"):
        comparisons.load_real_images(tiny_model(dataset_name=None), [], 5)


def test_real_images_are_not_those_that_the_run_left_out(tmp_path):
    source = open_dataset("digits")
    left_out = {"train": [], "eval": [BadRow(0, "", "the file is empty")]}
    bad_rows.write_record(tmp_path, bad_rows.leave_out(source, left_out))
    eval_split = comparisons.open_eval_split(tiny_model(run_dir=str(tmp_path)))
    assert eval_split.rows.tolist() == source.eval.rows[1:].tolist()
    other = comparisons.open_eval_split(tiny_model(run_dir=str(tmp_path / "none")))
    assert len(other) == len(source.eval)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"out": "grid.jpg"}, r"must end in \.png \(a grid\) or \.npz \(arrays\), or be a folder"),
        ({"trajectory": "trajectory.mp4"}, r"must end in \.gif"),
        ({"x0": "x0.png"}, r"--x0 x0\.png: the name must end in \.gif"),
        ({"trajectory": "a.gif", "x0": "a.gif"}, "--trajectory and --x0 name the same file: a.gif"),
        ({"n": 0}, "--n 0: must be at least 1"),
        ({"out": "/nowhere/grid.png"}, "folder /nowhere does not exist"),
        ({"n": 401}, r"a grid shows at most 400 images, not 401: name a folder or an \.npz"),
        ({"n": 401, "out": "a.npz", "x0": "a.gif"}, "--trajectory and --x0 show at most 400"),
        ({"seeds": (1, 2), "seed": 3}, "--seeds has one for each image; drop --seed"),
        ({"seeds": (1, 2), "n": 3}, "--seeds has one for each image; drop --n"),
        (
            {"cfg_sweep": (1.0, 2.0), "cfg_scale": 2.0},
            "--cfg_sweep makes a comparison grid, .*; drop --cfg_s",
        ),
        (
            {"cfg_sweep": (2.0,), "denoise": (0.5,)},
            "--cfg_sweep makes a comparison grid, .*; drop --denoise",
        ),
        ({"cfg_sweep": (2.0,), "out": "a.npz"}, "--cfg_sweep makes a comparison grid, a .png"),
        ({"cfg_sweep": (1.0,)}, "--cfg_sweep 1: name a scale besides 1"),
        ({"denoise": (0.5, 1.5)}, "--denoise 1.5: a time must be above 0 and at most 1"),
        (
            {"denoise": (0.5,), "prompts": ("a",)},
            "--denoise makes a comparison grid, .*; drop --prompts",
        ),
        ({"denoise": (0.5,), "n": 200}, "a grid of 600 images is more than 400; lower --n"),
        ({"labels": ("3",), "prompts": ("three",)}, "--labels are of classes, and prompts"),
        ({}, "is not a run"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_it_starts(tmp_path, fields, message):
    flags: dict[str, Any] = {n: Path(v) if isinstance(v, str) else v for n, v in fields.items()}
    with pytest.raises(UserError, match=message):
        generate.main(GenerateConfig(run=tmp_path, **flags))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"labels": ("eleven",)}, "unknown label 'eleven'"),
        ({"labels": ("3", "7", "1"), "n": 2}, "--n 2 is fewer than the 3 labels or prompts"),
        ({"labels": ("3", "7"), "seeds": (1,)}, "--seeds has 1, which is fewer than the 2 labels"),
        ({"seeds": (1, -1)}, "seed -1: must be in 0 …"),
        ({"prompts": ("a seven",)}, "trained without captions; choose classes by --labels"),
        ({"negative_prompt": ""}, "trained without captions; choose classes by --labels"),
        (
            {"negative_prompt": "", "cfg_scale": 1.0},
            "--negative_prompt: has no effect without guidance",
        ),
        ({"interval": (0.5,)}, "--interval takes two times"),
        ({"interval": (0.5, 0.7), "cfg_scale": 1.0}, "--interval: has no effect without guidance"),
        ({"solver": "ddim"}, "--solver ddim is not for a model trained by rectified flow"),
        (
            {"cfg_sweep": (1.0, 4.0), "model": UNCONDITIONAL},
            "cfg_scale 4.0: an unconditional model",
        ),
        ({"shift": 3.0, "model": SIGMA}, "--shift 3 is for rectified flow"),
        ({"time_grid": "sd3", "model": SIGMA}, "--time_grid sd3 is for rectified flow, not for"),
        (
            {"cfg_scale": 4.0, "label_dropout": 0.0},
            "cfg_scale 4: 'digits' was trained without label dropout",
        ),
        (
            {"cfg_sweep": (1.0, 4.0), "label_dropout": 0.0},
            "cfg_scale 4: 'digits' was trained without label dropout",
        ),
    ],
)
def test_flags_that_do_not_fit_the_run_are_refused_before_weights_are_loaded(
    command, fields, message
):
    def load():
        raise AssertionError("weights are loaded")

    config = fields.pop("model", CLASSES)
    dropout = {"label_dropout": fields.pop("label_dropout", 0.1)}
    trained = tiny_model(config, **dropout, **(DDPM if config is SIGMA else {}))
    with pytest.raises(UserError, match=message):
        command(replace(trained, load=load), **fields)
