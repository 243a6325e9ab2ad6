"""A run with buckets trains one set of weights on images of many proportions."""

import shutil
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest
from export_cases import SMALL
from hub_copies import image_file
from pipeline_cases import own_cache  # noqa: F401
from train_cases import assert_same

from convert_imagenet import ConvertConfig, convert
from data import latents
from data.image_buckets import open_buckets, read_sides
from data.load import open_dataset
from inference.codec import Codec
from inference.latent_check import check_latents_with_vae
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime import parallel
from runtime.errors import UserError
from train import Trainer

N_STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for i, size in enumerate([(8, 8)] * 20 + [(8, 12)] * 30 + [(12, 8)] * 14):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_file(rng, size=size))
    small = {"model": "DiT-Nano/4", "image_size": 16, "eval_split": "none", "n_steps": N_STEPS}
    return replace(SMALL, dataset_name=f"folder:{folder}", **small)


def train(trainer, stop):
    for batch in trainer.batches(trainer.position, stop):
        trainer.train_step(batch)
    return trainer


def test_it_resumes_in_the_middle_of_a_pass_bit_for_bit(config, tmp_path):
    config = replace(config, buckets=("3",))
    whole = train(Trainer(replace(config, run_dir=tmp_path / "whole")), N_STEPS)
    assert len({batch.image.shape for batch in whole.data.train_batches(0, N_STEPS)}) == 3
    assert np.isfinite(whole.evaluate()["eval_loss"])
    train(Trainer(replace(config, run_dir=tmp_path / "cut")), 3).save()
    # The shapes that were chosen are recorded; the same words name them again.
    for resumed in (
        Trainer.from_run(tmp_path / "cut"),
        Trainer(replace(config, run_dir=tmp_path / "cut", resume=True)),
        Trainer(
            replace(config, run_dir=tmp_path / "cut", resume=True, buckets=("20×12", "16", "12x20"))
        ),
    ):
        assert resumed.config.buckets == ("20x12", "16x16", "12x20")
    assert_same(train(resumed, N_STEPS).state, whole.state)
    with pytest.raises(UserError, match="cannot resume: buckets was"):
        Trainer(replace(config, run_dir=tmp_path / "cut", resume=True, buckets=("5",)))


def test_one_square_bucket_changes_nothing(config, tmp_path):
    runs = (
        train(Trainer(replace(config, buckets=buckets, run_dir=tmp_path / name)), 3)
        for name, buckets in (("plain", ()), ("one", ("1",)))
    )
    plain, one = runs
    assert_same(one.state, plain.state)
    assert one.evaluate() == plain.evaluate()


def test_what_buckets_are_not_for_is_refused(config, tmp_path):
    for changes, message in (
        ({"position": "learned"}, "--buckets is not for --position learned: its table has one"),
        ({"cache_on_device": True}, "--buckets is not for --cache_on_device"),
        ({"overfit_batch": True}, "--buckets is not for --overfit_batch"),
        ({"buckets": ("wide",)}, "--buckets wide: takes one number, such as 5, or several"),
        ({"buckets": ("8x10",)}, "--buckets 8x10: both sides must be multiples of 4"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(replace(config, **{"buckets": ("3",), "run_dir": tmp_path / "no"} | changes))


# --- latents --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(config):
    return open_dataset(config.dataset_name, image_size=16, channels=1, eval_split="none")


@pytest.fixture(scope="module")
def codec(vae):
    return Codec.open(str(vae), parallel.make_mesh(), dtype="float32")


@pytest.fixture(scope="module")
def folder(config, source, codec, tmp_path_factory):
    """Latents of the folder, at half its size, in three shapes."""
    folder = tmp_path_factory.mktemp("latents") / "mixed"
    flags = ConvertConfig(dataset_name=config.dataset_name, buckets=("24x12", "16", "12x24"))
    convert(replace(flags, n_workers=0, verify=2), source, codec, folder)
    return folder


def test_latents_of_several_shapes_are_those_of_their_images(source, codec, folder):
    shapes = latents.read_latent_dataset(folder).encoding.buckets
    assert shapes == ("24x12", "16x16", "12x24")
    opened = open_dataset(source.config.name, latents_dir=folder, eval_split="none")
    n_rows = len(source.train) + len(source.eval)
    assert len(opened.train) + len(opened.eval) == n_rows
    assert opened.buckets
    buckets = open_buckets(read_sides(source), opened.buckets["train"].shapes, batch_size=1)
    counts = np.array([np.bincount(b.ids, minlength=3) for b in buckets.values()])
    assert counts.sum(0).tolist() == [
        sum(latents.read_latent_dataset(folder / name).n_rows.values()) for name in shapes
    ]
    assert check_latents_with_vae(folder, codec.mesh).count("sound") == 4
    stored = datasets.load_dataset(str(folder), split="train")
    row: Any
    for row in stored.select([0, n_rows // 2, n_rows - 1]):
        moments = np.frombuffer(row["moments"], "<f2")
        assert moments.size == row["height"] * row["width"] * 2 * codec.config.latent_channels


def test_a_run_trains_on_latents_of_several_shapes(config, folder, vae, tmp_path):
    run = replace(
        config,
        dataset_name=None,
        latents=folder,
        image_size=None,
        patch_size=2,
        run_dir=tmp_path / "run",
    )
    trainer = train(Trainer(run), N_STEPS)
    assert trainer.config.buckets == ("24x12", "16x16", "12x24")
    seen = {batch.image.shape[1:3] for batch in trainer.data.train_batches(0, N_STEPS)}
    assert seen == {(12, 6), (8, 8), (6, 12)}
    trainer.save()
    trained = TrainedModel.from_run(tmp_path / "run").at_size("12x24")
    assert trained.sample([0, 1], trained.plan(SamplingOverrides())).x.shape == (2, 12, 24, 1)
    assert Trainer.from_run(tmp_path / "run").step == N_STEPS
    with pytest.raises(UserError, match=r"--buckets is for images; convert_imagenet\.py --buckets"):
        Trainer(replace(run, buckets=("3",), run_dir=tmp_path / "other"))


def test_buckets_of_unreadable_images_stop_no_others(codec, tmp_path, capsys):
    """Truncated: all training images of one shape, and all images to evaluate with of another."""
    album, folder, rng = tmp_path / "album", tmp_path / "latents", np.random.default_rng(1)
    tall, wide = ("test", (8, 12)), ("train", (24, 8))
    for split in ("train", "test"):
        for i, size in enumerate([(8, 8)] * 4 + [(8, 12)] * 3 + [(24, 8)] * 2):
            path = album / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = image_file(rng, size=size)
            path.write_bytes(
                content[: len(content) // 2] if (split, size) in (tall, wide) else content
            )
    source = open_dataset(f"folder:{album}", image_size=16, channels=1)
    flags = ConvertConfig(
        dataset_name=f"folder:{album}", buckets=("16", "24x12", "8x32"), n_workers=0, verify=2
    )
    written = convert(flags, source, codec, folder)
    warning = "bucket 8x32 is left out, with 2 images to evaluate with: none of its 2 training"
    assert warning in capsys.readouterr().err
    assert written.encoding.buckets == ("16x16", "24x12")
    assert written.n_rows == {"train": 7, "test": 4}
    assert {name: len(rows) for name, rows in written.skipped.items()} == {"train": 2, "test": 3}
    record = (folder / latents.INFO_FILE).read_bytes()
    assert convert(flags, source, codec, folder) == written
    assert (folder / latents.INFO_FILE).read_bytes() == record
    assert check_latents_with_vae(folder, codec.mesh).count("sound") == 3
    opened = open_dataset(source.config.name, latents_dir=folder)
    assert opened.buckets
    assert {name: b.sizes for name, b in opened.buckets.items()} == {
        "train": (4, 3),
        "eval": (4, 0),
    }
    with pytest.raises(UserError, match="holds latents in 16x16, 24x12, not in 24x12, 8x32, 16x16"):
        convert(replace(flags, buckets=("24x12", "8x32", "16")), source, codec, folder)
    for path in (album / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"no image of folder:.*album can be read"):
        convert(flags, source, codec, tmp_path / "none")


def test_a_damaged_bucket_or_another_conversion_is_refused(config, source, codec, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "12x24")
    with pytest.raises(UserError, match=r"copy/12x24' holds no finished latents"):
        latents.check_latents(copy)
    shutil.copytree(folder / "24x12", copy / "12x24")
    with pytest.raises(UserError, match="of another conversion"):
        latents.check_latents(copy)
    for buckets, message in (
        ((), "holds latents in 12x24, 16x16, 24x12, which is none of these buckets"),
        (("24x12", "16"), "holds latents in 12x24, which is none of these buckets"),
    ):
        flags = ConvertConfig(dataset_name=config.dataset_name, n_workers=0, buckets=buckets)
        with pytest.raises(UserError, match=message):
            convert(flags, source, codec, folder)
    flags = replace(flags, buckets=("24x12", "16", "12x24"))
    letterboxes = replace(source, config=replace(source.config, crop="letterbox"))
    with pytest.raises(UserError, match="was begun with crop center, not letterbox"):
        convert(flags, letterboxes, codec, folder)
    with pytest.raises(UserError, match=r"--crop letterbox: the latents in '.*' have crop center"):
        open_dataset(source.config.name, latents_dir=folder, crop="letterbox")
