"""Flags of the command; the same scores for the same images from every source; sets of images."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from caption_cache_cases import ENCODERS, REVISIONS, FakeEncoders, open_store
from evaluate_cases import (
    PIXELS,
    digits,  # noqa: F401
    evaluate_pixels,
    scores,
)
from PIL import Image
from tiny_models import CAPTIONS, tiny_model

import evaluate
from data import image_sets
from data.caption_cache import CaptionStore
from data.load import open_dataset
from evaluate import EvaluateConfig
from evaluation.comparison import Comparison
from evaluation.features import build_pixel_extractor
from evaluation.reference import read_reference
from evaluation.scores import report_scores
from inference import sample_files
from inference.sample_files import EvaluationSamplesConfig
from inference.sampler import Samples
from inference.trained_model import TrainedModel
from runtime import parallel, processes
from runtime.errors import UserError

rng = np.random.default_rng(0)
MAKE = {"npz": Path("a.npz"), "reference": None, "make_reference": Path("x.npz")}
REFERENCE = Path("r.npz").absolute()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "pass exactly one of --run, --pretrained, --images, --npz, .* not none"),
        ({"run": Path("a"), "npz": Path("b")}, "not --run and --npz"),
        ({"npz": Path("a"), "n": 5}, "--n needs --run or --pretrained"),
        ({"npz": Path("a"), "data_dir": Path("b")}, "--data_dir needs --dataset_name"),
        ({"npz": Path("a"), "image_size": 8}, "--image_size does not apply to --npz"),
        ({"run": Path("a"), "crop": "center"}, "--crop does not apply to --run"),
        ({"run": Path("a"), "reference": None}, "--make_reference FILE.npz"),
        ({"run": Path("a"), "n": 1}, "--n 1: must be at least 2"),
        ({"run": Path("a"), "n_features": 1}, "must be 0 or at least 2"),
        ({"run": Path("a"), "seed": -1}, "--seed -1: must be at least 0"),
        ({"npz": Path("a"), "split": "test"}, "--split needs --dataset_name"),
        ({"npz": Path("a"), "ema": False}, "--ema needs --run"),
        (MAKE | {"out": Path("x")}, "--out needs --reference"),
        (MAKE | {"make_reference": Path("a.npz")}, "--make_reference and --npz name the same file"),
        ({"run": Path("a"), "samples": REFERENCE}, "--samples and --reference name the same file"),
        (
            {"run": Path("a"), "samples": REFERENCE, "out": REFERENCE},
            "--samples and --out name the same",
        ),
        ({"run": Path("a"), "out": Path("/")}, "/ is a folder; name a file"),
        ({"run": Path("a"), "samples": Path("nowhere/x.npz")}, "folder nowhere does not exist"),
        ({"run": Path("a"), "samples": Path("x.zip")}, "must end in .npz"),
        ({"run": Path("a")}, "FID needs Inception's weights: pass --inception"),
        (
            {"run": Path("a"), "features": "pixels", "preparation": "adm"},
            "--preparation is for --features inception",
        ),
        ({"run": Path("a"), "encoder": "x"}, "--encoder is for --features dinov2"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_anything_is_read(fields, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(EvaluateConfig(**{"reference": Path("r.npz")} | fields))


def test_scores_are_printed_even_if_they_cannot_be_recorded(tmp_path, capsys):
    with pytest.raises(UserError, match="cannot write"):
        report_scores({"fid": 1.5}, {"pictures": {"count": 9}}, tmp_path, space="inception")
    assert "fid                  1.5\n" in capsys.readouterr().out


# --- the same images from every source ------------------------------------------------------------


@pytest.fixture(scope="module")
def some():
    return rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)


def test_folders_files_and_batch_sizes_give_the_same_scores(some, digits, tmp_path):
    np.savez_compressed(tmp_path / "some.npz", arr_0=some)
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i, image in enumerate(some):  # in order, though half of them are in a subfolder
        folder = tmp_path / "images" / ("more" if i >= 20 else "")
        Image.fromarray(image[..., 0]).save(folder / f"{i:02}.png")
    expected = scores(evaluate_pixels(tmp_path / "a", npz=tmp_path / "some.npz", reference=digits))
    assert expected.keys() == PIXELS
    one_by_one = {"npz": tmp_path / "some.npz", "batch_size": 1}
    for flags in (one_by_one, {"images": tmp_path / "images"}):
        found = scores(evaluate_pixels(tmp_path / "b", reference=digits, **flags))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_references_that_do_not_fit_are_refused(digits, some, tmp_path):
    np.savez(tmp_path / "wide.npz", arr_0=some.repeat(2, axis=2))
    with pytest.raises(UserError, match="has 64 features per image, and these images have 128"):
        evaluate_pixels(tmp_path / "a", npz=tmp_path / "wide.npz", reference=digits)
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="holds features 'inception', not 'pixels'"):
        evaluate_pixels(tmp_path / "a", npz=tmp_path / "wide.npz", reference=tmp_path / "fid.npz")
    with pytest.raises(UserError, match="unknown split 'tets'; did you mean 'test'"):
        evaluate_pixels(tmp_path / "a", dataset_name="digits", split="tets", reference=digits)


def test_an_npz_begun_on_other_devices_resumes(digits, tmp_path, monkeypatch):
    model, samples = tiny_model(), tmp_path / "x.npz"
    monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: model)
    begun = sample_files.open_image_set(
        model, EvaluationSamplesConfig(n=20, batch_size=7), samples=samples
    ).batches(7)
    first = next(begun)
    begun.close()  # type: ignore
    flags = {"run": Path("run"), "n": 20, "samples": samples, "reference": digits}
    with pytest.raises(UserError, match="batch_size was 7, not 8; resume with"):
        evaluate_pixels(tmp_path / "a", batch_size=8, **flags)
    evaluate_pixels(tmp_path / "a", **flags)
    with np.load(samples) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"][:7], first)


def test_without_features_those_of_the_images_in_a_reference_are_computed(some, tmp_path):
    statistics = {
        "mu": np.zeros(64),
        "sigma": np.eye(64),
        "mu_s": np.zeros(9),
        "sigma_s": np.eye(9),
    }
    np.savez(tmp_path / "adm.npz", arr_0=some, **statistics)
    real = read_reference(tmp_path / "adm.npz")
    extractor = build_pixel_extractor(parallel.make_mesh())
    pixels = some.reshape(40, 64) / 255
    chosen = []
    for seed in (0, 1):  # chooses the images
        features = Comparison(real, extractor, 16, n_features=10, seed=seed).reference_features
        assert features is not None and features.shape == (10, 64)
        assert all(np.abs(pixels - row[None]).max(1).min() < 1e-6 for row in features)
        chosen.append(features)
    assert (chosen[0] != chosen[1]).any()


# --- sets of images -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros(3)}, "holds x.npy, but no arr_0.npy"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"float64 \(2, 4, 4, 3\), not uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, r"\(2, 4, 4, 4\), not uint8"),
        ({"arr_0": np.array([print], object)}, r"object \(1,\), not uint8"),
    ],
)
def test_a_file_without_images_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        image_sets.image_set_from_npz(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"text")
    with pytest.raises(UserError, match=r"damaged or no \.npz file"):
        image_sets.image_set_from_npz(tmp_path / "x.npz")


def test_a_compressed_file_that_is_damaged_is_refused(some, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", arr_0=some)
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:40] + bytes([255]) * 40 + whole[80:])
    with pytest.raises(UserError, match=r"damaged or no \.npz file"):
        image_sets.image_set_from_npz(tmp_path / "x.npz")


def test_images_of_two_sizes_are_refused_unless_resized(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        image_sets.image_set_from_folder(tmp_path)
    for i, side in enumerate((8, 9)):
        Image.fromarray(rng.integers(0, 256, (8, side, 3)).astype(np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    with pytest.raises(UserError, match=r"1.png has 8 × 9 pixels .*0.png 8 × 8; --image_size"):
        list(image_sets.image_set_from_folder(tmp_path).batches(4))
    (batch,) = image_sets.image_set_from_folder(tmp_path, image_size=6).batches(4)
    assert batch.shape == (2, 6, 6, 3)
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2\.png: the image cannot be read"):
        list(image_sets.image_set_from_folder(tmp_path, image_size=6).batches(4))


def test_interrupted_sampling_resumes_with_the_same_settings_only(some, tmp_path):
    calls, labels, card = [], np.zeros(40, np.int32), {"seed": 1}

    def sample_batch(start):
        calls.append(start)
        return some[start : start + 16]

    starts, samples = range(0, 40, 16), tmp_path / "x.npz"
    begun = sample_files.write_npz(sample_batch, starts, samples, labels, card)
    for _ in range(2):
        next(begun)
    begun.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz.parts"]
    with pytest.raises(UserError, match="was begun with other settings"):
        list(sample_files.write_npz(sample_batch, starts, samples, labels, {"seed": 2}))
    parts = list(sample_files.write_npz(sample_batch, starts, samples, labels, card))
    assert calls == [0, 16, 32]
    np.testing.assert_array_equal(np.concatenate(parts), some)
    with np.load(samples) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], some)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


# --- sizes and counts that differ -----------------------------------------------------------------


def test_images_of_another_size_than_the_reference_are_reported(some, digits, tmp_path, capsys):
    """Pixels of all sizes above 16 shrink to 16, so that the features alone would fit."""
    for width in (32, 48):
        large = rng.integers(0, 256, (12, 32, width, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{width}.npz", arr_0=large)
    reference = tmp_path / "real.npz"
    evaluate.main(
        EvaluateConfig(npz=tmp_path / "32.npz", make_reference=reference, features="pixels")
    )
    for width, is_other in ((32, False), (48, True)):
        capsys.readouterr()
        record = evaluate_pixels(tmp_path / "a", npz=tmp_path / f"{width}.npz", reference=reference)
        printed = capsys.readouterr().out
        assert f"12 images of 32 × {width} pixels, RGB\n" in printed
        warning = "warning: these images have 32 × 48 pixels, those of the reference 32 × 32"
        assert (warning in printed) == is_other
        assert record["card"]["pictures"]["shape"] == [32, width, 3]
        assert record["card"]["reference"]["pictures"]["pictures"]["shape"] == [32, 32, 3]


def test_a_reference_of_cropped_images_is_none_of_a_model_of_whole_ones(tmp_path):
    """Of images of a folder that were not resized nothing is known."""
    for name in "ab":
        Image.new("L", (16, 8), 255).save(tmp_path / f"{name}.png")
    flags: dict[str, Any] = {"images": tmp_path, "features": "pixels"}
    by_name: dict[str, dict[str, Any]] = {
        "center": {"image_size": 8},
        "letterbox": {"image_size": 8, "crop": "letterbox"},
        "whole": {},
    }
    found = {}
    for name, options in by_name.items():
        path = tmp_path / f"{name}.npz"
        evaluate.main(EvaluateConfig(**flags, **options, make_reference=path))
        found[name] = read_reference(path)
    assert found["center"].pool.mean.min() == pytest.approx(1)
    assert found["letterbox"].pool.mean.mean() == pytest.approx(0.5)
    for crop in ("center", "random"):
        assert not found["center"].compare_crop(crop)
        message = "training are cropped, those of the reference shown whole, between black bars"
        assert message in found["letterbox"].compare_crop(crop)
    assert "make a reference with the --crop" in found["center"].compare_crop("letterbox")
    assert not found["letterbox"].compare_crop("letterbox")
    assert not found["whole"].compare_crop("letterbox")


def test_a_reference_with_fewer_features_than_images_is_reported(some, tmp_path, capsys):
    np.savez(tmp_path / "all.npz", arr_0=some)
    np.savez(tmp_path / "few.npz", arr_0=some[:20])
    flags = {"npz": tmp_path / "few.npz", "make_reference": tmp_path / "real.npz"}
    evaluate.main(EvaluateConfig(features="pixels", **flags))
    evaluate_pixels(tmp_path / "a", npz=tmp_path / "all.npz", reference=tmp_path / "real.npz")
    expected = "KID, precision and recall compare 40 images with 20 of the reference\n"
    assert expected in capsys.readouterr().out


# --- a model of captions --------------------------------------------------------------------------


def test_a_model_of_captions_is_sampled_with_those_of_its_evaluation_split(tmp_path, monkeypatch):
    """They are padded as in training and read batch by batch, from what training has encoded."""
    sampled = []

    def sample(_, labels, plan, *, first_index, batch_size, **__):
        sampled.append(labels)
        return Samples(np.zeros((batch_size, 8, 8, 1), np.float32), None, None)

    monkeypatch.setattr(TrainedModel, "sample", sample)
    monkeypatch.setattr(TrainedModel, "card", {})
    split = open_dataset("digits", conditioning="text", templates=("the digit {label}",)).eval
    captions = [texts[0] for texts in split.captions[:7]]
    encoders = FakeEncoders()
    open_store(tmp_path, captions, encoders)
    settings = {"text_towers": ENCODERS, "text_revisions": REVISIONS, "caption_cache": tmp_path}
    settings |= {"caption": ["the digit {label}"]}
    model = tiny_model(CAPTIONS, conditioning="text", **settings)
    images = sample_files.open_image_set(model, EvaluationSamplesConfig(n=7, batch_size=4))
    assert sum(map(len, images.batches(4))) == 7
    tokens = np.concatenate([labels.tokens for labels in sampled])
    assert tokens.shape == (8, 24, 6)
    for caption, shown in zip(captions, tokens):
        np.testing.assert_array_equal(shown[: len(caption)], encoders.embedding(caption).tokens)


def test_a_model_of_captions_without_its_dataset_names_the_way_out():
    settings = {"dataset_name": None, "text_towers": ENCODERS, "text_revisions": REVISIONS}
    model = tiny_model(CAPTIONS, conditioning="text", **settings)
    message = "needs those of its dataset, and the dataset of digits is not known; .* by --npz"
    with pytest.raises(UserError, match=message):
        sample_files.open_image_set(model, EvaluationSamplesConfig(n=7))


def test_processes_encode_captions_one_after_the_other(tmp_path, monkeypatch):
    """Text encoders fill a host's memory, and what the first one encodes the others find."""
    events, store = [], open_store(tmp_path, ["a cat"], FakeEncoders())

    @contextmanager
    def first_then_others():
        events.append("begin")
        yield
        events.append("end")

    def open_caption_store(*_, **__):
        events.append("encode")
        return store

    monkeypatch.setattr(processes, "first_then_others", first_then_others)
    monkeypatch.setattr(CaptionStore, "open", open_caption_store)
    settings = {"text_towers": ENCODERS, "text_revisions": REVISIONS, "caption_cache": tmp_path}
    tiny_model(CAPTIONS, conditioning="text", **settings).open_caption_store(["a cat"])
    assert events == ["begin", "encode", "end"]
