"""NaN and infinity never become an image: each command refuses them, and names sample and step."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import averaging
import jax
import numpy as np
import pytest
from generate_cases import command, digits  # noqa: F401
from latents_cases import ENCODING, moments
from tiny_models import CLASSES, tiny_model, weights

import export
from data import latents
from data.latents import LatentDataset, MomentSums
from data.load import open_dataset
from evaluation.features import FeatureBatch, summarize_features
from export import ExportConfig
from inference import grids, latent_check, latent_writer
from inference.codec import Codec
from inference.grids import NotFiniteError
from inference.sampler import Samples
from inference.trained_model import TrainedModel
from pretrained.autoencoder import PretrainedAutoencoder
from runtime import parallel
from runtime.errors import UserError
from training.autoencoder.trainer import VaeTrainer
from training.session import RunSession
from training.tracking import NullTracker, Throughput

BROKEN = replace(
    tiny_model(), load=lambda: (7, jax.tree.map(lambda p: p * np.float32("nan"), weights(CLASSES)))
)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("steps", [(), (3,)])
def test_the_first_bad_image_is_named(number, steps):
    x = np.zeros((*steps, 5, 2, 2, 1), np.float32)
    assert grids.to_uint8(x).shape == x.shape
    x[..., 3, 1, 1, 0] = number
    x[..., 4, 0, 0, 0] = number
    with pytest.raises(NotFiniteError, match=r"^sample 13 \(counted from 0\) .* in 2 of 5 images"):
        grids.to_uint8(x, first=10)


def test_a_single_image_is_checked_too():
    with pytest.raises(NotFiniteError, match=r"reconstruction 0 .* in 1 of 1"):
        grids.to_uint8(np.full((2, 2, 3), np.nan, np.float32), kind="reconstruction")


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out, flags",
    [
        ("a.png", {}),
        ("a.npz", {}),
        ("folder", {}),
        ("a.png", {"trajectory": "a.gif"}),
        ("a.png", {"cfg_sweep": (1.0, 2.0), "n": 2}),
        ("a.png", {"denoise": (0.5,), "n": 2}),
    ],
)
def test_weights_that_are_not_finite_give_no_files(command, tmp_path, out, flags):
    flags = {k: tmp_path / v if isinstance(v, str) else v for k, v in flags.items()}
    message = "^digits, step 7: sample 0 .* its weights are not finite either: use another check"
    with pytest.raises(UserError, match=message):
        command(BROKEN, out=tmp_path / out, **{"n": 3} | flags)
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".png", ".gif", ".npy")]
    assert not (tmp_path / "a.npz").exists()


def test_a_bad_sample_of_sound_weights_is_counted_over_all_batches(
    command, digits, tmp_path, monkeypatch
):
    def sample(_, labels, plan, *, first_index, batch_size, **__):
        x = np.zeros((batch_size, 8, 8, 1), np.float32)
        x[np.arange(first_index, first_index + batch_size) == 9] = np.inf
        return Samples(x, None, None)

    monkeypatch.setattr(TrainedModel, "sample", sample)
    message = "sample 9 .* in 1 of 4 images; its weights are finite: lower --cfg_scale"
    with pytest.raises(UserError, match=message):
        command(digits, out=tmp_path / "a.npz", n=16, batch_size=4)
    assert len(list((tmp_path / "a.npz.parts").glob("*.npy"))) == 2  # what came before is kept


def test_weights_that_are_not_finite_are_not_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: BROKEN)
    with pytest.raises(UserError, match=r"the weights of step 7 of run hold NaN or infinity"):
        export.main(ExportConfig(run=Path("run"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite_are_no_score():
    batch = FeatureBatch(np.full((4, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="features of the images are not finite"):
        summarize_features([batch], 4, n_features=2, keep_logits=False)


# --- training -------------------------------------------------------------------------------------


class Messages(NullTracker):
    """A tracker that keeps what a run reports."""

    def __init__(self):
        self.lines: list[str] = []
        self.logged: list[int] = []

    def message(self, text):
        self.lines.append(text)

    def log(self, step, metrics):
        self.logged.append(step)


def test_a_run_reports_the_step_and_draws_no_black_grid(tmp_path):
    x = np.full((4, 8, 8, 1), np.nan, np.float32)
    run: Any = SimpleNamespace(
        run_dir=tmp_path,
        GRID_FOLDER="samples",
        step=15,
        image_grids=lambda **_: [grids.image_grid(grids.to_uint8(x))],
        measure=lambda _: {"fid_4": float(grids.to_uint8(x).mean())},
    )
    checkpoints: Any = None
    tracker = Messages()
    session = RunSession(run, 15, tracker, checkpoints, Throughput())
    session.save_image_grid("0000015.png")
    stop: Any = None
    session.measure(stop)
    assert not list(tmp_path.iterdir()) and not tracker.logged
    assert tracker.lines[0].startswith("step 15: samples/0000015.png is not saved: sample 0 ")
    assert tracker.lines[1].startswith("step 15 is not measured: sample 0 ")
    assert session.not_finite == tracker.lines[0]
    x[:] = 0
    session.save_image_grid("0000015.png")
    assert not session.not_finite and (tmp_path / "samples/0000015.png").exists()


def test_an_autoencoder_without_a_scale_is_not_exported():
    trainer: Any = SimpleNamespace(latent_statistics=lambda: (0.0, np.nan), step=3)
    with pytest.raises(UserError, match="step 3 is not exported: its latents are not finite"):
        VaeTrainer.export(trainer)


# --- latents --------------------------------------------------------------------------------------


def broken_codec(part: str, number: float = np.nan) -> Codec:
    """A VAE of which one layer is not finite."""
    tree = averaging.params()
    tree[part]["conv_out"]["bias"][:] = number
    vae = PretrainedAutoencoder(
        config=averaging.config(), params=tree, id="vae", hash="", revision=None
    )
    return Codec(vae, parallel.make_mesh())


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_vae_that_encodes_to_nan_ends_the_conversion_with_the_row(number):
    split, codec = open_dataset("digits").train, broken_codec("encoder", number)
    batches = latent_writer.encode_split(
        split, [np.arange(8)], codec, mirrored=False, batch_size=8, n_workers=0
    )
    row = split.rows[0]
    with pytest.raises(UserError, match=rf"the VAE vae encodes row {row} of split 'train' to num"):
        list(batches)


def test_latents_that_are_not_finite_are_not_verified(tmp_path):
    x = np.zeros((8, 4, 4, 2), np.float32)
    with pytest.raises(UserError, match=r"decoded by vae: image 0 .* is not finite"):
        latent_check.decode_to_uint8(tmp_path, broken_codec("decoder"), x)
    x[3] = np.nan
    with pytest.raises(UserError, match=r"latents in '.*' are not finite"):
        latent_check.decode_to_uint8(tmp_path, broken_codec("decoder"), x)


def test_a_file_of_latents_that_are_not_finite_is_named(tmp_path):
    good, bad = moments(4), moments(4)
    bad[2, 0, 0, 0] = np.nan
    records = {
        tmp_path / f"{name}.parquet": {"sums": MomentSums.of_moments(rows, 2), "n_rows": 4}
        for name, rows in (("a", good), ("b", bad))
    }
    nan = (np.nan, np.nan)
    dataset = LatentDataset(ENCODING, nan, nan, {"train": 8}, {"train": 2}, {"train": []})
    problems = list(latents._find_wrong_statistics(dataset, records))
    assert problems == ["b.parquet holds latents that are not finite; make them again"]
