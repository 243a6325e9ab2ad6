"""A run on latents is a run: its samples are images, it resumes bit for bit, and only with the
latents and the VAE that it began with.
"""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import averaging
import jax
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from commands import CONVERT, DIGITS_AT_16, SMALL
from faults_cases import Forks, assert_same_end, newest, wait_until
from hub_copies import make_copy
from PIL import Image
from tiny_text_encoders import save_clip
from train_cases import metrics

import datasets_config
import generate
from data import latents
from data.load import open_dataset
from generate import GenerateConfig
from inference import comparisons, sampler
from inference.sampler import SamplerConfig
from inference.spaces import space_of
from inference.trained_model import TrainedModel
from networks.autoencoder import AutoencoderConfig, init_autoencoder_params
from pretrained import autoencoder as pretrained
from runtime.errors import UserError
from train import Trainer
from training.config import TrainConfig
from training.resolve import require_same_space, with_dataset_and_latents

N_STEPS = 18
EVERY = ["--n_steps", N_STEPS, "--eval_save_steps", 6, "--sample_every_n", 100]
EVERY += ["--log_every", 5]
COMMON = [*SMALL[2:], *EVERY]  # but for the model
FLAGS = ["--model", "DiT-Nano/4", *COMMON]


@pytest.fixture(scope="module")
def whole(server, latent_digits, tmp_path_factory) -> tuple[Path, str]:
    """A run that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, out, err = server.run(*FLAGS, "--latents", latent_digits, "--run_dir", folder)
    assert status == 0, err
    return folder, out


def convert(forks: Forks, out: Path, *flags: Any) -> Path:
    words = ["--out", out, *flags]
    status, _, err = forks.run(*DIGITS_AT_16, *words, command=CONVERT)
    assert status == 0, err
    return out


def fails(forks: Forks, *flags: Any) -> str:
    """The one line that a run ends with."""
    status, out, err = forks.run(*flags)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# --- what a run shows -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_greeting_says_what_is_learnt(whole, vae):
    _, out = whole
    assert f"digits: 1437 training latents (16×16 images through {vae}) of 8×8×2, 10 cl" in out
    assert f"starting: {N_STEPS} steps of 8 images" in out


@pytest.mark.slow
def test_samples_are_images(whole):
    """As many grey pixels as the VAE makes, whatever the size of latents."""
    folder, _ = whole
    trainer = Trainer.from_run(folder)
    assert trainer.sample([3, "7"], n_steps=2).shape == (2, 16, 16, 1)
    states = trainer.sample([3, 7, 1], n_steps=2, trajectory=True)
    assert states.shape == (3, 3, 16, 16, 1)
    # The autoencoder's: each image is of blocks of 2 × 2 equal pixels.
    blocks = states.reshape(3, 3, 8, 2, 8, 2)
    assert np.ptp(blocks, axis=(3, 5)).max() < 1e-3

    undecoded = sampler.sample_images(
        trainer.state.ema,
        trainer.model_config,
        [3, 7, 1],
        sampler=SamplerConfig(n_steps=2),
        mesh=trainer.mesh,
        cfg_scale=trainer.config.cfg_scale,
    ).x
    assert undecoded.shape == (3, 8, 8, 2)
    z = undecoded / averaging.SCALE + averaging.SHIFT
    # Of what is not quite an average and half of it, the decoder takes the nearest that is.
    nearest = (z @ np.asarray(averaging.GAINS) / np.square(averaging.GAINS).sum())[..., None]
    np.testing.assert_allclose(states[-1][:, ::2, ::2], nearest, atol=2e-3)
    for name in ("final.png", "trajectory.gif"):
        with Image.open(folder / "samples" / name) as grid:
            colours = np.asarray(grid.convert("RGB")).astype(int)
            assert grid.width > 10 * 64 and (colours == colours[..., :1]).all()


@pytest.mark.slow
def test_the_run_knows_how_its_latents_were_made(whole, latent_digits):
    config = json.loads((whole[0] / "config.json").read_text())
    encoding = latents.read_latent_dataset(latent_digits).encoding
    assert datasets_config.LatentEncoding.from_record(config["dataset"]["encoding"]) == encoding
    assert config["dataset_name"] == "digits" and config["latents"] == str(latent_digits)
    assert config["model_config"]["channels"] == 2 and config["model_config"]["image_size"] == 8


@pytest.mark.slow
def test_a_profile_needs_no_vae(forks, whole, latent_digits, tmp_path):
    folder = tmp_path / "latents"
    shutil.copytree(latent_digits, folder)
    for file in [folder / "latents.json", *folder.glob("data/*")]:
        file.write_bytes(file.read_bytes().replace(b"/vae", b"/was"))  # of the same length
    flags = [*FLAGS, "--latents", folder, "--run_dir", tmp_path / "run"]
    status, out, err = forks.run(*flags, "--profile")
    assert status == 0, err
    assert "train" in out and not (tmp_path / "run/config.json").exists()
    assert "if the VAE has moved, name its new place by --vae" in fails(forks, *flags)


# --- however it is run, it is the same ------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(forks, whole, latent_digits, tmp_path):
    """Also where the latents are held otherwise than by the run that nobody disturbed: first in the
    device's memory, then nowhere.
    """
    folder = tmp_path / "run"
    held = ["--cache_on_device", "--latents", latent_digits]
    child = forks.start(*FLAGS, *held, "--run_dir", folder)
    wait_until(lambda: newest(folder))
    os.killpg(child, signal.SIGKILL)
    forks.end()
    assert 0 < (there := newest(folder)) < N_STEPS
    nowhere = ["--nocache_on_device", "--noin_memory", "--n_workers", 1]
    status, out, err = forks.run("--resume", "--run_dir", folder, *nowhere)
    assert status == 0 and f"resuming at step {there}:" in out, err
    assert_same_end(forks, folder, whole[0])


@pytest.mark.slow
def test_latents_are_streamed_too(forks, latent_digits, tmp_path):
    flags = [*FLAGS, "--streaming", "--latents", latent_digits]
    status, _, err = forks.run(*flags, "--run_dir", tmp_path / "run")
    assert status == 0, err
    assert newest(tmp_path / "run") == N_STEPS


@pytest.mark.slow
def test_latents_may_move(forks, whole, latent_digits, tmp_path):
    """And the VAE too: a run resumes with them where they are now."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole[0], folder)
    shutil.copytree(latent_digits, moved)
    vae = averaging.save(tmp_path / "vae")
    flags = ["--resume", "--run_dir", folder, "--latents", moved, "--vae", vae, "--n_steps", 20]
    status, out, err = forks.run(*flags)
    assert status == 0 and f"resuming at step {N_STEPS}: 20 steps" in out, err
    config = json.loads((folder / "config.json").read_text())
    assert (config["latents"], config["vae"]) == (str(moved), str(vae))


@pytest.mark.slow
def test_captions_of_latents_are_trained_on(forks, tmp_path):
    """From COCO's images to a sample of a caption."""
    pytest.importorskip("transformers")
    vae = averaging.save(tmp_path / "vae", channels=3)
    copy = make_copy("coco", tmp_path / "coco")
    flags = ["--dataset_name", "coco", "--data_dir", copy, "--image_size", 16, "--n_workers", 0]
    flags += ["--vae", vae, "--out", tmp_path / "latents"]
    status, _, err = forks.run(*flags, command=CONVERT)
    assert status == 0, err
    encoder, folder = save_clip(tmp_path / "encoder"), tmp_path / "run"
    flags = ["--model", "MMDiT-Nano/4", *COMMON, "--latents", tmp_path / "latents"]
    flags += ["--text_towers", encoder, "--caption_cache", tmp_path / "cache"]
    status, out, err = forks.run(*flags, "--run_dir", folder)
    assert status == 0, err
    assert re.search(r"coco: \d+ training latents .*8×8×6, captions, padded to", out)
    with Image.open(folder / "samples/final.png") as grid:
        assert min(grid.size) > 64


# --- only with what it began with -----------------------------------------------------------------


@pytest.mark.slow
def test_another_conversion_is_refused(forks, whole, latent_digits, vae, tmp_path):
    """Of another VAE, or of the same without mirrored views, though its numbers would fit."""
    folder = whole[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    weights = averaging.params()
    weights["post_quant"]["bias"][0] += 1e-3
    pretrained.save_autoencoder(tmp_path / "other", averaging.config(), weights)
    other = convert(forks, tmp_path / "latents", "--vae", tmp_path / "other", "--mirror")
    bare = convert(forks, tmp_path / "bare", "--vae", vae, "--nomirror")
    resume = ["--resume", "--run_dir", folder, "--latents"]
    assert "error: cannot resume: vae_hash of the latents was" in fails(forks, *resume, other)
    message = fails(forks, *resume, bare)
    assert message == "error: cannot resume: mirrored of the latents was True, not False\n"
    message = fails(forks, "--resume", "--run_dir", folder, "--vae", tmp_path / "other")
    assert "is not the one that the latents of digits were made with" in message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_may_change_of_latents_is_where_things_lie(latent_digits):
    encoding = latents.read_latent_dataset(latent_digits).encoding
    saved = json.loads(json.dumps({"dataset": {"encoding": vars(encoding)}}))
    require_same_space(space_of(replace(encoding, vae="elsewhere", source="moved")), saved)
    require_same_space(space_of(None), {"dataset": {"encoding": None}})
    others: list[dict[str, Any]] = [
        {"image_size": 32},
        {"shape": (8, 8, 4)},
        {"vae_hash": "0" * 64},
        {"scaling_factor": 0.5},
        {"shift_factor": 0.5},
        {"precision": "bfloat16"},
        {"mirrored": False},
        {"captions": True},
        {"dataset_name": "mnist"},
    ]
    for other in others:
        (name,) = other
        with pytest.raises(UserError, match=f"cannot resume: {name} of the latents was"):
            require_same_space(space_of(replace(encoding, **other)), saved)
    for now, before in ((None, saved), (encoding, {"dataset": {"encoding": None}})):
        with pytest.raises(UserError, match="cannot resume: "):
            require_same_space(space_of(now), before)


@pytest.mark.slow
def test_samples_are_decoded_by_the_vae_wherever_it_is(whole, vae, tmp_path, capsys):
    config = GenerateConfig(run=whole[0], labels=("3", "7"), n=4, n_steps=2, out=tmp_path / "a.npz")
    generate.main(config)
    moved = averaging.save(tmp_path / "moved")
    generate.main(replace(config, vae=str(moved), out=tmp_path / "b.npz"))
    gif = tmp_path / "trajectory.gif"
    generate.main(replace(config, trajectory=gif, out=tmp_path / "grid.png"))
    with np.load(tmp_path / "a.npz") as ours, np.load(tmp_path / "b.npz") as theirs:
        assert ours["arr_0"].shape == (4, 16, 16, 1) and ours["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])
        assert ours["arr_0"].std() > 1

    averaging.save(tmp_path / "rescaled")  # the run's own scale counts
    facts = json.loads((tmp_path / "rescaled/config.json").read_text())
    (tmp_path / "rescaled/config.json").write_text(json.dumps(facts | {"scaling_factor": 9.0}))
    generate.main(replace(config, vae=str(tmp_path / "rescaled"), out=tmp_path / "c.npz"))
    with np.load(tmp_path / "a.npz") as ours, np.load(tmp_path / "c.npz") as theirs:
        np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])

    weights = averaging.params()
    weights["post_quant"]["bias"][0] += 1e-3
    pretrained.save_autoencoder(tmp_path / "other", averaging.config(), weights)
    with pytest.raises(UserError, match="is not the one that the latents of digits were made with"):
        generate.main(replace(config, vae=str(tmp_path / "other")))


@pytest.mark.slow
def test_real_latents_are_decoded_to_images(whole, tmp_path, capsys):
    run = TrainedModel.from_run(whole[0])
    real = comparisons.load_real_images(run, [], 5)
    split = open_dataset("digits", image_size=16).eval
    images = split.decode(np.linspace(0, len(split) - 1, 5).astype(int))
    assert real.data.shape == (5, 8, 8, 2)
    means = averaging.decode_means(averaging.encode_means(images))
    np.testing.assert_allclose(run.space.to_images(real.data), means, atol=2e-2)
    config = GenerateConfig(
        run=whole[0], n=3, n_steps=2, denoise=(0.3, 1.0), out=tmp_path / "a.png"
    )
    generate.main(config)
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.height > 5 * 64


@pytest.mark.slow
def test_a_vae_that_is_gone_is_asked_for_by_name(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["dataset"]["encoding"]["vae"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="if the VAE has moved, name its new place by --vae"):
        generate.main(GenerateConfig(run=folder, n=1, out=tmp_path / "a.png"))


@pytest.mark.slow
def test_a_run_on_images_takes_no_vae(whole, vae, tmp_path):
    config = json.loads((whole[0] / "config.json").read_text())
    config["dataset"]["encoding"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--vae .*: the model is of pixels, not of lat"):
        generate.main(GenerateConfig(run=tmp_path, vae=str(vae), out=tmp_path / "a.png"))


@pytest.mark.slow
def test_imagenet_trains_on_its_latents(forks, tmp_path):
    """From images in the hub's schema."""
    random = AutoencoderConfig(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=1.0)
    pretrained.save_autoencoder(
        tmp_path / "vae", random, init_autoencoder_params(random, jax.random.key(0))
    )
    copy, folder = make_copy("imagenet", tmp_path / "data"), tmp_path / "latents"
    words = ["--dataset_name", "imagenet", "--data_dir", copy, "--vae", tmp_path / "vae"]
    words += ["--image_size", 16, "--out", folder]
    status, _, err = forks.run(*words, command=CONVERT)
    assert status == 0, err
    assert latents.read_latent_dataset(folder).encoding.mirrored
    flags = [*FLAGS, "--dataset_name", "imagenet", "--latents", folder]
    status, out, err = forks.run(*flags, "--run_dir", tmp_path / "run")
    assert status == 0 and "1000 classes" in out, err


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_imagenet_without_latents_says_how_to_make_them(forks, tmp_path):
    message = fails(forks, "--dataset_name", "imagenet", "--run_dir", tmp_path / "run")
    assert "'latents/imagenet' holds no finished latents: it has no latents.json; " in message
    assert message.endswith("python convert_imagenet.py makes them\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_cannot_be_said_of_latents_is_one_line(forks, latent_digits, tmp_path):
    run = ["--run_dir", tmp_path / "run", *FLAGS, "--latents", latent_digits]
    assert "--image_size 16: the latents in" in fails(forks, *run, "--image_size", 16)
    assert not (tmp_path / "run").exists()


def test_latents_name_their_data_set_and_a_data_set_its_latents(latent_digits):
    config = with_dataset_and_latents(TrainConfig(latents=latent_digits))
    assert (config.dataset_name, config.latents) == ("digits", latent_digits)
    assert with_dataset_and_latents(TrainConfig(dataset_name="imagenet")).latents == Path(
        "latents/imagenet"
    )
    assert with_dataset_and_latents(
        TrainConfig(dataset_name="imagenet", latents=Path("x"))
    ).latents == Path("x")
    assert with_dataset_and_latents(TrainConfig()).dataset_name == "digits"
    assert with_dataset_and_latents(TrainConfig()).latents is None
    assert with_dataset_and_latents(TrainConfig(dataset_name="folder:x")).latents is None


@pytest.mark.slow
def test_latents_can_be_learnt(forks, latent_digits, tmp_path):
    """The loss falls well below that of knowing nothing, which is 2: noise of variance 1 less data
    of about variance 1.
    """
    flags = [*FLAGS, "--latents", latent_digits, "--run_dir", tmp_path / "run"]
    for name, value in {"n_steps": 200, "eval_save_steps": 200, "batch_size": 64}.items():
        flags[flags.index(f"--{name}") + 1] = value
    status, _, err = forks.run(*flags)
    assert status == 0, err
    first, *_, last = metrics(tmp_path / "run")
    assert 1.6 < first["loss"] < 2.4 and last["eval_loss"] < 0.6 * first["loss"]
